"""The config of one fusion head: an operator and its options."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ...configs.load import StrictModel

__all__ = ["OPTIONS", "STAGES", "HeadConfig", "Link"]

Link = Literal["sigmoid", "softmax", "identity", "cumulative", "vectors"]
"""How logits become answers: yes or no each, one of many, numbers, yes and no in a fixed order, or vectors
that are compared."""

STAGES = {
    "zero_shot": ("mid", "embedding"),
    "similarity": ("mid", "embedding"),
    "concat": ("mid", "embedding"),
    "weighted_sum": ("mid", "embedding"),
    "gated": ("mid", "embedding"),
    "bilinear": ("mid", "embedding"),
    "merged": ("mid", "token"),
    "cross": ("mid", "token"),
    "bottleneck": ("mid", "token"),
    "joint": ("early", "input"),
    "late": ("late", "decision"),
}
"""Stage and level of each fusion operator, as docs/finetune/fusion.md defines them."""

OPTIONS: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "similarity": {},
    "concat": {"width": 256, "dropout": 0.1, "interactions": False},
    "weighted_sum": {"weights": "learned", "dropout": 0.1},
    "gated": {"width": 256, "dropout": 0.1, "gate": "element"},
    "bilinear": {"rank": None, "dropout": 0.1},
    "merged": {"width": 128, "dropout": 0.1, "layers": 2, "heads": 4},
    "cross": {"width": 128, "dropout": 0.1, "layers": 1, "heads": 4},
    "bottleneck": {"width": 128, "dropout": 0.1, "layers": 2, "heads": 4, "bottlenecks": 4},
    "joint": {"dropout": 0.1, "layers": None},
    "late": {"rule": "mean"},
}
"""Which options each fusion operator takes, with their defaults."""
SINGLE_OPTIONS: dict[str, Any] = {"width": 0, "dropout": 0.1}
"""Those of a modality alone."""


class HeadConfig(StrictModel):
    """One fusion head: an operator, its options, and what it trains differently from ``adapt``.

    Options that the operator does not take are null; null for one that it takes is its default. See
    ``OPTIONS``.
    """

    op: str
    """A fusion operator, or the name of a modality: a classifier of that one alone."""
    width: int | None = Field(default=None, ge=0)
    """Hidden units; 0 (not for gated and heads on tokens) leaves a linear classifier."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    interactions: bool | None = None
    """concat: also the elementwise distance and product of every two vectors."""
    weights: Literal["learned", "equal"] | tuple[float, ...] | dict[str, float] | None = None
    """weighted_sum: learned by softmax, all equal, or given: a list in the order of data.modalities, or by
    name. Only their ratio counts."""
    gate: Literal["element", "modality"] | None = None
    """gated: a gate per hidden unit, or one per modality."""
    rank: int | Literal["full"] | None = None
    """bilinear: factors; null takes the embedding's width, where it starts at the inner product; full is the
    whole outer product."""
    layers: int | None = Field(default=None, ge=1)
    """Blocks; of joint null takes all of the image tower's."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads."""
    bottlenecks: int | None = Field(default=None, ge=1)
    """bottleneck: tokens through which the modalities hear of each other."""
    rule: Literal["mean", "learned", "product", "vote", "stacking"] | None = None
    """late: how the modalities' probabilities meet."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Keys of ``adapt`` that differ for this head."""

    @model_validator(mode="before")
    @classmethod
    def _own_options(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("op"), str):
            return data  # the field's own message says what is missing
        own = OPTIONS.get(data["op"], SINGLE_OPTIONS)
        for key, value in data.items():
            if key in cls.model_fields and key not in (*own, "op", "adapt") and value is not None:
                known = ", ".join(own) or "none"
                what = data["op"] if data["op"] in OPTIONS else f"a modality alone, as {data['op']}"
                raise ValueError(f"{key} is no option of {what} (its options: {known}); remove it")
        if data["op"] == "joint":  # pretrained blocks
            data = data | {"adapt": {"lr": 1e-4} | (data.get("adapt") or {})}
        return own | {key: value for key, value in data.items() if value is not None or key not in own}

    @field_validator("weights", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        given = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        numbers = all(isinstance(w, int | float) and 0 < w < float("inf") for w in given)
        if value not in (None, "learned", "equal") and not (given and numbers):
            raise ValueError(f"weights must be learned, equal or numbers above 0, as [0.7, 0.3], not {value}")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("rank", mode="before")
    @classmethod
    def _rank(cls, value: Any) -> Any:
        if value not in (None, "full") and not (type(value) is int and value > 0):
            raise ValueError(f"rank must be 1 or more, full or null, not {value}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "HeadConfig":
        if (self.op == "gated" or self.reads_tokens) and self.width == 0:
            raise ValueError(f"{self.op} needs a width of at least 1")
        if self.width and self.heads and self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.op == "bottleneck" and self.layers == 1:
            raise ValueError("bottleneck needs 2 or more layers: in the first, bottlenecks only listen")
        return self

    @property
    def single(self) -> bool:
        """Whether it reads one modality alone, which ``op`` names."""
        return self.op not in OPTIONS

    @property
    def stage(self) -> tuple[str, str]:
        """Stage and level."""
        return STAGES.get(self.op, ("single", "embedding"))

    @property
    def reads_tokens(self) -> bool:
        """Whether the head needs token features of any kind."""
        return self.stage[1] in ("token", "input")

    @property
    def reads_inputs(self) -> bool:
        """Whether the head needs the embeddings that the towers' first blocks read."""
        return self.stage[1] == "input"

    @property
    def needs_frozen(self) -> str | None:
        """Why the head cannot be trained together with encoders, if so."""
        if self.reads_tokens:
            return f"{self.op} reads frozen {'embeddings' if self.reads_inputs else 'tokens'}"
        if self.rule == "stacking":
            return "stacking needs answers to rows that nothing was trained on, the encoders neither"
        return None

    def check_modalities(self, name: str, modalities: tuple[str, ...]) -> None:
        """Raise ValueError if given weights are not one per modality."""
        if isinstance(self.weights, tuple) and len(self.weights) != len(modalities):
            raise ValueError(
                f"heads.{name}.weights: {len(self.weights)} numbers for the {len(modalities)} modalities "
                f"{', '.join(modalities)}; give one each"
            )
        if isinstance(self.weights, dict) and set(self.weights) != set(modalities):
            raise ValueError(
                f"heads.{name}.weights: names {', '.join(self.weights)}, but the modalities are "
                f"{', '.join(modalities)}; give one number each"
            )
