"""The run folder: recognised, and refused when another config lives in it; what may change between starts.

Every key of the config is in exactly one of three classes: ``FREE`` ones are taken, ``GUARDED`` ones only
with ``resume.force``, ``FIXED`` ones never, since the checkpoint would not fit.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configs.errors import UserError, unwritable
from ..configs.files import atomic_write_text
from ..configs.load import load_config, to_yaml
from .config import PretrainConfig

__all__ = [
    "FIXED",
    "FREE",
    "GUARDED",
    "LINES",
    "NONE",
    "Changes",
    "compare",
    "config_hash",
    "run_path",
    "write_config",
]

LINES = ("metrics.jsonl", "quarantine.jsonl", "bad_steps.jsonl", "changes.jsonl")
"""Files of a run to which lines are added."""
# what may change between one start of a run and the next: what ordinary steps depend on by rounding at most
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
    "resume",
)

# what changes the result, and what it would change
GUARDED = {
    "seed": "the order of samples follows from it",
    "data.train": "it says what an epoch is",
    "data.epoch_samples": "it says what an epoch is",
    "data.captions": "the same samples would give other texts",
    "data.augment": "the same samples would give other pictures",
    "data.weight_key": "it weighs the loss",
    "data.max_pixels": "it decides which samples count as damaged",
    "stages": "they say what is seen when",
    "lock": "it says which weights learn",
    "loss.kind": "it is what is minimised",
    "loss.duplicates": "it is what is minimised",
    "loss.label_smoothing": "it is what is minimised",
    "optim.lr": "steps so far were taken with the old one",
    "optim.betas": "moments so far were made with the old ones",
    "optim.eps": "steps so far were taken with the old one",
    "optim.weight_decay": "steps so far were taken with the old one",
    "optim.image_lr_scale": "steps so far were taken with the old one",
    "optim.text_lr_scale": "steps so far were taken with the old one",
    "optim.image_layer_decay": "steps so far were taken with the old one",
    "optim.text_layer_decay": "steps so far were taken with the old one",
    "optim.muon_momentum": "moments so far were made with the old one",
    "optim.muon_lr_scale": "steps so far were taken with the old one",
    "optim.clip_grad_norm": "steps so far were taken with the old one",
    "optim.ema_decay": "the average so far was made with the old one",
    "schedule": "the rate would not be what it was so far",
    "train.global_batch_size": "steps, epochs and the loss follow from it",
    "train.epochs": "the schedule ends with the run",
    "train.total_samples": "the schedule ends with the run",
    "train.precision": "sums would be rounded otherwise",
    "train.compile": "sums would be rounded otherwise",
}

# what the checkpoint would not fit
FIXED = {
    "model": "the weights are this model's; a new run takes them by model.pretrained",
    "optim.name": "the saved moments are this optimizer's",
    "data.lanes": "a run keeps the order that it began with",
    "data.window": "a run keeps the order that it began with",
}


def run_path(config: PretrainConfig) -> Path:
    """The run's folder: ``out``, else ``runs/NAME``."""
    return Path(config.out) if config.out is not None else Path("runs") / config.name


@dataclass(frozen=True)
class Changes:
    """What differs from the config that a run was started with: dotted keys, the old and the new value."""

    taken: dict[str, tuple[Any, Any]]
    forced: dict[str, tuple[Any, Any]]

    def lines(self) -> list[str]:
        """In words, for the start of a run."""
        told = {"taken": self.taken, "forced, so the run is another from here on": self.forced}
        return [
            f"{how}: {', '.join(_arrow(key, *values) for key, values in changed.items())}"
            for how, changed in told.items()
            if changed
        ]


NONE = Changes({}, {})


def compare(config: PretrainConfig, stored: Sequence[Path], *, force: bool = False) -> Changes:
    """What differs from the config files ``stored``, with one of which ``config`` may go on: that which the
    run was started with last, then that of its checkpoint. Nothing if there is no file. Where the first is
    refused and the second is not, a change is taken back.

    Raises UserError, naming keys and reasons, if it may go on with none of them: for what may not change, or
    not without ``force``.
    """
    problem: UserError | None = None
    undone: dict[str, tuple[Any, Any]] = {}
    for file in stored:
        try:
            changed = _changed(config, file)
            undone = undone or changed
            _refuse(changed, file, force=force)
        except UserError as error:
            problem = error
            continue
        forced = {key: values for key, values in changed.items() if not _is_free(key)}
        taken = {k: v for k, v in (undone | changed).items() if k not in forced and _told(k)}
        return Changes(taken, forced)
    if problem is not None:
        raise problem
    return NONE


def _changed(config: PretrainConfig, stored: Path) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which a config differs from a file, the file's value and the config's."""
    old = load_config(PretrainConfig, stored)
    return {key: (was, now) for key, was, now in _differences(_plain(old), _plain(config))}


def _refuse(changed: Mapping[str, tuple[Any, Any]], stored: Path, *, force: bool) -> None:
    """Raise UserError if something has changed that may not."""
    refused = {key: why for key in changed if (why := _why(key, FIXED))}
    if None in changed.get("optim.ema_decay", ()):
        refused["optim.ema_decay"] = "an average neither begins nor ends within a run"
    fixed = bool(refused)
    if not fixed and not force:
        refused = {key: _why(key, GUARDED) for key in changed if not _is_free(key)}
    if not refused:
        return
    told = [
        f"{key} was {json.dumps(changed[key][0])}, now {json.dumps(changed[key][1])}: {why}"
        for key, why in list(refused.items())[:5]
    ]
    more = f", and {len(refused) - 5} more" if len(refused) > 5 else ""
    how = "" if fixed else ", or set resume.force=true to go on with it"
    raise UserError(
        f"{stored.parent} holds a run with other settings ({'; '.join(told)}{more}); set out to another "
        f"folder for a new run, undo the change to go on with this one{how}"
    )


def write_config(config: PretrainConfig, folder: Path, changes: Changes, step: int) -> None:
    """Write ``config.yaml``, and a line of ``changes.jsonl`` if something changed at ``step``.

    Raises UserError if the folder cannot be written.
    """
    for name in LINES:
        if (folder / name).is_dir():
            raise UserError(f"out: {folder / name} is a folder, and the run writes a file there; remove it")
    try:
        if changes.lines():
            row = {"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"), **asdict(changes)}
            with (folder / "changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        atomic_write_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise unwritable(f"out: {error.filename2 or error.filename or folder}", error) from error


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
    return any(_under(key, free) for free in FREE)


def _under(key: str, above: str) -> bool:
    return key == above or key.startswith(above + ".")


def _why(key: str, reasons: Mapping[str, str]) -> str:
    """The reason of the key, or of the section that it is in; "" if there is none."""
    return next((why for above, why in reasons.items() if _under(key, above)), "")


def _told(key: str) -> bool:
    """Whether a harmless change is worth a word: not how and where this start was asked for."""
    return not any(_under(key, above) for above in ("resume", "out", "name"))


def _arrow(key: str, was: Any, now: Any) -> str:
    return f"{key} {json.dumps(was)} -> {json.dumps(now)}"


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys at which two plain configs differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new
