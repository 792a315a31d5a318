"""Mixtures and filters through the real loader: the same batches on any topology, resumed anywhere."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox

from diptych.configs.errors import UserError
from diptych.configs.load import load_config, to_yaml
from diptych.data.augment import train_image
from diptych.data.captions import CaptionConfig, choose_caption
from diptych.data.config import DataConfig, SourceConfig
from diptych.data.decode import decode_image
from diptych.data.mixture import Mixture
from diptych.data.shards import ShardWriter, open_shards
from diptych.data.text import caption_hash
from diptych.data.trace import trace_lines

from .images import photo, stored
from .stream_corpus import (
    AUGMENT,
    CAPTIONS,
    SIZE,
    TOKENIZER,
    Batch,
    all_same,
    caption_texts,
    change_bytes,
    global_batches,
    ranks_of,
    stream_of,
    write_corpus,
)

B = 12


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed")
    sizes = {"large": (47, 6), "small": (11, 4), "middle": (23, 5)}
    for name, (n, per_shard) in sizes.items():
        write_corpus(folder / name, n, per_shard)
    return [
        {"data": str(folder / "large"), "weight": 3.0},
        {"data": str(folder / "small"), "weight": 1.0, "where": "width > 20"},
        {"data": str(folder / "middle"), "weight": 2.0},
    ]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path_factory.getbasetemp() / "mixed-cache"))


SETTINGS: dict[str, Any] = {"batch": B, "epoch_samples": 5 * B, "lanes": 3, "window": 9}


@pytest.fixture(scope="module")
def truth(sets: list[dict[str, Any]]) -> list[Batch]:
    return global_batches([stream_of(sets, **SETTINGS)], 17)


def test_epochs_are_of_the_length_asked_for(truth: list[Batch]) -> None:
    assert [(b["epoch"], b["step"]) for b in truth] == [(i // 5, i % 5) for i in range(17)]
    assert set(torch.cat([b["source"] for b in truth]).tolist()) == {0, 1, 2}


def test_rows_are_made_from_the_numbers_of_sample_and_source(
    sets: list[dict[str, Any]], truth: list[Batch]
) -> None:
    shards = [open_shards(one["data"]) for one in sets]
    order = stream_of(sets, **SETTINGS).order
    assert isinstance(order, Mixture)
    for batch in truth[8:11]:
        places = order.places(batch["epoch"], batch["step"], slice(0, B))
        assert batch["source"].tolist() == places.source.tolist()
        for row, (source, sample_id) in enumerate(
            zip(batch["source"].tolist(), batch["sample_id"].tolist(), strict=True)
        ):
            raw = shards[source].read(sample_id)
            key = [3, int(places.epoch[row])]
            numbers = Generator(Philox(key=key, counter=[0, sample_id, 0, source]))
            image = train_image(decode_image(raw.image, max_pixels=10**6), SIZE, AUGMENT, numbers)
            assert torch.equal(batch["image"][row], image)


def test_sample_ids_are_the_indexes_own_whatever_is_filtered(
    sets: list[dict[str, Any]], truth: list[Batch]
) -> None:
    small = open_shards(sets[1]["data"])
    wide = {i for i in range(len(small)) if 20 + i % 5 > 20 or 18 + i % 7 > 20}
    records = np.concatenate([small.records(s) for s in range(len(small.rows))])
    chosen = set(np.flatnonzero(records["width"] > 20).tolist())
    assert chosen <= wide
    ids = torch.cat([b["sample_id"][b["source"] == 1] for b in truth]).tolist()
    assert set(ids) == chosen
    assert 0 < len(chosen) < len(small)


def test_every_source_is_gone_through_before_it_begins_anew(truth: list[Batch]) -> None:
    """Of each lane, for each lane has its own part of every epoch of a source."""
    sizes = {0: 47, 2: 23}
    for source, size in sizes.items():
        for lane in range(3):
            seen = [
                int(i)
                for b in truth
                for i, s in zip(
                    b["sample_id"][4 * lane : 4 * lane + 4], b["source"][4 * lane : 4 * lane + 4], strict=True
                )
                if s == source
            ]
            length = size // 3
            for start in range(0, len(seen) - length, length):
                assert len(set(seen[start : start + length])) == length


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_ranks_and_workers_give_the_same_batches_from_any_step(
    sets: list[dict[str, Any]], truth: list[Batch], data: st.DataObject
) -> None:
    """Three topologies in turn, each going on from the state of the one before, with batches made ahead."""
    done, state = 0, None
    for _ in range(3):
        world_size = data.draw(st.integers(1, 5), label="ranks")
        workers = data.draw(st.sampled_from([0, 0, 1, 2]), label="workers") if world_size <= 2 else 0
        count = data.draw(st.integers(1, 5), label="batches")
        streams = ranks_of(sets, world_size, workers=workers, **SETTINGS)
        got = global_batches(streams, count, state)
        assert all_same(got, truth[done : done + count])
        states = [stream.state_dict() for stream in streams]
        assert all(one == states[0] for one in states)
        state, done = json.loads(json.dumps(states[0])), done + count


def test_the_trace_is_what_the_stream_yields(sets: list[dict[str, Any]], truth: list[Batch]) -> None:
    train = tuple(SourceConfig(**one) for one in sets)
    config = DataConfig(train=train, epoch_samples=5 * B, lanes=3, window=9)
    lines = list(
        trace_lines(config, seed=3, global_batch_size=B, world_size=5, workers=2, epoch=1, start=2, steps=4)
    )
    for line, batch in zip(map(json.loads, lines), truth[7:11], strict=True):
        assert line["sample_ids"] == batch["sample_id"].tolist()
        assert line["sources"] == batch["source"].tolist()


def test_damage_in_one_source_is_named_and_moves_nothing(
    sets: list[dict[str, Any]], truth: list[Batch], tmp_path: Path
) -> None:
    folder = write_corpus(tmp_path / "middle", 23, 5)
    shards = open_shards(folder)
    shard, record = shards.locate(7)
    change_bytes(folder / shards.shard_names[shard], int(shards.records(shard)[record]["image_offset"]) + 40)
    hurt = [sets[0], sets[1], {**sets[2], "data": str(folder)}]
    for batch, whole in zip(global_batches([stream_of(hurt, **SETTINGS)], 17), truth, strict=True):
        bad = (whole["source"] == 2) & (whole["sample_id"] == 7)
        assert torch.equal(batch["valid"], ~bad)
        assert torch.equal(batch["sample_id"], whole["sample_id"])
        assert torch.equal(batch["image"][~bad], whole["image"][~bad])
        assert (batch["image"][bad] == 255).all()
        named = [(row["source"], row["sample_id"], row["key"], row["reason"]) for row in batch["bad"]]
        assert named == [(2, 7, "key-007", "hash")] * int(bad.sum())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch_samples": 6 * B}, "data.epoch_samples: 72 is not the checkpoint's 60"),
        ({"weight": 2.0}, "the weights of the sources are not the checkpoint's"),
        ({"where": "width > 21"}, "the filter of small does not choose what the checkpoint's chose"),
        ({"data": "middle"}, "the shards of small are not those of the checkpoint"),
        ({"seed": 4}, "seed: 4 is not the checkpoint's 3"),
    ],
)
def test_a_run_does_not_go_on_with_another_mixture(
    sets: list[dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    state = stream_of(sets, **SETTINGS).state_dict()
    of_source = {key: change[key] for key in ("weight", "where", "data") if key in change}
    if "data" in of_source:
        of_source |= {"data": sets[2]["data"], "name": "small"}
    others = {key: change[key] for key in change.keys() - of_source.keys()}
    changed = [sets[0], {**sets[1], **of_source}, sets[2]]
    with pytest.raises(UserError, match=words):
        stream_of(changed, **(SETTINGS | others)).load_state_dict(state)


def test_what_differs_from_the_checkpoint_is_told_by_its_name(sets: list[dict[str, Any]]) -> None:
    alone = [{"data": sets[0]["data"]}]
    own, whole = SETTINGS | {"epoch_samples": 24}, SETTINGS | {"epoch_samples": None}
    for old, new in ((own, whole), (whole, own)):
        with pytest.raises(UserError, match=r"data\.epoch_samples"):
            stream_of(alone, **new).load_state_dict(stream_of(alone, **old).state_dict())
    state = stream_of(sets, **SETTINGS).state_dict()
    others = [{**one, "weight": 1.0} for one in sets]
    with pytest.raises(UserError, match="the weights of the sources"):
        stream_of(others, **(SETTINGS | {"lanes": 2})).load_state_dict(state)
    stream = stream_of(sets, **(SETTINGS | {"lanes": 2}))
    stream.load_state_dict(state)
    assert stream.state_dict() == state


def test_one_source_may_have_an_epoch_of_its_own_length(sets: list[dict[str, Any]]) -> None:
    stream = stream_of([{"data": sets[0]["data"]}], **(SETTINGS | {"epoch_samples": 30}))
    assert stream.steps_per_epoch == 2
    batches = global_batches([stream], 4)
    ids = torch.cat([b["sample_id"] for b in batches]).tolist()
    assert len(set(ids[:36])) == 36  # on through the set, across epochs
    assert [b["epoch"] for b in batches] == [0, 0, 1, 1]


def test_what_is_trained_on_is_told(sets: list[dict[str, Any]]) -> None:
    lines = stream_of(sets, **SETTINGS).describe()
    assert lines[0] == "large: 47 samples, 50.00% of every epoch"
    assert lines[1].startswith("small: 8 of 11 samples pass the filter, 16.67% of every epoch")
    assert lines[3].startswith("an epoch of 60 samples goes through large 0.638 times, small 1.25 times")
    alone = stream_of(Path(sets[0]["data"]), batch=8).describe()
    assert alone[-1] == "each epoch leaves out 7 samples, fewer than a global batch, others each time"


def test_caption_choice_is_keyed_by_the_source(sets: list[dict[str, Any]]) -> None:
    """Two copies of one set are two sources: their samples do not march in step."""
    twice = [{"data": sets[0]["data"], "name": "a"}, {"data": sets[0]["data"], "name": "b"}]
    stream = stream_of(twice, batch=10, lanes=1, window=None, epoch_samples=None)
    images: dict[int, list[torch.Tensor]] = defaultdict(list)
    for batch in global_batches([stream], 9):
        for i, image in zip(batch["sample_id"].tolist(), batch["image"], strict=True):
            images[i].append(image)
    pairs = [pair for pair in images.values() if len(pair) == 2]
    assert len(pairs) > 30
    assert not any(torch.equal(*pair) for pair in pairs)
    raw = open_shards(sets[0]["data"]).read(0)
    drawn = {
        choose_caption(CAPTIONS, raw.caption, raw.meta, Generator(Philox(key=[3, 0], counter=[0, 0, 1, s])))
        for s in range(20)
    }
    assert len(drawn) > 3


def test_a_source_may_have_captions_of_its_own(sets: list[dict[str, Any]]) -> None:
    named = CaptionConfig(txt=0.0, names=1.0, templates=("an icon of {}",))
    own = [sets[0], {**sets[2], "captions": named}]
    stream = stream_of(own, batch=B, captions=CaptionConfig())
    for batch in global_batches([stream], 3):
        for source, sample_id, tokens, digest in zip(
            batch["source"].tolist(),
            batch["sample_id"].tolist(),
            caption_texts(batch),
            batch["caption_hash"].tolist(),
            strict=True,
        ):
            texts = [f"name {sample_id}", f"alias {sample_id}"] if source else [f"picture number {sample_id}"]
            worded = [f"an icon of {text}" if source else text for text in texts]
            which = [TOKENIZER.pack([one])[0].tolist() for one in worded].index(tokens)
            assert digest == caption_hash(texts[which])  # the template is no part of what it means


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "the list of sources is empty"),
        ([{"data": "a", "weight": 1.0}, {"data": "b"}], "some sources have a weight and some have none"),
        ([{"data": "x/a"}, {"data": "y/a"}], "two sources are called a"),
        ([{"data": "a", "wieght": 1}], "yaml: train.0.wieght: unknown key; did you mean 'weight'.$"),
        ([{"data": "a", "weight": 0.0}], "weight"),
        ([{"data": "a", "captions": {"truncate": "random"}}], "truncate is one for all sources"),
    ],
)
def test_mistakes_in_the_list_are_told_in_a_sentence(tmp_path: Path, train: Any, words: str) -> None:
    (tmp_path / "data.yaml").write_text(json.dumps({"train": train}))
    with pytest.raises(UserError, match=words):
        load_config(DataConfig, tmp_path / "data.yaml")


def test_a_mixture_in_a_config_is_read_back_as_written(tmp_path: Path) -> None:
    text = """
