"""All fusion heads in one table, and what tests feed them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.finetune.adapt.fit import Part, fit, logits_of
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.fusion.joint import Joint
from diptych.finetune.fusion.operators import Head, build_head
from diptych.finetune.tasks.task import Task, metric_value

from .labelled import xor_rows

D = 16
TWO = {"image": D, "text": D}
THREE = {"image": 9, "text": 7, "audio": 5}
TOKENS = {"image": 12, "text": 10}  # of audio the embedding is the only token
INPUTS = {"image": 8, "text": 6}
BINARY, CLASSES = Task("binary", ("0", "1")), Task("multiclass", ("a", "b", "c"))
TASKS = {1: BINARY, 3: CLASSES}
ALL: dict[str, dict[str, Any]] = {
    "image": {"op": "image"},
    "text with a hidden layer": {"op": "text", "width": 8},
    "similarity": {"op": "similarity"},
    "concat": {"op": "concat"},
    "concat linear": {"op": "concat", "width": 0},
    "concat with interactions": {"op": "concat", "interactions": True},
    "weighted_sum": {"op": "weighted_sum"},
    "weighted_sum equal": {"op": "weighted_sum", "weights": "equal"},
    "weighted_sum given": {"op": "weighted_sum", "weights": {"text": 0.3, "image": 0.7, "audio": 0.5}},
    "gated": {"op": "gated", "width": 8},
    "gated by modality": {"op": "gated", "width": 8, "gate": "modality"},
    "bilinear": {"op": "bilinear"},
    "bilinear of low rank": {"op": "bilinear", "rank": 4},
    "bilinear full": {"op": "bilinear", "rank": "full"},
    "merged": {"op": "merged", "width": 8, "heads": 2},
    "merged with one layer": {"op": "merged", "width": 8, "heads": 2, "layers": 1},
    "cross": {"op": "cross", "width": 8, "heads": 2},
    "cross with two layers": {"op": "cross", "width": 8, "heads": 2, "layers": 2},
    "bottleneck": {"op": "bottleneck", "width": 8, "heads": 2},
    "joint": {"op": "joint"},
    "late": {"op": "late"},
    "late learned": {"op": "late", "rule": "learned"},
    "late product": {"op": "late", "rule": "product"},
    "late vote": {"op": "late", "rule": "vote"},
    "late stacking": {"op": "late", "rule": "stacking"},
}
LATE = [name for name in ALL if name.startswith("late")]
SINGLES = ["image", "text with a hidden layer"]
CASES = [(name, 1, TWO) for name in ALL] + [(name, 3, THREE) for name in ALL if name != "similarity"]
"""Every head with one output on two modalities, and with three on three of different widths."""
IDS = [f"{name}, {outputs} of {len(widths)}" for name, outputs, widths in CASES]


def grow(head: Head, width: int = 8, **widths: int) -> None:
    """Give a joint head layers of some size; other heads have theirs."""
    for module in head.modules():
        if isinstance(module, Joint):
            shape = {"width": width, "heads": 2, "layers": 2, "hidden": 4 * width, "quick": 1}
            module.grow(shape, {k: w for k, w in widths.items() if k in module.modalities and k != "image"})


def new(name: str, outputs: int = 1, widths: dict[str, int] = TWO, seed: int = 0) -> Head:
    """A head as training begins with it."""
    torch.manual_seed(seed)
    head = build_head(HeadConfig(**ALL[name]), widths, outputs, TOKENS)
    grow(head, **(widths | INPUTS))
    return head


def make(name: str, outputs: int = 1, widths: dict[str, int] = TWO) -> Head:
    """A head in eval mode in which nothing hides behind zeros."""
    head = new(name, outputs, widths)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head.eval()


def inputs(n: int = 6, seed: int = 0, widths: dict[str, int] = TWO) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = {k: F.normalize(torch.randn(n, w, generator=random), dim=1) for k, w in widths.items()}
    made["image_tokens"] = torch.randn(n, 5, TOKENS["image"], generator=random)
    made["text_tokens"] = torch.randn(n, 4, TOKENS["text"], generator=random)
    made["image_inputs"] = torch.randn(n, 5, INPUTS["image"], generator=random)
    made["text_inputs"] = torch.randn(n, 4, INPUTS["text"], generator=random)
    made["text_mask"] = torch.arange(4) < torch.randint(1, 5, (n, 1), generator=random)
    made["group"] = torch.arange(n)
    return made


def all_there(n: int, widths: dict[str, int] = TWO) -> dict[str, Tensor]:
    return {k: torch.ones(n, dtype=torch.bool) for k in widths}


def parity(n: int, seed: int) -> Part:
    """``xor_rows`` with groups."""
    part = xor_rows(n, seed)
    assert isinstance(part.rows, FeatureRows)
    return Part(replace(part.rows, groups=torch.arange(n)), part.targets)


def evidence(n: int, seed: int, *, signal: dict[str, float], noise: float = 0.6, width: int = 8) -> Part:
    """A random class, told by each modality through the sign along one direction of the joint space,
    ``signal`` times as strongly; without signal a modality is noise. One more token is faint noise."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (n,), generator=random)
    direction = F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(7)), dim=0)
    tables: dict[str, Tensor] = {}
    for k, strength in signal.items():
        z = strength * (2.0 * targets[:, None] - 1) * direction
        tables[k] = F.normalize(z + noise * torch.randn(n, width, generator=random), dim=1)
        other = 0.3 * torch.randn(n, 1, width, generator=random)
        tables[f"{k}_tokens"] = torch.cat([tables[k][:, None] * width**0.5, other], dim=1)
    tables["text_mask"] = torch.ones(n, 2, dtype=torch.bool)
    return Part(FeatureRows(tables, {k: torch.arange(n) for k in signal}, torch.arange(n)), targets)


