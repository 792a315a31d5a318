"""Evaluate a checkpoint on held-out data: retrieval, zero-shot classification, linear probe, examples.

Every score stands beside the level of guessing and a 95 % interval. Nothing is chosen on the data it is
reported on: prompts and the probe's penalty come from the training split.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from . import zero_shot
from .encode import quick_retrieval
from .galleries import data_root, find_galleries, run_folder
from .model import LoadedModel, check_name, load_model
from .scoring import EvaluateConfig, Progress, Session, probe_part, retrieval_part, zero_shot_part
from .statistics import Score

__all__ = ["EvaluateConfig", "evaluate", "quick_retrieval"]


def _silent(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def evaluate(
    checkpoint: str | Path,
    config: EvaluateConfig | None = None,
    *,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Score a run, checkpoint folder, weight file or open_clip ``ARCH:TAG``; write evaluate.json and
    pictures.

    Returns what evaluate.json holds: ``checkpoint``, ``model``, ``data``, ``retrieval``, ``zero_shot``,
    ``linear_probe``, ``examples``, ``pictures``, ``notes``; every score is ``{value, low, high, chance}``
    and, for classification, ``majority``. Raises UserError for a missing checkpoint, data or gallery.
    """
    config = config or EvaluateConfig()
    check_name(checkpoint)
    root = data_root(checkpoint, config.data)
    galleries = find_galleries(root, config.galleries)
    classes = zero_shot.read_classes(config.zero_shot.classes) if config.zero_shot.classes else None
    model = load_model(checkpoint, device=_device(config.device))
    folder = _output_folder(checkpoint, config)
    session = Session(model, config, progress, root)
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "folder": str(folder),
        "model": _describe(model),
        "data": str(root),
        "retrieval": {},
        "zero_shot": {},
        "linear_probe": {},
        "examples": [],
        "pictures": {},
        "notes": [],
    }
    drawn = {g.name for g in galleries} & set(config.example_galleries) or {g.name for g in galleries}
    for gallery in galleries:
        retrieval_part(session, gallery, folder, result, examples=gallery.name in drawn)
    if config.zero_shot.enabled:
        zero_shot_part(session, galleries, classes, result)
    if config.probe.enabled:
        probe_part(session, galleries, result)
    result = _plain(result)
    atomic_write_text(folder / "evaluate.json", json.dumps(result, indent=1) + "\n")
    return result


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' cannot be used here; give auto, cpu or cuda") from error
    return name


def _output_folder(checkpoint: str | Path, config: EvaluateConfig) -> Path:
    run = run_folder(checkpoint)
    if config.out is not None:
        folder = Path(config.out)
    elif run is not None:
        folder = run
    else:
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in str(checkpoint)).strip("-.")
        folder = Path("runs") / f"evaluate-{name}"
    (folder / "evaluate").mkdir(parents=True, exist_ok=True)
    return folder


def _describe(model: LoadedModel) -> dict[str, Any]:
    cfg = model.config["model_cfg"]
    return {
        "weights": str(model.file),
        "image": cfg["vision_cfg"].get("timm_model_name") or "open_clip ViT or ResNet",
        "text": cfg["text_cfg"].get("hf_model_name") or "open_clip transformer",
        "embed_dim": model.embed_dim,
        "image_size": model.image_size,
        "parameters": sum(p.numel() for p in model.clip.parameters()),
    }


def _plain(value: Any) -> Any:
    """Scores as dicts, for JSON."""
    if isinstance(value, Score):
        return value.as_dict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
