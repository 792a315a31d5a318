"""Commands as they stand in help texts and documents, checked without running them."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.cli.main import parse_line
from diptych.configs.load import load_config

from .repository import ROOT


def joined_lines(text: str) -> Iterator[str]:
    """Lines without indentation and prompt; those that end with a backslash are joined with the next."""
    for line in text.replace("\\\n", " ").splitlines():
        yield line.strip().removeprefix("$ ")


def diptych_words(line: str) -> list[str] | None:
    """Arguments of ``diptych`` in a shell line, None if it calls something else."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # prose with an apostrophe
        return None
    while words and "=" in words[0]:  # environment variables
        words.pop(0)
    if not words or words[0] != "diptych":
        return None
    stop = next((i for i, word in enumerate(words) if word in ("|", "&&", ">", "&")), len(words))
    return words[1:stop]


def check_words(words: list[str]) -> None:
    """Fails the test if ``diptych`` would refuse these arguments, overrides and shipped recipes included."""
    try:
        args = parse_line(list(words))
    except SystemExit as stop:
        if stop.code not in (0, None):
            pytest.fail(f"diptych {shlex.join(words)} does not parse")
        return
    check_overrides(args.command, getattr(args, "config", None), getattr(args, "overrides", None) or [])


def check_overrides(command: str, config: str | None, overrides: list[str]) -> None:
    """Validates the config that a command line would make, where its file ships with the project."""
    from diptych.finetune.config import FinetuneConfig
    from diptych.pretrain.config import PretrainConfig
    from diptych.pretrain.evaluate import EvaluateConfig

    classes = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "evaluate": EvaluateConfig}
    if command not in classes:
        return
    path = None if config is None else ROOT / config
    if path is None and command != "evaluate":
        return
    if path is not None and not path.is_file() and not config_ships(config):
        return
    load_config(classes[command], path, overrides)


def config_ships(config: str | None) -> bool:
    """Whether a config named in a document ought to be in the repository."""
    return config is not None and Path(config).parts[:1] == ("configs",)