train:
  - {data: corpus:icons-demo/train, weight: 3}
  - data: s3://bucket/cc12m
    weight: 1
    where: width >= 200 and text_len > 2
epoch_samples: 1000000
"""
    (tmp_path / "data.yaml").write_text(text)
    config = load_config(DataConfig, tmp_path / "data.yaml")
    assert [source.label for source in config.sources] == ["train", "cc12m"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(DataConfig, tmp_path / "again.yaml") == config


def test_a_caption_key_that_no_sample_has_is_refused_with_those_there_are(sets: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"text under 'alt_txt' of its JSON; there is text under names, tags"):
        stream_of(sets[:1], captions=CaptionConfig(txt=1.0, fields={"alt_txt": 1.0}))
    stream_of(sets[:1], captions=CaptionConfig(txt=1.0, fields={"alt_txt": 0.0}))
    stream = stream_of(sets[:1], captions=CaptionConfig(names=1.0, tags=0.0))
    assert not any("has a text under" in line for line in stream.describe())


def test_names_and_tags_that_are_not_there_are_said(tmp_path: Path) -> None:
    """A recipe for data that has them serves data that has none."""
    with ShardWriter(tmp_path / "bare") as writer:
        for i in range(9):
            writer.write(f"{i}", stored(photo(20, 20, seed=i), "PNG"), "png", "a caption", {"alt": "another"})
    lines = stream_of([{"data": str(tmp_path / "bare")}]).describe()
    told = "none of 9 samples of bare has a text under '{}' of its JSON; there is text under alt"
    assert lines[-2:] == [told.format("names"), told.format("tags")]
