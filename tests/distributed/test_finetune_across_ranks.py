"""Fine-tuning in several gloo processes has the features, gradients and scores of one process."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diptych.finetune.adapt.class_contrast import ClassContrast, ClassTexts
from diptych.finetune.adapt.encoders import encoder_groups, open_encoders, parameter_groups
from diptych.finetune.adapt.fit import LiveRows, Part, fit
from diptych.finetune.adapt.training import Training
from diptych.finetune.config import AdaptConfig, HeadConfig, ModalityConfig, StoppingConfig
from diptych.finetune.encoders import encoding, features
from diptych.finetune.encoders.features import extract
from diptych.finetune.encoders.live import encode_rows
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.tables.cells import Picture, PictureReader
from diptych.finetune.tables.manifest import Rows
from diptych.finetune.tasks.task import Task
from diptych.pretrain import distributed
from diptych.pretrain.model import load_model

Run = Callable[..., list[Any]]
TASK = Task("binary", ("0", "1"))
WIDTHS = {"image": 24, "text": 24}
WORDS = ("red", "blue square", "a green one", "gold")
PROMPTS: dict[str, str | list[str]] = {"0": ["red corner", "a red one"], "1": "blue corner"}
ROWS = 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and pictures of noise."""
    from ..pretrain import evaluate_corpus

    root = tmp_path_factory.mktemp("tuned")
    evaluate_corpus.make_checkpoint(root / "checkpoint")
    random = np.random.default_rng(0)
    for i in range(ROWS):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, format="PNG")
        (root / f"{i}.png").write_bytes(buffer.getvalue())
    return root


def table(images: Sequence[Picture | None], texts: Sequence[str | None]) -> Rows:
    declared = {k: ModalityConfig(column=k) for k in ("image", "text")}
    cells = {"image": [picture and (picture,) for picture in images], "text": list(texts)}
    return Rows("", [""] * len(texts), declared, cells)


def part(folder: str, *, together: bool, first: int, last: int) -> Part:
    """Rows of which some lack the picture (the first four: some process has none in a small batch) or the
    text, with weights."""
    numbers = range(first, last)
    images = [None if i % 5 == 0 or i < 4 else Picture(path=Path(folder, f"{i}.png")) for i in numbers]
    texts = [None if i % 5 == 1 and i > 4 else f"{WORDS[i % 4]} {i % 3}" for i in numbers]
    model = load_model(Path(folder, "checkpoint"))
    rows = LiveRows(model, table(images, texts), 10**6, PictureReader(), together=together)
    weights = 0.5 + torch.arange(first, last) % 3
    return Part(rows, torch.arange(first, last) % 2, weights)


def one_step(rank: int, world: int, folder: str, method: str) -> dict[str, Tensor]:
    """Loss and clipped gradients of one batch of an odd number of rows, with dropout of all kinds."""
    torch.manual_seed(3)
    train = part(folder, together=world > 1, first=0, last=7)
    assert isinstance(train.rows, LiveRows)
    model = train.rows.model
    distributed.alone()
    # one of the literals
    adapt = AdaptConfig(method=method, modality_dropout=0.4, class_prompts=PROMPTS)  # type: ignore[arg-type]
    open_encoders(model, ("image", "text"), adapt)
    if method == "contrastive":
        head: Any = ClassTexts(model, PROMPTS, ("image", "text"), 1, together=world > 1)
        run: Training = ClassContrast(head, TASK, adapt, StoppingConfig(), 0, lambda row: None)
    else:
        head = build_head(HeadConfig(op="concat", width=16, dropout=0.5), WIDTHS, 1, None, TASK.link)
        run = Training(head, TASK, adapt, StoppingConfig(), 0, lambda row: None)
    run.also(model.clip)
    groups = parameter_groups(head, 0.1) + encoder_groups(model, adapt)
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.0)
    loss = run._step(train, torch.arange(7), optimizer)
    named = [(n, p) for module in run.modules for n, p in module.named_parameters()]
    return {n: p.grad for n, p in named if p.grad is not None} | {"loss": torch.tensor(loss)}


def steps(rank: int, world: int, folder: str) -> dict[str, dict[str, Tensor]]:
    return {method: one_step(rank, world, folder, method) for method in ("full", "lora", "contrastive")}


def test_gradients_are_those_of_the_whole_batch(ranks: Run, folder: Path) -> None:
    truth = steps(0, 1, str(folder))
    for found in ranks(3, steps, str(folder)):
        for method, expected in truth.items():
            assert found[method].keys() == expected.keys()
            assert len(expected) > 10
            for name, value in expected.items():
                torch.testing.assert_close(found[method][name], value, rtol=1e-4, atol=1e-7, msg=name)


