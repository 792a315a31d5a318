"""Tars without an index: what webdataset writes, on disk and in a bucket, dealt, shuffled, cut."""

import io
import json
import logging
from collections import Counter
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from diptych.configs.errors import UserError
from diptych.data import plain_tars
from diptych.data.config import DataConfig
from diptych.data.plain import PlainStream, is_plain
from diptych.data.plain_tars import Tar, deal, expand, read_tar, shuffled
from diptych.data.shards import DamagedSample
from diptych.data.stream import open_stream

from .object_store import BUCKET, Fault, Proxy, forget_systems, hurry, s3_environment, upload
from .samples import WEBDATASET, by_webdataset, member_offsets, picture, samples, write_tar
from .stream_corpus import TOKENIZER, all_same

pytestmark = WEBDATASET
SIZE = 8


def colour(number: int) -> tuple[int, int, int]:
    return number % 251, 7 * number % 251, 31 * number % 251


def image_of(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), colour(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tars(folder: Path, sizes: list[int], *, keys_repeat: bool = False) -> list[Path]:
    """Tars by webdataset's own writer. The image of a sample is of one colour, which its caption names."""
    folder.mkdir(parents=True)
    number, paths = 0, list[Path]()
    for tar, size in enumerate(sizes):
        paths.append(folder / f"{tar:03d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for place in range(size):
                key = f"{place:05d}" if keys_repeat else f"{number:05d}"
                caption = "colour {} {} {}".format(*colour(number))
                writer.write(
                    {"__key__": key, "png": image_of(number), "txt": caption, "json": {"number": number}}
                )
                number += 1
    return paths


def stream_of(
    train: str | Path, *, batch: int = 6, seed: int = 5, rank: int = 0, world_size: int = 1, **settings: Any
) -> PlainStream:
    config = DataConfig(**{"train": str(train), "epoch_samples": 60} | settings)
    stream = open_stream(
        config,
        seed=seed,
        global_batch_size=batch,
        image_size=SIZE,
        tokenizer=TOKENIZER,
        rank=rank,
        world_size=world_size,
    )
    assert isinstance(stream, PlainStream)
    return stream


def take(stream: PlainStream, n: int) -> list[dict[str, Any]]:
    with stream:
        return list(islice(stream, n))


def pairs_are_right(batches: list[dict[str, Any]]) -> bool:
    """Whether every image has the colour that its caption names."""
    for batch in batches:
        tokens = batch["token_ids"].split(batch["seq_lens"].tolist())
        for image, ids, valid in zip(batch["image"], tokens, batch["valid"].tolist(), strict=True):
            red, green, blue = image[:, 4, 4].tolist()
            expected, _ = TOKENIZER.pack([f"colour {red} {green} {blue}"])
            if valid and ids.tolist() != expected.tolist():
                return False
    return True


def ids(batches: list[dict[str, Any]]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch["sample_id"].tolist()]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (3, 1)])
def test_all_ranks_and_workers_see_every_sample_once(tmp_path: Path, world_size: int, workers: int) -> None:
    sizes = [6] * 12
    write_tars(tmp_path / "set", sizes)
    batches: list[dict[str, Any]] = []
    steps = 12  # of 6 rows: 72 samples
    for rank in range(world_size):
        stream = stream_of(tmp_path / "set", rank=rank, world_size=world_size, workers=workers)
        assert (stream.steps_per_epoch, stream.num_samples) == (10, 60)
        mine = take(stream, steps)
        assert [(b["epoch"], b["step"]) for b in mine] == [divmod(n, 10) for n in range(steps)]
        batches += mine
    expected = {(tar << 32) + number for tar, size in enumerate(sizes) for number in range(size)}
    assert Counter(ids(batches)) == dict.fromkeys(expected, 1)
    assert pairs_are_right(batches)
    assert all(batch["valid"].all() and not batch["bad"] for batch in batches)


def test_fewer_tars_than_workers_are_shared_out_sample_by_sample(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [20, 20])
    batches: list[dict[str, Any]] = []
    for rank in range(2):  # four workers, two tars
        batches += take(stream_of(tmp_path / "set", batch=4, rank=rank, world_size=2, workers=2), 10)
    assert Counter(ids(batches)) == dict.fromkeys([(t << 32) + n for t in range(2) for n in range(20)], 1)


