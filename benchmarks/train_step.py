"""One training step beside open_clip's own: forward, loss, backward and AdamW, on real caption lengths.

    python benchmarks/train_step.py [--quick] [--models NAME ..] [--results FILE]

ViT-S/16-128 (both towers 256 wide, 6 layers; batch 64) and ViT-B/32 (batch 16). Captions have the lengths of
LAION alt-texts (caption_lengths.json), each batch drawn systematically, so that all have nearly its mean.
open_clip is its model, its loss and its optimizer as ``open_clip_train.main`` sets them up; ``exact`` is
Diptych's step, which gives the same parameters; ``masked`` leaves out half of the patches (FLIP, arXiv
2212.00794), which does not. Each contestant gets what its own loader makes and runs on one thread in an
interpreter of its own; one step of each makes a round, in drawn order. Seconds are processor time, figures
medians over rounds, ratios medians of the rounds' own. Memory is what a process grew by at its peak, weights
and optimizer state included, once its libraries are loaded. The roof is the time that the arithmetic of the
step takes at the rate of the best matrix product, measured in the same round.
"""

import argparse
import json
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from contestants import Contestant, resident
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict
from rows import append_row, judge, machine
from torch import Tensor

from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.engine import keep_freed_memory
from diptych.pretrain.flops import step_flops
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model, clamp_logit_scale
from diptych.pretrain.optim import OptimConfig, build_optimizer, clip_gradients
from diptych.pretrain.packing import pad_text
from diptych.pretrain.peaks import gemm_peak

HERE = Path(__file__).resolve().parent
KINDS = ("open_clip", "exact", "masked")
TARGETS = {"ViT-S/16-128": (2.5, 3.8), "ViT-B/32": (2.0, 3.5)}
MEMORY_TARGET, ROOF_TARGET = 0.6, 1.25
DROPOUT, STEPS_COMPARED = 0.5, 5
LR, BETAS, EPS, DECAY = 5e-4, (0.9, 0.98), 1e-6, 0.2  # open_clip_train's for ViTs
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6}
VISION = {"image_size": 128, "patch_size": 16, "width": 256, "head_width": 64, "layers": 6}
SMALL = {"layers": 2, "width": 64}
PARTS = {  # of the step's time, by the names of torch's operators
    "matrix products": r"(aten::(mm|addmm|bmm|baddbmm|_addmm_activation|linear|mkldnn_convolution)|mkldnn::)",
    "attention": r"aten::_scaled_dot_product|aten::_softmax|aten::_flash",
    "GELU": r"aten::gelu",
    "norms": r"aten::(native_)?layer_norm",
    "optimizer": r"aten::_fused_adamw|aten::_foreach|aten::(addcmul_|addcdiv_|lerp_|sqrt)|Optimizer",
    "copies and indexing": r"aten::(copy_|cat|clone|index|gather|scatter|fill_|zero_|embedding|split|sort)",
}
Step = Callable[[dict[str, Any]], Tensor]

MODELS: dict[str, tuple[dict[str, Any], int, int]] = {  # config, batch, batch of the comparison in fp64
    "ViT-S/16-128": ({"embed_dim": 256, "vision_cfg": VISION, "text_cfg": TEXT}, 64, 8),
    "ViT-B/32": (open_clip.get_model_config("ViT-B-32") or {}, 16, 4),
    "quick": (
        {
            "embed_dim": 64,
            "vision_cfg": VISION | SMALL | {"head_width": 32, "image_size": 64},
            "text_cfg": TEXT | SMALL | {"heads": 2},
        },
        16,
        4,
    ),
}


def caption_lengths(count: int, rng: np.random.Generator) -> Any:
    """Lengths in tokens, int64 [count], drawn systematically from the histogram, in drawn order."""
    counts = np.array(json.loads((HERE / "caption_lengths.json").read_text())["counts"], dtype=float)
    quantiles = (rng.permutation(count) + rng.random()) / count
    return 1 + np.searchsorted(np.cumsum(counts) / counts.sum(), quantiles, side="right")


def batch_of(name: str, size: int, number: int) -> dict[str, Any]:
    """Batch ``number`` of random pixels and captions: image uint8 [b, 3, S, S], token ids packed."""
    rng = np.random.default_rng(number)
    lengths = caption_lengths(size, rng)
    captions = [torch.from_numpy(rng.integers(1, 49405, int(n))) for n in lengths]
    for caption in captions:
        caption[0], caption[-1] = 49406, 49407
    side = MODELS[name][0]["vision_cfg"]["image_size"]
    image = torch.from_numpy(rng.integers(0, 256, (size, 3, side, side), dtype=np.uint8))
    return {
        "image": image,
        "token_ids": torch.cat(captions).int(),
        "seq_lens": torch.from_numpy(lengths).int(),
        "valid": torch.ones(size, dtype=torch.bool),
    }


def build_theirs(name: str) -> CLIP:
    """open_clip's model as ``open_clip_train.main`` builds it."""
    torch.manual_seed(0)
    return CLIP(**MODELS[name][0], output_dict=True)


