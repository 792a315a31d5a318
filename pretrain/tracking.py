"""What a run reports: ``metrics.jsonl``, which is the truth, and Weights & Biases, which is a sink.

One line per log, ``{"kind": .., "step": .., "samples_seen": .., ..}``. On resume the file is cut back to
the checkpoint's step, so it reads as if nothing had happened. W&B cannot do that, and two offline starts of
one id do not merge there: each start is a W&B run of its own, all in one group named after the run.
"""

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from ..configs.errors import UserError
from ..configs.files import Lines, atomic_write_bytes, atomic_write_text
from ..configs.load import StrictModel

__all__ = [
    "GROUP_BYTES",
    "GROUP_NAME",
    "Tracker",
    "TrackingConfig",
    "cut_metrics",
    "read_metrics",
    "track_evaluation",
]
log = logging.getLogger(__name__)
GROUP_NAME = "wandb_group.txt"
INIT_S = 60.0
"""How long W&B may try to reach its server at a start."""
GROUP_BYTES = 1024  # more than the file of any
_NAME, _TAG = re.compile(r"[^\x00-\x1f\x7f/\\#?%:]{1,128}"), re.compile(r"[^\x00-\x1f\x7f]{1,64}")


class TrackingConfig(StrictModel):
    """Weights & Biases; ``metrics.jsonl`` is always written."""

    wandb: Literal["offline", "online", "off"] = "offline"
    """``offline`` writes into the run folder and sends nothing; ``online`` needs ``wandb login``."""
    project: str = "diptych"
    entity: str | None = None
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _as_wandb_has_them(self) -> Self:
        if self.wandb != "off":
            for name, value in (("project", self.project), ("entity", self.entity or "none")):
                if not _NAME.fullmatch(value):
                    raise ValueError(
                        f"{name} {value!r} is no name for W&B; give 1 to 128 letters, none of /\\#?%:"
                    )
            if odd := [tag for tag in self.tags if not _TAG.fullmatch(tag)]:
                raise ValueError(f"tags: {odd[0]!r} is no tag for W&B; give 1 to 64 letters")
        return self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. Lines that are none, such as a last one that a crash cut short, are left out.
    Empty if there is no file."""
    return [row for line in _lines_of(path) if (row := _row_of(line)) is not None]


def cut_metrics(path: Path, step: int) -> None:
    """Leave only the rows up to ``step``, and no half line; a line that is no row stays, and is told."""
    if not path.is_file():
        return
    kept: list[bytes] = []
    odd: list[int] = []
    for number, line in enumerate(_lines_of(path), 1):
        row = _row_of(line)
        if row is None:
            odd.append(number)
        if row is None or row["step"] <= step:
            kept.append(line + b"\n")
    atomic_write_bytes(path, b"".join(kept))
    if odd:
        log.warning(
            "%s: line %d is no row of this run and is passed over (%d in all)", path, odd[0], len(odd)
        )


def _lines_of(path: Path) -> list[bytes]:
    """The lines of a file that were written to their end."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _row_of(line: bytes) -> dict[str, Any] | None:
    """A line as a row with its ``step``, None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class Tracker:
    """Where a run's numbers go. One process of a run has it."""

    def __init__(
        self, folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], *, strict: bool = True
    ) -> None:
        """``folder``: the run's, made if absent. ``run_config``: plain values shown beside the curves.

        Where W&B cannot be reached its files stay here, with a warning. For anything else that it refuses,
        such as a start without a login, UserError is raised; without ``strict`` that too is a warning.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._lines = Lines(self.path)
        self._lines.add()
        self._wandb = _start_wandb(folder, config, run_config, strict=strict)
        self.group = "" if self._wandb is None else _group_of(folder)
        """Of this run in W&B."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row. It must hold ``kind`` and ``step``; ``samples_seen`` is W&B's axis where given. Numbers
        that are not finite are null in the file."""
        odd = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        self._lines.add(json.dumps({**row, **odd}) + "\n")
        if self._wandb is not None:
            kind = row["kind"]
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            axes = {k: numbers.pop(k) for k in ("step", "samples_seen") if k in numbers}
            values = {k if "/" in k else f"{kind}/{k}": v for k, v in numbers.items()} | axes
            self._send(lambda run: run.log(values))

    def finish(self, exit_code: int = 0) -> None:
        """Close everything; may be called twice."""
        self._lines.close()
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._wandb = None

    def _send(self, work: Callable[[Any], object]) -> None:
        """Have W&B do something. A run does not end because W&B's own process has, or fails."""
        if self._wandb is None:
            return
        try:
            work(self._wandb)
        except Exception as error:
            self._wandb = None
            log.warning(
                "W&B has ended (%s): nothing more goes there until the next start; %s has everything",
                _told(error),
                self.path,
            )


