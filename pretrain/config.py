"""The whole config of a pretraining run; every part is defined beside the code that reads it."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..configs.load import FolderName, StrictModel
from ..data.config import DataConfig
from .contrastive import LossConfig
from .guard_config import GuardConfig
from .locking import LockConfig
from .optim import OptimConfig
from .resume import ResumeConfig
from .retention import CheckpointConfig
from .schedule import ScheduleConfig
from .stages import Stage
from .towers import ModelConfig
from .tracking import TrackingConfig
from .watch import WatchConfig

__all__ = ["CheckpointConfig", "PretrainConfig", "TrainConfig", "ValidationConfig"]


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
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples of a process that are computed at a time; null for all. Smaller ones bound the memory of any
    ``global_batch_size`` for one forward pass more: features first, then gradients (GradCache: Gao et al.,
    2021, arXiv 2101.06983). Gradients are those of the whole batch; towers with batch norms excepted."""
    grad_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the MLPs of the blocks with torch.compile: for GPUs, since on a CPU it does not pay
    (docs/performance.md)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """``ddp``: every process holds the whole model; ``fsdp``: its part of weights, gradients and optimizer,
    for models that do not fit otherwise. The numbers are the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per process; null shares the machine's cores among its processes."""
    log_every_steps: int = Field(default=10, ge=1)

    def micro_batches(self, world_size: int) -> int:
        """Into how many each process cuts its share of a batch, the same number on all."""
        most = -(-self.global_batch_size // world_size)
        wanted = -(-most // (self.micro_batch_size or most))
        return min(wanted, self.global_batch_size // world_size)  # none of them is empty

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

    moved: ClassVar[Mapping[str, str]] = {
        "train.save_every_steps": "checkpoint.every_steps",
        "train.keep_checkpoints": "checkpoint.keep",
        "train.timeout_s": "watch.timeout_s",
    }
    name: str = Field(default="pretrain", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's name; its folder is ``runs/NAME`` unless ``out`` says otherwise."""
    out: FolderName | None = None
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    stages: tuple[Stage, ...] = ()
    """Parts of the run with smaller images, shorter captions or fewer patches; none by default."""
    model: ModelConfig
    lock: LockConfig = LockConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    guard: GuardConfig = GuardConfig()
    evaluate: ValidationConfig = ValidationConfig()
    watch: WatchConfig = WatchConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _best_is_scored(self) -> Self:
        if self.checkpoint.keep_best is None:
            return self
        if self.evaluate.data is None:
            raise ValueError("checkpoint.keep_best needs held-out shards; give evaluate.data")
        if self.evaluate.every_steps % self.checkpoint.every_steps:
            raise ValueError(
                f"checkpoint.keep_best: evaluate.every_steps ({self.evaluate.every_steps}) must be a "
                f"multiple of checkpoint.every_steps ({self.checkpoint.every_steps}): what is scored must be "
                "saved"
            )
        return self
