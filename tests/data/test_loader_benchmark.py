"""The loader benchmark: its photos, its fidelity figure, and contestants that pass over all images."""

import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data import decode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("loader", "contestants", "rows"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("loader")


def test_photos_are_of_the_size_and_kind_that_is_said(loader: ModuleType) -> None:
    for size in loader.SIDES.values():
        image = Image.open(io.BytesIO(loader.photo(*size, np.random.default_rng(0))))
        assert (image.size, image.mode, image.format) == (size, "RGB", "JPEG")
        # of JPEGs alone
        assert image.layer == [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # type: ignore[attr-defined]


def test_our_training_pixels_are_near_pillows(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    small, large = ([loader.photo(*loader.SIDES[name], rng) for _ in range(4)] for name in ("256", "1024"))
    torch.set_num_threads(1)
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(decode, "simplejpeg", None)
        assert loader.psnr(small) > 65  # steps of one, here and there
        assert loader.psnr(large) > 45  # decoded at half size


@pytest.mark.slow
def test_contestants_pass_over_every_image(loader: ModuleType, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    photos = [loader.photo(341, 256, rng) for _ in range(4)]
    loader.write_shards(tmp_path / "shards", photos, loader.BATCH_SIZE)
    kinds = {"plain": None, "webdataset": None}
    measured = loader.measure(kinds, {"256": tmp_path / "shards", "read": tmp_path / "shards"}, 1)
    for task in ("256", "read"):
        assert all(rates[0] > 0 for rates in measured["rates"][task].values())
    assert measured["versions"]["webdataset"]["webdataset"] >= "1"
