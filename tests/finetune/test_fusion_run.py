"""Fusion heads through the command line: trained, saved, opened again and asked with a modality missing."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune.config import FinetuneConfig, HeadConfig
from diptych.finetune.predictor import Predictor

from .labelled import match_rows, write_config, write_csv, write_task

HEADS = """
  sum: {op: weighted_sum, weights: [0.7, 0.3]}
  named: {op: weighted_sum, weights: {text: 0.3, image: 0.7}}
  full: {op: bilinear, rank: full}
  merged: {op: merged, width: 8, heads: 2, layers: 1}
  bottleneck: {op: bottleneck, width: 8, heads: 2, bottlenecks: 2}
  joint: {op: joint, adapt: {lr: 1.0e-3}}
  product: {op: late, rule: product}
  vote: {op: late, rule: vote}
  stacking: {op: late, rule: stacking}
"""
NAMES = ["sum", "named", "full", "merged", "bottleneck", "joint", "product", "vote", "stacking"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_task(folder)
    assert main(["finetune", str(write_config(folder, HEADS))]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_saved_heads_answer_as_the_run_did_and_with_one_modality_too(made: Path, name: str) -> None:
    table = pq.read_table(made / "run" / "predictions.parquet").to_pydict()
    rows = [row for row in match_rows(made) if row[5] == "test"]
    predictor = Predictor.load(made / "run", head=name)
    p = predictor.predict_proba(write_csv(made / "test.csv", rows))
    assert np.abs(p[:, 1] - np.array(table[f"{name}:1"])).max() < 1e-5
    for missing in (1, 2):
        cut = [[*row[:missing], "", *row[missing + 1 :]] for row in rows]
        alone = predictor.predict_proba(write_csv(made / "cut.csv", cut))
        assert np.isfinite(alone).all()
        assert np.abs(alone - p).max() > 1e-6


def test_equal_heads_by_list_and_by_name_are_one(made: Path) -> None:
    heads = {n: json.loads((made / "run" / "heads" / n / "head.json").read_text()) for n in NAMES}
    assert heads["sum"]["inner"] == heads["named"]["inner"]
    assert (heads["merged"]["stage"], heads["merged"]["level"]) == ("mid", "token")
    assert (heads["bottleneck"]["stage"], heads["bottleneck"]["level"]) == ("mid", "token")
    assert (heads["joint"]["stage"], heads["joint"]["level"]) == ("early", "input")
    assert (heads["stacking"]["stage"], heads["stacking"]["level"]) == ("late", "decision")


def test_the_resolved_config_runs_again(made: Path) -> None:
    again = load_config(FinetuneConfig, made / "run" / "config.yaml")
    assert again.heads["sum"].weights == (0.7, 0.3)
    assert again.heads["named"].weights == {"text": 0.3, "image": 0.7}
    assert again.heads["full"].rank == "full"
    for head in again.heads.values():
        assert HeadConfig.model_validate_json(head.model_dump_json()) == head


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "heads={a: {op: weighted_sum, weights: [1, 2, 3]}}",
            "heads.a.weights: 3 numbers for the 2",
        ),
        ("heads={a: {op: weighted_sum, weights: {image: 1}}}", "heads.a.weights: names image, but the modal"),
        (
            "heads={a: {op: weighted_sum, weights: [1, 0]}}",
            "heads.a.weights: weights must be learned, equal or numbers above 0",
        ),
        (
            "heads={a: {op: weighted_sum, weights: fair}}",
            "equal or numbers above 0, as [0.7, 0.3], not fair",
        ),
        ("heads={a: {op: bilinear, rank: 0}}", "rank must be 1 or more, full or null, not 0"),
        ("heads={a: {op: bilinear, rank: whole}}", "full or null, not whole"),
        ("heads={a: {op: late, rule: product, adapt: {method: lp_ft}}}", None),
        (
            "heads={a: {op: late, rule: stacking, adapt: {method: lp_ft}}}",
            "stacking needs answers to rows",
        ),
        (
            "heads={a: {op: merged, adapt: {method: lp_ft}}}",
            "heads.a: merged reads frozen tokens; set",
        ),
        ("heads={a: {op: bottleneck, layers: 1}}", "bottleneck needs 2 or more layers"),
    ],
)
def test_heads_that_cannot_be_end_with_one_sentence(
    words: str, said: str | None, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if said is None:
        load_config(FinetuneConfig, made / "finetune.yaml", [words])
        return
    assert main(["finetune", str(made / "finetune.yaml"), words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_a_full_bilinear_map_that_is_absurd_is_refused_before_anything_is_trained(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.finetune.fusion.operators.MOST_WEIGHTS", 10)
    before = sorted((made / "run" / "heads").rglob("*"))
    assert main(["finetune", str(made / "finetune.yaml"), "heads={x: {op: bilinear, rank: full}}"]) == 2
    error = capsys.readouterr().err
    assert "heads.x.rank: full has " in error
    assert "more than 10; give a number" in error
    assert sorted((made / "run" / "heads").rglob("*")) == before
