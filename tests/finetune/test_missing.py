"""Scores with modalities missing: which rows are hit, and the numbers against runs' own predictions."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from diptych.cli.finetune import print_results
from diptych.cli.main import main
from diptych.finetune.missing import RATES, Scenario, scenarios
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report

from .labelled import match_rows, write_config, write_csv, write_task

HEADS = "{concat: {op: concat, adapt: {method: lp_ft, encoder_epochs: 1}}}"  # the only one that fuses
CELLS = [(seen, rate) for seen in ("both", "image", "text") for rate in RATES]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_are_hit_by_their_ids_nested_and_never_lose_everything(data: st.DataObject) -> None:
    names = ("image", "text", "audio")[: data.draw(st.integers(2, 3))]
    n = data.draw(st.integers(1, 30))
    ids = [f"row {i}" for i in data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n, unique=True))]
    there = np.array([data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
                      for _ in ids])  # fmt: skip
    there[~there.any(1), 0] = True
    present = {k: there[:, j] for j, k in enumerate(names)}
    order = data.draw(st.permutations(range(n)))
    for kept in (None, *names):
        lost: list[Any] = []
        for rate in (0.0, 0.2, 0.3, 0.7, 1.0):
            shown = Scenario(kept, rate).shown(ids, present)
            seen = np.stack([shown[k] for k in names], axis=1)
            assert not (seen & ~there).any()
            assert seen.any(1).all()
            moved = Scenario(kept, rate).shown(
                [ids[i] for i in order], {k: mask[order] for k, mask in present.items()}
            )
            assert all(np.array_equal(moved[k], shown[k][order]) for k in names)
            own = there if kept is None else present[kept][:, None]
            got = seen if kept is None else shown[kept][:, None]
            lost.append(own & ~got)  # by the rate alone
            if kept is not None:
                alone = shown[kept]
                assert (seen[alone].sum(1) == 1).all()
                assert np.array_equal(seen[~present[kept]], there[~present[kept]])
        assert not lost[0].any()
        for less, more in pairwise(lost):
            assert not (less & ~more).any()
        hit = lost[-1].any(1)
        several = (there.sum(1) > 1) & (True if kept is None else present[kept])
        assert np.array_equal(hit, several)
        assert (lost[-1].sum(1) <= 1).all()


def test_the_rate_is_that_of_rows_and_modalities_are_hit_alike() -> None:
    ids = [str(i) for i in range(20_000)]
    present = {k: np.ones(len(ids), dtype=bool) for k in ("image", "text")}
    for rate in (0.3, 0.7):
        shown = Scenario(None, rate).shown(ids, present)
        assert [1 - shown[k].mean() for k in present] == pytest.approx([rate / 2] * 2, abs=0.01)
        shown = Scenario("image", rate).shown(ids, present)
        assert [shown[k].mean() for k in present] == pytest.approx([1 - rate, rate], abs=0.01)
    assert scenarios(("text",)) == []
    assert [(s.name(("image", "text")), s.rate) for s in scenarios(("image", "text"))] == CELLS
    assert Scenario(None, 0.3).name(("a", "b", "c")) == "all"


def run(folder: Path, more: str = "", *words: str) -> dict[str, Any]:
    config = write_config(folder, HEADS)
    assert main(["finetune", str(config), "model.cache=false", f"out={folder / 'run'}{more}", *words]) == 0
    return json.loads((folder / f"run{more}" / "results.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on fixed splits, some rows of which miss a modality."""
    folder = tmp_path_factory.mktemp("missing")
    write_task(folder)
    rows = match_rows(folder)
    for i, row in enumerate(rows):
        if i % 9 == 0:
            row[1 + i % 2] = ""
    write_csv(folder / "match.csv", rows)
    run(folder)
    return folder


