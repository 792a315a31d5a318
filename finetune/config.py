"""The config of a fine-tuning run: one YAML file of ``diptych finetune``.

The heads' own options stand in ``HeadConfig``; which of them an operator takes is written in ``OPTIONS``.
"""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ..configs.load import StrictModel
from ..pretrain.tracking import TrackingConfig

__all__ = [
    "OPTIONS",
    "SINGLE",
    "AdaptConfig",
    "EvalConfig",
    "FinetuneConfig",
    "HeadConfig",
    "LabelledDataConfig",
    "ModalityConfig",
    "SourceConfig",
    "StoppingConfig",
    "TaskConfig",
]

Op = Literal[
    "image", "text", "similarity", "concat", "weighted_sum", "gated", "bilinear", "cross", "late"
]  # fmt: skip
SINGLE = ("image", "text")
"""Operators that read one modality: the baselines of every run."""

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"width": 0, "dropout": 0.1},
    "text": {"width": 0, "dropout": 0.1},
    "similarity": {},
    "concat": {"width": 256, "dropout": 0.1, "interactions": False},
    "weighted_sum": {"weights": "learned", "dropout": 0.1},
    "gated": {"width": 256, "dropout": 0.1, "gate": "element"},
    "bilinear": {"rank": None, "dropout": 0.1},
    "cross": {"width": 128, "dropout": 0.1, "layers": 1, "heads": 4},
    "late": {"rule": "mean"},
}
"""Which options each operator takes, with their defaults."""


class TaskConfig(StrictModel):
    """What is to be predicted."""

    type: Literal["binary", "multiclass"]
    target: str = "target"
    """Column of the labels."""
    positive: str | int | None = None
    """Binary only: the label that counts as positive; null for columns of 0 and 1 or true and false."""
    classes: tuple[str, ...] | None = None
    """Multiclass only: the classes in the order of their probabilities; null takes those of the training
    rows, sorted."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.type == "binary" and self.classes is not None:
            raise ValueError("classes belongs to multiclass; for binary give positive")
        if self.type == "multiclass" and self.positive is not None:
            raise ValueError("positive belongs to binary; for multiclass give classes")
        if self.classes is not None and len(set(self.classes)) != max(2, len(self.classes)):
            raise ValueError("classes must be two or more different names")
        return self


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
    split: str | None = "split"
    """Column with train, val and test; null makes a seeded split by group."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Only without a split column: share of the rows that is held out for the test."""
    min_class_rows: int = Field(default=2, ge=1)
    """Training rows that every class must have."""
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


class HeadConfig(StrictModel):
    """One fusion head: an operator, its options, and what it trains differently from ``adapt``.

    Options that the operator does not take are null; see ``OPTIONS``.
    """

    op: Op
    width: int | None = Field(default=None, ge=0)
    """Hidden units; 0 (not for gated and cross) leaves a linear classifier."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    interactions: bool | None = None
    """concat: also the elementwise distance and product of the two vectors."""
    weights: Literal["learned", "equal"] | None = None
    """weighted_sum: learned by softmax, or all equal."""
    gate: Literal["element", "modality"] | None = None
    """gated: a gate per hidden unit, or one per modality."""
    rank: int | None = Field(default=None, ge=1)
    """bilinear: factors; null takes the embedding's width, where it starts at the inner product."""
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    """cross: attention heads."""
    rule: Literal["mean", "learned"] | None = None
    """late: how the modalities' probabilities meet."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``adapt`` that differ for this head."""

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("op") not in OPTIONS:
            return data  # the field's own message names the known operators
        own = OPTIONS[data["op"]]
        for key, value in data.items():
            if key in cls.model_fields and key not in (*own, "op", "adapt") and value is not None:
                known = ", ".join(own) or "none"
                raise ValueError(f"{key} is no option of {data['op']} (its options: {known}); remove it")
        return own | data

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.op in ("gated", "cross") and self.width == 0:
            raise ValueError(f"{self.op} needs a width of at least 1")
        if self.op == "cross" and self.width and self.heads and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class AdaptConfig(StrictModel):
    """How heads, and with ``lp_ft`` the encoders, are trained."""

    method: Literal["linear_probe", "lp_ft"] = "linear_probe"
    """``linear_probe``: heads on frozen, cached features. ``lp_ft``: the head first, then head and encoders
    (Kumar et al. 2022, arXiv 2202.10054)."""
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    batch_size: int = Field(default=512, ge=2)
    epochs: int = Field(default=20, ge=1)
    """Passes over the training rows at most; early stopping usually ends sooner."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    modality_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of training rows in which one modality, drawn at random, is replaced by its learned null vector;
    never all of them. It makes predictions with a missing modality sensible."""
    encoder_lr: float = Field(default=1e-5, gt=0)
    """lp_ft: peak rate of the encoders."""
    encoder_epochs: int = Field(default=2, ge=1)
    encoder_batch_size: int = Field(default=128, ge=2)