def learned(name: str, train: Part, inner: Part, **options: Any) -> Head:
    """A head trained on embeddings and tokens of width D, wide enough to learn something."""
    options_of = ALL[name] | ({"width": 32} if ALL[name].get("width") == 8 else {})
    if isinstance(options_of.get("weights"), dict):
        options_of = options_of | {"weights": (0.6, 0.4)}
    config = HeadConfig(**options_of)
    pace = {"lr": 4e-3, "epochs": 8} if config.reads_tokens else {"lr": 1e-2, "epochs": 12}
    adapt = AdaptConfig(**{"batch_size": 64, "weight_decay": 0.01} | pace | options)
    assert isinstance(train.rows, FeatureRows)
    widths = {k: int(train.rows.tables[k].shape[1]) for k in train.rows.index}
    tables = train.rows.tables
    tokens = {k: int(tables[f"{k}_tokens"].shape[2]) for k in widths if f"{k}_tokens" in tables}
    if config.reads_inputs:  # of these rows they are the tokens
        train, inner = _with_inputs(train), _with_inputs(inner)
    fitted = fit(
        config, adapt, StoppingConfig(), BINARY, train, inner,
        widths=widths, token_widths=tokens or None, seed=0,
        start=lambda head: grow(head, 32, **(widths | tokens)),
    )  # fmt: skip
    return fitted.head


def _with_inputs(part: Part) -> Part:
    assert isinstance(part.rows, FeatureRows)
    tables = part.rows.tables
    inputs = {k.replace("_tokens", "_inputs"): t for k, t in tables.items() if k.endswith("_tokens")}
    inputs["image_inputs"] = F.pad(inputs["image_inputs"], (0, 32 - inputs["image_inputs"].shape[2]))
    return Part(replace(part.rows, tables=tables | inputs), part.targets)


def accuracy(head: Head, test: Part) -> float:
    p = BINARY.probabilities(logits_of(head, (_with_inputs(test) if head.reads_inputs else test).rows))
    return metric_value("accuracy", test.targets.numpy(), p)
