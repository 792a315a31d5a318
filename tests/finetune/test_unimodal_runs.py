"""Runs that start from encoders trained apart, through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.predictor import Predictor

from .labelled import match_rows, squares, write_csv
from .runs import finetune
from .unimodal_models import hf_folder

SHORT = "encoder_epochs: 1, encoder_batch_size: 32, encoder_lr: 1.0e-3"
TRAINED = f"""
  lp: {{op: bilinear, adapt: {{method: lp_ft, wise_ft: auto, {SHORT}}}}}
  soup: {{op: weighted_sum, adapt: {{method: full, soup: uniform, encoder_layer_decay: 0.5, {SHORT}}}}}
  bent: {{op: gated, adapt: {{method: norm_bias, {SHORT}}}}}
  lora: {{op: late, adapt: {{method: lora, lora_rank: 2, {SHORT}}}}}
"""
TOKENS = "[cross, merged, bottleneck, late]"
CONFIG = """
name: apart
out: {folder}/run
task: {{type: binary}}
data: {{manifest: {folder}/match.csv, id: id, group: group, modalities: {modalities}}}
model: {model}
heads: {heads}
adapt: {{epochs: 2, batch_size: 32}}
eval: {{seeds: [0, 1], bootstrap: 100}}
tracking: {{wandb: "off"}}
"""
BOTH = "{image: {column: image}, text: {column: text}}"
VIT = "image: {timm: test_vit, weights: none, image_size: 32}"
RESNET = "image: {timm: test_resnet, weights: none, image_size: 64}"
BERT = "text: {{hf: {folder}/bert, pooling: mean}}"


def write(folder: Path, *model: str, heads: str, modalities: str = BOTH, more: str = "") -> Path:
    write_csv(folder / "match.csv", match_rows(folder, names=4))
    hf_folder(folder / "bert")
    whole = "{" + ", ".join(one.replace("{{", "{").replace("}}", "}") for one in model) + "}"
    text = CONFIG.replace(
        "{model}", whole.replace("{folder}", str(folder)).replace("{", "{{").replace("}", "}}")
    )
    path = folder / "finetune.yaml"
    path.write_text(text.format(folder=folder, heads=heads, modalities=modalities) + more)
    return path


@pytest.mark.slow
def test_every_method_trains_them_and_the_run_answers_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, VIT, BERT, heads=TRAINED)
    results = finetune(tmp_path)
    assert results["checkpoint"] == f"test_vit and {tmp_path}/bert"
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    write_csv(tmp_path / "test.csv", [row for row in match_rows(tmp_path, names=4) if row[5] == "test"])
    shutil.rmtree(tmp_path / "bert")
    run = (tmp_path / "run").rename(tmp_path / "moved")
    pretrained = Predictor.load(run, head="concat").embed(tmp_path / "test.csv")
    assert {k: v.shape[1] for k, v in pretrained.items()} == {"image": 64, "text": 16}
    for name in ("lp", "soup", "bent", "lora", "concat"):
        predictor = Predictor.load(run, head=name)
        p = predictor.predict_proba(tmp_path / "test.csv")
        assert np.abs(p[:, 1] - np.array(table[f"{name}:1"])).max() < 1e-5
        document = json.loads((run / "heads" / name / "head.json").read_text())
        assert document["retention"] is None  # nothing to retrieve: there is no common space
        if name == "soup":
            moved = predictor.embed(tmp_path / "test.csv")
            assert all(np.abs(moved[k] - pretrained[k]).max() > 1e-6 for k in pretrained)
    assert main(["report", str(run)]) == 0
    capsys.readouterr()
    for kind in ("open_clip", "hf"):
        assert main(["export", str(run), "--to", kind, "-o", str(tmp_path / kind)]) == 2
        assert "its encoders were trained apart" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()
    out = str(tmp_path / "program")
    assert main(["export", str(run), "--to", "torch_export", "--head", "soup", "-o", out]) == 0
    assert json.loads((tmp_path / "program" / "export.json").read_text())["largest_differences"]


def test_heads_on_tokens_read_a_feature_map_and_words(tmp_path: Path) -> None:
    write(tmp_path, RESNET, BERT, heads=TOKENS)
    results = finetune(tmp_path)
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    write_csv(tmp_path / "test.csv", [row for row in match_rows(tmp_path, names=4) if row[5] == "test"])
    for name in ("cross", "merged", "bottleneck", "late"):
        assert name in results["heads"]
        p = Predictor.load(tmp_path / "run", head=name).predict_proba(tmp_path / "test.csv")
        assert np.abs(p[:, 1] - np.array(table[f"{name}:1"])).max() < 1e-5
    assert main(["finetune", str(tmp_path / "finetune.yaml"), "--validate"]) in (0, 1)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_modality_needs_one_encoder(tmp_path: Path, kind: str) -> None:
    adapt = f"adapt: {{method: norm_bias, {SHORT}}}"
    one = RESNET if kind == "image" else BERT
    write(
        tmp_path,
        one,
        heads=f"{{{kind}: {{op: {kind}, {adapt}}}}}",
        modalities=f"{{{kind}: {{column: {kind}}}}}",
    )
    finetune(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run" / "encoder").iterdir() if p.is_dir()) == [kind]
    rows = [{kind: (tmp_path / "images" / "red0.png") if kind == "image" else "red square"}]
    rows = [{k: str(v) for k, v in row.items()} for row in rows]
    assert Predictor.load(tmp_path / "run").predict_proba(rows, root=tmp_path).shape == (1, 2)
    out = str(tmp_path / "program")
    assert main(["export", str(tmp_path / "run"), "--to", "torch_export", "-o", out]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": "[similarity]"}, "heads.similarity: similarity needs one space of pictures and texts"),
        (
            {"more": "task={type: matching, hard_negatives: true}"},
            "task.hard_negatives: true needs one space of pictures and texts",
        ),
        ({"more": "adapt.method=contrastive"}, "adapt.method contrastive needs one space"),
        ({"more": "adapt.class_prompts={0: no, 1: yes}"}, "adapt.class_prompts needs one space"),
        ({"model": ["checkpoint: x", VIT]}, "give either checkpoint, a dual encoder, or image and text"),
        ({"model": ["batch_size: 2"]}, "give checkpoint, a dual encoder, or image and text"),
        ({"model": [VIT]}, "model.text: data.modalities has text; give its encoder"),
        ({"model": [VIT, BERT], "modalities": "{text: {column: text}}", "heads": "[]"}, "model.image: data"),
        ({"model": [VIT, "text: {hf: x}"]}, "pooling is missing"),
        ({"model": [VIT, "text: {checkpoint: x, pooling: cls}"]}, "pooling is for Hugging Face models"),
        ({"model": ["image: {weights: none}", BERT]}, "give either timm"),
        ({"model": ["image: {timm: a, size: 3}", BERT]}, "image_size"),
    ],
)
def test_what_needs_one_space_and_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    options = {"heads": "[concat]", "modalities": BOTH} | {k: v for k, v in change.items() if k != "model"}
    more = [options.pop("more")] if "more" in options else []
    path = write(tmp_path, *change.get("model", [VIT, BERT]), **options)
    with pytest.raises(UserError) as told:
        load_config(FinetuneConfig, path, more)
    assert words in str(told.value)


def test_joint_and_lora_say_which_tower_they_cannot_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, RESNET, BERT, heads="[joint]")
    assert main(["finetune", str(path)]) == 2
    assert "joint starts from the blocks of open_clip's own ViT" in capsys.readouterr().err
    path = write(tmp_path, RESNET, BERT, heads="{concat: {op: concat, adapt: {method: lora}}}")
    assert main(["finetune", str(path)]) == 2
    assert "lora finds no attention in TimmEncoder" in capsys.readouterr().err


def test_a_checkpoint_may_be_a_file_a_folder_or_come_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from huggingface_hub import constants
    from safetensors.torch import load_file

    from diptych.finetune.encoders.features import encoder_fingerprint

    from .unimodal_models import source

    folder = squares.make_checkpoint(tmp_path / "checkpoint")
    state = load_file(folder / "open_clip_model.safetensors")
    (tmp_path / "old").mkdir()
    shutil.copy(folder / "open_clip_config.json", tmp_path / "old")
    torch.save(state, tmp_path / "old" / "weights.pt")
    run = tmp_path / "pretrained" / "checkpoints" / "step_00000010"
    shutil.copytree(folder, run)
    (run / "manifest.json").write_text('{"step": 10, "files": {}}')
    hub = tmp_path / "hub" / "models--org--squares"
    shutil.copytree(folder, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names = [
        folder, f"local-dir:{folder}", folder / "open_clip_model.safetensors", tmp_path / "pretrained",
        tmp_path / "old" / "weights.pt", "hf-hub:org/squares",
    ]  # fmt: skip
    assert len({encoder_fingerprint(source(checkpoint=str(name))) for name in names}) == 1
    with pytest.raises(UserError, match="hf-hub:org/none cannot be downloaded"):
        source(checkpoint="hf-hub:org/none")
    with pytest.raises(UserError, match="neither a file or folder nor an open_clip tag"):
        source(checkpoint="ViT-B-32:no_such_tag")
