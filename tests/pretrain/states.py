"""A small model in training, without data: what a checkpoint holds, and steps that change all of it."""

from pathlib import Path
from typing import Any

import torch

from diptych.pretrain.checkpoint import read_tensors
from diptych.pretrain.ema import Ema
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer
from diptych.pretrain.state import TrainState

VISION: dict[str, Any] = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


class Position:
    """A stream's place."""

    at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def make_state(seed: int = 0, *, ema: bool = True, text: dict[str, Any] | None = None) -> TrainState:
    torch.manual_seed(seed)
    clip = build_model(ModelConfig(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT | (text or {})))
    root = ContrastiveModel(clip)
    optimizer = build_optimizer(root, OptimConfig(lr=1e-2))
    average = Ema(clip, 0.9) if ema else None
    place: Any = Position()
    return TrainState(root, optimizer, place, average, None, torch.device("cpu"))


def step(state: TrainState) -> None:
    """One step on gradients drawn from the random state."""
    for parameter in state.clip.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update(state.clip)
    state.step += 1
    state.samples_seen += 8
    state.stream.at = state.step


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which has the time."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "manifest.json"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.name}/{name}": value for f in files for name, value in read_tensors(f).items()}
