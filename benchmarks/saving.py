"""How long training stands still for a checkpoint, written beside it and written at once.

    python benchmarks/saving.py [--quick] [--rounds N] [--folder DIR] [--results FILE]

A dual encoder of about 100 MB (ViT and text tower of width 320) with AdamW's moments and an average of the
weights, so that a checkpoint has about 400 MB. ``synchronous`` is a save that training waits for: tensors,
hashes, fsync, manifest, rename. ``beside`` is the stall of a save that a thread writes: the copy of the
state. ``torch`` is ``torch.save`` of the same tensors with an fsync, and no hash. ``_s`` are seconds of the
clock, ``_cpu_s`` of the processor (all of the process's for a synchronous save, the training thread's
beside one): the least of all rounds, since other work on the machine only adds to them. The first round,
which finds fresh memory, is left out. One thread.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rows import append_row, judge, machine

from diptych.pretrain.checkpoint import newest_step
from diptych.pretrain.ema import Ema
from diptych.pretrain.engine import keep_freed_memory
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver
from diptych.pretrain.state import TrainState


class Position:
    """A stream's place."""

    def state_dict(self) -> dict[str, int]:
        return {"step": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state


def make_state(width: int, layers: int) -> TrainState:
    torch.manual_seed(0)
    vision = {"layers": layers, "width": width, "head_width": 64, "patch_size": 16, "image_size": 64}
    text = {"context_length": 32, "width": width, "heads": width // 64, "layers": layers}
    clip = build_model(ModelConfig(embed_dim=width, vision_cfg=vision, text_cfg=text))
    root = ContrastiveModel(clip)
    optimizer = build_optimizer(root, OptimConfig())
    for parameter in clip.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    position: Any = Position()
    return TrainState(root, optimizer, position, Ema(clip, 0.99), None, torch.device("cpu"))


def stalls(run: Path, state: TrainState, rounds: int, *, asynchronous: bool) -> list[float]:
    """Least seconds that a save holds training, those of the processor in it, and until it is durable."""
    run.mkdir()
    saver = Saver(run, state, CheckpointConfig(asynchronous=asynchronous, keep=1))
    processor = time.thread_time if asynchronous else time.process_time
    rows: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        state.step += 1
        start, busy = time.perf_counter(), processor()
        saver.save()
        held, busy = time.perf_counter() - start, processor() - busy
        saver.wait()
        rows.append((held, busy, time.perf_counter() - start))
    newest = newest_step(run)
    assert newest is not None
    assert newest[0] == state.step
    return [min(column) for column in zip(*rows[1:], strict=True)]


def torch_save(file: Path, state: TrainState, rounds: int) -> float:
    assert state.ema is not None
    parts = [state.clip.state_dict(), state.ema.weights(), state.optimizer.state_dict()]
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        with file.open("wb") as opened:
            torch.save(parts, opened)
            opened.flush()
            os.fsync(opened.fileno())
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a model of 13 MB, one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", help="where checkpoints are written (default: the system's temporary folder)"
    )
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rounds = 1 if args.quick else args.rounds
    state = make_state(64, 1) if args.quick else make_state(320, 5)
    size = 4 * sum(p.numel() for p in state.clip.parameters())
    print(f"{machine()}; model of {size / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        at_once, at_once_cpu, _ = stalls(folder / "at_once", state, rounds, asynchronous=False)
        beside, beside_cpu, durable = stalls(folder / "beside", state, rounds, asynchronous=True)
        plain = torch_save(folder / "plain.pt", state, rounds)
    print(f"synchronous {at_once:.3f} s (processor {at_once_cpu:.3f} s)")
    print(f"beside {beside:.3f} s (processor {beside_cpu:.3f} s), durable after {durable:.3f} s")
    print(f"torch.save and fsync, without hashes {plain:.3f} s")
    judge("stall beside / synchronous", beside / at_once, 0.1, below=True)
    judge("the same in processor time", beside_cpu / at_once_cpu, None)
    judge("synchronous / torch.save", at_once / plain, None)
    figures = {
        "model_mb": round(size / 1e6, 1),
        "rounds": rounds,
        "synchronous_s": at_once,
        "synchronous_cpu_s": at_once_cpu,
        "beside_s": beside,
        "beside_cpu_s": beside_cpu,
        "durable_s": durable,
        "torch_save_s": plain,
        "stall_ratio": beside / at_once,
    }
    if not args.quick or args.results is not None:
        append_row("saving", figures, args.results)


if __name__ == "__main__":
    main()
