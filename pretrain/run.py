"""The run folder: made, recognised, and refused when another config lives in it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from ..configs.load import load_config, to_yaml
from .config import PretrainConfig

__all__ = ["config_hash", "open_run", "run_path"]

# what may change between one start of a run and the next: what the result depends on by rounding at most
FREE = (
    "name",
    "out",
    "checkpoint",
    "guard",
    "tracking",
    "watch",
    "evaluate",
    "data.workers",
    "data.prefetch",
    "data.start_method",
    "data.cache_gb",
    "data.cache",
    "data.on_bad",
    "data.max_bad_fraction",
    "loss.tile",
    "loss.exchange",
    "train.micro_batch_size",
    "train.grad_checkpointing",
    "train.parallel",
    "train.device",
    "train.threads",
    "train.log_every_steps",
)


def run_path(config: PretrainConfig) -> Path:
    """The run's folder: ``out``, else ``runs/NAME``."""
    return Path(config.out) if config.out is not None else Path("runs") / config.name


def open_run(config: PretrainConfig) -> Path:
    """Make or recognise the run folder and write ``config.yaml`` into it.

    Raises UserError if a run with other settings lives there, naming the keys, or if it cannot be written.
    """
    folder = run_path(config)
    stored = folder / "config.yaml"
    if stored.is_file():
        old = load_config(PretrainConfig, stored)
        changed = [
            f"{key} was {json.dumps(was)}, now {json.dumps(now)}"
            for key, was, now in _differences(_plain(old), _plain(config))
            if not _is_free(key)
        ]
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(changed[:5])}); set out to another "
                "folder for a new run, or undo the change to go on with this one"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(stored, to_yaml(config))
    except OSError as error:
        raise UserError(
            f"out: {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return folder


def config_hash(config: PretrainConfig) -> str:
    """sha256 of the settings that a run's result depends on; kept in the manifest of its checkpoints."""
    fixed = {key: value for key, value in _leaves(_plain(config)) if not _is_free(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _plain(config: PretrainConfig) -> Any:
    """The config as plain values, without where data and lists of keys lie: a checkpoint knows the data by
    its content."""
    plain = json.loads(config.model_dump_json())
    sources = [json.loads(source.model_dump_json()) for source in config.data.sources]
    places = ("data", "name", "keep", "drop")
    plain["data"]["train"] = [{k: v for k, v in one.items() if k not in places} for one in sources]
    return plain


def _leaves(plain: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from _leaves(value, f"{where}.{key}" if where else key)
    else:
        yield where, plain


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys at which two plain configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new
