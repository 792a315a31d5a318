"""The loader: the same batches on any ranks and workers, from any step, past any damage."""

import copy
import io
import json
import os
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from numpy.random import Generator, Philox
from PIL import Image

from diptych.configs.errors import UserError
from diptych.configs.load import load_config, to_yaml
from diptych.data import reading as reading_module
from diptych.data.augment import train_image
from diptych.data.captions import choose_caption
from diptych.data.config import DataConfig
from diptych.data.decode import decode_image
from diptych.data.shards import ShardSet, open_shards
from diptych.data.text import caption_hash

from .samples import WEBDATASET
from .stream_corpus import (
    AUGMENT,
    CAPTIONS,
    SIZE,
    TOKENIZER,
    Batch,
    all_same,
    caption_texts,
    global_batches,
    ids,
    ranks_of,
    stream_of,
    write_corpus,
)

N, B, STEPS = 53, 8, 6  # six steps an epoch, five samples left over


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("stream") / "train", N)


@pytest.fixture(scope="module")
def truth(corpus: Path) -> list[Batch]:
    """Two epochs and a half from one process."""
    return global_batches([stream_of(corpus)], 15)


def test_batches_have_the_documented_entries(truth: list[Batch]) -> None:
    batch = truth[0]
    types = {key: (v.dtype, tuple(v.shape)) for key, v in batch.items() if isinstance(v, torch.Tensor)}
    tokens = int(batch["seq_lens"].sum())
    assert types == {
        "image": (torch.uint8, (B, 3, SIZE, SIZE)),
        "token_ids": (torch.int32, (tokens,)),
        "seq_lens": (torch.int32, (B,)),
        "valid": (torch.bool, (B,)),
        "sample_id": (torch.int64, (B,)),
        "source": (torch.int16, (B,)),
        "caption_hash": (torch.int64, (B,)),
    }
    assert batch["valid"].all()
    assert (batch["source"] == 0).all()
    assert batch["bad"] == []
    assert [(b["epoch"], b["step"]) for b in truth] == [(i // STEPS, i % STEPS) for i in range(15)]


def test_rows_are_made_from_the_samples_own_numbers(corpus: Path, truth: list[Batch]) -> None:
    shards = open_shards(corpus)
    for batch in truth[5:8]:
        for row, sample_id in enumerate(batch["sample_id"].tolist()):
            raw = shards.read(sample_id)
            numbers = [
                Generator(Philox(key=[3, batch["epoch"]], counter=[0, sample_id, purpose, 0]))
                for purpose in (0, 1)
            ]
            image = train_image(decode_image(raw.image, max_pixels=10**6), SIZE, AUGMENT, numbers[0])
            caption = choose_caption(CAPTIONS, raw.caption, raw.meta, numbers[1])
            assert torch.equal(batch["image"][row], image)
            assert caption_texts(batch)[row] == TOKENIZER.pack([caption])[0].tolist()
            assert batch["caption_hash"][row] == caption_hash(caption)


def test_an_epoch_has_every_sample_once_but_the_rest(corpus: Path, truth: list[Batch]) -> None:
    order = stream_of(corpus).order
    for epoch in (0, 1):
        seen = ids(truth[STEPS * epoch : STEPS * (epoch + 1)])
        assert np.array_equal(np.sort(np.concatenate([seen, order.rest(epoch)])), np.arange(N))
    first, second = truth[:STEPS], truth[STEPS : 2 * STEPS]
    assert not np.array_equal(ids(first), ids(second))
    seen_first = dict(zip(ids(first).tolist(), torch.cat([b["image"] for b in first]), strict=True))
    seen_second = dict(zip(ids(second).tolist(), torch.cat([b["image"] for b in second]), strict=True))
    both = seen_first.keys() & seen_second.keys()
    changed = sum(not torch.equal(seen_first[i], seen_second[i]) for i in both)
    assert changed == len(both)  # augmented anew


@pytest.mark.parametrize(
    ("world_size", "workers"), [(2, 0), (5, 0), (8, 0), (1, 1), (1, 3), (2, 2), (3, 3), (8, 1)]
)
def test_any_ranks_and_workers_make_the_same_global_batches(
    corpus: Path, truth: list[Batch], world_size: int, workers: int
) -> None:
    assert all_same(global_batches(ranks_of(corpus, world_size, workers=workers), 8), truth[:8])


def test_spawned_workers_make_the_same_too(corpus: Path, truth: list[Batch]) -> None:
    stream = stream_of(corpus, workers=1, start_method="spawn")
    assert all_same(global_batches([stream], 4), truth[:4])


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        ((1, 0), (2, 2), 1),
        ((2, 2), (3, 0), 6),
        ((3, 1), (1, 3), 11),
        ((8, 0), (5, 1), 9),
        ((1, 2), (1, 0), 5),
        ((4, 0), (7, 0), 3),
    ],
)
def test_a_run_goes_on_from_any_step_on_another_topology(
    corpus: Path, truth: list[Batch], before: tuple[int, int], after: tuple[int, int], step: int
) -> None:
    first = ranks_of(corpus, before[0], workers=before[1])
    assert all_same(global_batches(first, step), truth[:step])
    states = [json.loads(json.dumps(stream.state_dict())) for stream in first]
    assert all(state == states[0] for state in states)
    second = ranks_of(corpus, after[0], workers=after[1])
    assert all_same(global_batches(second, 4, states[0]), truth[step : step + 4])


