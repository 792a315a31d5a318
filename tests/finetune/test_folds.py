"""Nested cross-validation: folds against scikit-learn's, and whole runs on coloured squares."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from diptych.cli.finetune import print_results
from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.finetune import session
from diptych.finetune.config import CvConfig, FinetuneConfig, ModalityConfig
from diptych.finetune.encoders.features import silent
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report
from diptych.finetune.splits.folds import deal, inner_split, make_folds, strata_of
from diptych.finetune.tables.manifest import Rows
from diptych.pretrain.statistics import bootstrap_means

from .fold_runs import NAMES, make_run
from .labelled import match_rows


def table(groups: list[str]) -> Rows:
    n = len(groups)
    ids = [str(i) for i in range(n)]
    declared = {"text": ModalityConfig(column="text")}
    return Rows("t.csv", ids, declared, {"text": ["a"] * n}, ["0"] * n, groups)


@pytest.mark.parametrize("stratify", [True, False])
def test_folds_are_those_of_scikit_learn(stratify: bool) -> None:
    random = np.random.default_rng(0)
    strata, groups = random.integers(0, 3, 90), [f"g{i}" for i in random.integers(0, 25, 90)]
    cv = CvConfig(folds=4, repeats=3, stratify=stratify, seed=5)
    folds = make_folds(table(groups), strata, cv, inner_share=0.2)
    assert [(f.repeat, f.fold) for f in folds] == [(r, f) for r in range(3) for f in range(4)]
    kind: Any = StratifiedGroupKFold if stratify else GroupKFold
    for repeat in range(3):
        theirs = kind(4, shuffle=True, random_state=5 + repeat).split(np.zeros(90), strata, groups)
        for fold, (rest, test) in zip(folds[4 * repeat :], theirs, strict=False):
            assert np.array_equal(fold.splits.test, test)
            inner_folds = kind(5, shuffle=True, random_state=5 + repeat).split(
                rest, strata[rest], np.array(groups)[rest]
            )
            train, inner = next(iter(inner_folds))
            assert np.array_equal(fold.splits.train, rest[train])
            assert np.array_equal(fold.splits.inner, rest[inner])


def test_rows_without_groups_are_stratified_row_by_row() -> None:
    strata, groups = np.random.default_rng(0).integers(0, 3, 50), [str(i) for i in range(50)]
    theirs = StratifiedKFold(4, shuffle=True, random_state=2).split(np.zeros(50), strata)
    for ours, (_, test) in zip(deal(groups, strata, 4, 2), theirs, strict=True):
        assert np.array_equal(ours, test)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_is_tested_once_per_repeat_and_groups_stay_whole(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 40))
    numbers = data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    labels = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n))
    alone = data.draw(st.booleans())  # every row a group of its own
    groups = [f"g{i}" for i in (range(n) if alone else numbers)]
    cv = CvConfig(
        folds=data.draw(st.integers(2, 8)), repeats=data.draw(st.integers(1, 2)), stratify=labels is not None
    )
    share = data.draw(st.sampled_from([0.01, 0.15, 0.4, 0.95]))
    strata = None if labels is None else np.array(labels)
    if len(set(groups)) < cv.folds:
        with pytest.raises(UserError, match=f"{cv.folds} folds cannot be made of {len(set(groups))} groups"):
            make_folds(table(groups), strata, cv, inner_share=share)
        return
    dealt = [deal(groups, strata, cv.folds, repeat) for repeat in range(cv.repeats)]
    if min(len({groups[i] for i in set(range(n)) - set(test)}) for one in dealt for test in one) < 2:
        with pytest.raises(UserError, match="one group cannot make an inner split"):
            make_folds(table(groups), strata, cv, inner_share=share)
        return
    folds = make_folds(table(groups), strata, cv, inner_share=share)
    for repeat in range(cv.repeats):
        tested = np.concatenate([f.splits.test for f in folds if f.repeat == repeat])
        assert np.array_equal(np.sort(tested), np.arange(n))
    for fold in folds:
        parts = [fold.splits.train, fold.splits.inner, fold.splits.test]
        assert all(len(part) for part in parts)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
        names = [{groups[i] for i in part} for part in parts]
        assert sum(map(len, names)) == len(set(groups))


@pytest.mark.parametrize(("share", "expected"), [(0.15, 1 / 7), (0.1, 0.1), (0.4, 0.4), (0.9, 0.9)])
def test_an_inner_split_has_about_its_share_of_every_class(share: float, expected: float) -> None:
    random = np.random.default_rng(1)
    strata = random.integers(0, 2, 700)
    train, inner = inner_split(
        table([f"g{i}" for i in range(700)]), np.arange(700), strata, share=share, seed=0
    )
    assert len(inner) / 700 == pytest.approx(expected, abs=0.01)
    assert strata[inner].mean() == pytest.approx(strata[train].mean(), abs=0.02)


def test_targets_that_are_no_classes_are_not_stratified() -> None:
    assert strata_of(np.zeros(4)) is None
    assert strata_of(np.zeros((4, 2))) is None
    assert strata_of(np.zeros(4, dtype=np.int64)) is not None
    groups = [f"g{i}" for i in range(12)]
    ours = deal(groups, np.arange(12), 3, 0)  # twelve classes of one row
    theirs = GroupKFold(3, shuffle=True, random_state=0).split(np.zeros(12), None, groups)
    assert all(np.array_equal(a, b) for a, (_, b) in zip(ours, theirs, strict=True))


# ---- whole runs ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the tests of this file share and leave as it is."""
    return make_run(tmp_path_factory.mktemp("cv"))


