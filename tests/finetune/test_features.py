"""Features are the encoder's own, computed once per content, and found again only for the same content."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.configs.files import cache_dir
from diptych.finetune.config import LabelledDataConfig
from diptych.finetune.encoders import features as module
from diptych.finetune.encoders.features import encoder_fingerprint, extract
from diptych.finetune.tables.cells import PictureFolder
from diptych.finetune.tables.manifest import Rows, parse_rows
from diptych.pretrain.model import LoadedModel, load_model

from .labelled import squares


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(squares.make_checkpoint(tmp_path / "checkpoint"))


def table(folder: Path, images: list[Any], texts: list[Any]) -> Rows:
    for name in squares.NAMES[:4]:
        (folder / f"{name}.png").write_bytes(squares.square(name, 0))
    wanted = LabelledDataConfig(manifest="x")
    return parse_rows(
        {"image": images, "text": texts}, wanted, PictureFolder(folder), source="x", target=None
    )


def test_features_are_open_clips_own(tmp_path: Path, model: LoadedModel) -> None:
    names = squares.NAMES[:4]
    rows = table(tmp_path, [f"{n}.png" for n in names], [f"{n} square" for n in names])
    images, texts = squares.open_clip_features(tmp_path / "checkpoint", [(n, 0) for n in names])
    found, broken = extract(model, rows)
    features, present = found.batch(torch.arange(4))
    assert not broken
    assert present["image"].all()
    torch.testing.assert_close(features["image"], images, atol=1e-5, rtol=0)
    torch.testing.assert_close(features["text"], texts, atol=1e-5, rtol=0)


def test_token_features_lie_in_the_joint_space(tmp_path: Path, model: LoadedModel) -> None:
    """The end-of-text token's is the text feature; for a tower without class token the mean would be too."""
    names = squares.NAMES[:3]
    rows = table(
        tmp_path, [f"{n}.png" for n in names], [f"{n} square" * (1 + i) for i, n in enumerate(names)]
    )
    found, _ = extract(model, rows, tokens=True)
    features, _ = found.batch(torch.arange(3), tokens=True)
    assert features["image_tokens"].shape == (3, 4, 24)
    mask = features["text_mask"]
    assert mask.shape[1] == int(mask.sum(1).max())
    last = features["text_tokens"][torch.arange(3), mask.sum(1) - 1].float()
    own = torch.nn.functional.normalize(last, dim=1)
    torch.testing.assert_close(own, features["text"], atol=2e-3, rtol=0)
    narrow, _ = found.batch(torch.tensor([0]), tokens=True)
    assert narrow["text_mask"].shape[1] == int(mask[0].sum())


def test_equal_items_are_encoded_once_and_missing_ones_never(tmp_path: Path, model: LoadedModel) -> None:
    rows = table(tmp_path, ["red.png", None, "red.png", "blue.png"], ["x", "x", None, "x"])
    found, _ = extract(model, rows)
    assert len(found.tables["image"]) == 2
    assert len(found.tables["text"]) == 1
    features, present = found.batch(torch.arange(4))
    assert present["image"].tolist() == [True, False, True, True]
    assert present["text"].tolist() == [True, True, False, True]
    assert torch.equal(features["image"][0], features["image"][2])
    assert features["image"][1].abs().sum() == features["text"][2].abs().sum() == 0
    nothing, _ = extract(model, table(tmp_path, [None, None], ["a", "b"]), tokens=True)
    features, present = nothing.batch(torch.arange(2), tokens=True)
    assert not present["image"].any()
    assert features["image_tokens"].shape == (2, 4, 24)


def test_broken_pictures_are_named_by_row(tmp_path: Path, model: LoadedModel) -> None:
    (tmp_path / "cut.png").write_bytes(squares.square("red", 0)[:60])
    rows = table(tmp_path, ["red.png", "cut.png", "absent.png", "cut.png"], ["x"] * 4)
    for _ in range(2):  # also from the cache
        _, broken = extract(model, rows, fingerprint="f")
        assert sorted(broken) == [1, 2, 3]
        assert "damaged" in broken[1][1]
        assert broken[1] == broken[3]
        assert "no such file" in broken[2][1]