def test_batches_made_ahead_are_not_counted(corpus: Path, truth: list[Batch]) -> None:
    stream = stream_of(corpus, workers=2, prefetch=4)
    for _ in range(3):
        next(stream)
    time.sleep(0.3)  # eight more are ready by now
    state = stream.state_dict()
    assert (state["epoch"], state["step"]) == (0, 3)
    stream.close()
    assert all_same(global_batches([stream], 2), truth[3:5])  # a closed stream goes on from its place
    assert all_same(global_batches([stream_of(corpus)], 3, state), truth[3:6])


def test_the_state_at_an_epochs_end_is_the_next_ones_start(corpus: Path) -> None:
    stream = stream_of(corpus)
    for _ in range(STEPS):
        next(stream)
    assert stream.state_dict() == {
        "epoch": 1,
        "step": 0,
        "seed": 3,
        "global_batch_size": B,
        "lanes": 2,
        "window": 9,
        "fingerprint": open_shards(corpus).fingerprint,
    }
    assert (stream.steps_per_epoch, stream.num_samples) == (STEPS, N)


def test_a_stream_may_be_set_back_while_it_runs(corpus: Path, truth: list[Batch]) -> None:
    for workers in (0, 2):
        with stream_of(corpus, workers=workers) as stream:
            start = stream.state_dict()
            first = [next(stream) for _ in range(3)]
            stream.load_state_dict(start)
            assert all_same([next(stream) for _ in range(3)], first)
        assert all_same(first, truth[:3])


def test_lanes_and_window_are_the_runs_own(corpus: Path, truth: list[Batch]) -> None:
    state = global_state = stream_of(corpus).state_dict()
    other = stream_of(corpus, lanes=4, window=30)
    assert not all_same(global_batches([other], 2), truth[:2])
    assert all_same(global_batches([stream_of(corpus, lanes=4, window=30)], 3, state), truth[:3])
    assert other.state_dict()["lanes"] == 4
    assert global_state["lanes"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 4}, "seed: 4 is not the checkpoint's 3"),
        ({"batch": 16}, "global_batch_size: 16 is not the checkpoint's 8"),
    ],
)
def test_a_state_of_another_order_is_refused(corpus: Path, settings: dict[str, Any], words: str) -> None:
    state = stream_of(corpus).state_dict()
    with pytest.raises(UserError, match=words):
        stream_of(corpus, **settings).load_state_dict(state)


def test_a_state_of_other_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    state = stream_of(corpus).state_dict()
    other = write_corpus(tmp_path / "other", N - 1)
    with pytest.raises(UserError, match=r"data\.train: the data is not that of the checkpoint"):
        stream_of(other).load_state_dict(state)


