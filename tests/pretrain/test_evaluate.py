"""The whole evaluation on a tiny corpus: equal to open_clip's own features, the same every time, and kind
to users."""

import argparse
import io
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from diptych.cli import evaluate as evaluate_command
from diptych.cli import report as report_command
from diptych.cli.evaluate import print_scores
from diptych.configs.errors import UserError
from diptych.data.shards import open_shards
from diptych.pretrain.evaluate import EvaluateConfig, evaluate, quick_retrieval
from diptych.pretrain.galleries import data_root, find_galleries, run_folder
from diptych.pretrain.model import ContrastiveModel, load_model
from diptych.pretrain.probe import ProbeConfig
from diptych.pretrain.zero_shot import ZeroShotConfig

from .evaluate_corpus import (
    NAMES,
    SIZE,
    make_checkpoint,
    make_corpus,
    make_run,
    open_clip_features,
    write_split,
)

QUICK = EvaluateConfig(
    example_galleries=("openmoji", "both"),
    bootstrap=100,
    examples=2,
    zero_shot=ZeroShotConfig(galleries=("openmoji",)),
    probe=ProbeConfig(galleries=("openmoji", "both")),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", corpus)


def test_scores_equal_those_of_open_clips_own_model_and_transform(run: Path) -> None:
    result = evaluate(run, QUICK)
    names = [(name, v) for v in (0, 1) for name in NAMES]
    images, texts = open_clip_features(run / "checkpoints" / "step_00000010", names)
    similar = (images @ texts.T).double().round(decimals=6).numpy()
    truth = np.tile(np.arange(12), 2)
    got = result["retrieval"]["both"]
    assert (got["n_images"], got["n_captions"]) == (24, 12)
    for k in (1, 5, 10):
        best = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        hits = (best == truth[:, None]).any(1)
        assert got["image_to_text"][f"R@{k}"]["value"] == pytest.approx(hits.mean())
        assert got["image_to_text"][f"R@{k}"]["chance"] == pytest.approx(k / 12)
        best = np.argsort(-similar.T, axis=1, kind="stable")[:, :k]
        assert got["text_to_image"][f"R@{k}"]["value"] == pytest.approx(
            (truth[best] == np.arange(12)[:, None]).any(1).mean()
        )
    classes = {f"sub-{i}": [j for j in range(10) if j % 3 == i] for i in range(3)}  # training holds ten names
    zero_shot = result["zero_shot"]["openmoji/subgroup"]
    odds = (images[:12] @ texts[:10].T / 0.07).exp()  # at the initial temperature
    predicted = torch.stack([odds[:, rows].sum(1) for rows in classes.values()]).argmax(0).numpy()
    assert zero_shot["accuracy"]["value"] == pytest.approx((predicted == np.arange(12) % 3).mean())
    means = torch.stack([texts[rows].mean(0) for rows in classes.values()])
    predicted = (images[:12] @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1).numpy()
    quick = QUICK.model_copy(
        update={"zero_shot": ZeroShotConfig(galleries=("openmoji",), ensemble="embedding")}
    )
    got = evaluate(run, quick)["zero_shot"]["openmoji/subgroup"]["accuracy"]["value"]
    assert got == pytest.approx((predicted == np.arange(12) % 3).mean())
    assert zero_shot["accuracy"]["majority"] == pytest.approx(1 / 3)
    assert (zero_shot["classes"], zero_shot["prompts"], zero_shot["n"]) == (3, 10, 12)
    assert "openmoji/subgroup (class names)" in result["zero_shot"]
    assert result["linear_probe"]["both/subgroup"]["n_train"] == 30


def test_the_run_folder_holds_the_scores_and_the_pictures_and_a_second_run_gives_the_same_bytes(
    run: Path,
) -> None:
    first = evaluate(run, QUICK)
    stored = (run / "evaluate.json").read_bytes()
    assert json.loads(stored) == first
    pictures = {p.name: p.read_bytes() for p in (run / "evaluate").rglob("*.png")}
    assert {"examples_openmoji.png", "examples_both.png"} <= set(pictures)
    for entry in first["examples"]:
        for name in [entry["picture"], *(answer.get("picture") for answer in entry["top"])]:
            assert name is None or (run / name).is_file()
        assert len(entry["top"]) == 5
    assert evaluate(run / "checkpoints" / "step_00000010", QUICK)["retrieval"] == first["retrieval"]
    evaluate(run, QUICK)
    assert (run / "evaluate.json").read_bytes() == stored
    assert {p.name: p.read_bytes() for p in (run / "evaluate").rglob("*.png")} == pictures


def test_any_folder_of_shards_and_own_classes_will_do(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    write_split(tmp_path / "shards", ["mine"], NAMES)
    (tmp_path / "classes.yaml").write_text("{warm: [a red square, a gold square], cold: a blue square}")
    config = EvaluateConfig(
        data=str(tmp_path / "shards"),
        out=str(tmp_path / "out"),
        bootstrap=100,
        examples=0,
        zero_shot=ZeroShotConfig(classes=str(tmp_path / "classes.yaml"), label="group"),
    )
    result = evaluate(checkpoint, config)
    assert result["retrieval"]["shards"]["n_images"] == 12
    assert result["zero_shot"]["shards/group"]["classes"] == 2
    assert result["zero_shot"]["shards/group"]["prompts"] == 3
    assert result["linear_probe"] == {}
    assert any("linear probe" in note for note in result["notes"])
    assert (tmp_path / "out" / "evaluate.json").is_file()


def test_quick_retrieval_is_the_evaluation_without_its_extras_and_leaves_no_trace(
    run: Path, corpus: Path
) -> None:
    shards = open_shards(corpus / "test_vendor")
    loaded = load_model(run)
    model = ContrastiveModel(loaded.clip)
    model.train()
    model.clip.visual.eval()  # a frozen tower
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    got = quick_retrieval(model, shards, loaded.tokenizer, SIZE, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    scores = evaluate(run, QUICK)["retrieval"]["both"]
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            expected = scores[direction][f"R@{k}"]
            assert got[f"val/{direction}_R@{k}"] == pytest.approx(expected["value"])
            assert got[f"val/{direction}_R@{k}_chance"] == pytest.approx(expected["chance"])
    for other in (loaded, loaded.clip):
        assert quick_retrieval(other, shards, loaded.tokenizer, SIZE, "cpu") == got
    few = quick_retrieval(model, shards, loaded.tokenizer, SIZE, "cpu", max_images=7)
    assert few["val/image_to_text_R@1_chance"] > got["val/image_to_text_R@1_chance"]


def test_a_diverged_model_is_an_error_and_not_a_perfect_score(run: Path, corpus: Path) -> None:
    loaded = load_model(run)
    with torch.no_grad():
        loaded.clip.visual.proj.fill_(float("nan"))  # type: ignore[union-attr]  of this kind here
    with pytest.raises(ValueError, match="diverged"):
        quick_retrieval(loaded, open_shards(corpus / "test_vendor"), loaded.tokenizer, SIZE, "cpu")


def test_the_data_is_found_from_the_run_the_argument_or_the_cache(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_folder(run) == run_folder(run / "checkpoints" / "step_00000010") == run
    assert run_folder("ViT-B-32:openai") is None
    assert data_root(run, None) == corpus
    assert data_root(run, str(tmp_path)) == tmp_path
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="diptych data fetch icons"):
        data_root("ViT-B-32:openai", None)
    fetched = tmp_path / "cache" / "corpora" / "pets"
    fetched.parent.mkdir(parents=True)
    fetched.symlink_to(corpus)
    assert data_root("ViT-B-32:openai", "corpus:pets") == fetched
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.yaml").write_text("data: {train: corpus:pets/train}\n")
    assert data_root(other, None) == fetched
    assert [g.name for g in find_galleries(corpus, ["both"])] == ["both"]
    (tmp_path / "split").mkdir()
    write_split(tmp_path / "split" / "test_a", ["v"], NAMES[:2])
    write_split(tmp_path / "split" / "train", ["v"], NAMES[:2])
    assert [g.name for g in find_galleries(tmp_path / "split")] == ["test_a"]


def test_a_run_is_evaluated_on_the_data_that_its_config_names(corpus: Path, tmp_path: Path) -> None:
    """Whether it trained on one set, on several, or on a corpus with galleries of its own."""
    run, own = tmp_path / "run", tmp_path / "own"
    (run / "checkpoints").mkdir(parents=True)
    own.mkdir()
    for train in (str(corpus / "train"), [{"data": "a", "weight": 1.0}, {"data": "s3://b/c", "weight": 2.0}]):
        config: dict[str, Any] = {"data": {"train": train}, "evaluate": {"data": str(own)}}
        (run / "config.yaml").write_text(json.dumps(config))
        assert data_root(run, None) == own
        config["evaluate"]["data"] = str(tmp_path / "gone")
        (run / "config.yaml").write_text(json.dumps(config))
        with pytest.raises(
            UserError, match=r"evaluate.data is .*gone, which is not below .*give data=FOLDER"
        ):
            data_root(run, None)
    config = {"data": {"train": [{"data": str(corpus / "train")}]}, "evaluate": {"data": None}}
    (run / "config.yaml").write_text(json.dumps(config))
    assert data_root(run, None) == corpus


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"data": "/no/such/folder"}, "data: there is no folder /no/such/folder"),
        ({"galleries": ("openmojis",)}, "has no gallery 'openmojis'; it has openmoji, both"),
        ({"device": "tpu"}, "device: 'tpu'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run: Path, config: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        evaluate(run, QUICK.model_copy(update=config))
    assert "\n" not in str(error.value)


def test_a_gallery_that_names_samples_which_are_gone_is_an_error(tmp_path: Path, run: Path) -> None:
    root = make_corpus(tmp_path / "corpus")
    galleries = json.loads((root / "galleries.json").read_text())
    galleries["both"]["keys"].append("openmoji-purple")
    (root / "galleries.json").write_text(json.dumps(galleries))
    with pytest.raises(UserError, match=r"1 of 25 samples .* openmoji-purple"):
        evaluate(run, QUICK.model_copy(update={"data": str(root), "out": str(tmp_path / "out")}))


def test_the_printed_tables_hold_chance_majority_and_interval_beside_each_score() -> None:
    score = {"value": 0.1234, "low": 0.1, "high": 0.15, "chance": 0.0007}
    ways = {"R@1": score, "R@5": score | {"value": 0.4321}}
    labelled = {"accuracy": score | {"majority": 0.142}, "classes": 97, "n": 1430}
    result = {
        "folder": "runs/tiny",
        "retrieval": {"pets[bold]": {"image_to_text": ways, "text_to_image": ways}},
        "zero_shot": {"pets/kind": labelled},
        "linear_probe": {},
        "notes": ["linear probe: [none]"],
        "pictures": {"retrieval_examples": "evaluate/examples_pets.png"},
    }
    out = io.StringIO()
    print_scores(result, Console(file=out, width=120))
    text = out.getvalue()
    for words in ("0.432", "0.100 to 0.150", "0.0007", "0.142", "97", "[none]", "runs/tiny/evaluate.json"):
        assert words in text
    assert "pets[bold]" in text
    assert "Linear probe accuracy" not in text


@pytest.mark.parametrize("command", [evaluate_command, report_command])
def test_the_help_of_the_commands_has_an_example(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser(prog="diptych")
    command.add_parser(parser.add_subparsers())
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args([name, "--help"])
    shown = capsys.readouterr().out
    example = next(
        line.strip() for line in shown.splitlines() if line.strip().startswith(f"diptych {name} runs")
    )
    assert parser.parse_args(shlex.split(example)[1:]).run is command.run