def build_ours(name: str, dropout: float = 0.0) -> ContrastiveModel:
    torch.manual_seed(0)
    config = MODELS[name][0]
    vision = config["vision_cfg"] | ({"patch_dropout": dropout} if dropout else {})
    return ContrastiveModel(build_model(ModelConfig(**config | {"vision_cfg": vision})))


def their_optimizer(model: CLIP, lr: float = LR) -> torch.optim.AdamW:
    """open_clip_train's, with its default settings for ViTs."""
    named = list(model.named_parameters())

    def exclude(n: str, p: Tensor) -> bool:  # word for word from open_clip_train/main.py
        return p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n

    groups = [
        {"params": [p for n, p in named if exclude(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not exclude(n, p)], "weight_decay": DECAY},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS)


def their_step(model: CLIP, optimizer: torch.optim.Optimizer) -> Step:
    """The body of ``open_clip_train.train.train_one_epoch`` on one process in fp32."""
    loss_of = ClipLoss(cache_labels=True)
    model.train()

    def step(batch: dict[str, Any]) -> Tensor:
        optimizer.zero_grad()
        losses = loss_of(**model(batch["pixels"], batch["padded"]), output_dict=True)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss  # whose graph its loop, too, holds until the next step

    return step


def our_optimizer(model: ContrastiveModel) -> torch.optim.Optimizer:
    """Ours, with the same settings."""
    config = OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_grad_norm=None)
    return build_optimizer(model, config)


def our_step(model: ContrastiveModel, optimizer: torch.optim.Optimizer) -> Step:
    """The body of the loop in ``pretrain/train.py``, on one process in fp32."""
    model.train()

    def step(batch: dict[str, Any]) -> Tensor:
        loss = contrastive_loss(**model(batch), valid=batch["valid"])
        loss.backward()
        clip_gradients(model.parameters(), None)
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale(model)
        return loss.detach()  # train.py holds no graph until its next step

    return step


