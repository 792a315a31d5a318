"""The printed order is the order that training sees, for any ranks and workers."""

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data.config import DataConfig
from diptych.data.trace import trace_lines

from .stream_corpus import global_batches, stream_of, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("trace") / "train")


def trace(corpus: Path, **settings: Any) -> list[dict[str, Any]]:
    config = DataConfig(train=str(corpus), lanes=2, window=9)
    return [json.loads(line) for line in trace_lines(config, seed=3, global_batch_size=8, **settings)]


def test_the_trace_is_what_the_stream_yields(corpus: Path) -> None:
    truth = [
        {"epoch": batch["epoch"], "step": batch["step"], "sample_ids": batch["sample_id"].tolist()}
        for batch in global_batches([stream_of(corpus)], 14)
    ]
    assert trace(corpus) == truth[:6]
    assert trace(corpus, epoch=1, start=4, steps=3) == truth[10:13]
    for world_size in range(1, 9):
        for workers in range(4):
            assert trace(corpus, start=1, steps=13, world_size=world_size, workers=workers) == truth[1:14]


def test_mistakes_are_told_in_a_sentence(corpus: Path) -> None:
    for settings, words in [
        ({"start": 6}, "--start: 6 must be between 0 and 5"),
        ({"world_size": 9}, "--world-size: 9 must be between 1 and the global batch of 8"),
        ({"epoch": -1}, "must not be negative"),
        ({"epoch": 10**19}, "--epoch: 10000000000000000000 must be below"),
        ({"workers": -1}, "must not be negative"),
    ]:
        with pytest.raises(UserError, match=words):
            trace(corpus, **settings)


def test_tars_without_an_index_have_no_order_to_print(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    config = DataConfig(train=str(tmp_path), epoch_samples=8)
    with pytest.raises(UserError, match="tars without an index have no order to print"):
        list(trace_lines(config, seed=0, global_batch_size=8))
