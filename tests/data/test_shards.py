"""Shards against what webdataset and tarfile say of the same files, and against damage done on purpose."""

import json
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from diptych.configs.errors import UserError
from diptych.data.index import OK, RECORD
from diptych.data.shards import DamagedSample, ShardSet, open_shards

from .samples import (
    WEBDATASET,
    as_dict,
    by_webdataset,
    flip,
    member_offsets,
    picture,
    samples,
    write,
)


@WEBDATASET
def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    content = samples(10)
    write(tmp_path, content)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    seen = by_webdataset(urls)
    assert [sample["__key__"] for sample in seen] == [sample[0] for sample in content]
    shards = open_shards(tmp_path)
    for sample_id, (sample, (key, image, extension, caption, meta)) in enumerate(
        zip(seen, content, strict=True)
    ):
        assert set(sample) - {"__key__", "__url__", "__local_path__"} == {extension, "json", "txt"}
        assert (sample[extension], sample["txt"].decode(), json.loads(sample["json"])) == (
            image,
            caption,
            meta,
        )
        raw = shards.read(sample_id)
        assert as_dict(raw) == {
            "key": key, "image": image, "extension": extension, "caption": caption, "meta": meta
        }  # fmt: skip
        assert (raw.sample_id, raw.shard) == (sample_id, Path(sample["__url__"]).name)


def test_the_index_points_where_tarfile_points(tmp_path: Path) -> None:
    write(tmp_path, samples(9))
    shards = open_shards(tmp_path)
    for shard, name in enumerate(shards.shard_names):
        places = member_offsets(tmp_path / name)
        records, keys = shards.records(shard), shards.index(shard).keys()
        assert records.dtype == RECORD
        assert RECORD.itemsize == 80
        for key, record in zip(keys, records, strict=True):
            extension = next(e for e in ("png", "jpg", "webp") if f"{key}.{e}" in places)
            assert (record["image_offset"], record["image_size"]) == places[f"{key}.{extension}"]
            assert (record["caption_offset"], record["caption_size"]) == places[f"{key}.txt"]
            assert (record["json_offset"], record["json_size"]) == places[f"{key}.json"]
            assert (record["width"], record["height"], record["flags"]) == (9, 7, OK)
            assert record["key_hash"] == xxh3_64_intdigest(key.encode())


def test_ids_keys_and_records_agree(tmp_path: Path) -> None:
    content = samples(11)
    write(tmp_path, content)
    shards = open_shards(str(tmp_path))
    assert len(shards) == 11
    assert shards.shard_names == ["00000.tar", "00001.tar", "00002.tar"]
    assert shards.shard_sizes.tolist() == [4, 4, 3]
    assert shards.shard_sizes.dtype == np.int64
    assert shards.keys() == [sample[0] for sample in content]
    for sample_id, key in enumerate(shards.keys()):
        assert shards.find(key) == sample_id
        assert shards.key_of(sample_id) == key
        assert shards.locate(sample_id) == (sample_id // 4, sample_id % 4)
    with pytest.raises(KeyError, match="nothing"):
        shards.find("nothing")
    for wrong in (-1, 11):
        with pytest.raises(IndexError):
            shards.read(wrong)


key_text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="."), min_size=1, max_size=20
).filter(lambda k: not k.startswith(("/", "__")) and not k.endswith("/") and "//" not in k)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@WEBDATASET
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(
        st.tuples(
            key_text,
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
            st.dictionaries(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=8), json_values, max_size=3
            ),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda sample: sample[0],
    ),
    per_shard=st.integers(1, 4),
)
def test_any_key_caption_and_meta_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[str, str, dict[str, Any]]], per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    image = picture()
    write(folder, [(key, image, "png", caption, meta) for key, caption, meta in content], per_shard=per_shard)
    shards = open_shards(folder)
    back = [shards.read(sample_id) for sample_id in range(len(shards))]
    assert [(raw.key, raw.caption, raw.meta) for raw in back] == content
    assert [shards.find(key) for key, _, _ in content] == list(range(len(content)))
    urls = [str(folder / name) for name in shards.shard_names]
    others = by_webdataset(urls)
    assert [(o["__key__"], o["txt"].decode(), json.loads(o["json"])) for o in others] == content


