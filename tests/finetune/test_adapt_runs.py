"""Whole runs that train encoders, through the command line: what is saved, kept, told and predicted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.finetune.config import AdaptConfig, FinetuneConfig
from diptych.finetune.predictor import Predictor
from diptych.finetune.tasks.task import log_loss

from .labelled import match_rows, write_config, write_csv, write_task
from .runs import contents, finetune, permute_test_labels

SHORT = "encoder_lr: 1.0e-3, encoder_batch_size: 32, encoder_epochs: 2"
HEADS = f"""
  lora: {{op: bilinear, adapt: {{method: lora, lora_rank: 2, {SHORT}}}}}
  bent: {{op: bilinear, adapt: {{method: norm_bias, wise_ft: auto, {SHORT}}}}}
  soup: {{op: bilinear, adapt: {{method: full, soup: uniform, encoder_layer_decay: 0.5, {SHORT}}}}}
  flyp: {{op: concat, adapt: {{method: contrastive, class_prompts: {{0: a lie, 1: [so, right]}}, {SHORT}}}}}
"""
NAMES = ("lora", "bent", "soup", "flyp")


def document(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "run" / "heads" / name / "head.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every method, shared by the tests of this file, which leave it as it is."""
    folder = tmp_path_factory.mktemp("run")
    write_task(folder)
    write_config(folder, HEADS)
    finetune(folder)
    return folder


def test_what_is_saved_is_a_plain_checkpoint_and_answers_as_in_training(made: Path) -> None:
    inner = [row for row in match_rows(made) if row[5] == "val"]
    write_csv(made / "inner.csv", inner)
    targets = np.array([int(row[3]) for row in inner])
    table = pq.read_table(made / "run" / "predictions.parquet").to_pydict()
    write_csv(made / "test.csv", [row for row in match_rows(made) if row[5] == "test"])
    for name in NAMES:
        folder = made / "run" / "heads" / name
        saved = sorted(path.name for path in folder.glob("encoder_seed_*"))
        assert len(saved) == len(document(made, name)["seeds"]) == (1 if name == "soup" else 2)
        for encoder in saved:
            open_clip.create_model_and_transforms(f"local-dir:{folder / encoder}")
        predictor = Predictor.load(made / "run", head=name)
        p = predictor.predict_proba(made / "inner.csv")
        assert log_loss(targets, p) == pytest.approx(document(made, name)["inner"]["loss"], abs=1e-5)
        p = predictor.predict_proba(made / "test.csv")
        assert np.abs(p[:, 1] - np.array(table[f"{name}:1"])).max() < 1e-5


def test_head_json_tells_what_was_chosen_and_what_was_forgotten(made: Path) -> None:
    for name in NAMES:
        told = document(made, name)["retention"]
        assert told["measure"] == "mean recall"
        assert told["n"] == 16  # the positive inner rows: the others are pairs that do not match
        assert 0 < told["before"] <= 1
        assert told["after"] == pytest.approx(
            np.mean([seed["retention"]["after"] for seed in document(made, name)["seeds"]])
        )
    assert document(made, "image")["retention"] is None
    [soup] = document(made, "soup")["seeds"]
    assert soup["soup"] == [0, 1]
    for seed in document(made, "bent")["seeds"]:
        scores = {float(alpha): score for alpha, score in seed["inner_by_alpha"].items()}
        assert scores[seed["alpha"]] == max(scores.values())
    lora = document(made, "lora")
    factors = 2 * (2 * (3 * 32 + 3 * 32) + 2 * (32 + 32))  # towers x rank x (in_proj and out_proj)
    plain = 2 * 24 + 2 * (24 * 24 + 24) + 24 + 1  # null vectors, factors and the classifier of the head
    assert lora["params"] == factors + plain
    rows = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert {row.get("phase") for row in rows if row["kind"] == "flyp"} == {None, "contrastive"}