def test_the_matrix_holds_the_scores_of_tables_with_emptied_cells(made: Path, tmp_path: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    missing, best = results["missing"], results["best"]
    assert (missing["head"], missing["metric"], missing["rates"]) == (best, "accuracy", list(RATES))
    assert [(cell["seen"], cell["rate"]) for cell in missing["cells"]] == CELLS
    assert missing["cells"][0]["metrics"]["accuracy"] == results["heads"][best]["metrics"]["accuracy"]
    assert missing["cells"][0]["metrics"]["auroc"] == results["heads"][best]["metrics"]["auroc"]
    assert missing["cells"][0]["diff"] is None
    rows = [row for row in match_rows(tmp_path) if row[-1] == "test"]
    kept = {row["id"]: row for row in pq.read_table(made / "run" / "predictions.parquet").to_pylist()}
    full = {tuple(row[:1]): row for row in _read(made / "match.csv")}
    present = {
        k: np.array([bool(full[(row[0],)][j]) for row in rows]) for k, j in (("image", 1), ("text", 2))
    }
    predictor = Predictor.load(made / "run")
    truth = np.array([int(row[3]) for row in rows])
    for cell in missing["cells"]:
        seen = None if cell["seen"] == "both" else cell["seen"]
        shown = Scenario(seen, cell["rate"]).shown([row[0] for row in rows], present)
        emptied = [
            [row[0], row[1] if shown["image"][i] else "", row[2] if shown["text"][i] else ""]
            for i, row in enumerate(rows)
        ]
        write_csv(tmp_path / "t.csv", emptied, ("id", "image", "text"))
        p = predictor.predict_proba(tmp_path / "t.csv")
        accuracy = sk.accuracy_score(truth, p[:, 1] >= 0.5)
        assert cell["metrics"]["accuracy"]["value"] == pytest.approx(accuracy)
        assert cell["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth, p[:, 1]), abs=1e-3)
        assert cell["present"] == {k: pytest.approx(mask.mean()) for k, mask in shown.items()}
        if cell["diff"] is not None:
            base = missing["cells"][0]["metrics"]["accuracy"]["value"]
            assert cell["diff"]["value"] == pytest.approx(accuracy - base)
    assert len(kept) == len(rows)


def _read(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


def test_cross_validation_asks_every_folds_own_head(
    made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("tuned", "frozen"):
        words = [] if name == "tuned" else ["heads={late: {op: late}, concat: {op: concat}}"]
        results = run(made, f"-{name}", "eval.cv={folds: 2}", "eval.seeds=[0]", *words)
        cells = results["missing"]["cells"]
        assert [(cell["seen"], cell["rate"]) for cell in cells] == CELLS
        head = results["heads"][results["best"]]
        assert cells[0]["metrics"]["accuracy"] == head["metrics"]["accuracy"]
        left = list((made / f"run-{name}" / "folds").rglob("encoder_seed_*"))
        assert left == []
        tensors = len(list((made / f"run-{name}" / "folds").rglob("out_of_fold.safetensors")))
        assert tensors == 2 * len(results["heads"])
        before = results["missing"]
        again = run(made, f"-{name}", "eval.cv={folds: 2}", "eval.seeds=[0]", *words)
        assert again["missing"] == before
    capsys.readouterr()
    print_results(results, Console(width=120))
    printed = capsys.readouterr().out
    assert f"accuracy of {results['best']} where modalities are missing, by share of rows hit" in printed
    page = write_report([made / "run-frozen"], tmp_path / "report.html").read_text()
    assert "Missing modalities" in page
    for cell in cells:
        value = cell["metrics"]["accuracy"]["value"]
        assert f"{value:.3f}" in printed[printed.index("where modalities are missing") :]
        assert f"{100 * value:.1f} %<small>" in page[page.index("Missing modalities") :]
    assert "image alone" in printed
    assert "70 % missing" in page


def test_a_single_modality_has_no_matrix(made: Path) -> None:
    config = write_config(made, "[text]")
    words = ["data.modalities={text: {column: text}}", f"out={made / 'run-text'}", "model.cache=false"]
    rows = [row for row in match_rows(made)]
    write_csv(made / "match-all.csv", rows)
    assert main(["finetune", str(config), *words, f"data.manifest={made / 'match-all.csv'}"]) == 0
    assert "missing" not in json.loads((made / "run-text" / "results.json").read_text())
