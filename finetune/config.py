"""The config of a fine-tuning run: one YAML file of ``diptych finetune``.

The heads' own options stand in ``head_config.py``, the task's in ``task_config.py``.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ..configs.load import StrictModel
from ..pretrain.tracking import TrackingConfig
from .adapt_config import AdaptConfig, of_encoders
from .head_config import OPTIONS, SINGLE, STAGES, HeadConfig, Link
from .task_config import TaskConfig

__all__ = [
    "OPTIONS",
    "SINGLE",
    "STAGES",
    "AdaptConfig",
    "CvConfig",
    "EvalConfig",
    "FinetuneConfig",
    "HeadConfig",
    "LabelledDataConfig",
    "Link",
    "ModalityConfig",
    "SourceConfig",
    "StoppingConfig",
    "TaskConfig",
]


class ModalityConfig(StrictModel):
    """One modality of the table."""

    column: str


class LabelledDataConfig(StrictModel):
    """The labelled table. Columns are declared, never guessed."""

    manifest: str
    """CSV, TSV, JSONL or Parquet; ``corpus:NAME/FILE`` is one of a fetched corpus."""
    modalities: dict[Literal["image", "text"], ModalityConfig] = Field(
        default={"image": ModalityConfig(column="image"), "text": ModalityConfig(column="text")}
    )
    """Columns by modality. An image cell is a path relative to the manifest, bytes, or ``FOLDER#KEY``, a
    sample of a shard folder. An empty cell is a missing modality."""
    root: str | None = None
    """Folder that image paths may not leave; null is the manifest's own."""
    id: str | None = None
    """Column of unique row names; null numbers the rows."""
    group: str | None = None
    """Column of groups of rows that belong together (one product, one concept): intervals resample them.
    Null takes every row for itself."""
    group_across_splits: Literal["forbid", "allow"] = "forbid"
    """Whether a group may stand in several splits. ``forbid`` tests on new groups; ``allow`` is for tests on
    something else that is new, for instance another vendor's pictures of known concepts."""
    weight: str | None = None
    """Column of weights of the training loss, from 0 on; metrics, calibration and early stopping count every
    row once. Null counts all the same."""
    split: str | None = "split"
    """Column with train, val and test; null makes a seeded split by group."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Only without a split column: share of the rows that is held out for the test."""
    min_class_rows: int = Field(default=2, ge=1)
    """Training rows that every class must have (multilabel: positive rows of every label)."""
    on_error: Literal["raise", "quarantine"] = "raise"
    """What an image does that is there but cannot be read: stop, or leave the row out and list it in
    quarantine.csv (at most one row in a thousand)."""
    max_pixels: int = Field(default=89_478_485, ge=1)
    """Images with more pixels are not decoded."""

    @field_validator("modalities")
    @classmethod
    def _some(cls, value: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        if not value:
            raise ValueError("name at least one modality, for instance {image: {column: image}}")
        return value


class SourceConfig(StrictModel):
    """The pretrained encoders."""

    checkpoint: str
    """A pretraining run, a checkpoint folder, a .safetensors file or open_clip's ARCH:TAG."""
    batch_size: int = Field(default=256, ge=1)
    """Pictures encoded at once."""
    cache: bool = True
    """Keep frozen features in the cache folder, so that a second run does not encode again."""


class StoppingConfig(StrictModel):
    """Early stopping on the inner split."""

    metric: str = "auto"
    """``loss``, a metric of the task, or auto: AUROC for binary, else the task's first metric."""
    patience: int = Field(default=4, ge=1)
    """Epochs without an improvement after which training ends; the best epoch's weights are kept."""
    min_delta: float = Field(default=0.0, ge=0)


class CvConfig(StrictModel):
    """Nested cross-validation: outer folds are tested, an inner split of each fold's other rows stops,
    calibrates and chooses."""

    folds: int = Field(default=5, ge=2)
    repeats: int = Field(default=1, ge=1)
    """How often all rows are dealt into folds, each time shuffled differently."""
    stratify: bool = True
    """Keep the shares of the classes equal in all folds and inner splits, where the task has classes."""
    seed: int = Field(default=0, ge=0)
    """Repeat r shuffles with the random state seed + r. Folds do not depend on ``eval.seeds``."""


class EvalConfig(StrictModel):
    """How scores are made."""

    cv: CvConfig | None = None
    """Cross-validation over all rows, whatever ``data.split`` says; null tests on fixed splits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One model per seed; probabilities are averaged over them."""
    inner_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training rows, by whole groups, that stops and chooses; with a split column only where it
    has no val rows."""
    bootstrap: int = Field(default=1000, ge=100)
    calibration: Literal["none", "temperature", "platt"] = "none"
    """Fitted on the inner split: a scale of the logits (multilabel: one for all labels), or (binary only) a
    scale and a shift. Regression has none."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("give one or more different seeds, for instance [0, 1, 2]")
        return value


class FinetuneConfig(StrictModel):
    """One YAML file of ``diptych finetune``."""

    name: str = Field(default="finetune", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The run's name; its folder is ``runs/NAME`` unless ``out`` says otherwise."""
    out: str | None = None
    task: TaskConfig
    data: LabelledDataConfig
    model: SourceConfig
    heads: dict[str, HeadConfig]
    """Heads by name; a list of operators stands for heads of those names with default options. The
    single-modality heads are always added, without which no gain can be told, and ``concat``, the usual
    baseline of fusion; in the place of all these for retrieval ``zero_shot``, the encoders as they are."""
    adapt: AdaptConfig = AdaptConfig()
    early_stopping: StoppingConfig = StoppingConfig()
    eval: EvalConfig = EvalConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("heads", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, list):
            repeated = {str(op) for op in value if value.count(op) > 1}
            if repeated:
                raise ValueError(f"{', '.join(sorted(repeated))} stands twice; give such heads names")
            return {str(op): {"op": op} for op in value}
        return value

    @field_validator("heads", mode="after")
    @classmethod
    def _names(cls, value: dict[str, HeadConfig]) -> dict[str, HeadConfig]:
        for name, head in value.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"'{name}' names a folder: use letters, digits, - and _")
            if name in (*SINGLE, "concat", "zero_shot") and head.op != name:
                raise ValueError(f"'{name}' is the name of the baseline; call this {head.op} head otherwise")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        both = len(self.data.modalities) > 1
        for name, head in self.heads.items():
            adapt = self.adapt_of(name)
            frozen = head.needs_frozen
            if frozen and adapt.tunes_encoders:
                raise ValueError(f"heads.{name}: {frozen}; set its adapt.method: linear_probe")
            head.check_modalities(name, tuple(self.data.modalities))
            if head.op == "zero_shot":
                raise ValueError(
                    f"heads.{name}: retrieval always has zero_shot, other tasks never; remove it"
                )
            if self.task.type == "retrieval" and head.op != "similarity":
                raise ValueError(
                    f"heads.{name}: {head.op} gives no vectors to compare, which retrieval needs; use "
                    "similarity"
                )
            if self.task.type == "vqa" and head.rule in ("vote", "stacking"):
                raise ValueError(f"heads.{name}.rule: {head.rule} needs one class per row; give mean")
            if head.op == "similarity" and self.task.type in ("multiclass", "multilabel", "vqa"):
                raise ValueError(
                    f"heads.{name}: similarity is one number, which answers binary, ordinal and regression "
                    "tasks alone; remove it"
                )
            if head.op in SINGLE and head.op not in self.data.modalities:
                raise ValueError(f"heads.{name}: data.modalities has no {head.op}")
            if head.op not in SINGLE and not both:
                raise ValueError(f"heads.{name}: {head.op} needs two modalities in data.modalities")
        self._check_task()
        return self

    def _check_task(self) -> None:
        """What a kind of task does not have."""
        if self.task.of_pairs and set(self.data.modalities) != set(SINGLE):
            raise ValueError(
                f"data.modalities: {self.task.type} is about image and text; name these two and no other"
            )
        if self.task.type == "retrieval" and self.eval.calibration != "none":
            raise ValueError("eval.calibration: retrieval has no probabilities to calibrate; use none")
        if self.task.type not in ("binary", "multiclass", "ordinal") and any(
            self.adapt_of(name).sampling == "balanced" for name in self.all_heads()
        ):
            raise ValueError(
                f"adapt.sampling: balanced needs one class per row, which {self.task.type} tasks do not have"
            )
        if self.task.type == "regression":
            if self.eval.calibration != "none":
                raise ValueError("eval.calibration: regression has no probabilities to calibrate; use none")
            if any(self.adapt_of(name).label_smoothing for name in self.all_heads()):
                raise ValueError("adapt.label_smoothing: regression has no labels to smooth; use 0")
        if self.eval.calibration == "platt" and self.task.type != "binary":
            raise ValueError("eval.calibration: platt is for binary tasks; use temperature")

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        for name in self.all_heads():
            adapt = self.adapt_of(name)
            if adapt.method == "contrastive" and self.task.type not in ("binary", "multiclass", "retrieval"):
                raise ValueError(f"heads.{name}: contrastive needs classes; set another adapt.method")
            if adapt.method == "contrastive" and self.task.type == "binary" and not adapt.class_prompts:
                raise ValueError(
                    f"heads.{name}: contrastive needs adapt.class_prompts, as the classes of a binary task "
                    "have no names"
                )
            if adapt.soup != "none" and len(self.eval.seeds) < 2:
                raise ValueError(f"heads.{name}: soup needs two or more eval.seeds; set soup: none")
        return self

    def all_heads(self) -> dict[str, HeadConfig]:
        """The heads with the baselines first: of retrieval the encoders as they are."""
        if self.task.type == "retrieval":
            return {"zero_shot": HeadConfig(op="zero_shot", adapt={"method": "linear_probe"})} | self.heads
        baselines = {m: self.heads.get(m, HeadConfig(op=m)) for m in SINGLE if m in self.data.modalities}
        if len(baselines) > 1 and "concat" not in self.heads:
            baselines["concat"] = HeadConfig(op="concat")
        return baselines | self.heads

    def adapt_of(self, name: str) -> AdaptConfig:
        """How a head trains: ``adapt`` with its own keys over it. What ``adapt`` says of encoders is not for
        heads that name ``linear_probe`` themselves."""
        own = self.all_heads()[name].adapt
        unknown = own.keys() - AdaptConfig.model_fields.keys()
        if unknown:
            known = ", ".join(AdaptConfig.model_fields)
            raise ValueError(f"heads.{name}.adapt: unknown key {sorted(unknown)[0]}; known here: {known}")
        inherited = self.adapt.model_dump()
        if own.get("method") == "linear_probe" and self.adapt.tunes_encoders:
            inherited = {key: value for key, value in inherited.items() if not of_encoders(key)}
        try:
            return AdaptConfig.model_validate(inherited | own)
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:
                raise ValueError(f"heads.{name}.adapt: {said}") from error
            key = ".".join(map(str, first["loc"]))
            said = said[0].lower() + said[1:]
            raise ValueError(f"heads.{name}.adapt.{key}: {said}, not {first['input']!r}") from error
