"""Several pictures of a row: pools against plain formulas, and whatever stands behind the last picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from diptych.configs.errors import UserError
from diptych.finetune.adapt.presence import has_weights, weights_of
from diptych.finetune.config import HeadConfig, LabelledDataConfig, ModalityConfig
from diptych.finetune.encoders.features import FeatureRows, extract
from diptych.finetune.encoders.live import LiveRows
from diptych.finetune.fusion.operators import Head, build_head
from diptych.finetune.fusion.pooling import Attend, Pooled, mean_pool
from diptych.finetune.tables.cells import PictureFolder, PictureReader
from diptych.finetune.tables.manifest import Rows, parse_rows
from diptych.pretrain.model import LoadedModel, load_model

from .heads import ALL, all_there, inputs
from .labelled import squares

TWO = {"image": 16, "text": 16}
READS_EMBEDDINGS = [
    name for name in ALL if not HeadConfig(**ALL[name]).reads_tokens and name != "text with a hidden layer"
]


def sets(n: int, most: int, seed: int, width: int = 16) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(n, most, width, generator=random), dim=-1)
    return x, torch.arange(most) < torch.randint(1, most + 1, (n, 1), generator=random)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_pools_are_plain_formulas_and_know_no_order(most: int, seed: int, draw: Any) -> None:
    x, mask = sets(5, most, seed)
    torch.manual_seed(seed)
    attend = Attend(16)
    attend.score.weight.data.normal_()
    attend.standard.fit(x[mask])
    order = list(range(most))
    draw.shuffle(order)
    dirty, wide = x.clone(), F.pad(x, (0, 0, 0, 3), value=float("nan"))
    dirty[~mask] = float("nan")
    for pool, tolerance in ((mean_pool, 0.0), (attend, 2e-6)):
        got = pool(x, mask)
        assert torch.equal(pool(dirty, mask), got)
        torch.testing.assert_close(pool(wide, F.pad(mask, (0, 3))), got, atol=tolerance, rtol=0)
        torch.testing.assert_close(pool(x[:, order], mask[:, order]), got, atol=tolerance, rtol=0)
        single = mask.sum(1) == 1
        assert torch.equal(got[single], x[single, 0])
        for i in range(5):
            rows = x[i][mask[i]].double().numpy()
            if pool is mean_pool:
                mean = rows.mean(0)
                want = mean / np.linalg.norm(mean) if len(rows) > 1 else mean
            else:
                z = (rows - attend.standard.mean.double().numpy()) / float(attend.standard.scale)
                h = np.tanh(
                    z @ attend.hidden.weight.data.double().numpy().T
                    + attend.hidden.bias.data.double().numpy()
                )
                a = np.exp(h @ attend.score.weight.data.double().numpy()[0])
                want = (a / a.sum()) @ rows
            np.testing.assert_allclose(got[i].detach().numpy(), want, atol=1e-5)


def test_attention_starts_at_the_mean_and_learns_which_picture_counts() -> None:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    x, _ = sets(400, 4, 1)
    mask = torch.ones(400, 4, dtype=torch.bool)
    marked = torch.randint(4, (400,), generator=random)
    mark, sign = (
        F.one_hot(torch.tensor([0]), 16).float(),
        torch.randint(0, 2, (400,), generator=random) * 2.0 - 1,
    )
    x[torch.arange(400), marked] = F.normalize(
        2 * mark + 1.5 * sign[:, None] * F.one_hot(torch.tensor([1]), 16), dim=1
    )
    head = build_head(HeadConfig(op="image", dropout=0.0), {"image": 16}, 1, pooled=("image",))
    assert isinstance(head, Pooled)
    features = {"image": mean_pool(x, mask), "image_set": x, "image_set_mask": mask}
    present = {"image": torch.ones(400, dtype=torch.bool)}
    head.fit_standard(features, present)
    torch.testing.assert_close(head.pooled(features, present)["image"], x.mean(1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-2)
    for step in range(60):
        loss = F.binary_cross_entropy_with_logits(head(features, present)[:, 0], (sign > 0).float())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
    pool = head.pool["image"]
    assert isinstance(pool, Attend)
    weights = pool.weights(x, mask).detach()
    assert float((weights.argmax(1) == marked).float().mean()) > 0.95
    assert float(weights[torch.arange(400), marked].mean()) > 0.5


def make(name: str, *, pooled: tuple[str, ...]) -> Head:
    torch.manual_seed(0)
    head = build_head(HeadConfig(**ALL[name]), TWO, 1, pooled=pooled)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head.eval()


@pytest.mark.parametrize("name", [n for n in READS_EMBEDDINGS if n != "weighted_sum given"])
def test_heads_over_a_pool_read_nothing_behind_the_last_picture_or_in_a_missing_slot(name: str) -> None:
    head, n = make(name, pooled=("image",)), 6
    assert isinstance(head, Pooled)
    x, mask = sets(n, 3, 0)
    present = all_there(n)
    present["image"] = torch.tensor([True, False] * 3)
    clean = inputs(n) | {"image": mean_pool(x, mask), "image_set": x, "image_set_mask": mask}
    head.fit_standard(clean, present)
    dirty = {k: v.clone() for k, v in clean.items()}
    dirty["image_set"][~mask] = float("nan")
    for key in ("image", "image_set"):
        dirty[key][~present["image"]] = float("nan")
    assert torch.equal(head(dirty, present), head(clean, present))
    assert len(head.parts(dirty, present)) == len(head.inner.parts(clean, present))
    if has_weights(head):
        rows = FeatureRows(
            {"image": x[:, 0], "text": clean["text"], "image_set": x[:, 0]},
            {k: torch.arange(n) for k in TWO},
            None,
            {"image": torch.arange(n)[:, None]},
        )
        np.testing.assert_allclose(weights_of(head, rows, batch_size=4).sum(1), 1.0, atol=1e-6)
    alone = {"image": x[:, 0], "image_set": x[:, :1], "image_set_mask": mask[:, :1]}
    assert torch.equal(head(clean | alone, present), head.inner(clean | alone, present))


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(squares.make_checkpoint(tmp_path / "checkpoint"))


def table(folder: Path, cells: list[Any], *, pool: Any = "mean", separator: str | None = None) -> Rows:
    for name in squares.NAMES[:5]:
        (folder / f"{name}.png").write_bytes(squares.square(name, 0))
    declared = {
        "image": ModalityConfig(column="image", pool=pool, separator=separator),
        "text": ModalityConfig(column="text"),
    }
    config = LabelledDataConfig(manifest="x", modalities=declared)
    columns = {"image": cells, "text": ["a square"] * len(cells)}
    return parse_rows(columns, config, PictureFolder(folder), source="x", target=None)


R, B, G, W = (f"{name}.png" for name in squares.NAMES[:4])


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_one_picture_in_a_list_is_the_plain_cell_to_the_last_bit(
    pool: str, tmp_path: Path, model: LoadedModel
) -> None:
    plain, _ = extract(model, table(tmp_path, [R, None, B, R], pool=None), tokens=True)
    listed, _ = extract(model, table(tmp_path, [[R], [], [B, None], np.array([R])], pool=pool), tokens=True)
    every = torch.arange(4)
    before, there = plain.batch(every, tokens=True)
    after, again = listed.batch(every, tokens=True)
    assert {k: v.tolist() for k, v in there.items()} == {k: v.tolist() for k, v in again.items()}
    for name in ("image", "image_tokens", "text"):
        assert torch.equal(before[name], after[name]), name
    assert ("image_set" in after) == (pool == "attention")
    for options in ({"op": "concat"}, {"op": "merged", "width": 8, "heads": 2}):
        torch.manual_seed(0)
        config = HeadConfig.model_validate(options)
        head = build_head(config, dict.fromkeys(TWO, 24), 1, dict.fromkeys(TWO, 24)).eval()
        assert torch.equal(head(before, there), head(after, again))


def test_sets_are_pooled_each_picture_encoded_once_in_any_order(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = LoadedModel.encode_images

    def counted(self: LoadedModel, images: Tensor, batch_size: int = 256) -> Tensor:
        encoded.append(len(images))
        return original(self, images, batch_size)

    monkeypatch.setattr(LoadedModel, "encode_images", counted)
    cells = [[R, B, G], [G, R, B], [R], [W, W], None, [B, R, G]]
    rows = table(tmp_path, cells, pool="attention")
    found, broken = extract(model, rows, tokens=True, fingerprint="f")
    assert not broken
    assert encoded == [4]
    features, present = found.batch(torch.arange(6), tokens=True)
    assert present["image"].tolist() == [True] * 4 + [False, True]
    assert torch.equal(features["image"][0], features["image"][1])
    assert torch.equal(features["image"][0], features["image"][5])
    single = extract(model, table(tmp_path, [R, B, G, W], pool=None))[0].tables["image"]
    mean = F.normalize(single[:3].double().mean(0), dim=0).float()
    torch.testing.assert_close(features["image"][0], mean, atol=1e-6, rtol=0)
    assert features["image_set_mask"].sum(1).tolist() == [3, 3, 1, 2, 0, 3]
    assert features["image_tokens"].shape[1] == features["image_mask"].shape[1] == 3 * 4
    assert features["image_mask"].sum(1).tolist() == [12, 12, 4, 8, 0, 12]
    narrow, _ = found.batch(torch.tensor([2, 4]), tokens=True)  # no wider than the batch needs
    assert narrow["image_set"].shape[1] == 1
    torch.manual_seed(0)
    merged = build_head(
        HeadConfig(op="merged", width=8, heads=2),
        dict.fromkeys(TWO, 24),
        1,
        {"image": 24, "text": 24},
        None,
        ("image",),
    ).eval()
    assert not isinstance(merged, Pooled)  # it reads the tokens of all pictures
    dirty = {k: v.clone() for k, v in features.items()}
    dirty["image_tokens"][~features["image_mask"]] = float("nan")
    assert torch.equal(merged(dirty, present), merged(features, present))
    torch.testing.assert_close(merged(features, present)[0], merged(features, present)[1], atol=1e-5, rtol=0)
    assert (merged(features, present)[0] - merged(features, present)[2]).abs() > 1e-6
    live = LiveRows(model, rows, 10**6, PictureReader())
    now, seen = live.batch(torch.arange(6))
    assert seen["image"].tolist() == present["image"].tolist()
    for name in ("image", "image_set"):
        torch.testing.assert_close(now[name], features[name], atol=1e-5, rtol=0)
    assert torch.equal(now["image_set_mask"], features["image_set_mask"])


def test_a_broken_picture_of_a_list_breaks_its_row(tmp_path: Path, model: LoadedModel) -> None:
    (tmp_path / "cut.png").write_bytes(squares.square("red", 0)[:60])
    _, broken = extract(model, table(tmp_path, [[R, "cut.png"], [B], ["absent.png", "cut.png"]]))
    assert {i: picture.path.name for i, (picture, _) in broken.items() if picture.path} == {
        0: "cut.png",
        2: "absent.png",
    }


def test_cells_with_several_pictures(tmp_path: Path) -> None:
    def names(rows: Rows) -> list[Any]:
        return [cell and [picture.path.name for picture in cell] for cell in rows.cells["image"]]

    got = table(tmp_path, [f"{R}|{B}", f" {G} | ", "", "|", [R, f"{B}"], None], separator="|")
    assert names(got) == [[R, B], [G], None, None, [R, B], None]
    with pytest.raises(UserError, match="row 1: the image is a list; set"):
        table(tmp_path, [[R, B]], pool=None)
    with pytest.raises(UserError, match="leads out of"):
        table(tmp_path, [[R, "../out.png"]])