@pytest.mark.parametrize(
    ("member", "reason"), [("image", "hash"), ("caption", "caption"), ("json", "caption")]
)
def test_one_flipped_bit_makes_a_damaged_sample(tmp_path: Path, member: str, reason: str) -> None:
    write(tmp_path, samples(8))
    shards = open_shards(tmp_path)
    record = shards.records(1)[2]
    flip(tmp_path / "00001.tar", int(record[f"{member}_offset"]) + int(record[f"{member}_size"]) // 2)
    with pytest.raises(DamagedSample) as error:
        shards.read(6)
    assert (error.value.shard, error.value.key, error.value.reason) == ("00001.tar", "key-0006", reason)
    assert str(error.value) == f"00001.tar: sample 'key-0006' is damaged ({reason})"
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.shard, again.key, again.reason) == (error.value.shard, error.value.key, error.value.reason)
    for sample_id in (0, 5, 7):
        shards.read(sample_id)


def test_a_tar_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    write(tmp_path, samples(8))
    shards = open_shards(tmp_path)
    shards.read(0)
    record = shards.records(0)[2]
    os.truncate(tmp_path / "00000.tar", int(record["image_offset"]) + 10)
    assert shards.read(1).key == "key-0001"
    for sample_id in (2, 3):
        with pytest.raises(DamagedSample, match="missing"):
            shards.read(sample_id)


def test_a_failing_file_system_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, samples(4))
    shards = open_shards(tmp_path)

    def failing(*args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="Input/output error"):
        shards.read(0)
    monkeypatch.undo()
    assert shards.read(0).key == "key-0000"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, samples(4))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 100), offset))
    assert open_shards(tmp_path).read(1).image == samples(2)[1][1]


def test_pickled_shards_read_the_same(tmp_path: Path) -> None:
    write(tmp_path, samples(8))
    shards = open_shards(tmp_path)
    shards.read(3)
    again: ShardSet = pickle.loads(pickle.dumps(shards))
    assert (len(again), again.fingerprint, again.find("key-0005")) == (8, shards.fingerprint, 5)
    assert as_dict(again.read(6)) == as_dict(shards.read(6))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_the_same_shards(tmp_path: Path, method: str) -> None:
    write(tmp_path, samples(12))
    shards = open_shards(tmp_path)
    shards.read(0)  # files are open before the fork
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        theirs = pool.map(shards.read, range(12))
        mine = [shards.read(sample_id) for sample_id in reversed(range(12))]
        assert list(theirs) == mine[::-1]


