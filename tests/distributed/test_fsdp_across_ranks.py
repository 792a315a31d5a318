"""Steps with DDP and with sharded parameters against one process in fp64: losses, norms, weights, averages;
and checkpoints of each kind opened by the other."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.data.text import tokenizer_for
from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.ema import Ema
from diptych.pretrain.engine import build_accelerator, no_sync, prepare
from diptych.pretrain.gradcache import forward_backward
from diptych.pretrain.locking import LockConfig, lock
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model, clamp_logit_scale
from diptych.pretrain.optim import OptimConfig, build_optimizer, clip_gradients
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver
from diptych.pretrain.state import TrainState

from .pairs_of_ranks import SIZE, global_batch

BATCH, STEPS = 12, 4
TEXT = {"context_length": 10, "width": 16, "heads": 2, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": SIZE},
    "conv": {"timm_model_name": "test_efficientnet", "image_size": SIZE},
}


def batch(step: int, rows: slice) -> dict[str, Tensor]:
    return global_batch(step, rows, end_of_text=49407)


class Position:
    """The stream's place in a checkpoint: the rows of every step are known here."""

    at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Trainer:
    """A rank's share of a run, as pretrain/train.py puts one together."""

    def __init__(self, rows: slice, parallel: Any, case: dict[str, Any]) -> None:
        torch.manual_seed(0)
        config = ModelConfig(embed_dim=8, vision_cfg=VISION[case.get("vision", "vit")], text_cfg=TEXT)
        clip = build_model(config).double()
        lock(clip, LockConfig(**case.get("lock", {})))
        self.root, self.rows, self.micro = ContrastiveModel(clip), rows, case.get("micro", 1)
        cpu = torch.device("cpu")
        accelerator = build_accelerator("fp32", cpu)
        self.model = prepare(self.root, accelerator, parallel, tokenizer_for(TEXT, None))
        options = OptimConfig(name=case.get("name", "adamw"), lr=1e-2, eps=1e-3, text_layer_decay=0.8)
        self.optimizer = build_optimizer(self.root, options)
        ema = Ema(self.root.clip, 0.5)
        position: Any = Position()
        self.state = TrainState(self.root, self.optimizer, position, ema, None, cpu)
        self.figures: list[Tensor] = []

    def steps(self, stop: int) -> None:
        state, ema = self.state, self.state.ema
        assert ema is not None
        self.model.train()
        while state.step < stop:
            local = batch(state.step, self.rows)
            labels = {key: local[key] for key in ("valid", "caption_hash")}
            loss_of: Callable[[dict[str, Tensor]], Tensor] = lambda out, labels=labels: contrastive_loss(  # noqa: E731
                **out, **labels, duplicates="positives", tile=5
            )
            out = forward_backward(
                self.model,
                local,
                loss_of,
                micro_batches=self.micro,
                no_sync=partial(no_sync, self.model),
            )
            norm = clip_gradients(self.root.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clamp_logit_scale(self.root)
            ema.update(self.root.clip)
            state.step += 1
            self.figures.append(torch.stack([out["loss"], norm]))

    def result(self) -> dict[str, Any]:
        """Losses and norms, the weights, and what is exported with its features (on rank 0)."""
        weights = {k: distributed.whole(v).clone() for k, v in self.root.clip.state_dict().items()}
        out: dict[str, Any] = {"figures": torch.stack(self.figures), "weights": weights}
        with self.state.exported() as model, torch.no_grad():
            if model is not None:
                out["exported"] = {k: v.clone() for k, v in model.clip.state_dict().items()}
                model.eval()
                out["features"] = model.encode_image(batch(99, slice(0, BATCH))["image"])
        return out


def job(
    rank: int, world: int, split: list[int], parallel: str, case: dict[str, Any], folder: str, resume: bool
) -> dict[str, Any]:
    start = sum(split[:rank])
    trainer = Trainer(slice(start, start + split[rank]), parallel, case)
    if resume:
        trainer.state.load(Path(folder) / "checkpoints" / "step_00000002")
    elif folder:
        trainer.steps(2)
        saver = Saver(Path(folder), trainer.state, CheckpointConfig())
        saver.save()
        saver.wait()
    trainer.steps(STEPS)
    return trainer.result()


_truths: dict[str, dict[str, Any]] = {}


def truth(case: dict[str, Any]) -> dict[str, Any]:
    """One process with the whole batch."""
    key = repr(sorted((k, v) for k, v in case.items() if k != "micro"))
    if key not in _truths:
        trainer = Trainer(slice(0, BATCH), "ddp", {**case, "micro": 1})
        trainer.steps(STEPS)
        _truths[key] = trainer.result()
    return _truths[key]


def same(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Figures of the steps that were made, and all weights."""
    figures = expected["figures"][-len(result["figures"]) :]
    torch.testing.assert_close(result["figures"], figures, atol=1e-11, rtol=1e-11)
    for part in ("weights", "exported"):
        for name, value in result.get(part, {}).items():
            wanted = expected[part][name]
            torch.testing.assert_close(value, wanted, atol=tolerance, rtol=tolerance, msg=f"{part} {name}")
    if "features" in result:
        torch.testing.assert_close(result["features"], expected["features"], atol=1e-10, rtol=0)


CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "fsdp_adamw": ("fsdp", [7, 5], {}),
    "fsdp_muon_three": ("fsdp", [1, 8, 3], {"name": "muon"}),
    "fsdp_no_valid_row_four": ("fsdp", [5, 1, 2, 4], {}),  # row 5, which is not valid, is all of rank 1's
    "fsdp_conv_empty_rank": ("fsdp", [12, 0], {"vision": "conv"}),
    "fsdp_gradcache": ("fsdp", [7, 5], {"micro": 3}),
    "fsdp_locked": ("fsdp", [7, 5], {"lock": {"image": True, "text": True, "text_unlocked_groups": 2}}),
    "ddp_locked": ("ddp", [7, 5], {"lock": {"image": True, "text": True, "text_unlocked_groups": 2}}),
    "ddp_muon": ("ddp", [7, 5], {"name": "muon"}),
    "ddp_four": ("ddp", [5, 1, 2, 4], {}),
    "fsdp_alone": ("fsdp", [12], {}),
    "fsdp_conv_muon_three": ("fsdp", [1, 8, 3], {"vision": "conv", "name": "muon"}),
}
FAST = ("fsdp_muon_three", "fsdp_gradcache", "fsdp_conv_empty_rank")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_any_ranks_train_as_one_process(ranks: Any, name: str) -> None:
    parallel, split, case = CASES[name]
    results = ranks(len(split), job, split, parallel, case, "", False)
    for result in results:
        same(result, truth(case), 1e-10 if case.get("vision") == "conv" else 1e-12)
    assert all(w.equal(results[0]["weights"][k]) for r in results for k, w in r["weights"].items())


@pytest.mark.parametrize(
    ("first", "second", "case"),
    [
        (("fsdp", [7, 5]), ("ddp", [4, 4, 4]), {"name": "muon"}),
        pytest.param(("ddp", [7, 5]), ("fsdp", [1, 8, 3]), {"name": "muon"}, marks=pytest.mark.slow),
        pytest.param(("ddp", [12]), ("fsdp", [5, 1, 2, 4]), {}, marks=pytest.mark.slow),
        pytest.param(("fsdp", [1, 8, 3]), ("fsdp", [12]), {"vision": "conv"}, marks=pytest.mark.slow),
    ],
)
def test_either_kind_goes_on_from_the_others_checkpoint(
    ranks: Any, tmp_path: Path, first: Any, second: Any, case: dict[str, Any]
) -> None:
    for resume, (parallel, split) in enumerate((first, second)):
        for result in ranks(len(split), job, split, parallel, case, str(tmp_path), bool(resume)):
            same(result, truth(case), 1e-10 if case.get("vision") == "conv" else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_the_same_bit_for_bit(ranks: Any, tmp_path: Path, parallel: str, name: str) -> None:
    split, case = [1, 8, 3], {"name": name}
    straight = ranks(3, job, split, parallel, case, str(tmp_path), False)
    resumed = ranks(3, job, split, parallel, case, str(tmp_path), True)
    for a, b in zip(straight, resumed, strict=True):
        assert b["figures"].equal(a["figures"][2:])
        for part in ("weights", "exported"):
            assert all(value.equal(a[part][key]) for key, value in b.get(part, {}).items())