@pytest.mark.parametrize("tars", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("consumers", [1, 2, 3, 7])
def test_every_deal_covers_every_sample_once(tars: int, consumers: int) -> None:
    counts: Counter[tuple[int, int]] = Counter()
    for consumer in range(consumers):
        for tar, part, parts in deal([Tar(n, f"{n}.tar") for n in range(tars)], consumer, consumers):
            counts.update((tar.number, sample) for sample in range(part, 10, parts))
    assert counts == dict.fromkeys([(t, n) for t in range(tars) for n in range(10)], 1)


def test_the_order_is_a_function_of_seed_and_pass(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [10] * 4)
    first = take(stream_of(tmp_path / "set", batch=8), 10)
    assert all_same(first, take(stream_of(tmp_path / "set", batch=8), 10))
    other = take(stream_of(tmp_path / "set", batch=8, seed=6), 10)
    assert sorted(ids(first[:5])) == sorted(ids(other[:5])) == sorted(ids(first[5:]))
    assert len({tuple(ids(part)) for part in (first[:5], other[:5], first[5:])}) == 3
    assert ids(first[:5]) != sorted(ids(first[:5]))


def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    paths = write_tars(tmp_path / "set", [7, 5], keys_repeat=True)
    for number, path in enumerate(paths):
        lost: list[DamagedSample] = []
        with path.open("rb") as file:
            ours = list(read_tar(file, Tar(number, str(path)), lost))
        theirs = by_webdataset([str(path)])
        assert lost == []
        assert [(o.key, o.image, o.caption, o.meta) for o in ours] == [
            (t["__key__"], t["png"], t["txt"].decode(), json.loads(t["json"])) for t in theirs
        ]


def test_a_cut_tar_before_one_with_the_same_keys_never_makes_a_wrong_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_tars(tmp_path / "whole", [6, 6], keys_repeat=True)
    data = whole[0].read_bytes()
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "001.tar").write_bytes(whole[1].read_bytes())
    named: set[str] = set()
    end = max(at + size for at, size in member_offsets(whole[0]).values())
    for cut in [*range(0, end, 512), *range(700, end, 1777)]:
        (folder / "000.tar").write_bytes(data[:cut])
        caplog.clear()
        batches = take(stream_of(folder, batch=3), 8)  # at least two passes
        assert pairs_are_right(batches)
        bad = [row for batch in batches for row in batch["bad"]]
        assert [(row["shard"], row["reason"], row["sample_id"]) for row in bad] == [
            ("000.tar", "truncated", -1)
        ]
        assert caplog.text.count("000.tar ends at byte") == 1
        named.add(bad[0]["key"])
        assert set(ids(batches)) >= {(1 << 32) + n for n in range(6)}
    assert named == {"", *(f"{n:05d}" for n in range(6))}


