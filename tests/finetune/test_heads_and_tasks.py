"""Every fusion head with every task that it may answer: trained, saved, loaded, and without a modality."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diptych.configs.errors import UserError
from diptych.finetune.config import HeadConfig
from diptych.finetune.fusion.joint import start_joint
from diptych.finetune.fusion.operators import build_head, check_heads
from diptych.finetune.fusion.ordinal import Ordinal
from diptych.finetune.tasks.task import Task

from .heads import ALL
from .test_joint import VIT, features, loaded

WIDTHS, TOKENS = {"image": 8, "text": 8}, {"image": 6, "text": 5}
TASKS = {
    "multilabel": Task("multilabel", ("a", "b", "c")),
    "regression": Task("regression", ()),
    "ordinal": Task("ordinal", ("low", "mid", "high", "top")),
}
REFUSED = {("late vote", "regression"), ("late product", "regression"), ("late vote", "ordinal")}


def config(name: str) -> HeadConfig:
    return HeadConfig.model_validate(ALL[name], strict=False)


def batch(n: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(2)
    given = {k: torch.randn(n, w, generator=random) for k, w in WIDTHS.items()}
    given |= {f"{k}_tokens": torch.randn(n, 3, w, generator=random) for k, w in TOKENS.items()}
    given |= {"text_mask": torch.ones(n, 3, dtype=torch.bool), "group": torch.arange(n)}
    there = {k: torch.ones(n, dtype=torch.bool) for k in WIDTHS}
    there["text"][0] = there["image"][1] = False
    return given, there


def targets(task: Task, n: int) -> torch.Tensor:
    if task.type == "regression":
        return torch.linspace(-1, 1, n, dtype=torch.float64)
    if task.type == "multilabel":
        return torch.arange(3 * n).reshape(n, 3) % 2
    return torch.arange(n) % 4


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("name", [name for name in ALL if name != "joint"])
def test_every_head_trains_saves_and_answers_without_a_modality(name: str, kind: str) -> None:
    task = TASKS[kind]
    if (name, kind) in REFUSED:
        with pytest.raises(UserError, match=r"rule: (vote|product) is for tasks of classes"):
            check_heads({"x": config(name)}, WIDTHS, task.outputs, task.link)
        return
    if name == "similarity" and kind == "multilabel":
        return  # refused by the config
    given, there = batch(12)
    torch.manual_seed(0)
    head = build_head(config(name), WIDTHS, task.outputs, TOKENS, task.link)
    head.fit_standard(given, there)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2)
    for _ in range(2):
        losses = [
            task.loss(logits[rows], targets(task, 12)[rows])
            for logits, rows in head.parts(given, there)
            if bool(rows.any())
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    again = build_head(config(name), WIDTHS, task.outputs, TOKENS, task.link)
    again.load_state_dict(head.state_dict())
    with torch.no_grad():
        p = task.probabilities(head.eval()(given, there))
        assert np.array_equal(p, task.probabilities(again.eval()(given, there)))
    assert p.shape == (12, max(1, len(task.classes)))
    assert np.isfinite(p).all()
    if kind == "ordinal":
        assert np.allclose(p.sum(1), 1)


def test_an_ordinal_joint_head_brings_its_layers_from_a_file() -> None:
    model, task = loaded(VIT), TASKS["ordinal"]
    widths: dict[str, Any] = {"image": 24, "text": 24}
    head = build_head(config("joint"), widths, task.outputs, None, task.link)
    assert isinstance(head, Ordinal)
    assert head.reads_inputs
    start_joint(nn.ModuleList([head]), model)
    again = build_head(config("joint"), widths, task.outputs, None, task.link)
    again.load_state_dict(head.state_dict())
    given, _ = features(model)
    present = {k: torch.ones(5, dtype=torch.bool) for k in widths}
    assert torch.equal(again.eval()(given, present), head.eval()(given, present))
