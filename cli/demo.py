"""``diptych demo``: the whole road on real pictures, one command after the other, and what came of it.

Each step is the command that a user would type, in a process of its own, and each goes on by itself where it
was stopped; so this command does too.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

EPILOG = """example:
  diptych demo
  diptych demo --quick
"""

PRETRAIN_RUN = "runs/demo-pretrain"
FINETUNE_RUN = "runs/demo-match"
QUICK_PRETRAIN_RUN = "runs/demo-quick-pretrain"
QUICK_FINETUNE_RUN = "runs/demo-quick-match"


@dataclass(frozen=True)
class Step:
    """One command of the demo, and what to say before it runs."""

    name: str
    about: str
    command: tuple[str, ...]
    module: str = "diptych.cli"


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="fetch icons, pretrain, evaluate, fine-tune and report, in a quarter of an hour on 2 cores",
        description="The whole road on real pictures. Stop it with Ctrl-C at any time; the same command goes "
        "on where it was. Results go to runs/, pictures to the cache (DIPTYCH_CACHE).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a minute of training: shows that it runs, scores stay near chance",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the steps, then print the lines that matter."""
    from .demo_summary import summary

    processes = _processes()
    steps = plan(quick=args.quick, processes=processes)
    begun = time.monotonic()
    seconds: dict[str, float] = {}
    for number, step in enumerate(steps, start=1):
        print(f"\n==> {number} of {len(steps)}: {step.about}\n    {_shown(step)}", flush=True)
        seconds[step.name] = _run(step)
    pretrained, tuned = _folders(args.quick)
    print(f"\n==> done in {(time.monotonic() - begun) / 60:.1f} minutes\n")
    for line in summary(Path(pretrained), Path(tuned), seconds, processes):
        print(line)
    return 0


def plan(*, quick: bool, processes: int) -> list[Step]:
    """The steps in their order."""
    pretrained, tuned = _folders(quick)
    recipe = str(_config("demo/pretrain.yaml"))
    heads = str(_config("demo/finetune_match.yaml"))
    launch = ("--nproc-per-node", str(processes), "-m", "diptych.pretrain", recipe)
    return [
        Step(
            "fetch", "icons of a dozen vendors, drawn and sorted (some 2 minutes)", ("data", "fetch", "icons")
        ),
        Step(
            "verify",
            "every picture and caption is what was written",
            ("data", "verify", "corpus:icons-demo/train"),
        ),
        Step(
            "pretrain",
            f"an image and a text tower, {processes} processes",
            (*launch, f"out={pretrained}", *(QUICK_PRETRAIN if quick else ())),
            module="diptych.pretrain.launch",
        ),
        Step(
            "evaluate",
            "retrieval, zero-shot and linear probe on vendors and words never trained on",
            ("evaluate", pretrained, *(QUICK_EVALUATE if quick else ("examples=8",))),
        ),
        Step(
            "finetune",
            "fusion heads: does this caption belong to this picture?",
            (
                "finetune",
                heads,
                f"model.checkpoint={pretrained}",
                f"out={tuned}",
                *(QUICK_FINETUNE if quick else ()),
            ),
        ),
        Step("report", "one page of all results", ("report", pretrained, tuned)),
    ]


# a run that takes a minute and goes through every piece
QUICK_PRETRAIN = ("train.epochs=null", "train.total_samples=16384")
QUICK_EVALUATE = ("galleries=[openmoji_no_people, test_word]", "probe.enabled=false", "bootstrap=200")
QUICK_FINETUNE = ("heads=[concat, late]", "adapt.epochs=2", "eval.seeds=[0]", "eval.bootstrap=200")


def _folders(quick: bool) -> tuple[str, str]:
    return (QUICK_PRETRAIN_RUN, QUICK_FINETUNE_RUN) if quick else (PRETRAIN_RUN, FINETUNE_RUN)


def _config(name: str) -> Path:
    """A recipe that ships with the package; written from here where that is shorter."""
    path = Path(str(files("diptych.configs").joinpath(name)))
    here = Path.cwd().resolve()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def _processes() -> int:
    """How many training processes: one for each GPU, else two that share the cores."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    gpus = int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    return gpus or min(2, os.cpu_count() or 1)


def _shown(step: Step) -> str:
    words = ["diptych"] if step.module == "diptych.cli" else ["torchrun", "--standalone"]
    return shlex.join([*words, *step.command])


def _run(step: Step) -> float:
    """Run one step to its end and return its seconds. UserError says how to go on if it fails."""
    from ..configs.errors import UserError

    begun = time.monotonic()
    code = _wait([sys.executable, "-m", step.module, *step.command])
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        how = (
            "was killed (out of memory?)"
            if code in (-signal.SIGKILL, 137)
            else f"ended with exit code {code}"
        )
        raise UserError(
            f"the demo's step '{step.name}' {how}; mend what it says above and give the same command again, "
            "finished steps are kept"
        )
    return time.monotonic() - begun


def _wait(command: Sequence[str]) -> int:
    """The exit code of a command. On Ctrl-C the terminal has told the command too, and it gets time to save;
    SIGTERM is passed on."""
    with subprocess.Popen(command) as process:
        old = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            return process.wait()
        except BaseException:
            try:
                process.wait(60)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, old)
