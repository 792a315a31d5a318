"""The search for a head's settings: some are tried, the inner rows judge, the best are trained.

1. Trial 0 has the settings that the config gives, so the chosen ones are never worse on the inner rows. All
   others are drawn by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for
   hyper-parameter optimization"), the first ten trials at random.
2. A trial trains the head with the first of ``eval.seeds`` on the training rows of the run or fold, and is
   judged by the metric of early stopping on its inner rows. Test rows are not known here.
3. The sampler of trial t is seeded with (seed, repeat, fold, head, t), so what trial t is follows from the
   trials before it alone. Each is written down when it is finished: a search that was killed goes on as if
   nothing had been, and one with more trials goes on where the shorter one ended.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..configs.errors import UserError, unwritable
from ..configs.files import atomic_write_text
from .config import AdaptConfig, FinetuneConfig, HeadConfig
from .config.search import import_optuna
from .config.space import RangeConfig, Space, is_searched, settings_of, space_of, with_settings
from .runs.saved import read_json
from .session import Session
from .tasks.task import higher_is_better

__all__ = ["Found", "search_head", "search_key", "search_results", "told_search"]

Json = dict[str, Any]
Inner = Mapping[str, float]
"""Loss and metrics of the inner rows."""
TryOut = Callable[[HeadConfig, AdaptConfig], Inner | None]
"""Trains a head and gives its inner scores, None where they are no finite numbers."""


@dataclass(frozen=True)
class Found:
    """What a search chose: the head with its settings and how it trains, and what head.json tells of it."""

    head: HeadConfig
    adapt: AdaptConfig
    document: Json


@dataclass(frozen=True)
class Trial:
    """One finished trial. ``inner``: None for a training that came to no finite numbers."""

    settings: Json
    inner: dict[str, float] | None
    seconds: float


def search_key(config: FinetuneConfig, name: str) -> str:
    """What a head that is searched depends on beside its own config; empty for one that is not."""
    if config.search is None or not is_searched(config, name):
        return ""
    return f"{config.search.trials} of {_text(space_of(config, name))}"


def search_head(
    session: Session,
    name: str,
    try_out: TryOut,
    label: str,
) -> Found:
    """Search the settings of a head, or read what was found before.

    Raises UserError for a ``trials.jsonl`` that cannot be read.
    """
    config = session.config
    assert config.search is not None
    head, adapt = config.all_heads()[name], config.adapt_of(name)
    space, total = space_of(config, name), config.search.trials
    metric = session.task.check_metric(config.early_stopping.metric)
    journal = _Journal(session, name, head, adapt, space)
    trials = journal.trials[:total]
    written = _plain(settings_of(head, adapt, list(space)))
    if len(trials) < total:
        sampler = _Sampler(space, journal.seed)
        with session.progress(f"searching {label}", total) as advance:
            for trial in trials:
                sampler.add(trial.settings, _score(trial.inner, metric))
            advance(len(trials))
            while len(trials) < total:
                settings = sampler.propose() if trials else written
                trials.append(_tried(config, name, settings, trials, try_out))
                journal.add(trials[-1])
                sampler.add(settings, _score(trials[-1].inner, metric))
                advance(1)
    best = max(range(total), key=lambda i: (*_rank(trials[i].inner, metric), -i))
    document = {
        "trials": total,
        "metric": metric,
        "chosen": best,
        "settings": trials[best].settings,
        "written": written,
        "before": trials[0].inner,
        "after": trials[best].inner,
        "seconds": sum(trial.seconds for trial in trials),
    }
    if best == 0:
        return Found(head, adapt, document)
    return Found(*_changed(config, name, trials[best].settings), document)


def search_results(sessions: Sequence[Session], final: Session | None = None, best: str = "") -> Json:
    """``search`` of results.json, from the heads of all folds and, of the head ``best``, of the ``final``
    model; nothing of runs without a search."""
    config = sessions[0].config
    if config.search is None:
        return {}
    names = [name for name in config.all_heads() if is_searched(config, name)]
    found: Json = {
        "trials": config.search.trials,
        "metric": sessions[0].task.check_metric(config.early_stopping.metric),
        "heads": {name: [_entry(session, name) for session in sessions] for name in names},
        "as_written": [name for name in config.all_heads() if name not in names],
    }
    if final is not None and best in names:
        found["final"] = {best: _entry(final, best)}
    return {"search": found}


def _entry(session: Session, name: str) -> Json:
    """What was chosen for one head of a run or fold, and by which inner scores of one seed."""
    found = read_json(session.head_folder(name) / "head.json")["search"]
    entry = {"repeat": session.fold.repeat, "fold": session.fold.fold} if session.fold else {}
    entry |= {key: found[key] for key in ("chosen", "settings", "written", "seconds")}
    scores = {k: found[k] and found[k][found["metric"]] for k in ("before", "after")}
    return entry | scores


def told_search(document: Json) -> str:
    """What a search found, for one line; nothing of a head that was not searched."""
    found = document.get("search")
    if found is None:
        return ""
    before, after = (
        f"{found[k][found['metric']]:.3f}" if found[k] else "no number" for k in ("before", "after")
    )
    changed = {k: v for k, v in found["settings"].items() if v != found["written"][k]}
    settings = ", ".join(f"{k} {_short(v)}" for k, v in changed.items()) or "as written"
    return f"; {found['trials']} trials, {found['metric']} {before} -> {after}: {settings}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tried(
    config: FinetuneConfig,
    name: str,
    settings: Json,
    trials: Sequence[Trial],
    try_out: TryOut,
) -> Trial:
    """A new trial; settings that were tried before are not trained again."""
    for trial in trials:
        if trial.settings == settings:
            return Trial(settings, trial.inner, 0.0)
    begun = time.perf_counter()
    inner = try_out(*_changed(config, name, settings))
    return Trial(settings, None if inner is None else dict(inner), time.perf_counter() - begun)


def _changed(config: FinetuneConfig, name: str, settings: Json) -> tuple[HeadConfig, AdaptConfig]:
    """A head of a config with other settings, and how it then trains."""
    head = with_settings(config.all_heads()[name], settings)
    return head, config.model_copy(update={"heads": config.heads | {name: head}}).adapt_of(name)


def _score(inner: Inner | None, metric: str) -> float:
    """How good a trial is, more being better."""
    if inner is None:
        return float("-inf")
    return inner[metric] if higher_is_better(metric) else -inner[metric]


def _rank(inner: Inner | None, metric: str) -> tuple[float, float]:
    """How trials are ordered: by the metric, equals by their loss."""
    return _score(inner, metric), float("-inf") if inner is None else -inner["loss"]


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _text(space: Space) -> str:
    values = {k: v.model_dump() if isinstance(v, RangeConfig) else v for k, v in space.items()}
    return json.dumps(values)


class _Journal:
    """``search/NAME/trials.jsonl``: the finished trials of one head, kept as long as what they depend on."""

    def __init__(
        self, session: Session, name: str, head: HeadConfig, adapt: AdaptConfig, space: Space
    ) -> None:
        fold = session.fold
        self._where = {"repeat": fold.repeat, "fold": fold.fold} if fold else {}
        self._name, self._space = name, space
        self.seed = f"{session.config.eval.seeds[0]} {list(self._where.values())} {name}"
        self._metric = session.task.check_metric(session.config.early_stopping.metric)
        parts = [head, adapt, session.config.early_stopping]
        text = "".join(part.model_dump_json() for part in parts) + _text(space) + self.seed
        self._key = hashlib.sha256(f"{session.data_key}{text}".encode()).hexdigest()[:32]
        self.path = session.place / "search" / name / "trials.jsonl"
        self._lines: list[str] = []
        self.trials: list[Trial] = []
        if self.path.is_file():
            self._read()

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        number = len(self._lines)
        row: Json = {"head": self._name, **self._where, "trial": number, "settings": trial.settings}
        row |= {"inner": trial.inner, "seconds": trial.seconds, "key": self._key}
        self._lines.append(json.dumps(row) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, "".join(self._lines))
        except OSError as error:
            raise unwritable(self.path, error, then="then start the same command") from error

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [json.loads(line) for line in lines]
            if rows and all(row["key"] != self._key for row in rows):
                return  # of other settings or data
            self.trials = [self._trial(i, row) for i, row in enumerate(rows)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"{self.path} cannot be read ({said}); remove it, and the search of {self._name} starts anew"
            ) from error
        self._lines = lines

    def _trial(self, number: int, row: Json) -> Trial:
        settings, inner = row["settings"], row["inner"]
        if row["key"] != self._key or row["trial"] != number or list(settings) != list(self._space):
            raise ValueError(f"line {number + 1} is not trial {number} of this search")
        for key, value in settings.items() if number else ():
            if not _within(self._space[key], value):
                raise ValueError(f"line {number + 1}: {key} cannot be {value}")
        if inner is not None and not all(isfinite(inner[key]) for key in (*inner, "loss", self._metric)):
            raise ValueError(f"line {number + 1}: inner is no set of finite numbers")
        return Trial(settings, inner, float(row["seconds"]))


def _within(values: RangeConfig | tuple[Any, ...], value: Any) -> bool:
    """Whether a setting, as JSON gives it back, can be drawn."""
    if isinstance(values, RangeConfig):
        kinds = int if isinstance(values.low, int) else int | float
        return isinstance(value, kinds) and values.low <= value <= values.high
    return value in _plain(values)


class _Sampler:
    """Optuna's sampler: proposes the next settings after those that were added."""

    def __init__(self, space: Space, seed: str) -> None:
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed, self._space = optuna, seed, space
        self._study = optuna.create_study(direction="maximize")
        self._added = 0
        self._choices = {k: _plain(v) for k, v in space.items() if not isinstance(v, RangeConfig)}
        self._distributions = {key: self._distribution(values) for key, values in space.items()}
        self._asked: Any = None

    def _distribution(self, values: RangeConfig | tuple[Any, ...]) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(values, RangeConfig):
            return kinds.CategoricalDistribution(range(len(values)))
        kind = kinds.IntDistribution if isinstance(values.low, int) else kinds.FloatDistribution
        return kind(values.low, values.high, log=values.log)

    def propose(self) -> Json:
        """Settings of the next trial."""
        digest = hashlib.sha256(f"{self._seed} {self._added}".encode()).digest()
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=int.from_bytes(digest[:4], "big"), multivariate=False, constant_liar=False
        )
        self._asked = self._study.ask(self._distributions)
        drawn = self._asked.params
        return {
            k: self._choices[k][drawn[k]] if k in self._choices else drawn[k] for k in self._distributions
        }

    def add(self, settings: Json, score: float) -> None:
        """Tell a trial: the one that was proposed last, or one from before."""
        self._added += 1
        if self._asked is not None:
            self._study.tell(self._asked, score)
            self._asked = None
            return
        drawn: Json = {}
        for key, value in settings.items():
            if _within(self._space[key], value):  # the config's own settings need not
                drawn[key] = self._choices[key].index(value) if key in self._choices else value
        kinds = {key: self._distributions[key] for key in drawn}
        self._study.add_trial(self._optuna.trial.create_trial(params=drawn, distributions=kinds, value=score))