def whole_training(rank: int, world: int, folder: str, method: str) -> dict[str, Any]:
    """The log of a training with a last batch that is smaller, and the head."""
    distributed.alone()
    live = [part(folder, together=world > 1, first=a, last=b) for a, b in ((0, 15), (10, 22))]
    rows = [one.rows for one in live]
    assert isinstance(rows[0], LiveRows)
    assert isinstance(rows[1], LiveRows)
    rows[1] = LiveRows(**{**vars(rows[1]), "model": rows[0].model})
    with torch.no_grad():
        tables = [
            Part(encode_rows(source, source.modalities), one.targets, one.weights)
            for source, one in zip(rows, live, strict=True)
            if isinstance(source, LiveRows)
        ]
    wise: dict[str, Any] = {"wise_ft": 0.5} if method == "contrastive" else {}
    adapt = AdaptConfig(
        method=method, epochs=2, batch_size=8, encoder_epochs=2, encoder_batch_size=8,
        encoder_lr=1e-4, class_prompts=PROMPTS, **wise,
    )  # type: ignore[arg-type] # fmt: skip
    log: list[dict[str, Any]] = []
    head = HeadConfig(op="concat", width=16, dropout=0.3)
    fitted = fit(
        head, adapt, StoppingConfig(metric="loss"), TASK, *tables, widths=WIDTHS, seed=1,
        live=(rows[0], rows[1]), log=log.append, calibration="temperature",
    )  # fmt: skip
    return {"log": log, "scale": fitted.scale, "head": dict(fitted.head.state_dict())}


def numbers(log: list[dict[str, Any]]) -> Tensor:
    keys = ("epoch", "samples_seen", "loss", "lr", "inner_loss", "inner_brier")
    return torch.tensor([[row[key] for key in keys] for row in log], dtype=torch.float64)


def trainings(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    return {method: whole_training(rank, world, folder, method) for method in ("lp_ft", "contrastive")}


def test_a_training_together_has_the_numbers_of_one_process(ranks: Run, folder: Path) -> None:
    truth = trainings(0, 1, str(folder))
    everyone = ranks(2, trainings, str(folder))
    for method, expected in truth.items():
        first, second = (one[method] for one in everyone)
        assert first["log"] == second["log"]
        torch.testing.assert_close(numbers(first["log"]), numbers(expected["log"]), rtol=1e-5, atol=1e-6)
        assert first["scale"] == pytest.approx(expected["scale"], rel=1e-4)
        assert all(value.equal(second["head"][name]) for name, value in first["head"].items())


def shared_features(rank: int, world: int, folder: str, cached: bool) -> dict[str, Tensor]:
    """Features and tokens, in batches of two pictures and four texts."""
    model = load_model(Path(folder, "checkpoint"))
    images = [None if i == 4 else Picture(path=Path(folder, f"{i % 9}.png")) for i in range(ROWS)]
    images[7] = Picture(path=Path(folder, "absent.png"))
    texts = [f"{WORDS[i % 4]} " * (1 + i % 5) for i in range(ROWS)]
    rows = table(images, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE", f"{folder}/cache_{world}")
        patch.setattr(encoding, "TEXT_BATCH", 4)
        patch.setattr(features, "TEXT_BATCH", 4)
        found, broken = extract(
            model, rows, tokens=True, fingerprint="f" if cached else None, batch_size=2, together=world > 1
        )
    assert broken.keys() == {7}
    return found.tables | {f"of {k}": index for k, index in found.index.items()}


def all_features(rank: int, world: int, folder: str) -> list[dict[str, Tensor]]:
    return [shared_features(rank, world, folder, cached) for cached in (False, True)]


def test_features_encoded_together_are_those_of_one_process_bit_for_bit(ranks: Run, folder: Path) -> None:
    truth = shared_features(0, 1, str(folder), cached=False)
    for found in (one for both in ranks(3, all_features, str(folder)) for one in both):
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            assert found[name].equal(value), name


def left_out(rank: int, world: int) -> list[Any]:
    """A parameter that no process used, one that one process used, and one that all know."""
    torch.manual_seed(0)
    unused, used, known = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    if rank == 1:
        (used.sum() * 2).backward()
    known.square().sum().backward()
    distributed.sum_gradients([unused, used], [known])
    assert used.grad is not None
    assert known.grad is not None
    return [unused.grad is None, used.grad.tolist(), (known.grad - 2 * known).detach().abs().max().item()]


def test_a_parameter_that_no_process_used_keeps_no_gradient(ranks: Run) -> None:
    assert ranks(2, left_out) == [[True, [2.0, 2.0, 2.0], 0.0]] * 2
