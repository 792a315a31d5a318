"""ONNX graphs answer as the predictor does, at any batch size and with modalities missing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.data.text import build_tokenizer
from diptych.finetune.config import HeadConfig
from diptych.finetune.export import formats as exports
from diptych.finetune.export.formats import NOTE, export
from diptych.finetune.export.onnx import GRAPH, OPSET, OUTPUT, open_session, quiet, write_onnx
from diptych.finetune.export.program import inputs_of
from diptych.finetune.fusion.operators import Head, build_head
from diptych.finetune.predictor import Predictor
from diptych.finetune.runs.saved import SavedHead, write_encoder
from diptych.finetune.tasks.task import Task
from diptych.pretrain.model import LoadedModel, ModelConfig, build_model, load_model

from .heads import ALL, inputs
from .heads import make as make_head
from .labelled import squares, write_config, write_task
from .test_export import write_bert

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT: dict[str, Any] = {"context_length": 12, "width": 48, "heads": 3, "layers": 2}
TIMM = {"timm_model_name": "mobilenetv3_small_050", "timm_proj": "", "image_size": 32}
CLASSES = ("a", "b", "c")
CASES = {
    "cross": (Task("multilabel", CLASSES), {"op": "cross", "width": 8, "heads": 2}, VISION),
    "gated": (Task("binary", ("0", "1")), {"op": "gated", "width": 8}, VISION),
    "concat": (Task("regression", ()), {"op": "concat", "interactions": True}, TIMM),
    "late": (Task("ordinal", CLASSES), {"op": "late", "rule": "learned"}, VISION),
}
FAST = {"cross"}


def make(folder: Path, task: Task, options: dict[str, Any], vision: dict[str, Any]) -> Predictor:
    """A run of two seeds with random weights."""
    torch.manual_seed(0)
    config = HeadConfig.model_validate(options)
    text, name = TEXT, None
    if "timm_model_name" in vision:  # towers of others
        name = write_bert(folder / "bert")
        text = {"hf_model_name": name, "hf_tokenizer_name": name, "context_length": 12}
        text |= {"hf_proj_type": "linear"}
    clip = build_model(ModelConfig(embed_dim=24, vision_cfg=vision, text_cfg=text))
    (folder / "encoder").mkdir(parents=True)
    write_encoder(LoadedModel(clip, build_tokenizer(name, 12)), folder / "encoder")
    modalities = {"image": "picture", "text": "words"}
    widths = dict.fromkeys(modalities, 24)
    heads = [build_head(config, widths, task.outputs, widths, task.link).eval() for _ in range(2)]
    for head in heads:
        for parameter in head.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    info = {"task": task.type, "classes": list(task.classes), "modalities": modalities}
    info |= {"id": None, "max_pixels": 10**6}
    (folder / "heads" / "head").mkdir(parents=True)
    (folder / "heads" / "head" / "head.json").write_text("{}")
    saved = [SavedHead(head, 2.0 + i, 0.5 * i, None) for i, head in enumerate(heads)]
    return Predictor(folder, info, "head", saved, torch.device("cpu"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in CASES]
)
def test_graphs_of_heads_and_tasks(name: str, tmp_path: Path) -> None:
    task, options, vision = CASES[name]
    predictor = make(tmp_path / "run", task, options, vision)
    (tmp_path / "out").mkdir()
    found = write_onnx(predictor, tmp_path / "out", lambda line: None)
    assert list(found) == ["answers" if task.type == "regression" else "probabilities"]
    assert max(found.values()) < 1e-5
    session = open_session(tmp_path / "out" / GRAPH)
    model = load_model(tmp_path / "run" / "encoder")
    random = np.random.default_rng(0)
    side = vision["image_size"]
    for n in (1, 2, 7):
        pixels: list[Any] = [random.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(n)]
        texts: list[Any] = [f"{squares.NAMES[i % 12]} square" for i in range(n)]
        pixels[n // 2] = None  # of one row: of all rows
        if n > 2:
            texts[1] = None
        tensors = [None if x is None else torch.from_numpy(x).permute(2, 0, 1) for x in pixels]
        given = {k: v.numpy() for k, v in inputs_of(predictor, model, tensors, texts).items()}
        given["image"][n // 2] = np.nan  # what stands in a missing slot changes nothing
        got = session.run(None, given)[0]
        table = {"picture": [None if x is None else Image.fromarray(x) for x in pixels], "words": texts}
        rows = {str(one.column): table[str(one.column)] for one in predictor.modalities.values()}
        regression = task.type == "regression"
        want = predictor.predict(rows) if regression else predictor.predict_proba(rows)
        assert got.dtype == np.float32
        assert np.abs(got - np.reshape(want, got.shape)).max() < 1e-4
    told = {one.name: one.type for one in session.get_inputs()}
    noted = json.loads((tmp_path / "out" / NOTE).read_text())
    assert list(told) == list(noted["inputs"])
    assert [one.name for one in session.get_outputs()] == [OUTPUT] == [noted["output_name"]]
    assert noted["thresholds"] == {
        "binary": {"1": 0.5},
        "multilabel": dict.fromkeys(CLASSES, 0.5),
    }.get(task.type, {})
    assert noted["calibration"] == [{"scale": 2.0, "shift": 0.0}, {"scale": 3.0, "shift": 0.5}]


class Every(nn.Module):
    """All heads on the same features."""

    def __init__(self, heads: dict[str, Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(list(heads.values()))

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> list[Tensor]:
        return [head(features, present) for head in self.heads]


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [3])
def test_every_head_runs_in_onnxruntime_with_modalities_missing(outputs: int, tmp_path: Path) -> None:
    names = [name for name in ALL if "joint" not in name and (outputs == 1 or name != "similarity")]
    module = Every({name: make_head(name, outputs) for name in names}).eval()

    def given(n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        features = {k: v for k, v in inputs(n).items() if not k.endswith(("inputs", "group"))}
        present = {k: torch.arange(n) % 3 != i for i, k in enumerate(("image", "text"))}
        return features, present

    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({k: {0: batch} for k in part} for part in given(2))
    with torch.no_grad(), quiet():
        program = torch.export.export(module, given(2), dynamic_shapes=shapes, strict=False)
        graph: Any = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
        graph.save(str(tmp_path / GRAPH))
    session = open_session(tmp_path / GRAPH)
    for n in (1, 5):
        features, present = given(n)
        flat = [*features.values(), *present.values()]
        fed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), flat, strict=True)}
        with torch.no_grad():
            wanted = module(features, present)
        for name, got, want in zip(names, session.run(None, fed), wanted, strict=True):
            assert np.abs(got - want.numpy()).max() < 1e-4, name


@pytest.mark.slow
def test_a_run_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    heads = "{tuned: {op: bilinear, adapt: {method: lp_ft, encoder_epochs: 1, encoder_lr: 1.0e-3}}}"
    assert main(["finetune", str(write_config(tmp_path, heads, epochs=1)), "model.cache=false"]) == 0
    words = ["export", str(tmp_path / "run"), "--to", "onnx", "-o", str(tmp_path / "out")]
    assert main([*words, "--head", "tuned"]) == 0
    assert "largest difference of probabilities: " in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {GRAPH, NOTE}
    assert main(words) == 2
    assert "holds something already" in capsys.readouterr().err
    monkeypatch.setattr(exports, "TOLERANCE", 0.0)
    with pytest.raises(UserError, match="probabilities differ by"):
        export(tmp_path / "run", "onnx", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no head, which onnx needs"):
        export(tmp_path, "onnx", tmp_path / "out")
    predictor = make(tmp_path / "run", *CASES["gated"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs the package onnxscript; pip install 'diptych\[onnx\]'"):
        write_onnx(predictor, tmp_path, lambda line: None)
    assert not (tmp_path / GRAPH).exists()
