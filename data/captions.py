"""Which text stands for an image in an epoch: its caption, or others from the sample's JSON."""

from typing import Any

from numpy.random import Generator
from pydantic import Field, model_validator

from ..configs.load import StrictModel
from .text import Truncate

__all__ = ["CaptionConfig", "choose_caption", "choose_text", "texts_under", "word"]


class CaptionConfig(StrictModel):
    """Weights of the texts among which one is drawn for each sample in each epoch, keyed by (seed, epoch,
    sample id). A text that a sample does not have leaves its weight to the others; a sample that has none of
    them takes its .txt."""

    txt: float = Field(default=1.0, ge=0)
    """The caption proper."""
    names: float = Field(default=0.0, ge=0)
    """One of the strings under the JSON key ``names``."""
    tags: float = Field(default=0.0, ge=0)
    """Some of the strings under the JSON key ``tags``, in drawn order, joined by commas."""
    max_tags: int = Field(default=4, ge=1)
    """The most tags that are joined; the number is drawn from 1 to this."""
    fields: dict[str, float] = Field(default_factory=dict)
    """Other JSON keys with their weights: a string is taken as it stands, of a list one string is drawn."""
    templates: tuple[str, ...] = ()
    """Sentences with ``{}`` for the text, for data whose texts are class names: "a photo of a {}". One is
    drawn for each sample in each epoch; a blank text stays blank."""
    lower: bool = False
    """Whether captions are put in lower case. CLIP's own tokenizer does so anyway."""
    truncate: Truncate = "end"
    """What is left of a caption that is longer than the model's context: its beginning ("end" is cut off),
    its first whole sentences ("sentence"), or from a drawn word on what fits ("random")."""

    @model_validator(mode="after")
    def _some_weight(self) -> "CaptionConfig":
        if negative := [key for key, weight in self.fields.items() if not weight >= 0]:
            raise ValueError(f"fields: the weight of {negative[0]} must not be negative")
        if not self.txt + self.names + self.tags + sum(self.fields.values()) > 0:
            raise ValueError("all weights are 0; give txt, names, tags or one of fields a weight")
        if wrong := [template for template in self.templates if template.count("{}") != 1]:
            raise ValueError(f"templates: '{wrong[0]}' must have {{}} once, where the text goes")
        return self

    def keys(self) -> list[str]:
        """The keys of the JSON that texts are drawn from."""
        weights = {"names": self.names, "tags": self.tags, **self.fields}
        return [key for key, weight in weights.items() if weight > 0]


def choose_caption(config: CaptionConfig, caption: str, meta: dict[str, Any], rng: Generator) -> str:
    """What a sample's image is shown with: a text, worded. ``rng``: the sample's own random numbers in this
    epoch."""
    return word(config, choose_text(config, caption, meta, rng), rng)


def word(config: CaptionConfig, text: str, rng: Generator) -> str:
    """The text in a drawn template, in lower case if so configured. Samples of one text are of one meaning
    whatever the template, so their hash is the text's."""
    if config.templates and text.strip():
        text = config.templates[int(rng.random() * len(config.templates))].replace("{}", text)
    return text.lower() if config.lower else text


def choose_text(config: CaptionConfig, caption: str, meta: dict[str, Any], rng: Generator) -> str:
    """One of a sample's texts, drawn by weight."""
    weights = {"names": config.names, "tags": config.tags, **config.fields}
    texts = {key: texts_under(meta, key) for key, weight in weights.items() if weight > 0}
    choices = [(key, weights[key]) for key, found in texts.items() if found]
    if not choices:
        return caption
    draw = rng.random() * (config.txt + sum(weight for _, weight in choices))
    if draw < config.txt:
        return caption
    draw -= config.txt
    key = choices[-1][0]  # where rounding leaves the draw past the last
    for name, weight in choices:
        if draw < weight:
            key = name
            break
        draw -= weight
    found = texts[key]
    if key == "tags" and "tags" not in config.fields:
        count = 1 + int(rng.random() * min(config.max_tags, len(found)))
        keys = rng.random(len(found))
        return ", ".join(found[int(i)] for i in keys.argsort(kind="stable")[:count])
    return found[int(rng.random() * len(found))]


def texts_under(meta: dict[str, Any], key: str) -> list[str]:
    """The texts under a key of a sample's JSON: a string, or the strings of a list; blank ones are none."""
    value = meta.get(key)
    values: list[Any] = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text for text in values if isinstance(text, str) and text.strip()]