def track_evaluation(folder: Path, config: TrackingConfig, result: Mapping[str, Any]) -> None:
    """Send what ``evaluate`` returned for the run in ``folder`` to W&B: a run of kind ``evaluate`` in the
    training's group, with every score (``retrieval/GALLERY/DIRECTION/R@K``) and the example pictures. What
    fails there is a warning: the scores are in ``evaluate.json``."""
    run = _start_wandb(folder, config, {"checkpoint": result["checkpoint"]}, kind="evaluate", strict=False)
    if run is None:
        return
    import wandb

    try:
        pictures = {
            name: wandb.Image(str(Path(result["folder"], file))) for name, file in result["pictures"].items()
        }
        parts = {key: result[key] for key in ("retrieval", "zero_shot", "linear_probe")}
        run.log({**dict(_scores(parts)), **pictures})
        run.finish()
    except Exception as error:
        log.warning("the scores did not reach W&B (%s); evaluate.json has them", _told(error))


def _scores(part: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of all scores in a tree of results."""
    for name, value in part.items():
        if isinstance(value, Mapping):
            path = f"{where}/{name}" if where else name
            yield from [(path, value["value"])] if "value" in value else _scores(value, path)


def _name_of(folder: Path) -> str:
    """The folder's name as W&B takes it."""
    name = folder.resolve().name
    return "".join(letter if letter.isprintable() else "-" for letter in name)[:100]


def _group_of(folder: Path) -> str:
    """The run's group, kept in ``folder/wandb_group.txt``."""
    known = folder / GROUP_NAME
    text = ""
    if known.is_file():
        with known.open("rb") as file:
            text = file.read(GROUP_BYTES).decode(errors="replace").strip()
    if not text or not text.isprintable():
        text = f"{_name_of(folder)}-{secrets.token_hex(4)}"
        atomic_write_text(known, text + "\n")
    return text


def _start_wandb(
    folder: Path,
    config: TrackingConfig,
    run_config: Mapping[str, Any],
    *,
    strict: bool,
    kind: str | None = None,
) -> Any:
    """A W&B run whose files lie in ``folder/wandb``; None if there is to be none, or it cannot be."""
    if config.wandb == "off":
        return None
    import wandb
    from wandb.errors import CommError

    reason = ""
    online = config.wandb == "online" and os.environ.get("WANDB_MODE") != "offline"
    for mode in ("online", "offline") if online else ("offline",):
        try:
            return _init(folder, config, run_config, kind, mode)
        except (wandb.Error, OSError, ValueError) as error:
            reason = _told(error)
            # a refused key is a CommError, too, and comes at once
            away = isinstance(error, CommError) and "timed out" in reason.lower()
            if strict and not (mode == "online" and away):
                raise UserError(
                    f"tracking.wandb: cannot start a run {mode} ({reason}); mend that (a login is made with "
                    f"`wandb login`), or set tracking.wandb={'off' if mode == 'offline' else 'offline'}"
                ) from error
        if mode == "online":
            log.warning(
                "tracking.wandb: W&B cannot be had (%s); this start stays in %s, for `wandb sync`",
                reason,
                folder / "wandb",
            )
    log.warning("tracking.wandb: nothing goes to W&B until the next start (%s)", reason)
    return None


def _told(error: Exception) -> str:
    """What W&B says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _init(
    folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], kind: str | None, mode: Any
) -> Any:
    import wandb

    run = wandb.init(
        project=config.project,
        entity=config.entity or None,
        group=_group_of(folder),
        job_type=kind,
        name=_name_of(folder),
        tags=list(config.tags),
        config=dict(run_config),
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_S, x_disable_stats=True),
    )
    run.define_metric("*", step_metric="samples_seen")
    return run
