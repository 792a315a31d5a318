"""Remote shard sets against an S3 server: the same samples as from the folder, whatever the network does."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.configs.errors import UserError
from diptych.data import remote
from diptych.data.remote import RemoteFolder, as_url, shown
from diptych.data.shards import DamagedSample, ShardSet, open_shards

from .object_store import BUCKET, Fault, Proxy, hurry, upload
from .samples import flip, samples, write
from .stream_corpus import all_same, global_batches, ranks_of, write_corpus

N = 22
MODES = pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["cached", "ranges"])
URL = f"s3://{BUCKET}/set"


def all_of(shards: ShardSet) -> list[Any]:
    return [shards.read(sample_id) for sample_id in range(len(shards))]


@MODES
def test_a_bucket_gives_the_samples_of_the_folder(proxy: Proxy, folder: Path, cache_gb: float) -> None:
    here, there = open_shards(folder), open_shards(URL, cache_gb=cache_gb)
    assert (there.is_remote, here.is_remote) == (True, False)
    assert (len(there), there.fingerprint, there.shard_names) == (N, here.fingerprint, here.shard_names)
    assert str(there.folder) == URL
    assert str(there.folder / there.shard_names[0]) == f"{URL}/00000.tar"
    ids = random.Random(0).sample(range(N), N)
    assert there.read_many(ids) == here.read_many(ids) == [here.read(i) for i in ids]
    assert all_of(there) == all_of(here)
    assert there.keys() == here.keys()
    assert there.find("key-0013") == 13
    assert np.array_equal(there.records(2), here.records(2))
    assert open_shards(Path(URL), cache_gb=cache_gb).read(3) == here.read(3)  # one slash is lost in a Path


def test_a_cached_shard_is_fetched_once_and_an_index_needs_no_tar(proxy: Proxy) -> None:
    shards = open_shards(URL)
    assert len(shards.keys()) == N
    assert (len(proxy.gets("idx")), len(proxy.gets("tar"))) == (6, 0)
    all_of(shards)
    all_of(shards)
    all_of(open_shards(URL))
    assert (len(proxy.gets("idx")), len(proxy.gets("tar"))) == (6, 6)


def test_indexes_are_fetched_together_and_given_in_their_order(proxy: Proxy, folder: Path) -> None:
    proxy.meeting = (".idx", threading.Barrier(6))
    for cache_gb in (1.0, 0.0):
        shards = open_shards(URL, cache_gb=cache_gb)
        got = [index.keys() for index in shards.indexes()]
        assert got == [index.keys() for index in open_shards(folder).indexes()]
    assert not proxy.gets("tar")


def test_shards_known_by_their_index_alone_are_fetched_together(proxy: Proxy, folder: Path) -> None:
    shards = open_shards(URL)
    shards.keys()
    proxy.meeting = (".tar", threading.Barrier(6))
    assert shards.read_many(range(N)) == open_shards(folder).read_many(range(N))
    assert len(proxy.gets("tar")) == 6


def test_range_reads_leave_nothing_on_disk_and_ask_for_samples_alone(
    proxy: Proxy, tmp_path: Path, folder: Path
) -> None:
    shards = open_shards(URL, cache_gb=0)
    got = shards.read_many([2, 9, 17])
    assert [raw.sample_id for raw in got if not isinstance(raw, DamagedSample)] == [2, 9, 17]
    assert not (tmp_path / "cache").exists()
    asked = proxy.gets("tar")
    assert len(asked) == 3
    for line in asked:
        first, last = map(int, line.rpartition("bytes=")[2].split("-"))
        assert last - first < 4096 < (folder / "00000.tar").stat().st_size


@MODES
@pytest.mark.parametrize(
    ("kind", "at"), [("500", 0), ("cut", 100), ("cut", 0), ("refuse", 0), ("stall", 100), ("short", 30)]
)
def test_what_passes_is_tried_again(
    proxy: Proxy,
    folder: Path,
    cache_gb: float,
    kind: Any,
    at: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hurry(monkeypatch, silence=2 if kind == "stall" else 10)
    here = open_shards(folder)
    proxy.faults = [
        Fault(kind, r"manifest", at=at),
        Fault(kind, r"00001\.idx", at=at),
        Fault(kind, r"00001\.tar", at=at),
        Fault(kind, r"00003\.tar", at=at),
    ]
    if kind == "short":  # a manifest has nothing to be compared with, nor has an index in memory
        proxy.faults = proxy.faults[2 if cache_gb == 0 else 1 :]
    shards = open_shards(URL, cache_gb=cache_gb)
    assert shards.read_many(range(N)) == here.read_many(range(N))
    assert not [fault for fault in proxy.faults if fault.times]
    if kind == "500":
        assert f"{URL}/manifest.jsonl" in caplog.text
        assert "trying again" in caplog.text


def test_a_download_that_is_cut_again_and_again_goes_on(proxy: Proxy, folder: Path) -> None:
    proxy.faults = [Fault("cut", r"00002\.tar", times=2, at=3000)]
    assert open_shards(URL).read(9) == open_shards(folder).read(9)


@pytest.mark.parametrize("kind", ["short", "long"])
def test_an_object_of_the_wrong_length_is_an_error_that_says_which(
    proxy: Proxy, kind: Any, tmp_path: Path
) -> None:
    proxy.faults = [Fault(kind, r"00001\.tar", times=1000)]
    shards = open_shards(URL)
    assert shards.read(0).sample_id == 0
    with pytest.raises(
        UserError, match=rf"{URL}/00001\.tar cannot be read after 3 tries: it has .* bytes"
    ) as told:
        shards.read(5)
    assert "upload it and its manifest again" in str(told.value)
    assert not list((tmp_path / "cache" / "shards").glob("*00001.tar*"))


def test_an_object_with_other_bytes_of_the_same_length_is_an_error(
    proxy: Proxy, port: int, tmp_path: Path
) -> None:
    folder = write(tmp_path / "other", samples(8))
    flip(folder / "00001.tar", 700)
    upload(folder, port, "other")
    with pytest.raises(UserError, match=r"00001\.tar cannot be read after 3 tries: its xxh3 is"):
        open_shards(f"s3://{BUCKET}/other").read(5)
    # without the whole shard at hand it is the sample that shows
    there, here = open_shards(f"s3://{BUCKET}/other", cache_gb=0), open_shards(folder)
    theirs, mine = there.read_many(range(8)), here.read_many(range(8))
    assert [str(sample) for sample in theirs] == [str(sample) for sample in mine]
    assert [type(sample) for sample in theirs].count(DamagedSample) == 1


@MODES
def test_a_server_that_dies_for_good_ends_in_one_sentence(
    proxy: Proxy, cache_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(URL, cache_gb=cache_gb)
    shards.read(0)
    monkeypatch.setattr(remote, "REQUEST_S", 1.0)  # s3fs goes on asking by itself for longer
    proxy.dead = True
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"s3://bucket/set/0000[45]\.\w+ cannot be read after 3 tries: .+; check the"
    ):
        shards.read_many([17])
    proxy.close()  # nobody listens
    with pytest.raises(UserError, match=r"cannot be read after 3 tries"):
        shards.read(21)
    assert time.monotonic() - start < 30
    assert cache_gb == 0 or shards.read(0).sample_id == 0


def test_a_server_that_falls_silent_for_good_ends_in_one_sentence(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(URL)
    shards.index(0)  # only the tar is to be late
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    proxy.faults = [Fault("stall", "tar", times=1000)]
    start = time.monotonic()
    with pytest.raises(UserError, match=r"00000\.tar cannot be read after 3 tries"):
        shards.read(0)
    assert time.monotonic() - start < 60


@MODES
def test_a_stream_over_a_bucket_gives_the_batches_of_the_folder(
    proxy: Proxy, port: int, tmp_path: Path, cache_gb: float
) -> None:
    folder = write_corpus(tmp_path / "corpus", n=30)
    upload(folder, port, "corpus")
    expected = global_batches(ranks_of(folder, 2), 5)
    proxy.faults = [Fault("500", "tar", times=2), Fault("cut", r"00002\.", at=200)]
    there = ranks_of([{"data": f"s3://{BUCKET}/corpus"}], 2, workers=2, cache_gb=cache_gb)
    assert all_same(global_batches(there, 5), expected)


def test_a_folder_on_a_web_server_is_read_over_http(
    folder: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch, silence=2)
    url = f"{proxy.url}/{BUCKET}/set?token=secret"
    for cache_gb in (1.0, 0.0):
        proxy.faults = [Fault("cut", r"00001\.tar", at=2000), Fault("stall", r"00002\.tar", at=10)]
        shards = open_shards(url, cache_gb=cache_gb)
        assert shards.read_many(range(N)) == open_shards(folder).read_many(range(N))
        assert not [fault for fault in proxy.faults if fault.times]
        assert "secret" not in str(shards.folder)
    assert all("token=secret" in line for line in proxy.log)


def test_memory_is_a_remote_like_others(folder: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
    for cache_gb in (1.0, 0.0):
        shards = open_shards("memory://set", cache_gb=cache_gb)
        assert shards.read_many(range(N)) == open_shards(folder).read_many(range(N))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://{BUCKET}/none", r"s3://bucket/none/manifest.jsonl cannot be read: .*; there is no such file"),
        ("s3://no-such-bucket/set", r"cannot be read: .*; there is no such file; check the URL"),
        ("pipe:cat x.tar", "is a shell command, and Diptych runs none"),
        ("ftp://host/set", r"'ftp://host/set' has a scheme that is not read; .* s3://"),
        (
            "gs://bucket/set",
            r'gs:// needs gcsfs, which is not installed; install it: pip install "diptych\[gs\]"',
        ),
    ],
)
def test_what_cannot_be_opened_is_told(proxy: Proxy, url: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=message):
        open_shards(url)


def test_missing_credentials_are_told_at_once(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(UserError, match=r"check the credentials \(docs/remote.md\)"):
        open_shards(URL)
    assert not proxy.log


def test_a_url_is_told_from_a_path() -> None:
    assert as_url("s3://a/b") == as_url(Path("s3://a/b")) == "s3://a/b"
    for path in ("data/train", "/data/s3", "corpus:icons/train", "C:/data", "s3:", "odd:/name"):
        assert as_url(path) is None
    assert shown("https://user:word@host/a/b?sig=1#c") == "https://host/a/b"
    folder = RemoteFolder("https://host/a b/?sig=1")
    assert (folder / "x y.tar").url == "https://host/a b/x%20y.tar?sig=1"
    assert (RemoteFolder("s3://b/set/") / "x y.tar").url == "s3://b/set/x y.tar"
