"""The ``diptych`` command: finds the subcommand, and turns mistakes into one sentence each.

Subcommands live one per file beside this one. Each has ``add_parser(subparsers)`` that sets ``run``; what is
heavy (torch, open_clip) they import inside ``run``, so that ``diptych --help`` answers at once.
"""

import argparse
import importlib
import os
import re
import shlex
import sys
import threading
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, NoReturn

from ..configs.errors import UserError, mend
from ..configs.leave import leave

__all__ = ["COMMANDS", "build_parser", "main", "parse_line"]

COMMANDS = ("data", "pretrain", "checkpoint", "evaluate", "finetune", "predict", "export", "report", "demo")

EPILOG = """example:
  diptych data fetch icons
  diptych pretrain configs/demo/pretrain.yaml out=runs/first optim.lr=1e-3
  diptych evaluate runs/first

`diptych COMMAND --help` tells more. Settings are a YAML file and key=value overrides; a mistake ends with one
sentence and exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one sentence on standard error, with the nearest known word.

    The namespace that it fills names the innermost parser as ``parser``.
    """

    def parse_known_args(self, *args: Any, **named: Any) -> tuple[Any, list[str]]:
        """As argparse's, and remember which subcommand's parser it was."""
        filled, extra = super().parse_known_args(*args, **named)
        if not hasattr(filled, "parser"):
            filled.parser = self
        return filled, extra

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with code 2."""
        found = re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message)
        if found:
            known = [word.strip("' ") for word in found[2].split(",")]
            message = f"{self.prog} has no '{found[1]}'; {_nearest(found[1], known)}"
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")

    def unknown(self, word: str) -> NoReturn:
        """Say that nothing takes this argument, and which option was perhaps meant."""
        options = re.findall(r"--[a-z][\w-]*", self.format_help())
        near = get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.5)
        self.error(f"unknown argument '{word}'" + (f"; did you mean {near[0]}?" if near else ""))


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"


def build_parser() -> Parser:
    """The parser with every subcommand."""
    parser = Parser(
        prog="diptych",
        description="Contrastive image-text pretraining on sharded streams, and fused downstream models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diptych {version('diptych')}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks (anywhere on the line)")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        importlib.import_module(f".{name}", __package__).add_parser(subparsers)
    return parser


def parse_line(argv: list[str]) -> argparse.Namespace:
    """Arguments of one command. Overrides may stand before and after options."""
    parser = build_parser()
    args, extra = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        parser.exit(0)
    # argparse closes a list of values at the first option that follows; what comes later still belongs to it
    values = next((name for name in ("overrides", "runs") if hasattr(args, name)), None)
    while extra and values is not None and not extra[0].startswith("-"):
        setattr(args, values, [*getattr(args, values), extra.pop(0)])
    if extra:
        args.parser.unknown(extra[0])
    return args


def _sentence(error: Exception) -> str | None:
    """What to tell the user about an error that he can mend; None for our own mistakes."""
    from pydantic import ValidationError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        return f"{error.title}: {key}: {first['msg']}, not {first['input']!r}"
    if isinstance(error, OSError) and (how := mend(error)) is not None:
        reason = (error.strerror or "error").lower()
        return f"{error.filename or 'a file'}: {reason}; {how}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: looked at and found wanting; 2: a mistake that the user can mend, told in one sentence on
    standard error; 130: interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        args = parse_line(words)
    except SystemExit as stop:  # after --help, --version or a mistake in the line, already printed
        return int(stop.code or 0)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        again = shlex.join(["diptych", *words])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            again = "the same command"
        if os.environ.get("RANK", "0") == "0":
            print(f"\ninterrupted; what was finished is kept, go on with: {again}", file=sys.stderr)
        if any(thread.name == "checkpoint" for thread in threading.enumerate()):
            leave(130)  # it is at work, and nobody waits for it
        return 130
    except BrokenPipeError:
        # the reader of our output is gone, as in `| head`: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        sentence = None if debug else _sentence(error)
        if sentence is None:
            raise
        # a launched run raises its UserErrors on all ranks, but for those that one has alone
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, UserError) or error.alone:
            print(f"error: {sentence}", file=sys.stderr)
        return 2