def test_what_is_no_sample_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = picture(1)
    members = [
        ("readme", b"no extension"),
        ("a.png", image), ("a.txt", b"good"),
        ("b.png", image),
        ("c.txt", b"no picture"),
        ("d.png", image), ("d.txt", b" \n"),
        ("e.png", image), ("e.txt", b"\xff\xfe"),
        ("f.png", image), ("f.txt", b"x"), ("f.json", b"[1]"),
        ("g.png", image), ("g.png", image), ("g.txt", b"x"),
        ("a.png", image), ("a.txt", b"again"),
        ("h.JPEG", image), ("h.txt", b"also good"), ("h.cls", b"3"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    with path.open("rb") as file:
        got = list(read_tar(file, Tar(2, str(path)), []))
    assert [(raw.key, raw.caption, raw.extension) for raw in got] == [
        ("a", "good", "png"),
        ("h", "also good", "jpg"),
    ]
    assert [raw.sample_id for raw in got] == [2 << 32, (2 << 32) + 8]
    assert (
        "x.tar: 7 samples left out: b (no '.txt', or too large a one), c (no image), d (a blank"
        in caplog.text
    )


def test_an_image_that_does_not_decode_keeps_its_row(tmp_path: Path) -> None:
    members = [(f"{n}.{end}", data) for n in range(5) for end, data in (("png", image_of(n)), ("txt", b"x"))]
    members[4] = ("2.png", b"not an image")
    write_tar(tmp_path / "set" / "0.tar", members)
    (batch,) = take(stream_of(tmp_path / "set", batch=5), 1)
    assert batch["valid"].sum() == 4
    row = batch["valid"].tolist().index(False)
    assert (batch["sample_id"][row], batch["bad"][0]["key"], batch["bad"][0]["reason"]) == (2, "2", "decode")
    with pytest.raises(UserError, match=r"0\.tar: sample '2' is damaged"):
        take(stream_of(tmp_path / "set", batch=5, on_bad="raise"), 1)


def test_a_run_goes_on_with_the_next_epoch(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [20] * 3)
    stream = stream_of(tmp_path / "set", workers=2)
    with stream:
        straight = list(islice(stream, 13))
        state = json.loads(json.dumps(stream.state_dict()))
    assert (state["epoch"], state["step"]) == (1, 3)
    resumed = stream_of(tmp_path / "set", workers=2)
    resumed.load_state_dict(state)
    (batch,) = take(resumed, 1)
    assert (batch["epoch"], batch["step"]) == (2, 0)
    assert ids([batch]) != ids(straight[:1])
    at_a_border = stream_of(tmp_path / "set", workers=2)
    at_a_border.load_state_dict(state | {"epoch": 1, "step": 0})
    assert at_a_border.state_dict() == state | {"epoch": 1, "step": 0}
    for key, other, name in (
        ("seed", 1, "seed"),
        ("global_batch_size", 9, "global_batch_size"),
        ("fingerprint", "x", "data.train"),
    ):
        with pytest.raises(UserError, match=f"^{name}: it is not the checkpoint's"):
            stream_of(tmp_path / "set").load_state_dict(state | {key: other})


def test_one_line_says_what_is_missing_without_an_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tars(tmp_path / "set", [4])
    stream = [stream_of(tmp_path / "set", rank=rank, world_size=3) for rank in range(3)][2]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "without an index samples are not counted" in caplog.text
    assert "`diptych data index` mends that" in caplog.text
    assert stream.describe()[0] == "1 tars without an index; 60 samples are called an epoch"


def test_what_is_plain(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [1])
    for train in (
        tmp_path / "set",
        "x.tar",
        "a-{0..9}.tar",
        "s3://b/x-{0..9}.tar",
        "https://h/x.tar?download=true",
    ):
        assert is_plain(str(train))
    (tmp_path / "set" / "manifest.jsonl").write_text("")
    for train in (tmp_path / "set", tmp_path, tmp_path / "none", "s3://b/set", "corpus:icons/train"):
        assert not is_plain(str(train))


def test_lists_in_braces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_tars, "MOST_TARS", 1000)
    assert expand("x-{08..11}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]
    assert expand("{a,b}/{0..1}.tar::c.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "c.tar"]
    assert expand("s3://b/{000..002}.tar") == [f"s3://b/{n:03d}.tar" for n in range(3)]
    assert expand("{x}.tar") == ["{x}.tar"]
    with pytest.raises(UserError, match="names more than 1,000 tars"):
        expand("{0..9999999999}.tar")


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        ("pipe:cat x.tar", {}, "is a shell command, and Diptych runs none"),
        ("{s3://b/a,pipe:cat b}.tar", {}, "is a shell command"),
        ("set/x.tar.gz", {}, r"'set/x.tar.gz' is no '.tar'; unpack compressed ones"),
        ("none-{0..3}.tar", {}, r"there is no none-0.tar; check the list"),
        ("ftp://host/{0..3}.tar", {}, "has a scheme that is not read"),
        ("{0..-1}.tar", {}, "there is no"),
        (
            "x.tar",
            {"epoch_samples": None},
            "data.epoch_samples: it must be given, at least the global batch of 6",
        ),
        ("x.tar", {"epoch_samples": 5}, "data.epoch_samples: 5 is too few, at least"),
        (({"data": "a.tar"},), {}, "tars without an index cannot be mixed or filtered"),
    ],
)
def test_what_cannot_be_streamed_is_told(train: Any, settings: dict[str, Any], message: str) -> None:
    config = DataConfig(**{"train": train, "epoch_samples": 60} | settings)
    with pytest.raises(UserError, match=message):
        open_stream(config, seed=0, global_batch_size=6, image_size=SIZE, tokenizer=TOKENIZER)


def test_tars_without_a_sample_end_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", [("a.txt", b"alone")])
    with pytest.raises(UserError, match="worker 1 of 1 found no sample with an image and"):
        take(stream_of(tmp_path / "set"), 1)
    with pytest.raises(UserError, match="found no sample"):
        take(stream_of(tmp_path / "set", workers=1), 1)


def test_a_shuffled_pass_keeps_every_sample_and_bounds_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_tars, "BUFFER", 4)
    raws: list[Any] = [type("Raw", (), {"image": b"x" * 10, "n": n})() for n in range(30)]
    seen = 0

    def source() -> Generator[Any]:
        nonlocal seen
        for raw in raws:
            seen += 1
            yield raw

    out: list[int] = []
    for raw in shuffled(source(), np.random.default_rng(0)):
        out.append(raw.n)
        assert seen - len(out) < 4
    assert sorted(out) == list(range(30))
    monkeypatch.setattr(plain_tars, "BUFFER_BYTES", 25)
    assert len(list(shuffled(iter(raws), np.random.default_rng(0)))) == 30


@pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["cached", "ranges"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_tars_in_a_bucket_give_the_batches_of_the_folder(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, cache_gb: float, scheme: str
) -> None:
    proxy = Proxy(port)
    s3_environment(monkeypatch, proxy.url)
    hurry(monkeypatch, silence=2)
    try:
        write_tars(tmp_path / "set", [15, 15, 15])
        upload(tmp_path / "set", port, "plain")
        proxy.faults = [
            Fault("500", r"000\.tar"),
            Fault("cut", r"001\.tar", at=5000),
            Fault("stall", r"002\.tar"),
        ]
        base = f"s3://{BUCKET}" if scheme == "s3" else f"{proxy.url}/{BUCKET}"
        there = stream_of(f"{base}/plain/{{000..002}}.tar", cache_gb=cache_gb, workers=1)
        got = take(there, 15)
        assert all_same(got, take(stream_of(tmp_path / "set", workers=1), 15))
        assert torch.cat([batch["valid"] for batch in got]).all()
        assert (tmp_path / "cache" / "shards").exists() == (cache_gb > 0)
        assert not [fault for fault in proxy.faults if fault.times and fault.kind != "500"]
        proxy.dead = True
        with pytest.raises(UserError, match=rf"{base}/plain/9\.tar cannot be read after 3 tries"):
            take(stream_of(f"{base}/plain/9.tar", cache_gb=cache_gb), 1)
    finally:
        proxy.close()
        forget_systems()


def test_samples_written_by_the_shard_writer_are_plain_tars_too(tmp_path: Path) -> None:
    content = samples(4)
    from .samples import write

    write(tmp_path, content)
    with (tmp_path / "00000.tar").open("rb") as file:
        got = list(read_tar(file, Tar(0, "00000.tar"), []))
    assert [(raw.key, raw.image, raw.extension, raw.caption, raw.meta) for raw in got] == content


def test_a_cut_tar_stops_a_run_that_wants_to_know(tmp_path: Path) -> None:
    first, _ = write_tars(tmp_path / "set", [6, 6])
    offset, _ = member_offsets(first)["00004.png"]
    first.write_bytes(first.read_bytes()[:offset])
    stream = stream_of(tmp_path / "set", batch=4, on_bad="raise")
    with pytest.raises(UserError, match=r"000.tar: .*truncated.*set data.on_bad: mask"):
        take(stream, 4)
    stream.close()


def test_settings_of_an_order_that_is_not_there_are_refused(tmp_path: Path) -> None:
    write_tars(tmp_path / "set", [6])
    with pytest.raises(UserError, match=r"data.lanes and data.window"):
        stream_of(tmp_path / "set", batch=4, lanes=2)
