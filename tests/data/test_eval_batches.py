"""Evaluation's loader: in order, unaugmented, damage named once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.data.decode import eval_image
from diptych.data.eval_batches import EvalBatch, eval_batches
from diptych.data.shards import open_shards

from .stream_corpus import change_bytes, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("eval") / "val", 23, 6)


def rows(batches: list[EvalBatch]) -> list[int]:
    return np.concatenate([batch.sample_ids for batch in batches]).tolist()


def test_all_samples_come_in_order_as_open_clip_sees_them(corpus: Path) -> None:
    shards = open_shards(corpus)
    batches = list(eval_batches(shards, image_size=16, batch_size=10))
    assert [len(batch.keys) for batch in batches] == [10, 10, 3]
    assert rows(batches) == list(range(23))
    for batch in batches:
        assert batch.image.shape == (len(batch.keys), 3, 16, 16)
        assert batch.image.dtype == torch.uint8
        for i, sample_id in enumerate(batch.sample_ids):
            raw = shards.read(int(sample_id))
            assert (batch.keys[i], batch.captions[i], batch.metas[i]) == (raw.key, raw.caption, raw.meta)
            assert torch.equal(batch.image[i], eval_image(raw.image, 16))


def test_chosen_samples_come_in_the_order_asked_for(corpus: Path) -> None:
    shards = open_shards(corpus)
    batches = list(eval_batches(shards, image_size=8, batch_size=2, sample_ids=[20, 3, 3, 11, 0]))
    assert rows(batches) == [20, 3, 3, 11, 0]
    assert list(eval_batches(shards, image_size=8, sample_ids=np.array([], dtype=np.int64))) == []
    squashed = next(eval_batches(shards, image_size=8, sample_ids=[1], resize_mode="squash"))
    assert torch.equal(squashed.image[0], eval_image(shards.read(1).image, 8, resize_mode="squash"))


def test_damaged_samples_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_corpus(tmp_path / "val", 23, 6)
    shards = open_shards(folder)
    for sample_id in (4, 5, 17):
        shard, record = shards.locate(sample_id)
        change_bytes(
            folder / shards.shard_names[shard], int(shards.records(shard)[record]["image_offset"]) + 60
        )
    batches = list(eval_batches(open_shards(folder), image_size=8, batch_size=2))
    assert rows(batches) == [i for i in range(23) if i not in (4, 5, 17)]
    assert len(batches) == 11  # samples 4 and 5 were a batch of their own
    assert len(caplog.records) == 1
    assert all(f"key-{i:03d} (hash)" in caplog.text for i in (4, 5, 17))
    caplog.clear()
    assert rows(list(eval_batches(open_shards(folder), image_size=8, max_pixels=400))) != []
    assert "(size)" in caplog.text
