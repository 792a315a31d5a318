"""Whole runs of retrieval: training, folds, resume, scores, predictions, search and report."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report

from .pair_runs import COLUMNS, pair_rows, run_pairs, write_pairs
from .runs import contents, stop_at, timeless

TASK = "{type: retrieval}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a finished run of frozen encoders."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_pairs(folder)
    return folder, run_pairs(folder, TASK)


def by_open_clip(folder: Path) -> tuple[Any, Any, list[list[Any]]]:
    """Features of the test rows by open_clip alone."""
    rows = [row for row in pair_rows(folder) if row[4] == "test"]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'checkpoint'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'checkpoint'}")
    # a transform
    pictures = torch.stack([preprocess(Image.open(folder / row[1])) for row in rows])  # type: ignore[operator]
    with torch.no_grad():
        images = model.eval().encode_image(pictures, normalize=True)
        texts = model.encode_text(tokenizer([row[2] for row in rows]), normalize=True)
    return images.double().numpy(), texts.double().numpy(), rows


def test_zero_shot_is_what_open_clip_gives_and_training_beats_it(done: tuple[Path, dict[str, Any]]) -> None:
    folder, results = done
    images, texts, rows = by_open_clip(folder)
    names = [row[1] for row in rows]
    own = np.array([[a == b for b in names] for a in names])
    similar = images @ texts.T
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    zero = results["heads"]["zero_shot"]["metrics"]
    for k in (1, 5, 10):
        top = np.argsort(-similar[firsts], axis=1)[:, :k]
        expected = np.mean([own[q, t].any() for q, t in zip(firsts, top, strict=True)])
        assert zero[f"image_to_text_R@{k}"]["value"] == pytest.approx(expected)
        top = np.argsort(-similar[firsts].T, axis=1)[:, :k]
        expected = np.mean([own[q, np.array(firsts)[t]].any() for q, t in enumerate(top)])
        assert zero[f"text_to_image_R@{k}"]["value"] == pytest.approx(expected)
    inner = {name: head["inner"]["mean_recall"] for name, head in results["heads"].items()}
    assert inner["similarity"] > inner["zero_shot"]
    assert results["best"] == "similarity"
    assert results["heads"]["similarity"]["vs_best_single"]["diff"] > 0
    galleries = results["galleries"]
    assert galleries["image_to_text"] == {"queries": 16, "size": 32, "matches": 2}
    assert galleries["text_to_image"] == {"queries": 32, "size": 16, "matches": 1}
    assert results["chances"]["text_to_image_R@5"] == pytest.approx(5 / 16)
    assert "Gain over zero-shot" in results["fusion_gain"]["text"]
    assert "among 16 pictures and 32 texts" in results["headline"]


def test_numbers_can_be_made_again_from_the_ranks(done: tuple[Path, dict[str, Any]]) -> None:
    folder, results = done
    table = pq.read_table(folder / "run" / "predictions.parquet").to_pydict()
    for name, head in results["heads"].items():
        for way in ("image_to_text", "text_to_image"):
            ranks = np.array([rank for rank in table[f"{name}:{way}_rank"] if rank is not None])
            assert head["metrics"][f"{way}_R@5"]["value"] == pytest.approx((ranks <= 5).mean())
            assert head["metrics"][f"{way}_median_rank"]["value"] == np.median(ranks)
            precision = [one for one in table[f"{name}:{way}_AP@R"] if one is not None]
            assert head["metrics"][f"{way}_mAP@R"]["value"] == pytest.approx(np.mean(precision))
    assert len(set(table["picture"])) == 16


def test_predictions_searches_and_scores(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, results = done
    rows = [row for row in pair_rows(folder) if row[4] == "test"]
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    model = Predictor.load(folder / "run")
    vectors = model.embed(table, root=folder)
    cosines = (vectors["image"] * vectors["text"]).sum(1)
    assert np.abs(np.array(model.predict(table, root=folder)) - cosines).max() < 1e-5
    assert np.allclose(np.linalg.norm(vectors["image"], axis=1), 1, atol=1e-5)
    texts = [{"text": row["text"]} for row in table]
    pictures = [{"image": row["image"]} for row in table[::2]]
    places, values = model.search(pictures, texts, k=5, root=folder)
    hits = [(np.array(places[i]) // 2 == i).any() for i in range(len(pictures))]
    best = results["heads"]["similarity"]["metrics"]
    assert np.mean(hits) == pytest.approx(best["image_to_text_R@5"]["value"])
    assert (np.diff(values, axis=1) <= 0).all()
    assert model.search(texts, pictures, k=3, root=folder)[0].shape == (32, 3)
    with pytest.raises(UserError, match="give queries of pictures alone"):
        model.search(table, texts, root=folder)
    with pytest.raises(UserError, match="retrieval has no probabilities"):
        model.predict_proba(table, root=folder)
    scored = model.evaluate(table, root=folder)
    for name, score in best.items():  # groups are named otherwise here, so they are drawn in another order
        assert scored["metrics"][name]["value"] == pytest.approx(score["value"], abs=1e-6)
        assert scored["metrics"][name]["high"] == pytest.approx(score["high"], rel=0.3, abs=0.05)
    assert scored["n_groups"] == 16
    given = tmp_path / "in.csv"
    given.write_text("image,text\nimages/red0.png,red square one\nimages/red0.png,\n")
    out = tmp_path / "out.csv"
    assert main(["predict", str(folder / "run"), str(given), "-o", str(out), "--root", str(folder)]) == 2
    shutil.copytree(folder / "images", tmp_path / "images")
    assert main(["predict", str(folder / "run"), str(given), "-o", str(out)]) == 0
    with out.open() as file:
        answers = [row["prediction"] for row in csv.DictReader(file)]
    assert -1 <= float(answers[0]) <= 1
    assert answers[1] == ""


def test_the_report_and_a_second_run(done: tuple[Path, dict[str, Any]], capsys: Any) -> None:
    folder, results = done
    page = write_report([folder / "run"]).read_text()
    for words in ("gain over zero-shot", "text to image mAP@R", "16 pictures and 32 texts", "hit rate"):
        assert words in page
    assert "single modality" not in page
    assert "nan" not in page.lower()
    before = contents(folder / "run")
    assert timeless(run_pairs(folder, TASK)) == timeless(results)
    assert capsys.readouterr().err.count("kept from before") == 2
    assert contents(folder / "run") == before


@pytest.mark.slow
def test_every_fold_is_a_gallery_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    write_pairs(tmp_path, names=6)
    options = {"eval": ", cv: {folds: 3}", "epochs": 3}
    whole = run_pairs(tmp_path, TASK, **options)
    kept = contents(tmp_path / "run")
    assert whole["galleries"]["n"] == 3
    assert whole["galleries"]["image_to_text"]["queries"] == 60
    assert whole["n_test"] == 120
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    for one in whole["folds"]:  # each by itself, as a run on these test rows alone would score
        ranks = [
            (rank, way)
            for way in ("image_to_text", "text_to_image")
            for rank, fold in zip(table[f"similarity:{way}_rank"], table["fold"], strict=True)
            if fold == one["fold"] and rank is not None
        ]
        recalls = [
            np.mean([rank <= k for rank, way in ranks if way == wanted])
            for k in (1, 5, 10)
            for wanted in ("image_to_text", "text_to_image")
        ]
        assert one["scores"]["similarity"] == pytest.approx(np.mean(recalls))
    shutil.rmtree(tmp_path / "run")
    stop_at("similarity", tmp_path, monkeypatch)
    assert timeless(run_pairs(tmp_path, TASK, **options)) == timeless(whole)
    assert contents(tmp_path / "run") == kept


def test_test_rows_change_no_weight(tmp_path: Path) -> None:
    write_pairs(tmp_path, names=4)
    run_pairs(tmp_path, TASK, epochs=2)
    before = contents(tmp_path / "run" / "heads")
    text = (tmp_path / "pairs.csv").read_text().splitlines()
    test = [i for i, line in enumerate(text) if line.endswith(",test")]
    cells = [text[i].split(",") for i in test]
    for i, row, other in zip(test, cells, cells[3:] + cells[:3], strict=True):
        text[i] = ",".join([row[0], row[1], other[2], *row[3:]])
    (tmp_path / "pairs.csv").write_text("\n".join(text) + "\n")
    run_pairs(tmp_path, TASK, "adapt.weight_decay=0.04", epochs=2)
    run_pairs(tmp_path, TASK, epochs=2)
    assert contents(tmp_path / "run" / "heads") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["lp_ft, wise_ft: auto", "full", "lora, soup: uniform", "norm_bias", "contrastive, soup: greedy"]
)
def test_encoders_may_be_trained(how: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, names=5)
    heads = f"{{tuned: {{op: similarity, adapt: {{method: {how}, encoder_lr: 1.0e-3, encoder_epochs: 2}}}}}}"
    results = run_pairs(tmp_path, TASK, heads=heads, epochs=3)
    inner = {name: head["inner"]["mean_recall"] for name, head in results["heads"].items()}
    assert inner["tuned"] >= inner["zero_shot"] - 0.02  # of each seed not less; of both together nearly so
    assert results["heads"]["zero_shot"]["method"] == "linear_probe"
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in pair_rows(tmp_path, 5) if row[4] == "test"]
    scored = Predictor.load(tmp_path / "run").evaluate(rows, root=tmp_path)
    assert scored["metrics"]["mean_recall"]["value"] == pytest.approx(
        results["heads"]["tuned"]["metrics"]["mean_recall"]["value"], abs=1e-6
    )


def test_rows_of_one_name_match_and_stay_together(tmp_path: Path, capsys: Any) -> None:
    write_pairs(tmp_path, names=6)
    task = "{type: retrieval, target: kind}"
    config = ["finetune", str(tmp_path / "finetune.yaml")]
    with pytest.raises(AssertionError):
        run_pairs(tmp_path, task)
    assert "belong together" in capsys.readouterr().err
    results = run_pairs(tmp_path, task, data=", group_across_splits: allow", epochs=2)
    capsys.readouterr()
    assert results["galleries"]["image_to_text"] == {"queries": 12, "size": 24, "matches": 4}
    assert results["n_test_groups"] == 6
    for words, said in (
        ("heads=[concat]", "concat gives no vectors to compare"),
        ("heads=[zero_shot]", "retrieval always has zero_shot"),
        ("eval.calibration=temperature", "no probabilities to calibrate"),
        ("task.class_weight=balanced", "retrieval has no classes"),
        ("task.negatives=2", "negatives belongs to matching"),
        ("early_stopping.metric=auroc", "no metric of retrieval tasks"),
    ):
        assert main([*config, words]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert len(error.splitlines()) == 1
    out = str(tmp_path / "program")
    assert main(["export", str(tmp_path / "run"), "--to", "torch_export", "-o", out]) == 2
    assert "retrieval compares them" in capsys.readouterr().err
    assert main([*config, "--validate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"][2]["labels"] == {
        "different pictures": 12,
        "different texts": 24,
    }
