"""Searches in whole runs: what is tried, what is kept, what the inner rows decide and what is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune import heads, session
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.encoders.features import silent
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report

from .fold_runs import HEADS, KILLED, NAMES, permuted, pieces
from .labelled import write_config, write_csv, write_task
from .pair_runs import COLUMNS as PAIRS
from .pair_runs import pair_rows, run_pairs, write_pairs
from .runs import finetune, timeless

WORDS = ("eval.cv={folds: 2}", "eval.seeds=[0, 1]", "search={trials: 3}")
PLACES = ("folds/repeat_0/fold_0", "folds/repeat_0/fold_1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the tests of this file share and leave as it is."""
    folder = tmp_path_factory.mktemp("search")
    write_task(folder)
    write_config(folder, HEADS)
    finetune(folder, *WORDS)
    return folder


def copied(made: Path, folder: Path) -> Path:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    write_config(folder, HEADS)
    return folder


def trials_of(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "search" / name / "trials.jsonl").read_text().splitlines()]


def head_of(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / "heads" / name / "head.json").read_text())


def test_every_head_gets_as_many_trials_and_the_best_on_the_inner_rows_is_trained(made: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    told = results["search"]
    assert (told["trials"], told["metric"], told["as_written"]) == (3, "auroc", [])
    assert list(told["heads"]) == list(NAMES)
    places = [*PLACES, ""]
    for place in places:
        for name in NAMES if place else [results["best"]]:
            trials, document = trials_of(made / "run" / place, name), head_of(made / "run" / place, name)
            assert [row["trial"] for row in trials] == [0, 1, 2]
            found = document["search"]
            order = [(-row["inner"]["auroc"], row["inner"]["loss"], row["trial"]) for row in trials]
            assert found["chosen"] == min(order)[2]
            assert found["before"] == trials[0]["inner"]
            assert found["after"] == trials[found["chosen"]]["inner"]
            assert found["after"]["auroc"] >= found["before"]["auroc"]
            for key, value in found["settings"].items():  # what was trained is what was chosen
                assert (document["adapt"] | document["config"])[key] == value
            assert len(document["seeds"]) == 2
    entry = told["heads"]["late"][1]
    found = head_of(made / "run" / PLACES[1], "late")["search"]
    assert (entry["repeat"], entry["fold"]) == (0, 1)
    assert (entry["chosen"], entry["settings"]) == (found["chosen"], found["settings"])
    assert (entry["before"], entry["after"]) == (found["before"]["auroc"], found["after"]["auroc"])
    assert set(told["final"]) == {results["best"]}
    # folds and heads are searched for themselves
    drawn = {json.dumps(trials_of(made / "run" / p, n)[1]["settings"]) for p in PLACES for n in NAMES}
    assert len(drawn) == len(PLACES) * len(NAMES)


def test_trial_0_is_the_config_as_it_is_written(made: Path, tmp_path: Path) -> None:
    copied(made, tmp_path)
    shutil.rmtree(tmp_path / "run")
    finetune(tmp_path, WORDS[0], "eval.seeds=[0]")
    for place in PLACES:
        for name in NAMES:
            alone = head_of(tmp_path / "run" / place, name)
            first = trials_of(made / "run" / place, name)[0]
            assert first["inner"] == alone["inner"]
            written = alone["adapt"] | alone["config"]
            assert first["settings"] == {key: written[key] for key in first["settings"]}


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_been(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path)
    config = write_config(tmp_path, HEADS)
    # image: three trials, two seeds; text: two trials, and the third does not end
    command = [sys.executable, "-c", KILLED, str(config), "7", *WORDS]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = (tmp_path / "run" / PLACES[0] / "search" / "text" / "trials.jsonl").read_text()
    assert before.count("\n") == 2
    fits, original = [0], heads.fit

    def counting(*args: Any, **options: Any) -> Any:
        fits[0] += 1
        return original(*args, **options)

    monkeypatch.setattr(heads, "fit", counting)
    results = finetune(tmp_path, *WORDS)
    assert fits[0] == (2 * 4 + 1) * (3 + 2) - 7  # no finished trial was trained again
    assert (tmp_path / "run" / PLACES[0] / "search" / "text" / "trials.jsonl").read_text().startswith(before)
    whole = json.loads((made / "run" / "results.json").read_text())
    assert timeless(results) == timeless(whole) | {"checkpoint": results["checkpoint"]}
    assert pieces(tmp_path / "run") == pieces(made / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines == (made / "run" / "metrics.jsonl").read_text()


def test_labels_of_a_folds_test_rows_change_nothing_of_its_search(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(made, tmp_path)
    config = load_config(FinetuneConfig, made / "run" / "config.yaml")
    folds = [one.fold for one in session.open_sessions(config, silent, lambda text: None)[:-1]]
    chosen = folds[1]
    assert chosen is not None
    permuted(tmp_path, chosen.splits.test)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(session, "make_folds", lambda *args, **options: folds)
    finetune(tmp_path, *WORDS)
    before, after = pieces(made / "run" / chosen.name), pieces(tmp_path / "run" / chosen.name)
    assert sum(name.endswith("trials.jsonl") for name in before) == 4
    assert after == before
    assert pieces(made / "run" / PLACES[0]) != pieces(tmp_path / "run" / PLACES[0])  # there these rows train


def test_another_search_trains_the_heads_anew_that_it_concerns_and_more_trials_go_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(made, tmp_path)
    fits, original = Counter[str](), heads.fit

    def counting(config: Any, *args: Any, **options: Any) -> Any:
        fits[config.op] += 1
        return original(config, *args, **options)

    def trained(*words: str) -> dict[str, int]:
        fits.clear()
        finetune(tmp_path, *WORDS[:2], *words)
        return dict(fits)

    # the same config: a copied run has other paths, but the same rows and encoders
    best = json.loads((made / "run" / "results.json").read_text())["best"]
    monkeypatch.setattr(heads, "fit", counting)
    assert trained("search={trials: 3}") == {}
    more = trained("search={trials: 4}")
    assert {op: n for op, n in more.items() if op != best} == dict.fromkeys({*NAMES} - {best}, 2 * (1 + 2))
    for place in PLACES:
        for name in NAMES:
            assert trials_of(tmp_path / "run" / place, name)[:3] == trials_of(made / "run" / place, name)
    # only concat has this setting, and is searched and trained anew
    few = trained("search={trials: 4, space: {interactions: [true, false]}}")
    assert few.pop("concat") >= 2 * (4 + 2)
    assert set(few) <= {json.loads((tmp_path / "run" / "results.json").read_text())["best"]}
    assert sum(trained().values()) >= 2 * 4 * 2  # without a search all heads are others
    assert "search" not in json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_run_on_fixed_splits_says_what_a_search_costs_and_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    write_config(tmp_path, HEADS)
    results = finetune(tmp_path, "search={trials: 2, space: {lr: [1.0e-3, 0.01]}}")
    said = capsys.readouterr()
    assert "32 test rows; 16 trainings of 4 heads, 8 of them trials of the search" in said.err
    assert "2 trials, auroc" in said.err
    assert "Search: inner auroc of one seed, the best of 2 trials." in said.out
    assert "Such scores are too hopeful; only those of the test rows count." in said.out
    assert all(entry["settings"]["lr"] in (1e-3, 0.01) for [entry] in results["search"]["heads"].values())
    assert load_config(FinetuneConfig, tmp_path / "run" / "config.yaml") == load_config(
        FinetuneConfig, tmp_path / "finetune.yaml", ["search={trials: 2, space: {lr: [1.0e-3, 0.01]}}"]
    )
    # answers come from the heads with the chosen settings
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    for name in NAMES:
        p = Predictor.load(tmp_path / "run", head=name).predict_proba(tmp_path / "match.csv")
        assert np.abs(p[-32:, 1] - np.array(table[f"{name}:1"])).max() < 1e-5
    page = write_report([tmp_path / "run"]).read_text()
    assert "<h3>Search</h3>" in page
    assert "Inner scores after a search are too hopeful" in page
    assert "modality_dropout&nbsp;" in page


def test_the_report_of_folds_has_a_line_per_head_and_fold(made: Path, tmp_path: Path) -> None:
    page = write_report([made / "run"], tmp_path / "report.html").read_text()
    section = page.split("<h3>Search</h3>")[1].split("</table>")[0]
    assert section.count("<tr") == 1 + 2 * 4 + 1
    assert section.count("all rows") == 1


def test_validate_counts_the_trials(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["finetune", str(made / "finetune.yaml"), *WORDS, "--validate", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["trainings"]
    assert said == "45 trainings of 4 heads, 27 of them trials of the search"
    assert main(["finetune", str(made / "finetune.yaml"), *WORDS, "--validate"]) == 0
    assert f"planned: {said}" in capsys.readouterr().out


def test_without_optuna_the_run_says_how_to_get_it(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    capsys.readouterr()
    words = ["finetune", str(made / "finetune.yaml"), f"out={made / 'other'}", "search={trials: 2}"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(
        "search: needs Optuna, which is not installed; pip install 'diptych[search]', or remove search"
    )
    assert not (made / "other").exists()
    assert main([*words, "--validate"]) == 1
    assert "FAILS: search: needs Optuna" in capsys.readouterr().out


def test_trainings_that_explode_are_bad_trials_and_not_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    write_config(tmp_path, HEADS)
    results = finetune(tmp_path, "eval.calibration=platt", "search={trials: 2, space: {lr: [1.0e+30]}}")
    for name, [entry] in results["search"]["heads"].items():
        assert entry["chosen"] == 0
        assert [row["inner"] is None for row in trials_of(tmp_path / "run", name)] == [False, True]
    capsys.readouterr()
    assert main(["finetune", str(tmp_path / "finetune.yaml"), "adapt.lr=1.0e+30"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "heads.image: training came to no finite answers with lr 1e+30; set a smaller adapt.lr" in said


def test_heads_that_train_encoders_are_searched_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, names=3)
    head = "{tuned: {op: bilinear, adapt: {method: lp_ft, encoder_epochs: 1}}}"
    write_config(tmp_path, head, epochs=1, more="early_stopping: {metric: loss}\n")
    words = ("eval.seeds=[0]", "search={trials: 2, space: {encoder_lr: [1.0e-4, 1.0e-3]}, encoders: true}")
    results = finetune(tmp_path, *words)
    said = capsys.readouterr().err
    assert "the search trains the encoders of tuned in every trial: 2 trials each, up to 2 passes" in said
    assert said.index("the search trains") < said.index("image: inner")
    place = tmp_path / "run"
    assert trials_of(place, "tuned")[1]["settings"]["encoder_lr"] in (1e-4, 1e-3)
    assert "encoder_lr" not in trials_of(place, "image")[1]["settings"]
    assert results["search"]["as_written"] == []
    finetune(tmp_path, "eval.seeds=[0]", "search={trials: 2}")
    assert json.loads((place / "results.json").read_text())["search"]["as_written"] == ["tuned"]
    write_report([place])


@pytest.mark.parametrize(
    ("task", "heads", "as_written"),
    [("retrieval", "[similarity]", ["zero_shot"]), ("matching", "[late]", [])],
)
def test_heads_of_pairs_are_searched_but_not_encoders_as_they_are(
    task: str, heads: str, as_written: list[str], tmp_path: Path
) -> None:
    write_pairs(tmp_path)
    rows = pair_rows(tmp_path)
    rows[3][2] = "" if task == "retrieval" else rows[3][2]
    write_csv(tmp_path / "pairs.csv", rows, PAIRS)
    words = ("search={trials: 2}", "eval.seeds=[0]")
    results = run_pairs(tmp_path, f"{{type: {task}}}", *words, heads=heads, epochs=2)
    assert results["search"]["as_written"] == as_written
    for name, [entry] in results["search"]["heads"].items():
        assert len(trials_of(tmp_path / "run", name)) == 2
        assert ("modality_dropout" in entry["settings"]) == (name in ("concat", "late"))
    write_report([tmp_path / "run"])