class StoppingConfig(StrictModel):
    """Early stopping on the inner split."""

    metric: str = "auto"
    """``loss``, a metric of the task, or auto: AUROC for binary, accuracy for multiclass tasks."""
    patience: int = Field(default=4, ge=1)
    """Epochs without an improvement after which training ends; the best epoch's weights are kept."""
    min_delta: float = Field(default=0.0, ge=0)


class EvalConfig(StrictModel):
    """How scores are made."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One model per seed; probabilities are averaged over them."""
    inner_share: float = Field(default=0.15, gt=0, lt=1)
    """Only without val rows: share of the training rows, by whole groups, that stops and chooses."""
    bootstrap: int = Field(default=1000, ge=100)
    calibration: Literal["none", "temperature", "platt"] = "none"
    """Fitted on the inner split: a scale of the logits, or (binary only) a scale and a shift."""

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
    single-modality heads are always added: without them no gain can be told."""
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
            if name in SINGLE and head.op != name:
                raise ValueError(f"'{name}' is the name of the baseline; call this {head.op} head otherwise")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        both = len(self.data.modalities) > 1
        for name, head in self.heads.items():
            adapt = self.adapt_of(name)
            if head.op == "cross" and adapt.method == "lp_ft":
                raise ValueError(
                    f"heads.{name}: cross reads frozen tokens; set its adapt.method: linear_probe"
                )
            if head.op == "similarity" and self.task.type != "binary":
                raise ValueError(f"heads.{name}: similarity answers binary tasks alone; remove it")
            if head.op in SINGLE and head.op not in self.data.modalities:
                raise ValueError(f"heads.{name}: data.modalities has no {head.op}")
            if head.op not in SINGLE and not both:
                raise ValueError(f"heads.{name}: {head.op} needs two modalities in data.modalities")
        if self.eval.calibration == "platt" and self.task.type != "binary":
            raise ValueError("eval.calibration: platt is for binary tasks; use temperature")
        return self

    def all_heads(self) -> dict[str, HeadConfig]:
        """The heads with the baselines first."""
        single = {m: self.heads.get(m, HeadConfig(op=m)) for m in SINGLE if m in self.data.modalities}
        return single | self.heads

    def adapt_of(self, name: str) -> AdaptConfig:
        """How a head trains: ``adapt`` with its own keys over it."""
        own = self.heads[name].adapt if name in self.heads else {}
        unknown = own.keys() - AdaptConfig.model_fields.keys()
        if unknown:
            known = ", ".join(AdaptConfig.model_fields)
            raise ValueError(f"heads.{name}.adapt: unknown key {sorted(unknown)[0]}; known here: {known}")
        try:
            return AdaptConfig.model_validate(self.adapt.model_dump() | own)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            said = first["msg"][0].lower() + first["msg"][1:]
            raise ValueError(f"heads.{name}.adapt.{key}: {said}, not {first['input']!r}") from error
