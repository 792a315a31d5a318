"""Exports: open_clip and transformers give the same features from them, torch.export the same answers."""

import io
import json
import string
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.data.text import Tokenizer, build_tokenizer
from diptych.finetune.config import HeadConfig
from diptych.finetune.export import formats as exports
from diptych.finetune.export.formats import NOTE, export
from diptych.finetune.export.hf import differences, hf_config, hf_state, random_ids, unsupported, write_hf
from diptych.finetune.export.program import PROGRAM, inputs_of, write_program
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.predictor import Predictor
from diptych.finetune.runs.saved import SavedHead, write_encoder
from diptych.finetune.tasks.task import Task
from diptych.pretrain import checkpoint
from diptych.pretrain.model import LoadedModel, ModelConfig, build_model, load_model

from .labelled import squares, write_config, write_task

transformers = pytest.importorskip("transformers")

VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT: dict[str, Any] = {"context_length": 12, "width": 48, "heads": 3, "layers": 3}


def quiet(line: str) -> None:
    del line


def make(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    *,
    scale: float = 4.0,
    tokenizer: Tokenizer | None = None,
    **more: Any,
) -> LoadedModel:
    """A tiny model with weights so large that an activation of another kind shows, and no bias of zero."""
    torch.manual_seed(0)
    config = ModelConfig(
        **{"embed_dim": 24} | more, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {})
    )
    clip = build_model(config)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name.endswith("bias"):
                parameter += 0.3 * torch.randn_like(parameter)
            elif "mlp" in name or "attn" in name:
                parameter *= scale
    return LoadedModel(clip, tokenizer or build_tokenizer(None, 12))


class Words(Tokenizer):
    """A tokenizer that is not CLIP's: ids of words, no special tokens."""

    def __init__(self) -> None:
        super().__init__(lambda captions: [([3, 4], False) for _ in captions], "words", 12, 0)


