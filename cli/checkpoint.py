"""``diptych checkpoint``: what a run has saved, whether it is whole, and which may go."""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

LIST = """example:
  diptych checkpoint list runs/demo-pretrain"""
VERIFY = """example:
  diptych checkpoint verify runs/demo-pretrain

One checkpoint's folder may be given, too. Exit code 0: all are whole; 1: some are not, and each is named with
what is wrong."""
PRUNE = """example:
  diptych checkpoint prune runs/demo-pretrain --keep 1
  diptych checkpoint prune runs/demo-pretrain --keep 2 --keep-every 10000 --yes

Nothing is removed without --yes. The newest whole checkpoint always stays, and so do those that the run's own
checkpoint.keep_every_steps and checkpoint.keep_best keep. Works while the run trains."""


def add_parser(subparsers: Any) -> None:
    """Register the subcommand and its own."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="list, verify and prune the checkpoints of a run",
        description="List, verify and prune the checkpoints of a pretraining run, also while it trains.",
        epilog="example:\n  diptych checkpoint list runs/demo-pretrain",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # without an action: say which there are
    parser.set_defaults(run=lambda args: parser.print_help() or 2)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    texts = {
        "list": ("step, samples, time, size, state and scores of each checkpoint", LIST, list_),
        "verify": ("read every file of every checkpoint and compare its hash", VERIFY, verify),
        "prune": ("remove older checkpoints", PRUNE, prune),
    }
    made: dict[str, argparse.ArgumentParser] = {}
    for name, (text, epilog, action) in texts.items():
        made[name] = actions.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made[name].add_argument("folder", metavar="RUN", help="a run folder")
        made[name].set_defaults(run=action)
    made["list"].add_argument("--json", action="store_true", help="one JSON line per checkpoint")
    made["prune"].add_argument(
        "--keep", type=_positive, required=True, metavar="N", help="how many of the newest whole ones stay"
    )
    made["prune"].add_argument(
        "--keep-every", type=_positive, metavar="STEPS", help="those at multiples of this stay too"
    )
    made["prune"].add_argument("--yes", action="store_true", help="remove them; without, only say which")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def _own(folder: str) -> Any:
    """The run's own settings of checkpoints."""
    from ..configs.load import load_config
    from ..pretrain.config import PretrainConfig
    from ..pretrain.retention import CheckpointConfig

    file = Path(folder, "config.yaml")
    return load_config(PretrainConfig, file).checkpoint if file.is_file() else CheckpointConfig()


def _several(count: int) -> str:
    return f"{count} checkpoint{'' if count == 1 else 's'}"


def _scan(folder: str) -> list[Any]:
    """The run's checkpoints, newest first; UserError if there is none."""
    from ..configs.errors import UserError
    from ..pretrain.manifest import scan

    run = Path(folder)
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} is no run folder with checkpoints; give one, for instance runs/NAME")
    found = scan(run)
    if not found:
        raise UserError(f"{run / 'checkpoints'} holds no finished checkpoint yet")
    return found


def list_(args: argparse.Namespace) -> int:
    """Say what is there, by manifest and sizes."""
    from ..configs.errors import UserError
    from ..pretrain.manifest import size_text

    found = _scan(args.folder)
    wanted = None
    with suppress(UserError):  # a damaged config hides no checkpoints
        wanted = _own(args.folder).keep_best
    for one in found:
        facts = one.facts
        metrics = {name: v for name, v in facts.get("metrics", {}).items() if not name.endswith("_chance")}
        if args.json:
            row = {"step": one.step, "samples_seen": facts.get("samples_seen"), "bytes": one.bytes}
            row |= {"written": facts.get("written"), "folder": str(one.folder), "problem": one.problem}
            print(json.dumps(row | {"metrics": metrics}))
            continue
        seen = f"{facts['samples_seen']:,} samples" if "samples_seen" in facts else "samples unknown"
        words = [f"step {one.step:>8}", seen, str(facts.get("written", "time unknown")), size_text(one.bytes)]
        words.append("sizes right" if one.problem is None else f"DAMAGED: {one.problem}")
        best = [name for name in metrics if (name == wanted.metric if wanted else name.endswith("_R@5"))]
        words += [f"{name.removeprefix('val/')} {metrics[name]:.3f}" for name in best]
        words += [f"best {name.removeprefix('val/')}" for name in best if one is _best(found, name)]
        print("  ".join(words))
    return 0


def _best(found: list[Any], metric: str) -> Any:
    """The checkpoint that ``checkpoint.keep_best`` with this metric would keep; None where there is none."""
    from ..pretrain.retention import METRICS, KeepBest, best_of

    if metric not in METRICS:
        return None
    return next(iter(best_of(found, KeepBest.model_validate({"metric": metric}))), None)


def verify(args: argparse.Namespace) -> int:
    """Hash every file; 1 if a checkpoint is damaged."""
    from ..configs.errors import UserError
    from ..pretrain.manifest import verify as look

    damaged, path = 0, Path(args.folder)
    single = path.parent.name == "checkpoints" and not (path / "checkpoints").is_dir()
    found = _scan(str(path.parent.parent) if single else args.folder)
    chosen = [one for one in found if not single or one.folder.name == path.name]
    if not chosen:
        raise UserError(f"{path} is no checkpoint; `diptych checkpoint list {path.parent.parent}` names all")
    for one in chosen:
        problem = look(one.folder)
        if problem is not None and not one.folder.exists():
            print(f"step {one.step}: removed meanwhile")
            continue
        damaged += problem is not None
        print(f"step {one.step}: {'whole' if problem is None else problem}", flush=True)
    return 1 if damaged else 0


def prune(args: argparse.Namespace) -> int:
    """Remove what is older than the newest ones, or say what that would be."""
    from dataclasses import replace

    from ..pretrain.checkpoint import remove
    from ..pretrain.manifest import size_text
    from ..pretrain.manifest import verify as look
    from ..pretrain.retention import superseded

    own = _own(args.folder)
    found, whole = _scan(args.folder), 0
    for number, one in enumerate(found):  # those that are to stay are read in full: a damaged one is none
        if whole == args.keep:
            break
        problem = one.problem or look(one.folder)
        found[number] = replace(one, problem=problem)
        whole += problem is None
        if problem is not None:
            print(f"step {one.step} does not count: {problem}", flush=True)
    asked = superseded(found, keep=args.keep, keep_every_steps=args.keep_every)
    free = superseded(found, keep=args.keep, keep_every_steps=own.keep_every_steps, keep_best=own.keep_best)
    going = [one for one in asked if one in free]
    for one in going:
        if args.yes:
            remove(one.folder)
        print(f"{'removed' if args.yes else 'would remove'} {one.folder} ({size_text(one.bytes)})")
    total = size_text(sum(one.bytes for one in going))
    stay = len(found) - len(going)
    if args.yes or not going:
        print(f"{_several(len(going))} removed ({total}), {stay} stay")
    else:
        print(f"{_several(len(going))} ({total}) would go, {stay} stay; add --yes to remove them")
    return 0
