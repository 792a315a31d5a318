"""The config of how heads and encoders are trained: ``adapt`` of a fine-tuning run."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ...configs.load import StrictModel

__all__ = ["AdaptConfig", "of_encoders"]


def of_encoders(key: str) -> bool:
    """Whether a key of ``AdaptConfig`` says how encoders are trained."""
    return key in ("class_prompts", "wise_ft", "soup") or key.startswith(("encoder_", "lora_"))


class AdaptConfig(StrictModel):
    """How heads, and with every method but ``linear_probe`` the encoders, are trained."""

    method: Literal["linear_probe", "lp_ft", "full", "norm_bias", "lora", "contrastive"] = "linear_probe"
    """``linear_probe``: heads on frozen, cached features. ``lp_ft``: the head first, then head and encoders
    (Kumar et al. 2022, arXiv 2202.10054). ``full``: head and encoders together from the start. ``norm_bias``:
    the head first, then head, norms and biases (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199). ``lora``:
    the head first, then head and low-rank changes of the encoders' weights (Hu et al. 2021, arXiv
    2106.09685). ``contrastive``: the encoders by the contrastive loss of rows and texts of their classes
    (FLYP, Goyal et al. 2022, arXiv 2212.00638), then the head on what they give."""
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    batch_size: int = Field(default=512, ge=2)
    epochs: int = Field(default=20, ge=1)
    """Passes over the training rows at most with the encoders frozen; early stopping usually ends sooner."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """``balanced`` draws as many rows per epoch with replacement, each class as often as any other; for tasks
    with one class per row."""
    modality_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of training rows in which one modality, drawn at random, is replaced by its learned null vector;
    of more than two, each other one with probability 1/2; never all of them. It makes predictions with a
    missing modality sensible."""
    encoder_lr: float | None = Field(default=None, gt=0)
    """Peak rate of what is trained of the encoders; null is 1e-5, for norm_bias and lora 3e-4."""
    encoder_epochs: int = Field(default=2, ge=1)
    """Passes over the training rows at most with the encoders in training."""
    encoder_batch_size: int = Field(default=128, ge=2)
    encoder_layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the encoders' rate from each layer to the one before it (arXiv 2106.08254); 1 for one
    rate."""
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16.0, gt=0)
    """lora: a weight becomes W + (lora_alpha / lora_rank) B A."""
    lora_targets: Literal["attention", "all"] = "attention"
    """lora: the projections of attention (queries, keys, values, output), or every linear layer."""
    class_prompts: dict[str, str | list[str]] | None = None
    """contrastive: texts of each class, one or a list; null takes the class names (not for binary tasks)."""
    wise_ft: Literal["auto"] | float | None = None
    """Weights of the encoders between pretrained (0) and fine-tuned (1), the head trained again on what they
    give (Wortsman et al. 2021, arXiv 2109.01903); auto lets the inner rows choose. Null is off."""
    soup: Literal["none", "uniform", "greedy"] = "none"
    """One model whose weights are the mean of those of the seeds (Wortsman et al. 2022, arXiv 2203.05482):
    of all, or of those that together do best on the inner rows. The seeds then share the head's initial
    weights."""

    @field_validator("class_prompts")
    @classmethod
    def _texts(cls, value: dict[str, str | list[str]] | None) -> dict[str, str | list[str]] | None:
        for name, texts in (value or {}).items():
            if not texts or not all(text.strip() for text in ([texts] if isinstance(texts, str) else texts)):
                raise ValueError(f"class '{name}' needs a text or a list of texts")
        return value

    @field_validator("wise_ft")
    @classmethod
    def _share(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError("give auto, a number from 0 (pretrained) to 1 (fine-tuned), or null")
        return value

    @model_validator(mode="after")
    def _has_encoders(self) -> Self:
        if self.wise_ft is not None and not self.tunes_encoders:
            raise ValueError("wise_ft needs trained encoders; set method to another than linear_probe")
        return self

    @property
    def tunes_encoders(self) -> bool:
        """Whether the encoders are trained too."""
        return self.method != "linear_probe"

    @property
    def peak_encoder_lr(self) -> float:
        """``encoder_lr``, or the method's own."""
        return self.encoder_lr or (3e-4 if self.method in ("norm_bias", "lora") else 1e-5)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Shares of the fine-tuned weights that wise_ft tries, from the smallest."""
        if self.wise_ft is None:
            return ()
        return (0.0, 0.25, 0.5, 0.75, 1.0) if self.wise_ft == "auto" else (float(self.wise_ft),)

    @property
    def most_epochs(self) -> int:
        """Epochs of one seed, without early stopping."""
        frozen = 0 if self.method == "full" else self.epochs
        again = len(self.alphas) or (1 if self.method == "contrastive" else 0)
        return frozen + (self.encoder_epochs if self.tunes_encoders else 0) + again * self.epochs
