"""Stages and weights: which batch is of which shape, and what its pairs count."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.data.plain import PlainStream
from diptych.data.shards import ShardWriter
from diptych.data.stages import StageConfig
from diptych.data.text import build_tokenizer

from .images import photo, stored
from .stream_corpus import SIZE, TOKENIZER, Batch, all_same, global_batches, ranks_of, stream_of, write_corpus

N, B, STEPS = 53, 8, 6
STAGES = (
    StageConfig(until_samples=3 * B - 3, image_size=8, text_len=4),
    StageConfig(until_samples=8 * B, image_size=12),
    StageConfig(),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("stages") / "train", N)


@pytest.fixture(scope="module")
def truth(corpus: Path) -> list[Batch]:
    """Batches of streams that have one shape throughout, each where its stage is."""
    short = build_tokenizer(None, 4)
    small = global_batches([stream_of(corpus, image_size=8, tokenizer=short)], 3)
    middle = global_batches([stream_of(corpus, image_size=12)], 8)
    return small + middle[3:] + global_batches([stream_of(corpus)], 12)[8:]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (3, 1)])
def test_each_stage_has_the_batches_of_a_stream_of_its_shape(
    corpus: Path, truth: list[Batch], world_size: int, workers: int
) -> None:
    streams = ranks_of(corpus, world_size, stages=STAGES, workers=workers)
    assert all_same(global_batches(streams, 12), truth)


@pytest.mark.parametrize("at", [2, 3, 7, 8])
def test_a_resumed_stream_is_in_the_stage_that_it_was_in(corpus: Path, truth: list[Batch], at: int) -> None:
    stream = stream_of(corpus, stages=STAGES)
    global_batches([stream], at)
    assert all_same(
        global_batches([stream_of(corpus, stages=STAGES)], 3, stream.state_dict()), truth[at:][:3]
    )


def test_tars_without_an_index_have_stages_too(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in corpus.glob("*.tar"):
        (folder / tar.name).hardlink_to(tar)
    settings: dict[str, Any] = {"lanes": None, "window": None, "epoch_samples": 48, "workers": 2}
    streams = ranks_of(folder, 2, stages=STAGES, **settings)
    assert isinstance(streams[0], PlainStream)
    sides = [batch["image"].shape[-1] for batch in global_batches(streams, 12)]
    assert sides == [8] * 3 + [12] * 5 + [SIZE] * 4


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until_samples": 5}], "the last must not have it"),
        ([{}, {}], "each but the last needs until_samples"),
        ([{"until_samples": 9}, {"until_samples": 9}, {}], r"must rise from stage to stage, not \[9, 9\]"),
        ([{"text_len": 13}], "text_len 13 is more than the model's context of 12 tokens"),
    ],
)
def test_stages_that_do_not_follow_one_another_are_told(
    corpus: Path, stages: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        stream_of(corpus, stages=[StageConfig(**stage) for stage in stages])


def test_pairs_weigh_what_their_json_says(tmp_path: Path) -> None:
    values = [2, 0.5, None, 0, "much", -1, [1], True]
    with ShardWriter(tmp_path / "train") as writer:
        for i, value in enumerate(values):
            meta = {} if value is None else {"quality": value}
            writer.write(f"k{i}", stored(photo(20, 20, seed=i), "PNG"), "png", f"picture {i}", meta)
    settings: dict[str, Any] = {"lanes": 1, "weight_key": "quality"}
    batch = global_batches([stream_of(tmp_path / "train", **settings)], 1)[0]
    got = dict(zip(batch["sample_id"].tolist(), batch["weight"].tolist(), strict=True))
    assert got == {0: 2.0, 1: 0.5, 2: 1.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 0.0}
    assert batch["weight"].dtype == torch.float32
    valid = dict(zip(batch["sample_id"].tolist(), batch["valid"].tolist(), strict=True))
    assert [i for i in range(8) if not valid[i]] == [4, 5, 6, 7]
    reasons = {row["key"]: row["reason"] for row in batch["bad"]}
    assert reasons["k4"] == "its quality is 'much', not a weight"
    with pytest.raises(UserError, match=r"its quality is .*set data.on_bad: mask"):
        global_batches([stream_of(tmp_path / "train", on_bad="raise", **settings)], 1)


def test_a_shortened_tokenizer_is_the_one_of_that_context() -> None:
    captions = ["a few words and then some more of them", "x"]
    assert TOKENIZER.shortened(12) is TOKENIZER
    for ours, theirs in zip(
        TOKENIZER.shortened(5).pack(captions), build_tokenizer(None, 5).pack(captions), strict=True
    ):
        assert torch.equal(ours, theirs)