def their_batch(root: ContrastiveModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What open_clip's loader makes: normalised floats and padded token ids."""
    padded = pad_text(root.clip.text, batch["token_ids"], batch["seq_lens"])
    return {"pixels": root.pixels(batch["image"]), "padded": padded}


def contestant(kind: str, name: str) -> None:
    """Answer ``step NUMBER``, ``memory`` and ``profile`` with one line of JSON each."""
    torch.set_num_threads(1)
    size = MODELS[name][1]
    base = resident("VmRSS")
    if kind == "open_clip":
        model = build_theirs(name)
        root = build_ours("quick")  # for its normalisation and padding
        step = their_step(model, their_optimizer(model))
    else:
        keep_freed_memory()
        root = build_ours(name, DROPOUT if kind == "masked" else 0.0)
        step = our_step(root, our_optimizer(root))
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "step":
            batch = batch_of(name, size, int(rest[0]))
            batch = their_batch(root, batch) if kind == "open_clip" else batch
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step(batch)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            assert math.isfinite(loss.item())
            answer = {"cpu": cpu, "wall": wall}
        elif command == "memory":
            answer = {"MiB": resident("VmHWM") - base}
        else:
            batch = batch_of(name, size, 0)
            batch = their_batch(root, batch) if kind == "open_clip" else batch
            answer = profile(step, batch)
        print(json.dumps(answer), flush=True)


def profile(step: Step, batch: dict[str, Any]) -> dict[str, float]:
    """Shares of the step's processor time by kind of operator; ``rest`` is what no pattern names."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            step(batch)
    times = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if re.match(names, event.key)), "rest")
        times[part] += event.self_cpu_time_total
    total = sum(times.values())
    return {part: round(value / total, 4) for part, value in times.items()}


def difference(name: str) -> float:
    """Largest difference of any parameter after five steps in fp64, of the same model on the same batches."""
    size = MODELS[name][2]
    theirs = build_theirs(name).double()
    start = convert_to_custom_text_state_dict(theirs.state_dict())
    start = {key: value.clone() for key, value in start.items()}
    ours = build_ours(name).double()
    batches = [batch_of(name, size, number) for number in range(STEPS_COMPARED)]
    step = their_step(theirs, their_optimizer(theirs))
    for batch in batches:
        step(their_batch(ours, batch))
    ends = convert_to_custom_text_state_dict(theirs.state_dict())
    del theirs, step
    ours.clip.load_state_dict(start)
    del start
    step = our_step(ours, our_optimizer(ours))
    for batch in batches:
        step(batch)
    found = ours.clip.state_dict()
    assert found.keys() == ends.keys()
    return max(float((found[key] - value).abs().max()) for key, value in ends.items())


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Rounds of steps, each with the matrix product's rate; memory; profiles."""
    steps: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    peaks: list[float] = []
    order = random.Random(0)
    with ExitStack() as stack:
        running = [
            stack.enter_context(Contestant(kind, [__file__, "--contestant", kind, name])) for kind in KINDS
        ]
        for one in running:
            for number in (0, 1):
                one.ask("step", number)  # warm up
        for number in range(2, 2 + rounds):
            peaks.append(gemm_peak(timer=time.process_time))
            for one in order.sample(running, len(running)):
                steps[one.kind].append(one.ask("step", number) | {"flop": work(name, one.kind, number)})
            print(f"\r{name}: round {number - 1} of {rounds}   ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        memory = {one.kind: round(one.ask("memory")["MiB"]) for one in running}
        profiles = {one.kind: one.ask("profile") for one in running}
    return {"steps": steps, "peaks": peaks, "memory": memory, "profiles": profiles}


@cache
def shape(name: str) -> Any:
    """Our towers without weights."""
    with torch.device("meta"):
        config = MODELS[name][0]
        return CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def work(name: str, kind: str, number: int) -> float:
    """FLOP that this contestant computes for batch ``number``."""
    batch = batch_of(name, MODELS[name][1], number)
    dropout = DROPOUT if kind == "masked" else 0.0
    side, lengths = batch["image"].shape[-1], batch["seq_lens"]
    computed, dense = step_flops(shape(name), image_size=side, seq_lens=lengths, patch_dropout=dropout)
    return dense if kind == "open_clip" else computed


def figures(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of one model, without the comparison in fp64."""
    steps, peaks, size = measured["steps"], measured["peaks"], MODELS[name][1]

    def of(kind: str, key: str) -> list[float]:
        return [step[key] for step in steps[kind]]

    def ratio(kind: str, key: str) -> float:
        pairs = zip(of("open_clip", key), of(kind, key), strict=True)
        return round(statistics.median(theirs / ours for theirs, ours in pairs), 3)

    def roof(kind: str) -> float:
        triples = zip(of(kind, "cpu"), of(kind, "flop"), peaks, strict=True)
        return round(statistics.median(seconds * peak / flops for seconds, flops, peak in triples), 3)

    memory = measured["memory"]
    per_second = {
        clock: {kind: round(size / statistics.median(of(kind, clock)), 2) for kind in KINDS}
        for clock in ("cpu", "wall")
    }
    return {
        "model": name,
        "batch_size": size,
        "rounds": len(peaks),
        "speedup_exact": ratio("exact", "cpu"),
        "speedup_masked": ratio("masked", "cpu"),
        "speedup_exact_wall": ratio("exact", "wall"),
        "speedup_masked_wall": ratio("masked", "wall"),
        "memory_ratio": round(memory["exact"] / memory["open_clip"], 3),
        "roof_ratio": roof("exact"),
        "roof_ratio_masked": roof("masked"),
        "roof_ratio_open_clip": roof("open_clip"),
        "samples_per_cpu_second": per_second["cpu"],
        "samples_per_second": per_second["wall"],
        "memory_mib": memory,
        "gflop_per_sample": {k: round(statistics.median(of(k, "flop")) / size / 1e9, 3) for k in KINDS},
        "gemm_gflops": round(statistics.median(peaks) / 1e9, 1),
        "shares": measured["profiles"],
    }


def report(row: dict[str, Any]) -> None:
    """Print one model's figures."""
    name = row["model"]
    print(
        f"\n{name}, batch {row['batch_size']}: one thread, {row['gemm_gflops']} GFLOP/s in matrix products\n"
    )
    print("                      " + "".join(f"{kind:>11}" for kind in KINDS))
    for what, values in (
        ("samples / CPU second", row["samples_per_cpu_second"]),
        ("samples / second", row["samples_per_second"]),
        ("peak memory, MiB", row["memory_mib"]),
        ("GFLOP / sample", row["gflop_per_sample"]),
    ):
        print(f"{what:22}" + "".join(f"{values[kind]:11.5g}" for kind in KINDS))
    for part in row["shares"]["exact"]:
        print(f"{part:22}" + "".join(f"{row['shares'][kind][part]:11.1%}" for kind in KINDS))
    print()
    exact, masked = TARGETS.get(name, (None, None))
    judge("exact / open_clip, CPU", row["speedup_exact"], exact)
    judge("masked / open_clip, CPU", row["speedup_masked"], masked)
    judge("memory, exact / open_clip", row["memory_ratio"], MEMORY_TARGET, below=True)
    judge("exact / its roof", row["roof_ratio"], ROOF_TARGET, below=True)
    judge("open_clip / its roof", row["roof_ratio_open_clip"], None)
    print(
        f"largest difference of a parameter after {STEPS_COMPARED} fp64 steps: {row['difference_fp64']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--models", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="NAME")
    parser.add_argument("--rounds", type=int, help="rounds per model")
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/train_step.jsonl")
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant is not None:
        contestant(*options.contestant)
        return
    torch.set_num_threads(1)
    print(f"{machine()}")
    for name in ["quick"] if options.quick else options.models:
        rounds = options.rounds or {"quick": 2, "ViT-S/16-128": 11, "ViT-B/32": 7}[name]
        row = figures(name, measure(name, rounds))
        row["difference_fp64"] = difference(name)
        report(row)
        append_row("train_step", row, options.results)


if __name__ == "__main__":
    main()
