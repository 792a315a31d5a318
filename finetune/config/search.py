"""The config of a search for settings: ``search`` of a fine-tuning run.

Every head gets the same number of trials, the single modalities and ``concat`` too: with equal tuning few
fusions beat simple ones ("Fusion or Confusion?", arXiv 2512.22991).
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any, get_args

from pydantic import Field, ValidationError, field_validator

from ...configs.errors import UserError
from ...configs.load import StrictModel
from .adapt import AdaptConfig
from .head import HeadConfig
from .space import (
    ADAPT_KEYS,
    HEAD_KEYS,
    RangeConfig,
    Values,
    combinations,
    examples,
    is_searched,
    space_of,
    with_settings,
)

if TYPE_CHECKING:
    from .run import FinetuneConfig

__all__ = ["SearchConfig", "check_search", "encoder_cost", "import_optuna", "trainings"]


class SearchConfig(StrictModel):
    """A search for the settings of every head by the inner rows of each fold alone, with the tree-structured
    Parzen estimator (Bergstra et al. 2011). The best settings are then trained with all ``eval.seeds``."""

    trials: int = Field(ge=2)
    """Settings that are tried per head and fold, as many for all heads; the first are those of the config."""
    space: dict[str, RangeConfig | tuple[Any, ...] | None] = Field(default_factory=dict)
    """What is tried of a setting of ``heads`` or ``adapt``, for every head that takes it: ``{low: 1e-4, high:
    1e-2, log: true}`` or a list of values; null leaves it as the config says. Settings that are not named
    here have the space that docs/finetune/search.md tells."""
    encoders: bool = False
    """Whether heads that train encoders are searched too: every trial trains the encoders."""

    @field_validator("space", mode="before")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        return (
            {key: _values(key, given) for key, given in value.items()} if isinstance(value, dict) else value
        )


def _values(key: str, given: Any) -> Values | None:
    """The values of one setting; ValueError says what is wrong with them."""
    known = (*HEAD_KEYS, *ADAPT_KEYS)
    if key not in known:
        raise ValueError(f"{key} is no setting that can be searched; {_hint(key, known)}")
    if given is None or isinstance(given, RangeConfig):
        return given
    if isinstance(given, dict):
        return _range(key, given)
    if not isinstance(given, list | tuple):
        raise ValueError(f"{key}: give {{low: .., high: ..}}, a list of values or null, not {given}")
    if not given:
        raise ValueError(f"{key}: the list is empty; give values, or null to leave it as the config says")
    for i, value in enumerate(given):
        if any(value == other and type(value) is type(other) for other in given[:i]):
            raise ValueError(f"{key}: {value} stands twice; remove one")
    return tuple(given)


def _hint(key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"


def _range(key: str, given: Mapping[str, Any]) -> RangeConfig:
    fields = tuple(RangeConfig.model_fields)
    for name in given:
        if name not in fields:
            raise ValueError(f"{key}.{name}: unknown key; {_hint(name, fields)}")
    field = HeadConfig.model_fields.get(key) or AdaptConfig.model_fields[key]
    kinds = {field.annotation, *get_args(field.annotation)}
    if not kinds & {int, float}:
        raise ValueError(f"{key}: this is no number, so give a list of values")
    allowed, word = ((int, float), "number") if float in kinds else ((int,), "whole number")
    ends = [given.get("low"), given.get("high")]
    for name, end in zip(fields, ends, strict=False):
        if isinstance(end, bool) or not isinstance(end, allowed) or not isfinite(end):
            raise ValueError(f"{key}.{name}: give a {word}, not {end}")
    low, high = (float(end) if float in kinds else int(end) for end in ends if end is not None)
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{key}.log: give true or false, not {log}")
    if low >= high:
        raise ValueError(f"{key}: low must be less than high, not {ends[0]} and {ends[1]}")
    if log and low <= 0:
        raise ValueError(f"{key}.low: on a log scale give a number above 0, not {ends[0]}")
    return RangeConfig(low=low, high=high, log=log)


def check_search(config: "FinetuneConfig") -> None:
    """Raise ValueError for values that some head cannot have, that none takes, or if nothing is left to
    search."""
    search, names = config.search, [name for name in config.all_heads() if is_searched(config, name)]
    if search is None:
        return
    if not names:
        raise ValueError(
            "search: all heads train encoders, or nothing; set search.encoders: true, or remove search"
        )
    spaces = {name: space_of(config, name) for name in names}
    for key, values in search.space.items():
        taking = [name for name in names if key in spaces[name]]
        if values is not None and not taking:
            raise ValueError(f"search.space.{key}: no head that is searched takes it; remove it")
        for value in examples(values):
            _try(config, f"search.space.{key}: {value}", taking, {key: value})
    for name, space in spaces.items():
        if not space:
            raise ValueError(f"search.space: leaves nothing to search of {name}; take a null out")
        options = {key: examples(values) for key, values in space.items() if key in HEAD_KEYS}
        for chosen in combinations(options):
            _fit(config, "search.space", name, chosen)


def _try(config: "FinetuneConfig", where: str, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a config of heads with these settings is none."""
    heads = {name: _fit(config, where, name, settings) for name in names}
    data = json.loads(config.model_dump_json(exclude={"search"}))
    data["heads"] |= {name: json.loads(head.model_dump_json()) for name, head in heads.items()}
    try:
        type(config).model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ValueError(f"{where}: {_said(error)}") from None


def _fit(config: "FinetuneConfig", where: str, name: str, settings: Mapping[str, Any]) -> HeadConfig:
    try:
        return with_settings(config.all_heads()[name], settings)
    except ValidationError as error:
        raise ValueError(f"{where}: head {name}: {_said(error)}") from None


def _said(error: ValidationError) -> str:
    text = error.errors()[0]["msg"].removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def import_optuna() -> Any:
    """The module optuna; UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "search: needs Optuna, which is not installed; pip install 'diptych[search]', or remove search"
        ) from error
    return optuna


def trainings(config: "FinetuneConfig") -> str:
    """How many trainings a run makes, in words; of a cross-validation that searches some heads only, at
    most."""
    heads, cv, seeds = config.all_heads(), config.eval.folds, len(config.eval.seeds)
    searched = [name for name in heads if is_searched(config, name)]
    trials = 0 if config.search is None else config.search.trials
    pieces = 1 if cv is None else cv.folds * cv.repeats
    last = 0 if cv is None else 1  # the recommended head on all rows
    tried = (len(searched) * pieces + (last if searched else 0)) * trials
    total = (len(heads) * pieces + last) * seeds + tried
    told = f"{total:,} trainings of {len(heads)} heads"
    if not searched:
        return told
    most = "at most " if cv is not None and len(searched) < len(heads) else ""
    return f"{most}{told}, {tried:,} of them trials of the search"


def encoder_cost(config: "FinetuneConfig", rows: int) -> str | None:
    """What a search costs that trains encoders, in words; None for one that does not."""
    cv = config.eval.folds
    pieces = 1 if cv is None else cv.folds * cv.repeats
    names = [n for n in config.all_heads() if is_searched(config, n) and config.adapt_of(n).tunes_encoders]
    if config.search is None or not names:
        return None
    trials = config.search.trials * pieces
    passes = sum(trials * config.adapt_of(name).encoder_epochs for name in names)
    last = "" if cv is None else ", and then those of the final model"
    return (
        f"the search trains the encoders of {', '.join(names)} in every trial: {trials:,} trials each, up to "
        f"{passes:,} passes of encoders over {rows:,} rows{last}"
    )
