"""A fine-tuned model, encoders and head and calibration, as one ONNX graph that onnxruntime runs."""

import importlib
import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configs.errors import UserError
from ..predictor import Predictor
from .formats import NOTE, Say
from .program import BATCHES, Fused, difference, document, refuse_inputs, trace

__all__ = ["GRAPH", "OPSET", "OUTPUT", "open_session", "quiet", "write_onnx"]

GRAPH = "model.onnx"
OPSET = 18
OUTPUT = "answers"
INLINE = 1 << 30
"""Weights of more bytes stand in a file beside the graph: protobuf ends at 2 GiB."""


def needed(name: str) -> Any:
    """A package of the extra ``onnx``; UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"export to onnx needs the package {name}; pip install 'diptych[onnx]'") from error


@contextmanager
def quiet() -> Generator[None]:
    """The exporter and its optimizer talk; what goes wrong is raised."""
    named = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in named]
    try:
        for logger in named:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(named, levels, strict=True):
            logger.setLevel(level)


def write_onnx(predictor: Predictor, folder: Path, say: Say) -> dict[str, float]:
    """Write ``model.onnx`` and what its inputs and outputs are; returns by how much onnxruntime's answers
    differ from the predictor's, of regression in standard deviations of the training targets.

    Raises UserError where the extra is not installed or the model cannot be exported.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        needed(name)
    refuse_inputs(predictor)
    say(f"tracing head {predictor.head} with {len(predictor.saved)} seeds")
    fused = Fused(predictor)
    program = trace(fused, predictor)
    say("translating to ONNX")
    size = sum(p.numel() * p.element_size() for p in fused.parameters())
    try:
        with quiet():
            made: Any = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=list(_flat(program.example_inputs[1])), output_names=[OUTPUT],
            )  # fmt: skip
            made.save(str(folder / GRAPH), external_data=size > INLINE)
    except Exception as error:  # torch.onnx has a zoo of them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{predictor.run}: torch.onnx cannot export this model: {reason}") from error
    model = fused.models[0]
    described = document(predictor, model) | {"opset": OPSET, "output_name": OUTPUT}
    (folder / NOTE).write_text(json.dumps(described), encoding="utf-8")
    say("comparing onnxruntime with the predictor")
    session = open_session(folder / GRAPH)

    def run(**inputs: Any) -> torch.Tensor:
        given = {k: v.numpy() for k, v in _flat(inputs).items()}
        return torch.from_numpy(np.asarray(session.run(None, given)[0]))

    found = max(difference(predictor, model, run, n) for n in BATCHES)
    return {"answers" if predictor.task.type == "regression" else "probabilities": found}


def _flat(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A program's inputs by the names that export.json tells, those of ``columns`` among the others."""
    columns = inputs.get("columns", {})
    named = {name: value for name, value in inputs.items() if name != "columns"}
    return named | {f"columns.{name}": value for name, value in columns.items()}


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    ort = needed("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path.name}: onnxruntime cannot open what was exported: {reason}") from error
