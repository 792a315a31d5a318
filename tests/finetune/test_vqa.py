"""Soft answers of several people: scores beside the definition, and whole runs."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cli.main import main
from diptych.finetune.config import TaskConfig
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report
from diptych.finetune.tasks.task import Task
from diptych.finetune.tasks.vqa import answer_score, canonical_answer, soft_targets, vocabulary

from .labelled import squares
from .pair_runs import pair_rows, run_pairs, write_pairs


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=10), st.sampled_from("abcd"))
def test_scores_are_the_official_mean_over_subsets(people: list[str], answer: str) -> None:
    """min(# / 3, 1) of all subsets that leave one of them out."""
    subsets = list(combinations(people, len(people) - 1))
    expected = np.mean([min(subset.count(answer) / 3, 1) for subset in subsets])
    assert answer_score(people.count(answer), len(people)) == pytest.approx(expected)


def test_answers_are_compared_as_the_official_evaluation_does() -> None:
    for written, meant in {
        "The  Red Car.": "red car",
        "two": "2",
        "None": "0",
        "100,978": "100978",
        "2:50 pm": "2:50 pm",
        "girl’s": "girl's",
        "girls": "girls",
        "3.5 m": "3.5 m",
        "a no. 5": "no 5",
        "dont": "don't",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "its": "its",
        "yes!": "yes",
        "black/white": "black white",
        "t-shirt - red": "tshirt red",
        "1,000 t-shirts": "1000 tshirts",
        "50% of $5": "50% of $5",
        "an": "",
    }.items():
        assert canonical_answer(written) == meant
        assert canonical_answer(meant) == meant


def test_the_vocabulary_is_that_of_the_training_rows() -> None:
    answers = [["x", "x", "y", "z"], ["x", "y", "y", "y"], ["z", "w", "w", "w"]]
    assert vocabulary(answers, np.array([0, 1]), most=9, min_rows=2) == ["x", "y"]
    assert vocabulary(answers, np.array([0, 1, 2]), most=2, min_rows=1) == ["x", "y"]
    targets = soft_targets(answers, ["x", "y"])
    assert targets[2].tolist() == [0, 0]
    assert targets[1, 1] == 0.75
    task = Task("vqa", ("x", "y"))
    p = np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.4]])
    expected = (targets[0, 0] + targets[1, 1] + targets[2, 0]) / 3
    assert task.value("vqa_accuracy", targets, p) == pytest.approx(expected)
    assert task.named(p) == ["x", "y", "x"]
    logits = torch.logit(torch.from_numpy(p))
    bce = torch.nn.functional.binary_cross_entropy(torch.from_numpy(p), torch.from_numpy(targets))
    assert float(task.loss(logits, torch.from_numpy(targets))) == pytest.approx(float(bce))
    assert task.log_loss(targets, p) == pytest.approx(float(bce))


def test_runs_answer_questions(tmp_path: Path, capsys: Any) -> None:
    write_pairs(tmp_path, names=4)
    random = np.random.default_rng(0)
    with (tmp_path / "vqa.jsonl").open("w") as file:
        for i, row in enumerate(pair_rows(tmp_path, 4)):
            said = [row[3] if i % 2 else "square"] * 7 + random.choice(squares.NAMES[:6], 3).tolist()
            cells = {"id": row[0], "image": row[1], "text": ("what shape?", "what colour?")[i % 2]}
            file.write(json.dumps(cells | {"answers": said, "group": row[1], "split": row[4]}) + "\n")
    task = "{type: vqa, target: answers, vocabulary: 6}"
    options = {"heads": "[concat, late]", "data": ", group: group", "epochs": 12}
    words = f"data.manifest={tmp_path}/vqa.jsonl"
    results = run_pairs(tmp_path, task, words, **options)
    assert len(results["classes"]) == 6
    assert "square" in results["classes"]
    best = results["heads"]["concat"]["metrics"]["vqa_accuracy"]["value"]
    assert best > results["majority"]
    assert best <= results["ceiling"] <= 1
    assert "for the best of the vocabulary" in results["headline"]
    assert results["headline"] in capsys.readouterr().out
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    p = np.stack([table[f"concat:{name}"] for name in results["classes"]], axis=1)
    scores = [
        dict(zip(names, values, strict=True)).get(results["classes"][c], 0)
        for names, values, c in zip(table["target"], table["target_score"], p.argmax(1), strict=True)
    ]
    assert np.mean(scores) == pytest.approx(best)
    model = Predictor.load(tmp_path / "run", head="concat")
    rows = [json.loads(line) for line in (tmp_path / "vqa.jsonl").read_text().splitlines()]
    test = [row for row in rows if row["split"] == "test"]
    assert model.predict(test, root=tmp_path) == [results["classes"][c] for c in p.argmax(1)]
    assert model.evaluate(test, root=tmp_path)["metrics"]["vqa_accuracy"]["value"] == pytest.approx(best)
    assert "vqa_accuracy" in write_report([tmp_path / "run"]).read_text()
    folds = run_pairs(
        tmp_path, task, words, **options | {"eval": ", cv: {folds: 2}, calibration: temperature"}
    )
    assert len(folds["folds"]) == 2
    # each fold has the vocabulary of its own training rows, and answers stand under their own names
    assert len(folds["classes"]) > 6
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    p = np.stack([table[f"concat:{name}"] for name in folds["classes"]], axis=1)
    people = {row["id"]: row["answers"] for row in rows}
    for i, names, values in zip(table["id"], table["target"], table["target_score"], strict=True):
        official = soft_targets([[canonical_answer(one) for one in people[i]]], names)[0]
        assert values == pytest.approx(official.tolist())
    hits = [
        dict(zip(names, values, strict=True)).get(folds["classes"][c], 0)
        for names, values, c in zip(table["target"], table["target_score"], p.argmax(1), strict=True)
    ]
    assert np.mean(hits) == pytest.approx(folds["heads"]["concat"]["metrics"]["vqa_accuracy"]["value"])
    config = ["finetune", str(tmp_path / "finetune.yaml"), words]
    capsys.readouterr()
    assert main([*config, "--validate"]) in (0, 1)
    assert main([*config, "task.target=split"]) == 2
    assert "needs 4 or more people's" in capsys.readouterr().err
    with pytest.raises(ValueError, match="vqa has soft answers"):
        TaskConfig(type="vqa", class_weight="balanced")
