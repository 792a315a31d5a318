"""``diptych pretrain``: train a dual encoder, or go on with a run that was stopped."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .unread import still_read

EPILOG = """example:
  diptych pretrain configs/demo/pretrain.yaml --dry-run
  diptych pretrain configs/demo/pretrain.yaml out=runs/first optim.lr=1e-3
  torchrun --standalone --nproc-per-node 2 -m diptych.pretrain configs/demo/pretrain.yaml
  accelerate launch --multi_gpu --num_processes 2 -m diptych.pretrain configs/demo/pretrain.yaml

The same command again goes on from the newest checkpoint. Ctrl-C saves one first, and so does SIGTERM, after
which the exit code is 0 and RUN/stopped.json is there; RUN/finished.json says that the run is complete."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a dual encoder on shards of image-text pairs",
        description="Train a dual encoder on shards of image-text pairs. Everything goes into the run folder "
        "(out, else runs/NAME): config.yaml, metrics.jsonl, checkpoints/, quarantine.jsonl, wandb/.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file, for instance configs/demo/pretrain.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, for instance optim.lr=1e-3"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, read one batch, print sizes, steps and estimates, train nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, and say where the results are."""
    from ..configs.early import signals_kept
    from ..configs.parent import LAUNCHER_ENDED, end_with_launcher

    end_with_launcher(LAUNCHER_ENDED)
    if args.print_config or args.dry_run:
        return _look(args)
    with signals_kept():
        return _train(args)


def _look(args: argparse.Namespace) -> int:
    """Say what a run would be."""
    from ..configs.load import load_config, to_yaml
    from ..pretrain.config import PretrainConfig

    config = load_config(PretrainConfig, args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    from ..pretrain.dry_run import dry_run

    for line in dry_run(config):
        print(line)
    return 0


def _train(args: argparse.Namespace) -> int:
    from ..configs.load import load_config
    from ..pretrain.config import PretrainConfig
    from ..pretrain.run import run_path
    from ..pretrain.stop import exit_code
    from ..pretrain.train import train

    config = load_config(PretrainConfig, args.config, args.overrides)
    if not any(word.startswith("out=") for word in args.overrides):
        _check_where(Path(args.config), run_path(config))
    with _Console() as console:
        outcome = train(config, console)
    if os.environ.get("RANK", "0") == "0":
        still_read("stdout", lambda: print(_end(outcome), flush=True))
    return exit_code(outcome.reason)


def _check_where(file: Path, out: Path) -> None:
    """What a run wrote says where it was then: moved, it would begin anew at the old place."""
    from ..configs.errors import UserError

    run = file.parent
    written = file.name == "config.yaml" and (run / "metrics.jsonl").exists()
    if written and (run / "checkpoints").is_dir() and out.resolve() != run.resolve():
        raise UserError(
            f"out: {file} is of the run in {run}, and says {out}; add out={run} to go on with that run, or "
            f"out={out} for one there"
        )


def _end(outcome: Any) -> str:
    """How it ended."""
    if not outcome.stopped:
        return f"trained {outcome.step} steps; next: diptych evaluate {outcome.folder}"
    if outcome.total_steps:
        return (
            f"stopped after step {outcome.step} of {outcome.total_steps}, which is saved; "
            "the same command goes on from there"
        )
    return f"stopped while it started; what was saved before (step {outcome.step}) is as it was"


class _Console:
    """Progress on standard error: a bar with the latest numbers on a terminal, a line a log elsewhere."""

    def __init__(self) -> None:
        self.total = 0
        self.bar: Any = None
        self.task: Any = None
        self.unread = False

    def __enter__(self) -> "_Console":
        return self

    def __exit__(self, *error: object) -> None:
        self._end_bar()

    def _end_bar(self) -> None:
        bar, self.bar = self.bar, None
        if bar is not None:
            still_read("stderr", bar.stop)

    def start(self, facts: dict[str, Any]) -> None:
        """Say what the run is and open the bar."""
        self._show(partial(self._start, facts))

    def row(self, row: dict[str, Any]) -> None:
        """Show a logged row."""
        self._show(partial(self._row, row))

    def _show(self, write: Callable[[], None]) -> None:
        if not self.unread and not still_read("stderr", write):
            self.unread = True
            self._end_bar()

    def _start(self, facts: dict[str, Any]) -> None:
        self.total = facts["total_steps"]
        processes = f"{facts['world_size']} process{'es' if facts['world_size'] > 1 else ''}"
        state = f"goes on after step {facts['step']}" if facts["step"] else "starts"
        print(
            f"{facts['run']} {state}: {facts['total_steps']} steps of {facts['global_batch_size']} samples, "
            f"{facts['parameters'] / 1e6:.1f} M parameters, {processes} on "
            f"{facts['device']} with {facts['threads']} thread{'s' if facts['threads'] > 1 else ''} each, "
            f"{facts['precision']}",
            *(f"data: {line}" for line in facts["data"]),
            *facts["notes"],
            sep="\n",
            file=sys.stderr,
        )
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("", total=self.total, completed=facts["step"])
            self.bar.start()

    def _row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            text = (
                f"loss {row['loss']:.3f}  lr {row['lr']:.2e}  {row['samples_per_s']:.0f} samples/s  "
                f"data wait {row['data_wait_fraction']:.0%}"
            )
            text += f"  MFU {row['mfu']:.0%}" if "mfu" in row else ""
            text += f"  {row['bad_samples']} damaged" if row["bad_samples"] else ""
            if self.bar is not None:
                self.bar.update(self.task, completed=row["step"], description=text)
                return
        elif row["kind"] == "guard":
            text = row["text"]
        elif row["kind"] == "checkpoint":
            if "warning" not in row:
                return
            text = f"warning: {row['warning']}"
        else:
            text = "held out: " + ", ".join(
                f"{name.removeprefix('val/')} {row[name]:.3f} (chance {row[name + '_chance']:.4f})"
                for name in row
                if name.endswith("R@5")
            )
        line = f"step {row['step']}/{self.total}  {text}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)