def test_what_cannot_be_streamed_is_told_at_once(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="global_batch_size: 54 is more than the 53 samples"):
        stream_of(corpus, batch=54)
    with pytest.raises(UserError, match="leaves some of 9 ranks without a row"):
        stream_of(corpus, rank=0, world_size=9)
    with pytest.raises(UserError, match="nowhere"):
        stream_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.lanes: 3"):
        stream_of(corpus, lanes=3)


def damage(corpus: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """The corpus with a changed byte, an image that does not decode, and one with too many pixels."""
    from diptych.data.shards import ShardWriter

    shards = open_shards(corpus)
    cut = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(cut, "PNG")
    large = io.BytesIO()
    Image.fromarray(np.zeros((60, 50, 3), dtype=np.uint8)).save(large, "PNG")
    instead = {"key-009": cut.getvalue()[:-30], "key-030": large.getvalue()}
    with ShardWriter(folder, samples_per_shard=6) as writer:
        for i in range(len(shards)):
            raw = shards.read(i)
            writer.write(raw.key, instead.get(raw.key, raw.image), raw.extension, raw.caption, raw.meta)
    written = open_shards(folder)
    shard, record = written.locate(written.find("key-021"))
    entry = written.records(shard)[record]
    tar = folder / written.shard_names[shard]
    with tar.open("r+b") as file:
        file.seek(int(entry["image_offset"]) + int(entry["image_size"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return folder, {"key-009": "decode", "key-021": "hash", "key-030": "size"}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1)])
def test_damage_keeps_its_place_and_is_named(
    corpus: Path, tmp_path: Path, truth: list[Batch], world_size: int, workers: int
) -> None:
    folder, reasons = damage(corpus, tmp_path / "damaged")
    settings: dict[str, Any] = {"workers": workers, "max_pixels": 1000}
    got = global_batches(ranks_of(folder, world_size, **settings), STEPS)
    assert np.array_equal(ids(got), ids(truth[:STEPS]))
    met: dict[str, str] = {}
    keys = open_shards(folder).keys()
    for batch, whole in zip(got, truth, strict=False):
        for row, valid in enumerate(batch["valid"].tolist()):
            if valid:
                assert torch.equal(batch["image"][row], whole["image"][row])
                assert caption_texts(batch)[row] == caption_texts(whole)[row]
            else:
                assert (batch["image"][row] == 255).all()
                assert caption_texts(batch)[row] == TOKENIZER.pack([""])[0].tolist()
        named = {row["sample_id"]: row for row in batch["bad"]}
        assert sorted(named) == sorted(batch["sample_id"][~batch["valid"]].tolist())
        for sample_id, row in named.items():
            assert row["key"] == keys[sample_id]
            assert row["shard"] == f"{sample_id // 6:05d}.tar"
            assert (row["epoch"], row["step"]) == (batch["epoch"], batch["step"])
            met[row["key"]] = row["reason"]
    rest = {keys[i] for i in stream_of(corpus).order.rest(0)}
    assert met == {key: reason for key, reason in reasons.items() if key not in rest}
    assert len(met) >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_may_stop_the_run_with_its_name(corpus: Path, tmp_path: Path, workers: int) -> None:
    folder, reasons = damage(corpus, tmp_path / "damaged")
    stream = stream_of(folder, on_bad="raise", max_pixels=1000, workers=workers)
    with pytest.raises(UserError) as caught:
        list(islice(stream, STEPS))
    message = str(caught.value)
    key = next(key for key in reasons if f"'{key}'" in message)
    assert f"damaged ({reasons[key]})" in message
    assert ".tar: " in message
    assert "\n" not in message  # not a worker's traceback
    stream.close()


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> Counter[int]:
    """Each sample's first reads fail as on a network disk."""
    monkeypatch.setattr(reading_module, "FIRST_WAIT_S", 0.0)
    read, tried = ShardSet.read, Counter[int]()

    def flaky(self: ShardSet, sample_id: int) -> Any:
        tried[sample_id] += 1
        if tried[sample_id] <= times:
            raise OSError(116, "Stale file handle")
        return read(self, sample_id)

    monkeypatch.setattr(ShardSet, "read", flaky)
    return tried


def test_a_disk_that_fails_for_a_while_is_asked_again(
    corpus: Path, truth: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = stream_of(corpus)
    tried = failing(monkeypatch, times=3)
    assert all_same(global_batches([stream], 2), truth[:2])
    assert set(tried.values()) == {4}
    assert "Stale file handle; trying again" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fails_for_good_stops_the_run_with_the_files_name(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    stream = stream_of(corpus, workers=workers)
    failing(monkeypatch, times=10**6)
    with pytest.raises(UserError, match=rf"{corpus}/0000\d\.tar cannot be read after 6 tries: Stale file"):
        next(stream)
    stream.close()


def test_a_killed_worker_is_told_with_what_helps(corpus: Path) -> None:
    stream = stream_of(corpus, workers=1)
    next(stream)
    worker: Any = stream._batches  # type: ignore[reportPrivateUsage]  its inside is what is tested
    os.kill(worker._workers[0].pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"data worker \d \(process \d+\) died \(signal 9\).*lower data\.workers"
    ):
        list(islice(stream, 20))
    stream.close()


def test_workers_leave_ctrl_c_to_the_training_process(corpus: Path, truth: list[Batch]) -> None:
    stream = stream_of(corpus, workers=1, prefetch=1)
    next(stream)
    worker: Any = stream._batches  # type: ignore[reportPrivateUsage]  its inside is what is tested
    os.kill(worker._workers[0].pid, signal.SIGINT)
    assert all_same([next(stream) for _ in range(4)], truth[1:5])
    stream.close()
    assert not worker._workers[0].is_alive()


@WEBDATASET
def test_webdatasets_reader_sees_the_samples_of_one_epoch(corpus: Path, truth: list[Batch]) -> None:
    urls = [str(corpus / name) for name in open_shards(corpus).shard_names]
    theirs = Counter(
        (sample["__key__"], sample["txt"].decode())
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    )
    shards = open_shards(corpus)
    rest = stream_of(corpus).order.rest(0)
    ours = [shards.read(int(i)) for i in np.concatenate([ids(truth[:STEPS]), rest])]
    assert Counter((raw.key, raw.caption) for raw in ours) == theirs


def test_the_budget_of_damage_lets_chance_and_a_single_sample_pass() -> None:
    config = DataConfig(train="x")
    assert [config.bad_allowed(seen, 10**9) for seen in (0, 100, 10_000, 10**6, 10**8)] == [
        1,
        2,
        20,
        1095,
        100949,
    ]
    assert config.bad_allowed(10**9, 100) == 2  # distinct samples: epochs do not add up
    assert DataConfig(train="x", max_bad_fraction=0.0).bad_allowed(10**9, 10**9) == 0
    rng = np.random.default_rng(0)  # a thousand runs of sets with half the budget of damage
    damaged = np.cumsum(rng.random((1000, 4000)) < 0.0005, axis=1)
    allowed = np.array([config.bad_allowed(seen, 10**9) for seen in range(1, 4001)])
    assert (damaged > allowed).any(axis=1).mean() < 0.01


def test_the_config_survives_yaml_and_names_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    config = DataConfig(train="corpus:x/train", captions=CAPTIONS, augment=AUGMENT, workers=2, lanes=4)
    file.write_text(to_yaml(config))
    assert load_config(DataConfig, file) == config
    for override, words in [
        ("on_bad=skip", "on_bad: .*'mask' or 'raise'"),
        ("workers=-1", "workers"),
        ("captions.text=1.0", r"captions\.text: unknown key; did you mean 'txt'"),
        ("prefetch=0", "prefetch"),
    ]:
        with pytest.raises(UserError, match=words):
            load_config(DataConfig, file, [override])


def test_a_streams_recipe_can_be_copied(corpus: Path, truth: list[Batch]) -> None:
    stream = stream_of(corpus)
    assert all_same([next(copy.copy(stream))], truth[:1])
    assert stream.state_dict()["step"] == 0
