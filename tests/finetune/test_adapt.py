"""Training of heads and encoders: what moves, what stays, and that a seed says it all."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.finetune.adapt import fit as module
from diptych.finetune.adapt.fit import LiveRows, Part, fit, logits_of
from diptych.finetune.adapt.training import Training
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.tables.cells import Picture
from diptych.finetune.tasks.task import Task
from diptych.pretrain.model import LoadedModel, load_model

from .labelled import live_rows, squares, xor_rows

TASK = Task("binary", ("0", "1"))
WIDTHS = {"image": 16, "text": 16}


def train(config: HeadConfig, **options: Any) -> tuple[module.Fitted, list[dict[str, Any]]]:
    log: list[dict[str, Any]] = []
    settings = {"lr": 1e-2, "epochs": 4, "batch_size": 64} | options.pop("adapt", {})
    stopping = StoppingConfig(**options.pop("stopping", {}))
    parts = options.pop("parts", (xor_rows(300, 1), xor_rows(100, 2)))
    fitted = fit(
        config, AdaptConfig(**settings), stopping, TASK, *parts, widths=WIDTHS, seed=options.pop("seed", 0),
        log=log.append, **options,
    )  # fmt: skip
    return fitted, log


def state(fitted: module.Fitted) -> dict[str, torch.Tensor]:
    return fitted.head.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_seed_gives_the_same_weights_whatever_was_drawn_before() -> None:
    config = HeadConfig(op="concat")
    first, log = train(config)
    torch.rand(17)
    before = torch.get_rng_state()
    again, same_log = train(config)
    assert torch.equal(before, torch.get_rng_state())  # and nothing is drawn from the caller's numbers
    assert equal(state(first), state(again))
    assert log == same_log
    assert not equal(state(first), state(train(config, seed=1)[0]))


def test_the_best_epoch_of_the_inner_rows_is_kept_and_patience_ends_the_training() -> None:
    config, options = HeadConfig(op="concat"), {"epochs": 30}
    fitted, log = train(config, adapt=options, stopping={"patience": 2})
    scores = [(row["inner_auroc"], -row["inner_loss"]) for row in log]
    assert fitted.best_epoch == max(range(len(scores)), key=lambda i: (scores[i], -i))
    assert len(log) == min(30, fitted.best_epoch + 3)
    short, _ = train(config, adapt=options, stopping={"patience": 30})
    assert len(short.head.state_dict()) == len(state(fitted))
    by_loss, log = train(config, adapt=options, stopping={"metric": "loss", "patience": 30})
    losses = [row["inner_loss"] for row in log]
    assert by_loss.best_epoch == min(range(len(losses)), key=lambda i: (losses[i], i))


def test_the_inner_rows_choose_but_do_not_train() -> None:
    """With one epoch there is nothing to choose: other inner labels leave the weights as they are."""
    config, one = HeadConfig(op="concat"), {"epochs": 1}
    inner = xor_rows(100, 2)
    first, _ = train(config, adapt=one, parts=(xor_rows(300, 1), inner))
    second, _ = train(config, adapt=one, parts=(xor_rows(300, 1), Part(inner.rows, 1 - inner.targets)))
    assert equal(state(first), state(second))


def test_a_layer_that_gets_no_gradient_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.build_head

    def forgetful(*args: Any) -> Any:
        head = original(*args)
        head.forgotten = nn.Linear(3, 3)
        return head

    monkeypatch.setattr(module, "build_head", forgetful)
    with pytest.raises(AssertionError, match=r"Concat\.forgotten\.weight gets no gradient"):
        train(HeadConfig(op="concat"))


def test_modality_dropout_takes_one_modality_of_some_rows_and_never_the_last() -> None:
    config = AdaptConfig(modality_dropout=0.4)
    # as good as one here
    run = Training(nn.Linear(1, 1), TASK, config, StoppingConfig(), 0, lambda row: None)  # type: ignore[arg-type]
    both = {k: torch.ones(20_000, dtype=torch.bool) for k in WIDTHS}
    both["text"][:10_000] = False
    torch.manual_seed(0)
    got = run._drop(both)
    assert torch.equal(got["image"][:10_000], both["image"][:10_000])
    assert not got["text"][:10_000].any()
    gone = {k: float((~got[k][10_000:]).float().mean()) for k in WIDTHS}
    assert gone == pytest.approx({"image": 0.2, "text": 0.2}, abs=0.02)
    assert (got["image"] | got["text"]).all()
    assert run._drop({"image": both["image"]}) == {"image": both["image"]}


def test_a_head_trained_with_missing_rows_predicts_with_them() -> None:
    parts = [xor_rows(n, seed) for n, seed in ((300, 1), (100, 2))]
    for part in parts:
        assert isinstance(part.rows, FeatureRows)
        part.rows.index["image"][::3] = -1
    for op in ("concat", "gated", "bilinear", "late", "similarity", "weighted_sum"):
        # as good as one here
        fitted, _ = train(HeadConfig(op=op), parts=tuple(parts), calibration="platt")  # type: ignore[arg-type]
        assert logits_of(fitted.head, parts[1].rows).isfinite().all()
        assert fitted.scale > 0


def live(model: LoadedModel, n: int) -> LiveRows:
    names = [squares.NAMES[i % 6] for i in range(n)]
    images = [Picture(data=squares.square(name, i)) for i, name in enumerate(names)]
    texts = [f"{squares.NAMES[(i // 2) % 6]} square" for i in range(n)]
    return live_rows(model, image=[None, *images[1:]], text=[*texts[:-1], None])


@pytest.mark.parametrize("op", ["bilinear", "image", "text"])
def test_lp_ft_trains_the_towers_that_the_head_reads_and_no_other(op: Any, tmp_path: Path) -> None:
    model = load_model(squares.make_checkpoint(tmp_path / "checkpoint"))
    before = copy.deepcopy(model.clip.state_dict())
    rows = [live(model, n) for n in (24, 12)]
    targets = [torch.arange(len(part)) % 2 for part in rows]
    with torch.no_grad():
        frozen = [part.batch(torch.arange(len(part)))[0] for part in rows]
    tables = [
        Part(
            FeatureRows(
                features,
                {
                    "image": torch.cat([torch.tensor([-1]), torch.arange(1, n)]),
                    "text": torch.cat([torch.arange(n - 1), torch.tensor([-1])]),
                },
            ),
            t,
        )
        for features, t, n in zip(frozen, targets, (24, 12), strict=True)
    ]
    adapt = AdaptConfig(method="lp_ft", encoder_lr=1e-3, encoder_epochs=3, encoder_batch_size=8, epochs=1)
    log: list[dict[str, Any]] = []
    fitted = fit(
        HeadConfig(op=op), adapt, StoppingConfig(metric="loss"), TASK, tables[0], tables[1],
        widths={"image": 24, "text": 24}, seed=0, live=(rows[0], rows[1]), log=log.append,
    )  # fmt: skip
    assert fitted.model is model
    assert [row["epoch"] for row in log] == [0, 1, 2, 3]
    assert fitted.best_epoch > 0  # otherwise nothing below is shown
    moved = {
        name.split(".")[0] for name, value in model.clip.state_dict().items() if not value.equal(before[name])
    }
    assert moved == {"bilinear": {"visual", "text"}, "image": {"visual"}, "text": {"text"}}[op]


def test_lp_ft_that_does_not_help_leaves_the_encoders_as_they_were(tmp_path: Path) -> None:
    model = load_model(squares.make_checkpoint(tmp_path / "checkpoint"))
    before = copy.deepcopy(model.clip.state_dict())
    rows = [live(model, n) for n in (24, 12)]
    targets = [torch.arange(len(part)) % 2 for part in rows]
    with torch.no_grad():
        features = [part.batch(torch.arange(len(part)))[0] for part in rows]
    tables = [
        Part(FeatureRows(f, {k: torch.arange(n) for k in ("image", "text")}), t)
        for f, t, n in zip(features, targets, (24, 12), strict=True)
    ]
    adapt = AdaptConfig(method="lp_ft", encoder_lr=1e-3, encoder_epochs=2, encoder_batch_size=8, epochs=1)
    fitted = fit(
        HeadConfig(op="bilinear"), adapt, StoppingConfig(metric="loss", min_delta=100.0), TASK, *tables,
        widths={"image": 24, "text": 24}, seed=0, live=(rows[0], rows[1]),
    )  # fmt: skip
    assert fitted.best_epoch == 0
    assert equal(before, dict(model.clip.state_dict()))


def test_of_epochs_with_one_score_the_one_with_the_least_loss_is_kept() -> None:
    """An ordinal head first says the most frequent class of every row, and its kappa stands still at 0: that
    must not end the training."""
    rows, log = xor_rows(400, 1), list[dict[str, Any]]()
    first = rows.rows.tables["image"][:, 0].contiguous()  # type: ignore[attr-defined]  of this kind here
    grades = torch.bucketize(first, first.quantile(torch.tensor([0.1, 0.9])))
    part, task = Part(rows.rows, grades), Task("ordinal", ("low", "mid", "high"))
    adapt = AdaptConfig(lr=1e-2, epochs=100, batch_size=64, modality_dropout=0.0)
    config, stopping = HeadConfig(op="image", dropout=0.0), StoppingConfig()
    fit(config, adapt, stopping, task, part, part, widths=WIDTHS, seed=0, log=log.append)
    scores = [row["inner_qwk"] for row in log]
    assert scores[:6] == [0.0] * 6
    assert max(scores) > 0.25


@pytest.mark.parametrize("rule", ["mean", "stacking"])
@pytest.mark.parametrize("pictures", [0, 2])
def test_a_modality_that_few_rows_have_is_no_layer_without_gradient(rule: str, pictures: int) -> None:
    rows = xor_rows(200, 1)
    index = dict(rows.rows.index)
    index["image"] = torch.where(torch.arange(200) >= 200 - pictures, index["image"], -1)
    features = FeatureRows(rows.rows.tables, index, torch.arange(200))
    parts = (Part(features, rows.targets), xor_rows(100, 2))
    fitted, log = train(HeadConfig(op="late", rule=rule), parts=parts, adapt={"batch_size": 8, "epochs": 2})
    assert len(log) == 2
    assert all(bool(value.isfinite().all()) for value in state(fitted).values())