def test_a_second_start_keeps_every_finished_head_and_a_change_makes_one_anew(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    out = f"out={folder / 'run'}"
    before = contents(folder / "run")
    capsys.readouterr()
    heads = len(finetune(folder, out)["heads"])
    assert capsys.readouterr().err.count("kept from before") == heads
    finetune(folder, out, "heads.lora.adapt.lora_alpha=2")
    told = capsys.readouterr().err
    assert told.count("kept from before") == heads - 1
    assert "mean recall of 16 inner rows" in told
    changed = {k for k, v in contents(folder / "run").items() if before.get(k) != v}
    assert changed
    assert all(path.startswith("heads/lora/") for path in changed)


def test_labels_of_the_test_change_no_weight_alpha_or_soup(made: Path, tmp_path: Path) -> None:
    write_task(tmp_path)
    permute_test_labels(tmp_path)
    write_config(tmp_path, HEADS)
    finetune(tmp_path)
    assert contents(tmp_path / "run") == contents(made / "run")
    for name in NAMES:
        assert document(tmp_path, name)["seeds"] == document(made, name)["seeds"]


def test_pictures_alone_meet_the_names_of_their_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, names=3)
    colours = [
        [*row[:3], row[2].replace(" ", "_"), *row[4:]] for row in match_rows(tmp_path, names=3) if row[3] == 1
    ]
    write_csv(tmp_path / "match.csv", colours)
    adapt = f"{{method: contrastive, {SHORT}}}"
    text = write_config(tmp_path, f"{{flyp: {{op: image, adapt: {adapt}}}}}").read_text()
    text = text.replace("type: binary", "type: multiclass")
    text = text.replace("id: id", "id: id, modalities: {image: {column: image}}")
    (tmp_path / "finetune.yaml").write_text(text)
    finetune(tmp_path)
    told = document(tmp_path, "flyp")["retention"]
    assert (told["measure"], told["n"]) == ("zero-shot accuracy", 6)
    assert "zero-shot accuracy of 6 inner rows" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    zero_shot = [row["inner_accuracy"] for row in rows if row.get("phase") == "contrastive"]
    assert max(zero_shot) > told["before"]  # the class names have been learnt


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapt.wise_ft=auto"], "adapt: wise_ft needs trained encoders; set method to another"),
        (["adapt.method=lora", "adapt.wise_ft=2"], "adapt.wise_ft: give auto, a number from 0 (pretrained)"),
        (["adapt.method=contrastive"], "heads.image: contrastive needs adapt.class_prompts"),
        (["adapt.soup=greedy", "eval.seeds=[0]"], "heads.image: soup needs two or more eval.seeds"),
        (["heads={c: {op: cross}}", "heads.c.adapt={method: lora}"], "cross reads frozen tokens"),
        (
            ["adapt.method=contrastive", "adapt.class_prompts={0: no}"],
            "adapt.class_prompts: class '1' has no text; add one",
        ),
        (
            ["adapt.method=contrastive", "adapt.class_prompts={0: [], 1: a}"],
            "class '0' needs a text or a list",
        ),
        (["adapt.method=bitfit"], "adapt.method"),
        (
            ["heads={c: {op: cross}}", "heads.c.adapt={wise_ft: auto}"],
            "heads.c.adapt: wise_ft needs trained encoders; set method to another than linear_probe",
        ),
        (["heads={c: {op: cross}}", "heads.c.adapt={lr: 0}"], "heads.c.adapt.lr: input should be greater"),
    ],
)
def test_mistakes_end_with_one_sentence_before_anything_is_trained(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, names=4)
    write_config(tmp_path)
    assert main(["finetune", str(tmp_path / "finetune.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "run" / "heads").exists()


def test_what_is_said_of_encoders_is_not_for_a_head_that_leaves_them_alone(tmp_path: Path) -> None:
    adapt = "{method: lora, lr: 0.5, wise_ft: auto, soup: greedy, lora_rank: 2, encoder_epochs: 7}"
    heads = "heads={c: {op: cross, adapt: {method: linear_probe}}, b: {op: bilinear}}"
    config = load_config(FinetuneConfig, write_config(tmp_path), [f"adapt={adapt}", heads])
    assert config.adapt_of("c") == AdaptConfig(lr=0.5)
    assert config.adapt_of("b") == config.adapt
    with pytest.raises(UserError, match=r"heads.c.adapt: wise_ft needs trained encoders; [^']*$"):
        load_config(
            FinetuneConfig, write_config(tmp_path), [f"adapt={adapt}", heads, "heads.c.adapt.wise_ft=1"]
        )
