"""Which settings of a head a search may change, and to what."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ...configs.load import StrictModel
from .adapt import AdaptConfig
from .head import OPTIONS, SINGLE_OPTIONS, HeadConfig

if TYPE_CHECKING:
    from .run import FinetuneConfig

__all__ = [
    "ADAPT_KEYS",
    "HEAD_KEYS",
    "RangeConfig",
    "Space",
    "Values",
    "candidates",
    "combinations",
    "examples",
    "is_searched",
    "settings_of",
    "space_of",
    "with_settings",
]

HEAD_KEYS = tuple(key for key in HeadConfig.model_fields if key not in ("op", "adapt"))
ADAPT_KEYS = tuple(
    key for key in AdaptConfig.model_fields if key not in ("method", "class_prompts", "wise_ft", "soup")
)


class RangeConfig(StrictModel):
    """Numbers from ``low`` to ``high``, both among them; whole ones for a setting that counts."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether every order of magnitude is as likely as any other, before anything is known."""


Values = RangeConfig | tuple[Any, ...]
"""What a setting may be: a number of a range, or one of some values."""
Space = dict[str, Values]


def space_of(config: "FinetuneConfig", name: str) -> Space:
    """The settings that are searched of a head, and their values, in a fixed order: those that
    ``search.space`` names, and others by ``_defaults``, of which values that do not go with the rest of the
    head are left out."""
    assert config.search is not None
    head, adapt, given = config.all_heads()[name], config.adapt_of(name), config.search.space
    defaults = _defaults(config, head, adapt)
    space: Space = {}
    for key in (*HEAD_KEYS, *ADAPT_KEYS):
        values = given[key] if key in given else defaults.get(key)
        if values is not None and _takes(config, head, adapt, key):
            space[key] = values
    own = {key: examples(values) for key, values in space.items() if key in HEAD_KEYS and key in given}
    for key in [key for key in space if key not in given]:
        values = space[key]
        if isinstance(values, tuple):
            values = tuple(value for value in values if _goes(head, own | {key: [value]}))
            if len(values) > 1:
                space[key] = values
            else:
                del space[key]
    return space


def _defaults(config: "FinetuneConfig", head: HeadConfig, adapt: AdaptConfig) -> Space:
    """The space where the config names none. What makes a head what it is (interactions, gates, rules, given
    weights, layers) is left alone. Some modality dropout always stays: inner rows have all their modalities
    and would take it away."""
    rates = (1e-5, 1e-3) if head.op == "joint" else (1e-4, 3e-2)
    encoder_rates = (3e-5, 3e-3) if adapt.method in ("norm_bias", "lora") else (1e-6, 1e-4)
    widths = (0, 64, 256) if head.single else (64, 128, 256) if head.reads_tokens else (64, 128, 256, 512)
    space: Space = {
        "lr": RangeConfig(low=rates[0], high=rates[1], log=True),
        "weight_decay": RangeConfig(low=1e-3, high=1.0, log=True),
        "dropout": RangeConfig(low=0.0, high=0.5),
        "width": widths,
        "label_smoothing": RangeConfig(low=0.0, high=0.2),
        "modality_dropout": RangeConfig(low=0.05, high=0.3),
        "encoder_lr": RangeConfig(low=encoder_rates[0], high=encoder_rates[1], log=True),
    }
    if head.rank != "full":
        space["rank"] = (None, 16, 64, 256)
    return space


def _takes(config: "FinetuneConfig", head: HeadConfig, adapt: AdaptConfig, key: str) -> bool:
    """Whether a setting changes anything in how a head is trained."""
    if key in HEAD_KEYS:
        return key in OPTIONS.get(head.op, SINGLE_OPTIONS)
    if key == "label_smoothing":
        return config.task.type != "regression"
    if key == "modality_dropout":
        return not head.single and len(config.data.modalities) > 1 and config.task.type != "retrieval"
    if key.startswith("lora_"):
        return adapt.method == "lora"
    return adapt.tunes_encoders or not key.startswith("encoder_")


def _goes(head: HeadConfig, values: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a head can have all combinations of some values."""
    try:
        for chosen in combinations(values):
            with_settings(head, chosen)
    except ValueError:
        return False
    return True


def combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value per key."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def examples(values: Values | None) -> list[Any]:
    """Values that stand for all: a list's own; of a range its ends, and the number after a whole low end, as
    of two neighbours one at most is a multiple."""
    if not isinstance(values, RangeConfig):
        return list(values or ())
    after = [values.low + 1] if isinstance(values.low, int) else []
    return [values.low, *after, values.high]


def with_settings(head: HeadConfig, settings: Mapping[str, Any]) -> HeadConfig:
    """A head with other settings; those of ``adapt`` become its own keys of ``adapt``. Raises
    ValidationError for what the operator cannot have."""
    own = {key: value for key, value in settings.items() if key in HEAD_KEYS}
    adapt = head.adapt | {key: value for key, value in settings.items() if key not in HEAD_KEYS}
    return HeadConfig.model_validate(head.model_dump() | own | {"adapt": adapt})


def settings_of(head: HeadConfig, adapt: AdaptConfig, keys: Sequence[str]) -> dict[str, Any]:
    """What a head's settings are as its config stands."""
    return {key: getattr(head if key in HEAD_KEYS else adapt, key) for key in keys}


def is_searched(config: "FinetuneConfig", name: str) -> bool:
    """Whether the settings of a head are searched: those of encoders as they are have nothing to train."""
    if config.search is None or config.all_heads()[name].op == "zero_shot":
        return False
    return config.search.encoders or not config.adapt_of(name).tunes_encoders


def candidates(config: "FinetuneConfig") -> list[dict[str, HeadConfig]]:
    """The heads of a config, and what a search may make of their options, one option at a time."""
    found = [config.all_heads()]
    for name, head in config.all_heads().items() if config.search else ():
        for key, values in space_of(config, name).items() if is_searched(config, name) else ():
            if key in HEAD_KEYS:
                found += [{name: with_settings(head, {key: value})} for value in examples(values)]
    return found
