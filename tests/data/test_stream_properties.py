"""Any data set, any settings, any topology: one order, the same pixels and tokens, resumed anywhere.

Through the real loader, with worker processes that have batches ready when the stream is left.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.data.index import read_manifest, write_manifest
from diptych.data.order import Order
from diptych.data.shards import ShardWriter

from .images import photo, stored
from .stream_corpus import all_same, global_batches, ids, ranks_of, stream_of

SIZES = (1, 2, 3, 5, 7, 4, 6, 9)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of all sizes, of which data sets are put together."""
    folder = tmp_path_factory.mktemp("pool")
    for number, size in enumerate(SIZES):
        with ShardWriter(folder / str(number), samples_per_shard=size) as writer:
            for i in range(size):
                image = stored(photo(17 + i, 19, seed=10 * number + i), ("PNG", "JPEG", "WEBP")[i % 3])
                extension = ("png", "jpg", "webp")[i % 3]
                meta = {"names": [f"name {number} {i}"], "tags": ["a", "b", f"tag {i}"]}
                writer.write(f"s{number}-{i}", image, extension, "word " * (1 + i), meta)
    return folder


def assemble(pool: Path, out: Path, picks: list[int]) -> str:
    """A data set of these shards, in this order."""
    out.mkdir()
    rows: list[Any] = []
    for place, number in enumerate(picks):
        (row,) = read_manifest(pool / str(number))
        name = f"{place:05d}"
        os.link(pool / str(number) / "00000.tar", out / f"{name}.tar")
        shutil.copy(pool / str(number) / "00000.idx", out / f"{name}.idx")
        rows.append(type(row)(**{**vars(row), "shard": f"{name}.tar"}))
    write_manifest(out, rows)
    return str(out)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_order_on_every_topology(
    pool: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE", f"{folder}/cache")
        sets, config = draw_run(pool, Path(folder), data)
        truth = global_batches([stream_of(sets, **config)], 9)
        done, state = 0, None
        for _ in range(2):
            most = min(4, config["batch"])
            world_size = data.draw(st.integers(1, most), label="ranks")
            workers = data.draw(st.sampled_from([0, 1, 3]), label="workers") if world_size < 3 else 0
            count = data.draw(st.integers(1, 4), label="batches")
            streams = ranks_of(sets, world_size, workers=workers, **config)
            assert all_same(global_batches(streams, count, state), truth[done : done + count])
            assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)
            state, done = json.loads(json.dumps(streams[0].state_dict())), done + count


def draw_run(pool: Path, folder: Path, data: st.DataObject) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sources and settings of a stream."""
    picks = st.lists(st.sampled_from(range(len(SIZES))), min_size=2, max_size=8, unique=True)
    chosen = data.draw(st.lists(picks, min_size=1, max_size=3), label="shards of each source")
    weighted = data.draw(st.booleans(), label="weights")
    sets: list[dict[str, Any]] = []
    totals: list[int] = []
    for number, one in enumerate(chosen):
        source: dict[str, Any] = {"data": assemble(pool, folder / f"set{number}", one)}
        if weighted:
            source["weight"] = data.draw(st.floats(0.1, 10), label="weight")
        total = sum(SIZES[number] for number in one)
        if total > len(one) and data.draw(st.booleans(), label="filtered"):
            source["where"] = "text_len > 5"  # all but the first of each shard
            total -= len(one)
        sets.append(source)
        totals.append(total)
    lanes = data.draw(st.integers(1, min(3, *totals)), label="lanes")
    batch = lanes * data.draw(st.integers(1, max(1, min(totals) // lanes)), label="rows of a lane")
    own_length = len(sets) > 1 or data.draw(st.booleans(), label="epochs of own length")
    epoch_samples = batch * data.draw(st.integers(1, 5), label="steps") if own_length else None
    window = data.draw(st.integers(1, 30), label="window")
    seed = data.draw(st.integers(0, 2**40), label="seed")
    return sets, {
        "seed": seed,
        "batch": batch,
        "lanes": lanes,
        "window": window,
        "epoch_samples": epoch_samples,
    }


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_epoch_through_workers_has_every_chosen_sample_once(
    pool: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE", f"{folder}/cache")
        picks = data.draw(st.lists(st.sampled_from(range(8)), min_size=2, max_size=8, unique=True))
        source = {"data": assemble(pool, Path(folder, "set"), picks), "where": "text_len > 5"}
        # a caption is "word " times the sample's number in its shard and one more
        first = np.cumsum([0, *(SIZES[number] for number in picks)])
        chosen = [
            int(first[place]) + i for place, number in enumerate(picks) for i in range(1, SIZES[number])
        ]
        batch = data.draw(st.integers(1, max(1, len(chosen))), label="batch")
        if not chosen:
            return
        stream = stream_of([source], batch=batch, lanes=None, window=None, workers=1)
        order = stream.order
        assert isinstance(order, Order)
        seen = ids(global_batches([stream], stream.steps_per_epoch))
        rest = [chosen[i] for i in order.rest(0)]
        assert sorted([*seen.tolist(), *rest]) == chosen


def test_workers_take_none_of_the_runs_random_numbers(pool: Path) -> None:
    before = torch.get_rng_state()
    with stream_of(pool / "7", workers=1) as stream:
        next(stream)
    assert torch.get_rng_state().equal(before)