CASES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "gelu by tanh": {
        "vision": {"act_kwargs": {"approximate": "tanh"}},
        "text": {"act_kwargs": {"approximate": "tanh"}},
    },
    "read at an end-of-text id": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "another end-of-text id": {
        "text": {"pool_type": "eos", "eos_id": 7, "vocab_size": 90}, "tokenizer": Words(),
    },
    "the highest id of another tokenizer": {"text": {"vocab_size": 90}, "tokenizer": Words()},
    "one width": {"embed_dim": 32, "text": {"width": 32, "heads": 2}},
    "wide mlp and another eps": {
        "embed_dim": 8, "text": {"mlp_ratio": 3.0},
        "vision": {"mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}},
    },
    "norm after pooling": {"vision": {"final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_gives_the_same_features_and_logits(case: str, tmp_path: Path) -> None:
    model = make(**CASES[case])
    found = write_hf(model, tmp_path, quiet)
    assert max(found.values()) < 1e-5, found
    # once more without our comparison, on what transformers loads
    hf = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    random = torch.Generator().manual_seed(5)
    pixels, ids = torch.randn(3, 3, 16, 16, generator=random), random_ids(model, 3, random)
    with torch.inference_mode():
        out = hf(pixel_values=pixels, input_ids=ids)
        image, text, scale = model.clip(pixels, ids)[:3]
    assert (out.image_embeds - image).abs().max() < 1e-5
    assert (out.text_embeds - text).abs().max() < 1e-5
    assert (out.logits_per_image - scale * image @ text.T).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("hidden_act", "quick_gelu"), ("eos_token_id", 5), ("layer_norm_eps", 1e-2)],
)
def test_the_comparison_sees_a_wrong_setting(key: str, wrong: Any) -> None:
    model = make()
    config = hf_config(model)
    config["text_config"][key] = wrong
    hf = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    hf.load_state_dict(hf_state(model.clip))
    found = differences(model, hf)
    assert found["text features"] > 1e-3
    assert found["logits"] > 1e-3
    assert found["image features"] < 1e-5


def test_tokenizer_and_pictures_are_prepared_alike(tmp_path: Path) -> None:
    model = make()
    write_hf(model, tmp_path, quiet)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "A photo of a cat's 12 dogs!",
        "",
        "über Größe",
        "one two three four five six seven eight nine ten",
    ]
    ids, lengths = model.tokenizer.pack(texts)
    for text, part in zip(texts, ids.split(lengths.tolist()), strict=True):
        assert tokenizer(text, truncation=True)["input_ids"] == part.tolist()
    hf = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        padded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        got = hf.text_projection(hf.text_model(**padded).pooler_output)
    features = torch.nn.functional.normalize(got, dim=-1)
    assert (features - model.encode_captions(texts)).abs().max() < 1e-5
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    prepared = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    ours = model.model.pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert (prepared - ours).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vision": {"timm_model_name": "mobilenetv3_small_050", "timm_proj": ""}}, "timm's mobilenetv3"),
        ({"vision": {"layers": [1, 1, 1, 1], "image_size": 64}}, "image tower is a ModifiedResNet"),
        ({"init_logit_bias": -10.0}, r"logit bias \(SigLIP\)"),
        ({"vision": {"no_ln_pre": True}}, "no_ln_pre"),
        ({"vision": {"ls_init_value": 1.0}}, "image tower has layer scale"),
        ({"vision": {"pool_type": "avg"}}, "does not read the class token"),
        ({"vision": {"qk_norm": True}}, "image tower has blocks with more norms or scales"),
        ({"text": {"no_causal_mask": True}}, "text tower is not causal"),
        ({"text": {"embed_cls": True}}, "class token"),
        ({"text": {"pool_type": "last"}}, "reads the last token"),
        ({"text": {"pool_type": "eos", "eos_id": 2}}, "end-of-text id is 2"),
        ({"text": {"proj_bias": True}}, "text projection is not a plain matrix"),
        ({"resize_mode": "longest"}, "resize_mode longest"),
    ],
)  # fmt: skip
def test_what_transformers_cannot_hold_is_named(
    options: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(**options)
    (tmp_path / "source").mkdir()
    write_encoder(model, tmp_path / "source")
    with pytest.raises(UserError, match=words):
        export(tmp_path / "source", "hf", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    assert main(["export", str(tmp_path / "source"), "--to", "hf", "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error: transformers' CLIPModel cannot hold this model: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_an_export_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = squares.make_checkpoint(tmp_path / "source")
    monkeypatch.setattr(exports, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match=r"features differ by .*e-0. from the model's, more than 0e\+00"):
        export(source, "hf", tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_targets_that_hold_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(squares.make_checkpoint(tmp_path / "source")), tmp_path / "out"
    words = ["export", source, "--to", "open_clip", "-o", str(out)]
    out.mkdir()
    assert main(words) == 0  # an empty folder is as good as none
    assert json.loads((out / NOTE).read_text())["format"] == "open_clip"
    assert main(words) == 2
    assert "holds something already" in capsys.readouterr().err
    assert main(["export", source, "--to", "hf", "-o", str(out), "--force"]) == 0
    assert "largest difference of logits: " in capsys.readouterr().out
    assert not (out / "open_clip_config.json").exists()
    (out / NOTE).unlink()
    assert main([*words, "--force"]) == 2
    assert "holds something that is no export" in capsys.readouterr().err
    assert (out / "model.safetensors").is_file()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        export(source, "open_clip", tmp_path / "file")
    with pytest.raises(UserError, match="there is no export to 'tflite'; give open_clip, hf, torch_export"):
        export(source, "tflite", out)
    with pytest.raises(UserError, match="has no head, which torch_export needs"):
        export(source, "torch_export", tmp_path / "new")
    with pytest.raises(UserError, match="has no head 'x'"):
        export(source, "hf", tmp_path / "new", head="x")


def same_features(model: LoadedModel, folder: Path) -> float:
    """Largest difference between a model's features and those that open_clip gets from a folder."""
    loaded = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    texts = ["a red square", "blue"]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.inference_mode():
        image = loaded.encode_image(model.model.pixels(pixels), normalize=True)
        text = loaded.encode_text(ids, normalize=True)
    both = image - model.encode_images(pixels), text - model.encode_captions(texts)
    return max(float(part.abs().max()) for part in both)


def test_of_a_pretraining_run_the_newest_whole_averaged_weights_are_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 11):
        made = squares.make_checkpoint(tmp_path / f"made{step}", seed=step)
        tensors = {
            "open_clip_model.safetensors": load_file(made / "open_clip_model.safetensors"),
            "train_model.safetensors": {"x": torch.zeros(1)},
        }
        document = json.loads((made / "open_clip_config.json").read_text())
        checkpoint.save(run, step, tensors=tensors, documents={"open_clip_config.json": document}, keep=3)
    damaged = run / "checkpoints" / "step_00000011" / "open_clip_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    said: list[str] = []
    export(run, "open_clip", tmp_path / "out", say=said.append)
    assert said == [f"checkpoint {run}/checkpoints/step_00000010 (averaged weights)"]
    assert same_features(load_model(tmp_path / "made10"), tmp_path / "out") < 1e-5
    assert same_features(load_model(tmp_path / "made9"), tmp_path / "out") > 1e-2
    with pytest.raises(UserError, match="is damaged"):
        export(damaged.parent, "open_clip", tmp_path / "other")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="nor a run with a finished one"):
        export(tmp_path / "empty", "open_clip", tmp_path / "other")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run of two seeds; encoders of one head are trained."""
    folder = tmp_path_factory.mktemp("run")
    write_task(folder)
    heads = (
        "{concat: {op: concat}, merged: {op: merged, width: 8, heads: 2, layers: 1}, early: {op: joint}, "
        "tuned: {op: bilinear, adapt: {method: lp_ft, encoder_epochs: 1, encoder_lr: 1.0e-3}}}"
    )
    config = write_config(folder, heads, epochs=1)
    assert main(["finetune", str(config), "model.cache=false", "eval.calibration=platt"]) == 0
    return folder / "run"


LOADED = """
import sys, torch
for folder in sys.argv[1:]:
    program = torch.export.load(f"{folder}/out/model.pt2").module()
    torch.save([program(**kwargs) for kwargs in torch.load(f"{folder}/inputs.pt")], f"{folder}/outputs.pt")
assert not any(name.startswith(("diptych", "open_clip")) for name in sys.modules)
"""
BATCHES = (slice(0, 1), slice(0, 5), slice(1, 2))


def test_a_program_answers_as_the_predictor_does_where_only_torch_is(made: Path, tmp_path: Path) -> None:
    colours = ["red", "blue", "gold", "teal", "lime"]
    pictures: list[Any] = [squares.square(name, 30 * i) for i, name in enumerate(colours)]
    texts: list[Any] = [f"{name} square" for name in reversed(colours)]
    pictures[1], texts[3] = None, None
    model = load_model(made / "encoder")
    pixels = [None if p is None else _pixels(p) for p in pictures]
    predictors = {head: Predictor.load(made, head=head, device="cpu") for head in ("tuned", "merged")}
    for head, predictor in predictors.items():
        assert predictor.export("torch_export", tmp_path / head / "out")["probabilities"] < 1e-4
        inputs = [inputs_of(predictor, model, pixels[part], texts[part]) for part in BATCHES]
        inputs[1]["image"][1] = torch.nan  # what stands in a missing slot changes nothing
        torch.save(inputs, tmp_path / head / "inputs.pt")
    folders = [str(tmp_path / head) for head in predictors]
    subprocess.run([sys.executable, "-c", LOADED, *folders], check=True, cwd=tmp_path, timeout=120)
    for head, predictor in predictors.items():
        for got, part in zip(torch.load(tmp_path / head / "outputs.pt"), BATCHES, strict=True):
            expected = predictor.predict_proba({"image": pictures[part], "text": texts[part]})
            assert np.abs(got.numpy() - expected).max() < 1e-4
        noted = json.loads((tmp_path / head / "out" / NOTE).read_text())
        assert noted["classes"] == predictor.classes
        assert noted["inputs"]["token_ids"] == "int64 [b, 12]"
        with zipfile.ZipFile(tmp_path / head / "out" / PROGRAM) as archive:
            configs = [archive.read(name) for name in archive.namelist() if name.endswith("_config.json")]
        assert configs
        assert not any(b'"use_pickle": true' in text for text in configs)


def test_a_program_has_no_place_for_a_joint_head(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'early' reads patch and word embeddings"):
        Predictor.load(made, head="early", device="cpu").export("torch_export", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _pixels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)


def test_of_a_fine_tuned_run_the_heads_encoders_are_taken(made: Path, tmp_path: Path) -> None:
    said: list[str] = []
    export(made, "open_clip", tmp_path / "tuned", head="tuned", say=said.append)
    own = made / "heads" / "tuned" / "encoder_seed_0"
    assert said == [f"encoders {own} (one of 2, one per seed)"]
    assert same_features(load_model(own), tmp_path / "tuned") < 1e-5
    found = Predictor.load(made, head="concat").export("hf", tmp_path / "frozen")
    assert max(found.values()) < 1e-4
    hf = transformers.CLIPModel.from_pretrained(tmp_path / "frozen").eval()
    pixels = torch.randn(2, 3, 16, 16)
    encoder = load_model(made / "encoder")
    with torch.inference_mode():
        got = hf.visual_projection(hf.vision_model(pixel_values=pixels).pooler_output)
        assert (got - encoder.clip.visual(pixels)).abs().max() < 1e-5


def write_bert(folder: Path) -> str:
    """A tiny BERT with a tokenizer of letters."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefgh",
        *(f"##{c}" for c in string.ascii_letters),
    ]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=12, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("task", "head", "vision"),
    [
        (Task("multilabel", ("a", "b", "c")), HeadConfig(op="merged", width=8, heads=2), VISION),
        (
            Task("regression", ()),
            HeadConfig(op="gated"),
            {"timm_model_name": "mobilenetv3_small_050", "timm_proj": "", "image_size": 32},
        ),
        (Task("ordinal", ("a", "b", "c")), HeadConfig(op="image"), VISION),
    ],
    ids=lambda value: getattr(value, "type", getattr(value, "op", "")),
)
def test_programs_of_other_towers_and_tasks(
    task: Task, head: HeadConfig, vision: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    bert = write_bert(tmp_path / "bert")
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "context_length": 12, "hf_proj_type": "linear"}
    clip = build_model(ModelConfig(embed_dim=24, vision_cfg=vision, text_cfg=text))
    run = tmp_path / "run"
    (run / "encoder").mkdir(parents=True)
    write_encoder(LoadedModel(clip, build_tokenizer(bert, 12)), run / "encoder")
    modalities = {"image": "picture"} if head.op == "image" else {"image": "picture", "text": "words"}
    tokens = {"image": 24, "text": 24} if head.op == "merged" else None
    trained = build_head(head, dict.fromkeys(modalities, 24), task.outputs, tokens, task.link).eval()
    info = {"task": task.type, "classes": list(task.classes), "modalities": modalities}
    info |= {"id": None, "max_pixels": 10**6}
    (run / "heads" / "head").mkdir(parents=True)
    (run / "heads" / "head" / "head.json").write_text("{}")
    saved = [SavedHead(trained, 3.0, 1.0, None)]
    predictor = Predictor(run, info, "head", saved, torch.device("cpu"))
    found = write_program(predictor, tmp_path, quiet)
    assert list(found) == ["answers" if task.type == "regression" else "probabilities"]
    assert max(found.values()) < 1e-5


def test_nothing_is_refused_that_a_plain_clip_has() -> None:
    assert unsupported(make()) is None
