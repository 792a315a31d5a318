"""The config of a fine-tuning run: one YAML file of ``diptych finetune``.

The parts that are more than a few keys stand in files of their own beside this one.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ...configs.load import FolderName, StrictModel
from ...pretrain.tracking import TrackingConfig
from .adapt import AdaptConfig, of_encoders
from .head import OPTIONS, HeadConfig
from .modality import ENCODED, ModalityConfig, check_names
from .search import SearchConfig, check_search
from .source import SourceConfig
from .task import TaskConfig

__all__ = ["CvConfig", "EvalConfig", "FinetuneConfig", "LabelledDataConfig", "StoppingConfig"]


class LabelledDataConfig(StrictModel):
    """The labelled table. Columns are declared, never guessed."""

    manifest: str
    """A table (CSV, TSV, JSONL or Parquet), WebDataset shards (a tar, or a folder of tars), or a folder that
    holds one of pictures per class; tars and folders may be several, by braces or ``*``.
    ``corpus:NAME/FILE`` is a place of a fetched corpus."""
    format: Literal["table", "shards", "folders"] | None = None
    """What the manifest is. Null is what its ending says; of folders it must be said."""
    modalities: dict[str, ModalityConfig] = Field(
        default={"image": ModalityConfig(column="image"), "text": ModalityConfig(column="text")}
    )
    """Columns by modality: ``image`` and ``text``, which the checkpoint's towers read, and others of any
    name, as ``tabular: {numeric: [price], categorical: [brand]}`` or ``audio: {embedding: sound}``. An
    image cell is a path relative to the manifest, bytes, or ``FOLDER#KEY``, a sample of a shard folder. An
    empty cell is a missing modality."""
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
    def _names(cls, value: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        check_names(value)
        return value


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
    rows: Literal["all", "without_test"] = "all"
    """Which rows are dealt into folds: all of them, whatever ``data.split`` says, or all but those of its
    split test (without a split column those that ``data.test_share`` takes), which then wait for
    ``--holdout``."""
    stratify: bool = True
    """Keep the shares of the classes equal in all folds and inner splits, where the task has classes."""
    seed: int = Field(default=0, ge=0)
    """Repeat r shuffles with the random state seed + r. Folds do not depend on ``eval.seeds``."""


class EvalConfig(StrictModel):
    """How scores are made."""

    cv: CvConfig | None = None
    """Cross-validation over ``cv.rows``; null tests on fixed splits."""
    holdout: bool = False
    """Test on the fixed splits although ``cv`` is given, in the folder ``holdout`` of the run's. It is what
    ``diptych finetune --holdout`` sets."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One model per seed; probabilities are averaged over them."""
    inner_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the training rows, by whole groups, that stops and chooses; with a split column only where it
    has no val rows."""
    bootstrap: int = Field(default=1000, ge=100)
    calibration: Literal["none", "temperature", "platt"] = "none"
    """Fitted on the inner split: a scale of the logits (multilabel: one for all labels), or (binary and
    matching only) a scale and a shift. Regression has none."""
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = 0.5
    """From which probability on the positive class (multilabel: each label) is predicted. ``auto``: of each
    head and label the one with the greatest F1 on the inner split. For binary (also matching) and multilabel
    tasks."""

    @property
    def folds(self) -> CvConfig | None:
        """The cross-validation that this run is; None on fixed splits."""
        return None if self.holdout else self.cv

    @model_validator(mode="after")
    def _beside(self) -> Self:
        if self.holdout and self.cv is None:
            raise ValueError("holdout: without cv every run tests on the fixed splits; leave --holdout out")
        return self

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
    out: FolderName | None = None
    task: TaskConfig
    data: LabelledDataConfig
    model: SourceConfig
    heads: dict[str, HeadConfig]
    """Heads by name; a list of operators stands for heads of those names with default options. The
    single-modality heads are always added, without which no gain can be told, and ``concat``, the usual
    baseline of fusion; in the place of all these for retrieval ``zero_shot``, the encoders as they are."""
    adapt: AdaptConfig = AdaptConfig()
    early_stopping: StoppingConfig = StoppingConfig()
    search: SearchConfig | None = None
    """Tries several settings per head before it is trained; null trains them as they are written."""
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
        for name in value:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"'{name}' names a folder: use letters, digits, - and _")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, head in self.heads.items():
            if name in (*ENCODED, *self.data.modalities, "concat", "zero_shot") and head.op != name:
                raise ValueError(f"'{name}' is the name of the baseline; call this {head.op} head otherwise")
            self._check_modalities(name, head)
            adapt = self.adapt_of(name)
            frozen = head.needs_frozen
            if frozen and adapt.tunes_encoders:
                raise ValueError(f"heads.{name}: {frozen}; set its adapt.method: linear_probe")
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
        target = self.task.target or ()
        for k, declared in self.data.modalities.items():
            for column in [name for names in declared.columns.values() for name in names]:
                if column in ((target,) if isinstance(target, str) else target):
                    raise ValueError(f"data.modalities.{k}: '{column}' is what task.target asks; remove it")
        self._check_task()
        self._check_encoders()
        return self

    def _check_modalities(self, name: str, head: HeadConfig) -> None:
        """What a head cannot do with the modalities of the table."""
        modalities = self.data.modalities
        if head.single:
            if head.op not in modalities:
                near = get_close_matches(head.op, [*OPTIONS, *modalities], n=1, cutoff=0.6)
                if head.op in ENCODED:
                    hint = f"it has {', '.join(modalities)}; declare {head.op} there or remove the head"
                else:
                    hint = f"did you mean '{near[0]}'?" if near else f"operators are {', '.join(OPTIONS)}"
                raise ValueError(f"heads.{name}: data.modalities has no {head.op}; {hint}")
            return
        if len(modalities) < 2:
            raise ValueError(f"heads.{name}: {head.op} needs two modalities in data.modalities")
        head.check_modalities(name, tuple(modalities))
        if head.op == "similarity" and not set(ENCODED) <= set(modalities):
            raise ValueError(f"heads.{name}: similarity compares image and text; remove it")
        if head.reads_inputs:
            others = [k for k in modalities if k not in ENCODED]
            if others:
                raise ValueError(
                    f"heads.{name}: {head.op} reads image and text alone, not {others[0]}; remove it"
                )
            if any(declared.pool for declared in modalities.values()):
                raise ValueError(f"heads.{name}: {head.op} reads one picture per row; remove it or the pool")

    def _check_encoders(self) -> None:
        """What encoders that were trained apart cannot do."""
        apart, used = self.model.separate, [k for k in ("image", "text") if k in self.data.modalities]
        if not apart:
            return
        for k in used:
            if k not in apart:
                raise ValueError(
                    f"model.{k}: data.modalities has {k}; give its encoder, or leave {k} out there"
                )
        for k in apart:
            if k not in used:
                raise ValueError(f"model.{k}: data.modalities has no {k}; remove it")
        why = "needs one space of pictures and texts, which encoders trained apart do not have"
        if self.task.hard_negatives:
            raise ValueError(f"task.hard_negatives: true {why}; leave it out")
        for name, head in self.all_heads().items():
            adapt = self.adapt_of(name)
            if head.op == "zero_shot":
                raise ValueError(f"task.type: retrieval {why}; give a dual encoder as model.checkpoint")
            if head.op == "similarity":
                raise ValueError(f"heads.{name}: similarity {why}; remove it")
            if adapt.method == "contrastive":
                raise ValueError(f"heads.{name}: adapt.method contrastive {why}; set another")
            if adapt.class_prompts is not None:
                raise ValueError(f"heads.{name}: adapt.class_prompts {why}; remove it")

    def _check_task(self) -> None:
        """What a kind of task does not have."""
        if self.task.of_pairs and set(self.data.modalities) != set(ENCODED):
            raise ValueError(
                f"data.modalities: {self.task.type} is about image and text; name these two and no other"
            )
        if self.task.of_pairs and any(declared.pool for declared in self.data.modalities.values()):
            raise ValueError(f"data.modalities: {self.task.type} is about single pictures; remove the pool")
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
        if self.eval.threshold != 0.5 and self.task.type not in ("binary", "matching", "multilabel"):
            raise ValueError(
                f"eval.threshold: {self.task.type} tasks have none; it is for binary and multilabel ones"
            )
        if self.eval.calibration == "platt" and self.task.type not in ("binary", "matching"):
            raise ValueError("eval.calibration: platt is for binary tasks; use temperature")

    @model_validator(mode="after")
    def _methods_fit(self) -> Self:
        for name in self.all_heads():
            adapt = self.adapt_of(name)
            if adapt.tunes_encoders and not self._reads_encoders(name):
                raise ValueError(
                    f"heads.{name}: {adapt.method} trains encoders, and none is read by this head; set its "
                    "adapt.method: linear_probe"
                )
            if adapt.method == "contrastive" and self.task.type not in ("binary", "multiclass", "retrieval"):
                raise ValueError(
                    f"heads.{name}: contrastive is for binary, multiclass and retrieval tasks, not "
                    f"{self.task.type}; set another adapt.method"
                )
            if adapt.method == "contrastive" and self.task.type == "binary" and not adapt.class_prompts:
                raise ValueError(
                    f"heads.{name}: contrastive needs adapt.class_prompts, as the classes of a binary task "
                    "have no names"
                )
            if adapt.soup != "none" and len(self.eval.seeds) < 2:
                raise ValueError(f"heads.{name}: soup needs two or more eval.seeds; set soup: none")
        return self

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        check_search(self)
        return self

    def all_heads(self) -> dict[str, HeadConfig]:
        """The heads with the baselines first: of retrieval the encoders as they are."""
        if self.task.type == "retrieval":
            return {"zero_shot": HeadConfig(op="zero_shot", adapt={"method": "linear_probe"})} | self.heads
        order = sorted(self.data.modalities, key=lambda m: ENCODED.index(m) if m in ENCODED else len(ENCODED))
        baselines = {m: self.heads.get(m, HeadConfig(op=m)) for m in order}
        if len(baselines) > 1 and "concat" not in self.heads:
            baselines["concat"] = HeadConfig(op="concat")
        return baselines | self.heads

    def singles(self) -> list[str]:
        """Names of the heads that read one modality alone."""
        return [name for name, head in self.all_heads().items() if head.single]

    def _reads_encoders(self, name: str) -> bool:
        """Whether a head reads a modality of the checkpoint's towers."""
        head = self.all_heads()[name]
        return any(k in ENCODED for k in ([head.op] if head.single else self.data.modalities))

    def adapt_of(self, name: str) -> AdaptConfig:
        """How a head trains: ``adapt`` with its own keys over it. What ``adapt`` says of encoders is not for
        heads that name ``linear_probe`` themselves, nor for single modalities that have none."""
        own = self.all_heads()[name].adapt
        unknown = own.keys() - AdaptConfig.model_fields.keys()
        if unknown:
            known = ", ".join(AdaptConfig.model_fields)
            raise ValueError(f"heads.{name}.adapt: unknown key {sorted(unknown)[0]}; known here: {known}")
        inherited = self.adapt.model_dump()
        alone = self.all_heads()[name].single and not self._reads_encoders(name)
        if (
            self.adapt.tunes_encoders
            and own.get("method", "linear_probe" if alone else None) == "linear_probe"
        ):
            own = {"method": "linear_probe"} | own
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