def test_a_second_time_nothing_is_encoded_unless_the_content_changed(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = LoadedModel.encode_images

    def counted(self: LoadedModel, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        encoded.append(len(images))
        return original(self, images, batch_size)

    monkeypatch.setattr(LoadedModel, "encode_images", counted)
    key = encoder_fingerprint(model)
    rows = table(tmp_path, ["red.png", "blue.png"], ["a", "b"])
    first, _ = extract(model, rows, fingerprint=key)
    again, _ = extract(model, rows, fingerprint=key)
    assert encoded == [2]
    assert torch.equal(first.tables["image"], again.tables["image"])
    extract(model, table(tmp_path, ["blue.png", "red.png"], ["a", "b"]), fingerprint=key)  # another order
    (tmp_path / "red.png").write_bytes(squares.square("plum", 99))  # other pixels behind the same path
    changed, _ = extract(model, rows, fingerprint=key)
    assert encoded == [2, 2, 2]
    assert not torch.equal(changed.tables["image"], first.tables["image"])
    extract(model, rows, fingerprint=None)
    assert encoded[3:] == [2]
    assert not list((cache_dir() / "features").glob(".*"))


def test_a_picture_is_too_large_by_the_limit_of_this_run_not_of_the_one_that_kept_it(
    tmp_path: Path, model: LoadedModel
) -> None:
    rows = table(tmp_path, ["red.png"], ["a"])
    for limit, broken in ((squares.SIZE**2 - 1, [0]), (squares.SIZE**2, []), (squares.SIZE**2 - 1, [0])):
        assert list(extract(model, rows, fingerprint="f", max_pixels=limit)[1]) == broken


def test_the_encoders_fingerprint_depends_on_every_weight_and_on_the_preprocessing(
    tmp_path: Path, model: LoadedModel
) -> None:
    key = encoder_fingerprint(model)
    assert encoder_fingerprint(load_model(tmp_path / "checkpoint")) == key
    for parameter in (next(model.clip.visual.parameters()), model.clip.text.text_projection):
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3  # type: ignore[operator, union-attr]  of this kind here
        assert encoder_fingerprint(model) != key
        key = encoder_fingerprint(model)
    model.config["preprocess_cfg"]["interpolation"] = "bilinear"
    assert encoder_fingerprint(model) != key


def test_an_interrupted_write_leaves_no_entry(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, batches = LoadedModel.encode_images, list[int]()

    def stop(self: LoadedModel, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        batches.append(len(images))
        if len(batches) == 2:  # the first batch is in the files by now
            raise KeyboardInterrupt
        return original(self, images, batch_size)

    rows = table(tmp_path, ["red.png", "blue.png"], ["a", "b"])
    monkeypatch.setattr(LoadedModel, "encode_images", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(model, rows, fingerprint="f", batch_size=1)
    assert batches == [1, 1]
    assert not list((cache_dir() / "features").iterdir())
    monkeypatch.undo()
    found, _ = extract(model, rows, fingerprint=None)
    assert np.isfinite(found.tables["image"].numpy()).all()


def test_tables_are_the_files_themselves_and_stay_as_they_are(tmp_path: Path, model: LoadedModel) -> None:
    """Bit for bit what is encoded without a cache, in whatever batches; no copy of them is in memory."""
    rows = table(tmp_path, [f"{n}.png" for n in squares.NAMES[:4]], ["a", "b b b", "c", "d d"])
    plain, _ = extract(model, rows, tokens=True, batch_size=3)
    kept, _ = extract(model, rows, tokens=True, batch_size=3, fingerprint="f")
    assert kept.tables.keys() == plain.tables.keys()
    assert all(kept.tables[name].equal(value) for name, value in plain.tables.items())
    files = sorted((cache_dir() / "features").rglob("*.npy"))
    assert len(files) == 6
    before = [file.read_bytes() for file in files]
    mapped = Path("/proc/self/maps").read_text()
    assert {file.stem for file in files if f"{file}\n" not in mapped} == {"broken"}
    for batch in (kept.batch(torch.tensor([2, 0]), tokens=True)[0], kept.tables):
        for value in batch.values():
            value.zero_()  # what is done to a table or batch does not reach the file
    assert [file.read_bytes() for file in files] == before


def test_an_entry_is_written_a_batch_at_a_time(tmp_path: Path) -> None:
    """Of 32 MB no more than a few batches of 1 MB are ever in memory."""
    rows, width = 256, 2**15
    batches = ({"tokens": np.full((8, width), i, dtype=np.float32)} for i in range(rows // 8))
    tracemalloc.start()
    module._write_entry(tmp_path / "entry", rows, batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6
    written = np.load(tmp_path / "entry" / "tokens.npy", mmap_mode="r")
    assert written.shape == (rows, width)
    assert (written[:, 0] == np.arange(rows) // 8).all()


def test_what_another_run_kept_beside_is_not_read(tmp_path: Path, model: LoadedModel) -> None:
    rows = table(tmp_path, ["red.png", "blue.png"], ["x", "y"])
    deep, _ = extract(model, rows, tokens=True, fingerprint="f")
    assert "image_tokens" in deep.tables
    plain, _ = extract(model, rows, fingerprint="f")
    assert plain.tables.keys() == {"image", "text"}
    assert torch.equal(plain.tables["image"], deep.tables["image"])
    assert len(list((cache_dir() / "features").iterdir())) == 2


def test_a_groups_number_is_its_names_alone(tmp_path: Path, model: LoadedModel) -> None:
    def numbers(groups: list[str]) -> list[int]:
        rows = replace(table(tmp_path, [None] * len(groups), ["x"] * len(groups)), groups=groups)
        found = extract(model, rows)[0].groups
        assert found is not None
        return found.tolist()

    a, b, c = numbers(["a", "b", "\udcff"])
    assert len({a, b, c}) == 3
    assert numbers(["b", "new", "a", "b"])[::2] == [b, a]
