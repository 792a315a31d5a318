"""The config of a task: what is to be predicted, and the weights of its loss."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.load import StrictModel

__all__ = ["OF_PAIRS", "TaskConfig"]

OF_PAIRS = ("retrieval", "matching")
"""Tasks whose tables hold pairs of pictures and texts that match."""


class TaskConfig(StrictModel):
    """What is to be predicted."""

    type: Literal[
        "binary", "multiclass", "multilabel", "regression", "ordinal", "retrieval", "matching", "vqa"
    ]
    target: str | tuple[str, ...] | None = "target"
    """Column of the labels. Multilabel: a column of lists, a column of text with a ``separator``, or several
    columns of 0 and 1, whose names are the labels. Regression: a column of numbers. Vqa: a column of lists
    of answers, or of text with a ``separator``. Retrieval and matching:
    by default none, a picture and a text match that stand in one row; else a column of names, and all
    pictures and texts of rows with one name match."""
    positive: str | int | None = None
    """Binary only: the label that counts as positive; null for columns of 0 and 1 or true and false."""
    classes: tuple[str, ...] | None = None
    """The classes in the order of their probabilities; null takes those of the training rows, sorted.
    Ordinal: needed, from low to high."""
    separator: str | None = Field(default=None, min_length=1)
    """Multilabel and vqa: what stands between the labels of a text cell; null where cells are lists."""
    vocabulary: int = Field(default=3000, ge=2)
    """Vqa only: answers at most, those that most training questions have, at least ``data.min_class_rows`` of
    them; ``classes`` gives them instead."""
    class_weight: Literal["none", "balanced"] | dict[str, float] = "none"
    """Weights of the training loss. ``balanced``: all classes count the same, and for multilabel tasks
    positives and negatives of each label; ``{label: weight}`` weighs the rows of a class (multilabel: the
    positives of a label), others count 1."""
    focal_gamma: float = Field(default=0.0, ge=0)
    """Focal loss (Lin et al. 2017, arXiv 1708.02002): losses times (1 - p)^gamma, p the probability of the
    truth; 0 is off. Probabilities come out too timid, so calibrate them."""
    negatives: int = Field(default=1, ge=1)
    """Matching only: pairs that do not match, made per pair of the table in validation and test. With 1 the
    classes are balanced."""
    hard_negatives: bool = False
    """Matching only: in training, pairs that do not match are drawn by how similar picture and text are
    (ALBEF, Li et al. 2021, arXiv 2107.07651)."""

    @property
    def of_pairs(self) -> bool:
        """Whether the rows of the table are pairs that match."""
        return self.type in OF_PAIRS

    @property
    def columns(self) -> str | tuple[str, ...]:
        """The target columns; an empty tuple for a task without any."""
        return () if self.target is None else self.target

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.of_pairs and "target" not in self.model_fields_set:
            object.__setattr__(self, "target", None)  # the default depends on the type
        if self.type == "binary" and self.classes is not None:
            raise ValueError("classes belongs to multiclass; for binary give positive")
        if self.type != "binary" and self.positive is not None:
            raise ValueError(f"positive belongs to binary; remove it for {self.type}")
        if self.classes is not None and len(set(self.classes)) != max(2, len(self.classes)):
            raise ValueError("classes must be two or more different names")
        if self.type == "ordinal" and (self.classes is None or len(self.classes) < 3):
            raise ValueError("ordinal needs classes, three or more from low to high; for two use binary")
        if self.type == "regression" and self.classes is not None:
            raise ValueError("classes belongs to tasks with classes; remove it for regression")
        lists = self.type in ("multilabel", "vqa") and isinstance(self.target, str)
        if self.separator is not None and not lists:
            raise ValueError("separator belongs to multilabel and vqa with one text column; remove it")
        if self.vocabulary != 3000 and self.type != "vqa":
            raise ValueError(f"vocabulary belongs to vqa; remove it for {self.type}")
        self._check_pairs()
        self._check_columns()
        self._check_loss()
        return self

    def _check_pairs(self) -> None:
        if self.of_pairs:
            if self.classes is not None:
                raise ValueError(f"classes belongs to tasks with classes; remove it for {self.type}")
            if self.class_weight != "none":
                raise ValueError(
                    f"class_weight: {self.type} has no classes; use data.weight for weights of rows"
                )
        elif self.target is None:
            raise ValueError(f"target: {self.type} needs a column; name one")
        if self.type != "matching" and (self.negatives != 1 or self.hard_negatives):
            key = "hard_negatives" if self.hard_negatives else "negatives"
            raise ValueError(f"{key} belongs to matching; remove it for {self.type}")

    def _check_columns(self) -> None:
        if self.target is None or isinstance(self.target, str):
            return
        if self.type != "multilabel":
            raise ValueError(f"target: {self.type} has one column; several are for multilabel")
        if len(set(self.target)) != max(2, len(self.target)):
            raise ValueError("target: name two or more different columns, or one")
        if self.classes is not None:
            raise ValueError("classes: the labels are the names of the target columns; remove it")

    def _check_loss(self) -> None:
        if self.type == "vqa" and self.class_weight != "none":
            raise ValueError("class_weight: vqa has soft answers; use data.weight for weights of rows")
        if self.type == "regression" and self.class_weight != "none":
            raise ValueError("class_weight: regression has no classes; use data.weight for weights of rows")
        if isinstance(self.class_weight, dict):
            for name, weight in self.class_weight.items():
                if not 0 <= weight < float("inf"):
                    raise ValueError(f"class_weight.{name}: {weight} is no weight; give a number from 0 on")
        if self.focal_gamma and self.type in ("regression", "ordinal", "retrieval", "vqa"):
            raise ValueError(
                f"focal_gamma: {self.type} has no focal loss; it is for binary, multiclass and multilabel"
            )
