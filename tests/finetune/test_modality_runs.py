"""Runs with further modalities and several pictures per row: training, scores, answers, what is kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.encoders.columns import fit_columns
from diptych.finetune.predictor import Predictor
from diptych.finetune.session import data_config, plan
from diptych.finetune.tables.manifest import Rows, read_rows

from .modal import modal_rows, write_modal, write_modal_task
from .runs import contents, finetune

SMALL = "{text: {column: text}, tabular: {numeric: [price, stars], categorical: [brand]}}"
ALL_HEADS = (
    "{gated: {op: gated, width: 8}, cross: {op: cross, width: 8, heads: 2}, similarity: {op: similarity}, "
    "bottleneck: {op: bottleneck, width: 8, heads: 2}, learned: {op: late, rule: learned}, "
    "stacked: {op: late, rule: stacking}, "
    "tuned: {op: bilinear, adapt: {method: lp_ft, encoder_epochs: 1, wise_ft: 0.5}}}"
)


def head_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "run" / "heads" / name / "head.json").read_text())


def test_tabular_values_of_test_rows_never_reach_what_is_trained(tmp_path: Path) -> None:
    write_modal_task(tmp_path, modalities=SMALL)
    finetune(tmp_path)
    before, states = contents(tmp_path / "run" / "heads"), head_json(tmp_path, "gated")["columns"]
    assert states["tabular"]["numeric"][0]["missing"]
    rows = modal_rows(tmp_path)
    for i, row in enumerate(row for row in rows if row["split"] == "test"):
        row |= {"price": 1e6 * i, "stars": -3.0, "brand": f"never seen {i}"}
    write_modal(tmp_path, rows)
    finetune(tmp_path, f"out={tmp_path}/other")
    (tmp_path / "run").rename(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "run")
    assert contents(tmp_path / "run" / "heads") == before
    assert head_json(tmp_path, "gated")["columns"] == states


def test_a_run_goes_on_only_with_what_its_training_rows_still_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_modal_task(tmp_path, modalities=SMALL)
    finetune(tmp_path)
    capsys.readouterr()
    finetune(tmp_path)
    said = capsys.readouterr()
    assert (said.out + said.err).count("kept from before") == 4  # text, tabular, concat, gated
    rows = modal_rows(tmp_path)
    train = next(row for row in rows if row["split"] == "train" and row["brand"] == "acme")
    train["brand"] = "bolt"
    write_modal(tmp_path, rows)
    finetune(tmp_path)
    said = capsys.readouterr()
    assert "kept from before" not in said.out + said.err


class Watched(list[Any]):
    """Cells that know which of them were read."""

    def __init__(self, cells: list[Any]) -> None:
        super().__init__(cells)
        self.read = set[int]()

    def __getitem__(self, index: Any) -> Any:
        self.read.add(index)
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("all cells are read")


def test_every_fold_is_fitted_on_its_own_training_rows_and_reads_no_others(tmp_path: Path) -> None:
    path = write_modal_task(tmp_path, modalities=SMALL, more="").read_text()
    (tmp_path / "finetune.yaml").write_text(path.replace("bootstrap: 100", "bootstrap: 100, cv: {folds: 3}"))
    config = load_config(FinetuneConfig, tmp_path / "finetune.yaml")
    rows = read_rows(data_config(config), config.task)
    seen: list[Any] = []
    for fold, splits in plan(config, rows):
        cells = {k: Watched(column) for k, column in rows.cells.items()}
        watched = Rows("x", rows.ids, rows.declared, dict(cells))
        seen.append(fit_columns(watched.take(splits.train)))
        assert cells["tabular"].read == set(splits.train.tolist())
        if fold is not None:
            assert not cells["tabular"].read & set(splits.test.tolist())
    assert len({json.dumps(state["tabular"].model_dump(mode="json")) for state in seen}) == 4


@pytest.mark.slow
def test_folds_keep_their_own_columns_and_answers(tmp_path: Path) -> None:
    heads = "{gated: {op: gated, width: 8}, tuned: {op: concat, adapt: {method: lora, encoder_epochs: 1}}}"
    write_modal_task(tmp_path, heads, modalities=SMALL.replace("text", "image"))
    result = finetune(tmp_path, "eval.cv={folds: 3}")
    assert result["best_single"] in ("image", "tabular")
    assert {cell["seen"] for cell in result["missing"]["cells"]} == {"both", "image", "tabular"}
    config = load_config(FinetuneConfig, tmp_path / "finetune.yaml", ["eval.cv={folds: 3}"])
    rows = read_rows(data_config(config), config.task)
    for fold, splits in plan(config, rows):
        place = tmp_path / "run" / (fold.name if fold else "") / "heads" / result["best"] / "head.json"
        want = fit_columns(rows.take(splits.train))["tabular"].model_dump(mode="json")
        assert json.loads(place.read_text())["columns"] == {"tabular": want}
    assert len(Predictor.load(tmp_path / "run").predict(tmp_path / "modal.parquet")) == 160


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("modal")
    write_modal_task(folder, ALL_HEADS, epochs=30, more="")
    return folder, finetune(folder, "adapt.lr=0.01")


@pytest.mark.slow
def test_four_modalities_from_the_table_to_the_scores(made: tuple[Path, dict[str, Any]]) -> None:
    folder, result = made
    singles = [name for name, head in result["heads"].items() if head["stage"] == "single"]
    assert singles == ["image", "text", "tabular", "audio"]
    assert result["best_single"] == "tabular"
    score = {name: head["metrics"]["auroc"]["value"] for name, head in result["heads"].items()}
    assert score["tabular"] > 0.1 + max(score[name] for name in ("image", "text", "audio"))
    assert all("vs_best_single" not in result["heads"][name] for name in singles)
    assert all(
        h["vs_best_single"]["against"] == "tabular" for n, h in result["heads"].items() if n not in singles
    )
    assert [cell["seen"] for cell in result["missing"]["cells"][::3]] == ["all", *singles]
    assert main(["report", str(folder / "run")]) == 0
    page = (folder / "run" / "report.html").read_text()
    assert "tabular alone" in page
    assert "audio alone" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "cross", "learned", "tuned", "tabular"])
def test_four_modalities_from_a_table_to_answers(
    name: str, made: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    model = Predictor.load(folder / "run", head=name)
    rows = modal_rows(folder)
    test = [row for row in rows if row["split"] == "test"]
    p = model.predict_proba(test, root=folder)
    kept = pq.read_table(folder / "run" / "predictions.parquet").to_pydict()
    assert kept["id"] == [row["id"] for row in test]
    np.testing.assert_allclose(p[:, 1], kept[f"{name}:1"], atol=1e-6)
    values = model.explain(test, root=folder)
    assert all(set(value) == {"image", "text", "tabular", "audio"} for value in values)
    reads = model.saved[0].head.modalities
    assert all(value[k] == 0.0 for value in values for k in value if k not in reads)
    lacks = [
        (value["audio"], value["image"])
        for value, row in zip(values, test, strict=True)
        if row["sound"] is None and row["image"] is None
    ]
    assert all(pair == (0.0, 0.0) for pair in lacks)
    found = model.embed(test, root=folder)
    assert found["audio"].shape == (32, 5)
    assert np.isnan(found["audio"][:, 0]).tolist() == [row["sound"] is None for row in test]
    score = model.evaluate(folder / "modal.parquet", samples=100)["metrics"]["auroc"]["value"]
    assert score == score
    without = [{k: v for k, v in row.items() if k not in ("stars", "sound")} for row in test if row["text"]]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    words = ["predict", str(folder / "run"), str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    assert main([*words, "--head", name, "--explain"]) == 0
    said = capsys.readouterr().err
    assert "no column 'stars': all rows are answered as if it were empty" in said
    assert "no column 'sound': all rows are answered without audio" in said
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(
        [row["p_1"] for row in answers], model.predict_proba(without, root=folder)[:, 1], atol=1e-6
    )
    assert all(row["phi_audio"] == 0.0 for row in answers)


@pytest.mark.slow
def test_a_program_of_four_modalities_answers_as_the_predictor(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = made
    model = Predictor.load(folder / "run", head="gated")
    assert model.export("torch_export", tmp_path / "program")["probabilities"] < 1e-5
    assert model.export("onnx", tmp_path / "graph")["probabilities"] < 1e-5
    note = json.loads((tmp_path / "program" / "export.json").read_text())
    width = model.states["tabular"].width
    assert note["inputs"]["columns.tabular"] == f"float32 [b, {width}]"
    assert note["columns"]["audio"] == {"kind": "embedding", "width": 5}


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_rows_of_several_pictures_from_the_table_to_answers(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = (
        "{gated: {op: gated, width: 8}, merged: {op: merged, width: 8, heads: 2}, late: {op: late}, "
        "tuned: {op: concat, adapt: {method: lp_ft, encoder_epochs: 1, wise_ft: 0.5}}}"
    )
    modalities = f"{{image: {{column: image, pool: {pool}}}, text: {{column: text}}}}"
    write_modal_task(tmp_path, heads, modalities=modalities)
    rows = [row for row in modal_rows(tmp_path) if row["image"] or row["text"]]
    paths = [row["image"] for row in rows if row["image"]]
    for i, row in enumerate(rows):
        row["image"] = None if row["image"] is None else [row["image"], *paths[i : i + i % 3]]
    write_modal(tmp_path, rows)
    result = finetune(tmp_path)
    assert set(result["heads"]) == {"image", "text", "concat", "gated", "merged", "late", "tuned"}
    test = [row for row in rows if row["split"] == "test"]
    turned = [row | {"image": row["image"] and row["image"][::-1]} for row in test]
    kept = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    for name in result["heads"]:
        model = Predictor.load(tmp_path / "run", head=name)
        p = model.predict_proba(test, root=tmp_path)
        np.testing.assert_allclose(p[:, 1], kept[f"{name}:1"], atol=1e-5)
        np.testing.assert_allclose(model.predict_proba(turned, root=tmp_path), p, atol=1e-5)
        pools = [key for key in model.saved[0].head.state_dict() if key.startswith("pool.")]
        assert bool(pools) == (pool == "attention" and name not in ("text", "merged"))
    capsys.readouterr()
    words = ["finetune", str(tmp_path / "finetune.yaml")]
    assert main([*words, "heads={early: {op: joint}}"]) == 2
    assert "joint reads one picture per row" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--to", "torch_export", "-o", str(tmp_path / "x")]) == 2
    assert "a program reads one picture per row" in capsys.readouterr().err
    other = {"mean": "attention", "attention": "mean"}[pool]
    finetune(tmp_path, f"data.modalities.image.pool={other}")
    said = capsys.readouterr()
    assert "kept from before" not in said.out + said.err
    assert torch.isfinite(
        torch.tensor(Predictor.load(tmp_path / "run").predict_proba(test, root=tmp_path))
    ).all()
