"""The parts of a run that differ in what a sample costs: image size, caption length, patches dropped."""

from collections.abc import Sequence

from pydantic import Field

from ..data.stages import StageConfig, stage_at

__all__ = ["Stage", "patch_dropout_at"]


class Stage(StageConfig):
    """A stage of the data, and how many patches the image tower sees of it.

    Dropping half of the patches makes the image tower twice as fast for a small loss in accuracy, most of
    which a short last stage without dropping wins back (FLIP: Li et al., 2022, arXiv 2212.00794, section 4).
    """

    patch_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the patches that a training image loses; null leaves the model's own."""


def patch_dropout_at(stages: Sequence[Stage], samples_seen: int, own: float) -> float:
    """Fraction dropped in the batch that begins after ``samples_seen`` samples; ``own`` is the model's."""
    if not stages:
        return own
    chosen = stages[stage_at([stage.until_samples for stage in stages], samples_seen)].patch_dropout
    return own if chosen is None else chosen
