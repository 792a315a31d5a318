"""Where a run starts: at its beginning, where it stopped, or at a checkpoint of another run."""

import logging
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..configs.errors import UserError
from ..configs.load import StrictModel
from .checkpoint import PARTS, newest_or_none, partial_mend, verify
from .manifest import MANIFEST, scan
from .tracking import read_metrics

__all__ = ["ResumeConfig", "start_from"]

log = logging.getLogger(__name__)
POLICIES = ("auto", "never", "must")


class ResumeConfig(StrictModel):
    """Where a run starts. A plain string stands for ``start``: ``resume: must``."""

    start: str = Field(default="auto", min_length=1)
    """``auto``: where the run folder's newest whole checkpoint is, at the beginning if it has none.
    ``never``: at the beginning, and a folder with checkpoints is refused. ``must``: a folder without a whole
    one is refused. Else another run's folder or a checkpoint's: a run that has no checkpoint of its own yet
    takes everything from there - weights, optimizer, step, place in the data - and counts on from its
    step."""
    force: bool = False
    """Also take changes of the config that make it another run from here on; each is told and written into
    ``changes.jsonl``. Where the order of samples changes, the data goes on with the next epoch."""
    allow_partial: bool = False
    """Go on from a checkpoint whose optimizer or random states are missing, which then begin anew. Without it
    such a one is passed over for an older one, like any that is damaged."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"start": value} if isinstance(value, str) else value


def start_from(config: ResumeConfig, run: Path) -> Path | None:
    """The checkpoint to go on from, None to start at the beginning.

    Raises UserError if the policy forbids what the folder holds, and if what it holds is not all there.
    """
    if (run / "encoder").is_dir():
        raise UserError(f"out: {run} holds a fine-tuning; set out to another folder")
    if config.start == "never":
        if found := scan(run):
            several = "s" if len(found) > 1 else ""
            raise UserError(
                f"resume: never, but {run} holds {len(found)} checkpoint{several}; set out to another "
                "folder, or resume=auto to go on"
            )
        _check_that_none_was_saved(run)
        return None
    path = None if config.start in POLICIES else Path(config.start).expanduser()
    if path is not None and not path.exists() and _near(config.start):
        raise _unknown(config.start)
    without = PARTS if config.allow_partial else ()
    own = newest_or_none(run, without=without)
    if own is None:
        _check_that_none_was_saved(run)
    if own is None and config.start == "must":
        raise UserError(
            f"resume: must, but {run} holds no checkpoint; check out, or set resume=auto to start"
        )
    if path is None:
        return own
    if own is None:
        return _elsewhere(config.start, without)
    if path.absolute() not in (own.absolute(), run.absolute()):
        log.warning(
            "resume.start: %s is passed over, since %s goes on from its own %s; to start from there, set out "
            "to another folder",
            config.start,
            run,
            own.name,
        )
    return own


def _check_that_none_was_saved(run: Path) -> None:
    """A run whose checkpoints are gone does not start over, which would take what its folder still tells."""
    metrics = run / "metrics.jsonl"
    if steps := [row["saved_step"] for row in read_metrics(metrics) if "saved_step" in row]:
        raise UserError(
            f"{run} saved step {steps[-1]}, but checkpoints/ holds none; put one back there (is a disk not "
            f"mounted?), or remove {metrics} to start the run from its beginning"
        )


def _elsewhere(text: str, without: Collection[str]) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a run."""
    path = Path(text).expanduser()
    if (path / MANIFEST).is_file():
        if problem := verify(path, without=without):
            raise UserError(f"resume.start: {problem}; give another checkpoint{partial_mend(path)}")
        return path
    if path.is_dir() and (newest := newest_or_none(path, without=without)) is not None:
        return newest
    raise _unknown(text)


def _near(text: str) -> list[str]:
    """The policy that this was perhaps meant to be."""
    return get_close_matches(text, POLICIES, n=1, cutoff=0.6)


def _unknown(text: str) -> UserError:
    near = _near(text)
    hint = f"did you mean {near[0]}?" if near else "give auto, never, must, a run's folder or a checkpoint's"
    return UserError(f"resume.start: {text} is no folder of a run with checkpoints and no checkpoint; {hint}")
