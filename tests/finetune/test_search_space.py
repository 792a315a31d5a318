"""The space of a search and its sampler: what is refused, what is drawn, and that a good setting is found."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.finetune import search
from diptych.finetune.adapt.fit import fit
from diptych.finetune.adapt.training import inner_score
from diptych.finetune.config import OPTIONS, AdaptConfig, FinetuneConfig, HeadConfig
from diptych.finetune.config.space import (
    ADAPT_KEYS,
    HEAD_KEYS,
    RangeConfig,
    examples,
    space_of,
    with_settings,
)
from diptych.finetune.encoders.features import silent
from diptych.finetune.session import Session
from diptych.finetune.tasks.task import Task

from .labelled import xor_rows

CONFIG = """
task: {type: binary}
data: {manifest: nowhere.csv}
model: {checkpoint: nowhere}
heads:
  concat: {op: concat}
  cross: {op: cross, width: 96, heads: 6}
  bilinear: {op: bilinear}
"""


def config_of(folder: Path, *words: str) -> FinetuneConfig:
    (folder / "finetune.yaml").write_text(CONFIG)
    return load_config(FinetuneConfig, folder / "finetune.yaml", words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search.trials=1"], "search.trials: input should be greater than or equal to 2, not 1"),
        (["search.trial=3"], "search.trial: unknown key; did you mean 'trials'?"),
        (["search={space: {}}"], "search.trials: missing"),
        (["search.space={lrr: [1]}"], "lrr is no setting that can be searched; did you mean 'lr'?"),
        (["search.space={method: [lora]}"], "method is no setting that can be searched"),
        (["search.space={lr: 0.1}"], "lr: give {low: .., high: ..}, a list of values or null, not 0.1"),
        (["search.space={lr: {low: 0.1, hi: 1.0}}"], "lr.hi: unknown key; did you mean 'high'?"),
        (["search.space={lr: {low: 0.1}}"], "lr.high: give a number, not None"),
        (["search.space={lr: {low: 0.1, high: 1e999}}"], "lr.high: give a number, not inf"),
        (["search.space={lr: {low: 0.1, high: 0.1}}"], "lr: low must be less than high, not 0.1 and 0.1"),
        (
            ["search.space={lr: {low: 0, high: 0.1, log: true}}"],
            "lr.low: on a log scale give a number above 0",
        ),
        (["search.space={lr: {low: 0.1, high: 1, log: 1}}"], "lr.log: give true or false, not 1"),
        (["search.space={width: {low: 1.5, high: 9}}"], "width.low: give a whole number, not 1.5"),
        (["search.space={gate: {low: 1, high: 2}}"], "gate: this is no number, so give a list of values"),
        (["search.space={width: []}"], "width: the list is empty"),
        (["search.space={width: [8, 8]}"], "width: 8 stands twice; remove one"),
        (
            ["search.space={lr: [-1.0]}"],
            "search.space.lr: -1.0: heads.concat.adapt.lr: input should be greater",
        ),
        (
            ["search.space={dropout: {low: 0, high: 1}}"],
            "search.space.dropout: 1.0: head image: input should be",
        ),
        (["search.space={width: [100]}"], "search.space.width: 100: head cross: width 100 is no multiple"),
        (["search.space={width: {low: 60, high: 120}}"], "width 61 is no multiple of heads 6"),
        (["search.space={width: [64, 96], heads: [2, 3]}"], "head cross: width 64 is no multiple of heads"),
        (
            ["search.space={gate: [element]}"],
            "search.space.gate: no head that is searched takes it; remove it",
        ),
        (
            ["search.space={encoder_lr: [1.0e-5]}"],
            "search.space.encoder_lr: no head that is searched takes it",
        ),
        (
            ["task.type=regression", "search.space={label_smoothing: [0.1]}"],
            "label_smoothing: no head that is searched takes it",
        ),
        (
            ["task.type=regression", "search.space={sampling: [balanced, shuffled]}"],
            "search.space.sampling: balanced: adapt.sampling: balanced needs one class per row",
        ),
        (
            [
                "search.space={lr: null, weight_decay: null, label_smoothing: null, modality_dropout: null}",
                "heads={s: {op: similarity}}",
            ],
            "search.space: leaves nothing to search of s",
        ),
        (
            ["adapt.method=lp_ft", "heads=[concat]"],
            "all heads train encoders, or nothing; set search.encoders: true",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "finetune.yaml").write_text(CONFIG)
    start = [] if words[0] == "search={space: {}}" else ["search.trials=4"]
    assert main(["finetune", str(tmp_path / "finetune.yaml"), *start, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_a_rule_that_the_task_does_not_have_is_told_as_for_a_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from .labelled import write_config, write_task

    write_task(tmp_path)
    config = write_config(tmp_path, "[late]")
    words = ["task={type: regression}", "search={trials: 2, space: {rule: [mean, vote]}}"]
    assert main(["finetune", str(config), *words]) == 2
    assert "heads.late.rule: vote is for tasks of classes" in capsys.readouterr().err


def test_keys_of_heads_and_of_adapt_do_not_collide() -> None:
    assert not set(HEAD_KEYS) & set(ADAPT_KEYS)
    assert set(HEAD_KEYS) == {key for options in OPTIONS.values() for key in options}


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("adapt", ["{}", "{method: lora}", "{method: lp_ft}"])
def test_the_default_space_fits_every_head(task: str, adapt: str, tmp_path: Path) -> None:
    heads = {op: {"op": op} for op in OPTIONS if op not in ("similarity", "zero_shot")}
    if task in ("binary", "regression"):
        heads["similarity"] = {"op": "similarity"}
    heads["odd"] = {"op": "merged", "width": 100, "heads": 5}
    heads["full"] = {"op": "bilinear", "rank": "full"}
    frozen = {"adapt": {"method": "linear_probe"}}
    heads = {n: h | (frozen if HeadConfig(**h).needs_frozen else {}) for n, h in heads.items()}
    words = [f"task.type={task}", f"heads={json.dumps(heads)}", f"adapt={adapt}"]
    config = config_of(tmp_path, *words, "search={trials: 2, encoders: true}")
    for name, head in config.all_heads().items():
        space = space_of(config, name)
        assert {"lr", "weight_decay"} <= set(space)
        assert ("label_smoothing" in space) == (task != "regression")
        assert ("modality_dropout" in space) == (head.op not in ("image", "text"))
        assert ("encoder_lr" in space) == (adapt != "{}" and not head.needs_frozen)
        assert ("rank" in space) == (name == "bilinear")
        for key, values in space.items():
            for value in examples(values):
                with_settings(head, {key: value})
    assert "width" not in space_of(config, "odd")  # none of the default widths is a multiple of five


def test_null_leaves_a_setting_as_it_is_written_and_other_keys_keep_their_space(tmp_path: Path) -> None:
    config = config_of(tmp_path, "search={trials: 2, space: {width: null, lr: {low: 1, high: 2}}}")
    space = space_of(config, "concat")
    assert "width" not in space
    assert space["lr"] == RangeConfig(low=1.0, high=2.0)
    assert space["dropout"] == space_of(config_of(tmp_path, "search.trials=2"), "concat")["dropout"]


@dataclass
class Bench:
    """What a search needs of a session, with rows whose answer is known."""

    config: FinetuneConfig
    place: Path
    task: Task = field(default_factory=lambda: Task("binary", ("0", "1")))
    fold: None = None
    data_key: str = "rows"
    progress: Any = field(default=silent)


def found(config: FinetuneConfig, place: Path, name: str, try_out: Any) -> search.Found:
    return search.search_head(cast(Session, Bench(config, place)), name, try_out, name)


def drawn(place: Path, name: str) -> list[Any]:
    lines = (place / "search" / name / "trials.jsonl").read_text().splitlines()
    return [json.loads(line)["settings"] for line in lines]


def made_up(head: HeadConfig, adapt: AdaptConfig) -> dict[str, float]:
    """A score that is best at a rate of 0.002 and a width of 128."""
    score = 1 - abs(adapt.lr - 2e-3) * 10 - abs((head.width or 0) - 128) / 1000
    return {"loss": 1 - score, "auroc": score}


def test_one_seed_draws_one_series_however_often_it_is_interrupted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "search.trials=25")
    whole = found(config, tmp_path / "whole", "concat", made_up)
    series = drawn(tmp_path / "whole", "concat")
    assert len(series) == 25
    for seed_or_head, word in (("other seed", "eval.seeds=[1]"), ("same", "eval.seeds=[0, 5]")):
        found(config_of(tmp_path, "search.trials=25", word), tmp_path / seed_or_head, "concat", made_up)
    assert drawn(tmp_path / "same", "concat") == series
    assert drawn(tmp_path / "other seed", "concat")[1] != series[1]
    stopped = tmp_path / "stopped"
    for _ in range(9):
        left = [3]

        def tiring(head: HeadConfig, adapt: AdaptConfig, left: list[int] = left) -> dict[str, float]:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return made_up(head, adapt)

        try:
            again = found(config, stopped, "concat", tiring)
        except KeyboardInterrupt:
            continue
        assert again.head == whole.head
        assert again.adapt == whole.adapt
    assert drawn(stopped, "concat") == series
    # a longer search begins as a shorter one, and a shorter one makes use of the longer
    found(config_of(tmp_path, "search.trials=30"), stopped, "concat", made_up)
    assert drawn(stopped, "concat")[:25] == series
    shorter = found(config, stopped, "concat", None)
    assert shorter.document["chosen"] == whole.document["chosen"]


def test_later_trials_are_better_than_chance(tmp_path: Path) -> None:
    """Not random draws to the end: the sampler learns from the trials before."""
    found(config_of(tmp_path, "search.trials=40"), tmp_path, "concat", made_up)
    series = drawn(tmp_path, "concat")
    close = [sum(abs(one["lr"] - 2e-3) < 1e-3 for one in part) for part in (series[1:11], series[-10:])]
    assert close[1] > close[0]


@settings(max_examples=15, deadline=None)
@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=2, max_size=12), lower=st.booleans())
def test_the_best_of_the_trials_is_chosen_and_never_one_without_a_number(
    scores: list[float | None], lower: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("best")
    metric = "brier" if lower else "accuracy"
    config = config_of(folder, f"search.trials={len(scores)}", f"early_stopping.metric={metric}")
    left = iter(scores)

    def try_out(head: HeadConfig, adapt: AdaptConfig) -> dict[str, float] | None:
        score = next(left)
        return None if score is None else {"loss": 0.5, metric: score}

    got = found(config, folder, "concat", try_out).document["chosen"]
    known = [-1.0 if s is None else (1 - s if lower else s) for s in scores]
    assert got == known.index(max(known))


def test_settings_that_were_tried_are_not_trained_again(tmp_path: Path) -> None:
    space = "{lr: [0.01, 0.1], weight_decay: null, dropout: null, label_smoothing: null, width: null}"
    config = config_of(tmp_path, "search.trials=12", f"search.space={space}")
    tried: list[float] = []

    def try_out(head: HeadConfig, adapt: AdaptConfig) -> dict[str, float]:
        tried.append(adapt.lr)
        return {"loss": 0.5, "auroc": adapt.lr}

    got = found(config, tmp_path, "image", try_out)
    assert sorted(tried) == [1e-3, 0.01, 0.1]
    assert len(drawn(tmp_path, "image")) == 12
    assert got.adapt.lr == 0.1


def test_a_hopeless_rate_is_replaced_by_one_that_works(tmp_path: Path) -> None:
    """Heads at a rate of 1e-6 do not learn to compare two signs; some of ten trials do."""
    config = config_of(tmp_path, "search.trials=10", "adapt={lr: 1.0e-6, batch_size: 64, epochs: 12}")
    train, inner, test = xor_rows(400, 0), xor_rows(150, 1), xor_rows(400, 2)
    task = Task("binary", ("0", "1"))

    def score(head: HeadConfig, adapt: AdaptConfig, rows: Any) -> dict[str, float]:
        widths = {"image": 16, "text": 16}
        got = fit(head, adapt, config.early_stopping, task, train, inner, widths=widths, seed=0)
        return inner_score(task, "auroc", got.head, rows)[1]

    got = found(config, tmp_path, "concat", lambda head, adapt: score(head, adapt, inner))
    assert got.document["before"]["auroc"] < 0.7
    assert got.adapt.lr > 1e-4
    assert score(got.head, got.adapt, test)["auroc"] > 0.9


def test_a_value_of_another_kind_in_trials_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "search={trials: 2, space: {batch_size: {low: 8, high: 64}}}")
    found(config, tmp_path, "concat", made_up)
    path = tmp_path / "search" / "concat" / "trials.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for value in (8.5, 65, "8", None):
        rows[1]["settings"]["batch_size"] = value
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=f"line 2: batch_size cannot be {value}"):
            found(config, tmp_path, "concat", made_up)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-40], "cannot be read"),
        (lambda text: text.replace('"trial": 1', '"trial": 7'), "line 2 is not trial 1 of this search"),
        (lambda text: text.replace('"loss": ', '"loss": "a", "lost": ', 1), "cannot be read"),
        (lambda text: text.replace('"auroc": ', '"auroc": NaN, "x": ', 1), "no set of finite numbers"),
        (lambda text: "".join(reversed(text.splitlines(keepends=True))), "line 1 is not trial 0"),
        (lambda text: text.replace('"lr": ', '"lr": 7.5, "x": '), "line 1 is not trial 0"),
        (lambda text: text + "[1]\n", "cannot be read"),
        (lambda text: text.replace('"key": "', '"key": "0', 1), "line 1 is not trial 0"),
    ],
)
def test_damaged_trials_are_told_with_the_mend(damage: Any, said: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, "search.trials=3")
    found(config, tmp_path, "concat", made_up)
    path = tmp_path / "search" / "concat" / "trials.jsonl"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError) as error:
        found(config, tmp_path, "concat", made_up)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert str(error.value).endswith("remove it, and the search of concat starts anew")


def test_trials_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "search").write_text("in the way")
    with pytest.raises(UserError, match=r"trials.jsonl cannot be written \(.*\); check the path, then"):
        found(config_of(tmp_path, "search.trials=2"), tmp_path, "concat", made_up)
