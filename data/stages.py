"""What a batch is cut to while a run goes on: smaller images and shorter captions first, whole ones last.

Training mostly on small images and short captions and finishing on whole ones costs a fraction for nearly the
same model (CLIPA: Li, Wang and Xie, 2023, arXiv 2305.07017). A batch's stage follows from its place in the
order alone, so workers and ranks agree about it and a resumed run is where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from ..configs.errors import UserError
from ..configs.load import StrictModel

__all__ = ["Shape", "Shapes", "StageConfig", "check_stages", "stage_at"]


class StageConfig(StrictModel):
    """A part of a run; what is null is as it would be without stages."""

    until_samples: int | None = Field(default=None, ge=1)
    """The stage's batches are those that begin before so many samples of the run; null, for the last stage
    alone, lasts to the end."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the images in pixels."""
    text_len: int | None = Field(default=None, ge=2)
    """The most tokens of a caption; ``data.captions.truncate`` says what is left of longer ones."""


@dataclass(frozen=True)
class Shape:
    """Side of the images in pixels, and the most tokens of a caption."""

    image_size: int
    text_len: int


class Shapes:
    """The shape of every batch of a run."""

    def __init__(self, whole: Shape, stages: Sequence[StageConfig] = ()) -> None:
        """``whole``: what the model takes, for whatever stages leave open. Raises UserError for stages that
        do not follow one another or want longer captions than the model reads."""
        check_stages(stages, whole.text_len)
        self._ends = [stage.until_samples for stage in stages]
        self._shapes = [
            Shape(stage.image_size or whole.image_size, stage.text_len or whole.text_len) for stage in stages
        ]
        if not stages:
            self._ends, self._shapes = [None], [whole]

    def at(self, samples_seen: int) -> Shape:
        """The shape of the batch that begins after ``samples_seen`` samples."""
        return self._shapes[stage_at(self._ends, samples_seen)]

    def all(self) -> list[Shape]:
        """Each shape that occurs, in the order in which they first do."""
        return list(dict.fromkeys(self._shapes))


def stage_at(ends: Sequence[int | None], samples_seen: int) -> int:
    """Number of the stage of the batch that begins after ``samples_seen`` samples."""
    return next(i for i, end in enumerate(ends) if end is None or samples_seen < end)


def check_stages(stages: Sequence[StageConfig], context_length: int) -> None:
    """Raise UserError for stages of which one would never end or never begin, or wants longer captions than
    the model reads."""
    if long := [stage.text_len for stage in stages if (stage.text_len or 0) > context_length]:
        raise UserError(
            f"stages: text_len {long[0]} is more than the model's context of {context_length} tokens"
        )
    ends = [stage.until_samples for stage in stages]
    if stages and (ends[-1] is not None or None in ends[:-1]):
        raise UserError(
            "stages: each but the last needs until_samples, and the last must not have it (it lasts)"
        )
    rising = [end for end in ends if end is not None]
    if rising != sorted(set(rising)):
        raise UserError(f"stages: until_samples must rise from stage to stage, not {rising}")