def test_threads_read_while_files_are_closed_under_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.data.shards.OPEN_SHARDS", 2)
    write(tmp_path, samples(24))
    shards, wrong = open_shards(tmp_path), list[Any]()

    def work(seed: int) -> None:
        for sample_id in np.random.default_rng(seed).integers(0, 24, 200):
            try:
                if shards.read(int(sample_id)).key != f"key-{sample_id:04d}":
                    wrong.append(sample_id)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_few_files_stay_open_however_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.data.shards.OPEN_SHARDS", 3)
    write(tmp_path, samples(20), per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    shards = open_shards(tmp_path)
    for sample_id in range(20):
        shards.read(sample_id)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * 3  # the tar and its index
    del shards
    assert len(os.listdir("/proc/self/fd")) <= before


def spoil_manifest(folder: Path, **fields: Any) -> None:
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | fields)
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "manifest.jsonl").unlink(), "has tars but no manifest.jsonl; write it"),
        (lambda f: (f / "00001.tar").unlink(), "names 00001.tar, which is missing"),
        (lambda f: os.truncate(f / "00001.tar", 700), "00001.tar has 700 bytes, the manifest says"),
        (lambda f: (f / "00000.idx").unlink(), "00000.idx is missing"),
        (lambda f: (f / "manifest.jsonl").write_text("{\n"), "line 1 is no row of a manifest"),
        (lambda f: (f / "manifest.jsonl").write_text("[]\n"), "line 1 is no row of a manifest"),
        (lambda f: (f / "manifest.jsonl").write_text("[" * 100_000), "line 1 is no row of a manifest"),
        (lambda f: spoil_manifest(f, shard="../x.tar"), "is no shard name"),
        (lambda f: spoil_manifest(f, shard="/etc/x.tar"), "is no shard name"),
        (lambda f: spoil_manifest(f, shard=3), "is no row"),
        (lambda f: spoil_manifest(f, bytes="7"), "a field has the wrong type"),
        (lambda f: spoil_manifest(f, xxh3="no"), "a field has the wrong type"),
        (lambda f: spoil_manifest(f, extra=1), "extra"),
        (lambda f: spoil_manifest(f, shard="00001.tar"), "lists a shard twice"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_sentence(
    tmp_path: Path, damage: Any, words: str
) -> None:
    write(tmp_path, samples(8))
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        open_shards(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: os.truncate(f, 0), "is empty"),
        (lambda f: os.truncate(f, 30), "is no index"),
        (lambda f: os.truncate(f, f.stat().st_size - 1), "is cut short"),
        (lambda f: flip(f, 0), "is no index"),
        (lambda f: flip(f, 8), "has version 0"),
        (lambda f: flip(f, 16), "is not the index of"),
        (lambda f: flip(f, 100), "is not the index of"),
        (lambda f: flip(f, f.stat().st_size - 1), "is not the index of"),
    ],
)
def test_an_index_that_is_not_the_manifests_is_refused(tmp_path: Path, damage: Any, words: str) -> None:
    write(tmp_path, samples(8))
    damage(tmp_path / "00001.idx")
    shards = open_shards(tmp_path)
    shards.read(0)
    with pytest.raises(UserError, match=words):
        shards.read(4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_offset", 2**63),
        ("image_offset", 2**64 - 20),
        ("image_size", 2**31),
        ("image_size", 0),
        ("caption_offset", 10**6),
        ("json_size", 2**30),
        ("format", 9),
        ("format", 0),
    ],
)
def test_a_false_index_cannot_lead_out_of_its_tar(tmp_path: Path, field: str, value: int) -> None:
    write(tmp_path, samples(3))
    path = tmp_path / "00000.idx"
    data = bytearray(path.read_bytes())
    np.frombuffer(data, dtype=RECORD, count=3, offset=64)[field][1] = value
    path.write_bytes(data)
    spoil_manifest(tmp_path, idx_xxh3=xxh3_64_hexdigest(bytes(data)))
    with pytest.raises(UserError, match="points outside of"):
        open_shards(tmp_path).read(0)


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        ("txt", b"\xff" * 3, "caption"),
        ("json", b"[1", "json"),
        ("json", b"[]", "json"),
        ("json", b"no", "json"),
    ],
)
def test_text_that_cannot_be_read_is_damage_even_where_the_hash_agrees(
    tmp_path: Path, member: str, content: bytes, reason: str
) -> None:
    write(tmp_path, samples(3))
    tar, path = tmp_path / "00000.tar", tmp_path / "00000.idx"
    raw, data = bytearray(tar.read_bytes()), bytearray(path.read_bytes())
    record = np.frombuffer(data, dtype=RECORD, count=3, offset=64)[1]
    part = {"txt": "caption", "json": "json"}[member]
    offset = int(record[f"{part}_offset"])
    raw[offset : offset + len(content)] = content
    record[f"{part}_size"] = len(content)
    texts = [bytes(raw[record[f"{p}_offset"] :][: record[f"{p}_size"]]) for p in ("caption", "json")]
    record["text_xxh3"] = xxh3_64_intdigest(b"".join(texts))
    tar.write_bytes(raw)
    path.write_bytes(data)
    spoil_manifest(tmp_path, idx_xxh3=xxh3_64_hexdigest(bytes(data)))
    with pytest.raises(DamagedSample) as error:
        open_shards(tmp_path).read(1)
    assert error.value.reason == reason


def test_a_set_prints_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, samples(5))
    assert repr(open_shards(tmp_path)) == f"ShardSet('{tmp_path}': 5 samples in 2 shards)"


def test_an_absent_or_empty_folder_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        open_shards(tmp_path / "no")
    with pytest.raises(UserError, match="diptych data build"):
        open_shards(tmp_path)


def test_corpus_names_are_folders_too(tmp_path: Path) -> None:
    write(tmp_path / "cache/corpora/small/train", samples(3))
    assert len(open_shards("corpus:small/train")) == 3
    with pytest.raises(UserError, match="fetch"):
        open_shards("corpus:other/train")
