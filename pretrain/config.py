"""The whole config of a pretraining run; every part is defined beside the code that reads it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..configs.load import StrictModel
from ..data.config import DataConfig
from .contrastive import LossConfig
from .optim import OptimConfig
from .schedule import ScheduleConfig
from .towers import ModelConfig
from .tracking import TrackingConfig

__all__ = ["PretrainConfig", "TrainConfig", "ValidationConfig"]


class TrainConfig(StrictModel):
    """How long, in which batches and in which precision."""

    global_batch_size: int = Field(default=1024, ge=2)
    """Samples per optimizer step over all processes; each takes its share, equal or not."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the data; give this or ``total_samples``."""
    total_samples: int | None = Field(default=None, ge=1)
    """Length of the run in samples, rounded up to whole steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast dtype of the towers. Features and loss are always fp32, and so are the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per process; null shares the machine's cores among its processes."""
    log_every_steps: int = Field(default=10, ge=1)
    save_every_steps: int = Field(default=500, ge=1)
    """A checkpoint is also written at the end and when the run is told to stop."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; older ones are removed once a newer one is complete."""
    timeout_s: float = Field(default=600.0, gt=0)
    """How long a process waits for the others before it gives up."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.total_samples is None):
            raise ValueError("give exactly one of train.epochs and train.total_samples")
        return self


class ValidationConfig(StrictModel):
    """Quick retrieval on held-out shards while training; ``diptych evaluate`` scores in full."""

    data: str | None = None
    """A folder of held-out shards; ``corpus:NAME/SPLIT`` is one in the cache. Null for none."""
    every_steps: int = Field(default=500, ge=1)
    """Also scored at the end."""
    max_images: int = Field(default=2000, ge=2)


class PretrainConfig(StrictModel):
    """One YAML file of ``diptych pretrain``."""

    name: str = Field(default="pretrain", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's name; its folder is ``runs/NAME`` unless ``out`` says otherwise."""
    out: str | None = None
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    evaluate: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