def test_scores_are_those_of_the_written_out_of_fold_predictions(made: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    told = pq.read_table(made / "run" / "predictions.parquet").to_pydict()
    assert list(results["heads"]) == list(NAMES)
    assert list(told)[:5] == ["id", "group", "target", "repeat", "fold"]
    ids = [row[0] for row in match_rows(made)]
    assert told["id"] == ids * 2
    assert told["repeat"] == [0] * 160 + [1] * 160
    truth, fold, repeat = np.array(told["target"]) == "1", np.array(told["fold"]), np.array(told["repeat"])
    folds_of_group = {(g, r): set[int]() for g, r in zip(told["group"], repeat, strict=True)}
    for g, r, f in zip(told["group"], repeat, fold, strict=True):
        folds_of_group[g, r].add(f)
    assert all(len(found) == 1 for found in folds_of_group.values())
    hits: dict[str, Any] = {}
    for name in NAMES:
        p, metrics = np.array(told[f"{name}:1"]), results["heads"][name]["metrics"]
        hits[name] = (p >= 0.5) == truth
        assert metrics["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, p >= 0.5))
        assert metrics["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth, p), abs=1e-4)
        expected = bootstrap_means(hits[name], told["group"], samples=100)[0]  # a group with all its repeats
        assert (metrics["accuracy"]["low"], metrics["accuracy"]["high"]) == (expected.low, expected.high)
        parts = [hits[name][(repeat == r) & (fold == f)].mean() for r in range(2) for f in range(3)]
        assert [row["scores"][name] for row in results["folds"]] == pytest.approx(parts)
        spread = results["spread"][name]
        assert spread["mean"] == pytest.approx(np.mean(parts))
        assert spread["sd"] == pytest.approx(np.std(parts, ddof=1))
    gain, single = results["fusion_gain"], results["best_single"]
    assert gain["head"] == results["best"]
    assert gain["against"] == single
    difference = hits[results["best"]].astype(float) - hits[single]
    expected = bootstrap_means(difference, told["group"], samples=100)[0]
    assert [gain[k] for k in ("diff", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    assert (results["n_test"], results["n_test_groups"]) == (160, 10)


def test_the_fusion_gain_and_the_folds_are_told_on_the_console_and_in_the_report(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    print_results(results, Console(width=120))
    printed = capsys.readouterr().out
    gain = results["fusion_gain"]
    expected = f"{100 * gain['diff']:+.1f} points of accuracy (95 % interval {100 * gain['low']:+.1f} to"
    assert f"Fusion gain over the best single modality ({gain['against']}): {expected}" in printed
    assert "160 test rows in 10 groups; chance 0.500; 3 folds, 2 times" in printed
    assert "accuracy by fold: spread, not an interval" in printed
    assert f"by its own inner rows: accuracy {results['chosen_per_fold']['score']['value']:.3f}" in printed
    page = write_report([made / "run"], tmp_path / "report.html").read_text()
    for row in results["folds"]:
        name = f"repeat {row['repeat']}, fold {row['fold']}"
        assert name in page
        shown = [f"<td>{100 * row['scores'][head]:.1f}</td>" for head in NAMES]
        assert "".join(shown) in page[page.index(name) :]
    assert f"fusion gain over {gain['against']} alone" in page
    assert f"<b>{100 * gain['diff']:+.1f}</b>" in page


def test_the_choice_is_that_of_inner_scores_averaged_over_folds(made: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    inner: dict[str, dict[str, float]] = {}
    for name in NAMES:
        paths = sorted((made / "run" / "folds").glob(f"repeat_*/fold_*/heads/{name}/head.json"))
        assert len(paths) == 6
        scores = [json.loads(path.read_text())["inner"] for path in paths]
        inner[name] = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
        assert results["heads"][name]["inner"] == pytest.approx(inner[name])

    def rank(name: str) -> tuple[float, float]:
        return inner[name]["auroc"], -inner[name]["loss"]

    assert results["best"] == max(("concat", "late"), key=rank)
    assert results["best_single"] == max(("image", "text"), key=rank)


def test_the_score_of_choosing_anew_in_each_fold_is_that_of_each_folds_own_choice(made: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    told = pq.read_table(made / "run" / "predictions.parquet").to_pydict()
    truth, hits, base = np.array(told["target"]) == "1", np.zeros(320), np.zeros(320)
    heads: list[str] = []
    for repeat in range(2):
        for fold in range(3):
            place = made / "run" / "folds" / f"repeat_{repeat}" / f"fold_{fold}" / "heads"
            inner = {n: json.loads((place / n / "head.json").read_text())["inner"] for n in NAMES}

            def rank(name: str, inner: Any = inner) -> tuple[float, float]:
                return inner[name]["auroc"], -inner[name]["loss"]

            heads.append(max(("concat", "late"), key=rank))
            here = (np.array(told["repeat"]) == repeat) & (np.array(told["fold"]) == fold)
            for name, out in ((heads[-1], hits), (max(("image", "text"), key=rank), base)):
                out[here] = ((np.array(told[f"{name}:1"]) >= 0.5) == truth)[here]
    anew = results["chosen_per_fold"]
    assert anew["heads"] == heads
    expected = bootstrap_means(np.stack([hits, hits - base], 1), told["group"], samples=100)
    for key, interval in zip(("score", "gain"), expected, strict=True):
        assert anew[key] == pytest.approx(interval.as_dict())


def test_predictions_come_from_the_recommended_head_trained_on_all_rows(made: Path, tmp_path: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    final = results["final"]
    assert final["heads"] == [results["best"]]
    assert final["n_train"] + final["n_inner"] == 160
    moved = tmp_path / "moved"
    shutil.copytree(made / "run", moved)
    shutil.rmtree(moved / "folds")  # scores were made from them, predictions are not
    predictor = Predictor.load(moved)
    assert predictor.head == results["best"]
    table = str(made / "match.csv")
    p = predictor.predict_proba(table)
    assert p.shape == (160, 2)
    told = pq.read_table(made / "run" / "predictions.parquet").to_pydict()
    assert np.abs(p[:, 1] - np.array(told[f"{results['best']}:1"])[:160]).max() > 1e-3  # another model
    assert main(["predict", str(moved), table, "-o", str(tmp_path / "out.csv")]) == 0
    with pytest.raises(UserError, match=f"has no head 'image'; it has {results['best']}"):
        Predictor.load(moved, head="image")


def test_standardisation_is_that_of_the_training_rows(made: Path) -> None:
    config = load_config(FinetuneConfig, made / "run" / "config.yaml")
    sessions = session.open_sessions(config, silent, lambda text: None)
    for one in sessions[:3]:
        state = load_file(one.head_folder("concat") / "seed_0.safetensors")
        train = one.splits.train
        assert not set(train) & (set(one.splits.inner) | set(one.splits.test))
        for modality in ("image", "text"):
            index = one.features.index[modality][torch.from_numpy(train)]
            x = one.features.tables[modality][index].double()
            assert state[f"standard.{modality}.mean"].numpy() == pytest.approx(x.mean(0).numpy(), abs=1e-6)
            scale = (x - x.mean(0)).square().mean().sqrt()
            assert float(state[f"standard.{modality}.scale"]) == pytest.approx(float(scale), rel=1e-5)
