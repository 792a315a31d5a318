"""Filters choose samples as a plain loop over all of them would, and never renumber any."""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from diptych.configs.errors import UserError
from diptych.data.filters import FilterConfig, select
from diptych.data.foreign import index_folder
from diptych.data.shards import RawSample, ShardSet, ShardWriter, open_shards

from .images import photo, stored

N = 53


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("filters") / "set"
    kinds = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
    with ShardWriter(folder, samples_per_shard=7) as writer:
        for i in range(N):
            extension, kind = kinds[i % 3]
            image = stored(photo(10 + i % 9, 12 + i % 5, seed=i), kind)
            writer.write(f"key-{i:03d}", image, extension, "word " * (1 + i % 4), {"uid": uid(i)})
    return open_shards(folder)


def uid(i: int) -> str:
    return f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}{i + 7:016x}"


def chosen(shards: ShardSet, **config: Any) -> list[int]:
    selection = select(shards, FilterConfig(**config))
    assert selection is not None
    total = int(selection.shard_sizes.sum())
    ids = selection.sample_ids(np.arange(total)).tolist()
    assert ids == sorted(set(ids))
    by_shard = np.bincount([shards.locate(i)[0] for i in ids], minlength=len(shards.rows))
    assert selection.shard_sizes.tolist() == by_shard.tolist()
    backwards = selection.sample_ids(np.arange(total)[::-1])
    assert backwards.tolist() == ids[::-1]
    return ids


def samples(shards: ShardSet) -> list[RawSample]:
    return [shards.read(i) for i in range(len(shards))]


def test_no_condition_is_no_filter(shards: ShardSet) -> None:
    assert select(shards, FilterConfig()) is None


def test_an_expression_chooses_by_what_the_index_says(shards: ShardSet) -> None:
    got = chosen(shards, where="text_len > 9 and format != 'png' and short >= 12")
    truth = [
        raw.sample_id
        for raw in samples(shards)
        if len(raw.caption) > 9 and raw.extension != "png" and min(pixels(shards, raw.sample_id)) >= 12
    ]
    assert got == truth
    assert 0 < len(got) < N


def pixels(shards: ShardSet, sample_id: int) -> tuple[int, int]:
    shard, record = shards.locate(sample_id)
    row = shards.records(shard)[record]
    return int(row["width"]), int(row["height"])


def write_keys(path: Path, keys: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_text("\n".join(keys) + "\n\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"key": key, "score": 1}) + "\n" for key in keys))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["score", "key"], *([1, key] for key in keys)])
    else:
        pyarrow.parquet.write_table(pa.table({"key": keys, "score": [1] * len(keys)}), path)
    return path


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".parquet"])
def test_lists_of_keys_keep_and_drop(shards: ShardSet, tmp_path: Path, ending: str) -> None:
    keys = [f"key-{i:03d}" for i in (3, 11, 12, 13, 40, 52)]
    file = write_keys(tmp_path / f"keys{ending}", [*keys, "nobody"])
    assert chosen(shards, keep=str(file)) == [3, 11, 12, 13, 40, 52]
    assert chosen(shards, drop=str(file)) == [i for i in range(N) if i not in (3, 11, 12, 13, 40, 52)]
    assert chosen(shards, keep=str(file), where="format == 'jpg'") == [13, 40, 52]


def test_datacomps_uids_choose_by_the_json(shards: ShardSet, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.array((1, 2), dtype=np.dtype("u8,u8")))
    with pytest.raises(UserError, match=r"one.npy cannot be read"):
        chosen(shards, keep=str(tmp_path / "one.npy"))
    wanted = [1, 8, 30]
    pairs = [(int(uid(i)[:16], 16), int(uid(i)[16:], 16)) for i in wanted]
    np.save(tmp_path / "uids.npy", np.array(pairs, dtype=np.dtype("u8,u8")))
    assert chosen(shards, keep=str(tmp_path / "uids.npy")) == wanted


def test_a_key_that_stands_in_several_shards_is_dropped_from_the_one_that_is_named(
    shards: ShardSet, tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes((shards.folder / "00000.tar").read_bytes())
    index_folder(folder)
    both = open_shards(folder)
    file = tmp_path / "drop.parquet"
    pyarrow.parquet.write_table(pa.table({"key": ["key-002"], "shard": ["b.tar"]}), file)
    assert chosen(both, drop=str(file)) == [i for i in range(14) if i != 9]
    assert chosen(both, drop=str(write_keys(tmp_path / "all.txt", ["key-002"]))) == [
        i for i in range(14) if i not in (2, 9)
    ]


def test_a_filter_is_worked_out_once_and_anew_when_its_file_changes(shards: ShardSet, tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.txt", ["key-001"])
    first = select(shards, FilterConfig(keep=str(file)))
    again = select(shards, FilterConfig(keep=str(file)))
    assert first is not None
    assert again is not None
    assert len(list((tmp_path / "cache" / "filters").glob("*.npy"))) == 1
    assert first.digest == again.digest
    write_keys(file, ["key-002"])
    other = select(shards, FilterConfig(keep=str(file)))
    assert other is not None
    assert other.digest != first.digest
    assert other.sample_ids(np.array([0])).tolist() == [2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "cannot be read (No such file"),
        ("empty.txt", b"\n\n", "lists no keys"),
        ("other.pdf", b"x", "a list of keys is one of .txt, .jsonl, .csv, .parquet, .npy"),
        ("wrong.jsonl", b'{"id": 3}\n', "no text under key"),
        ("torn.jsonl", b'{"key": "a"', "cannot be read as a list"),
        ("torn.parquet", b"PAR1", "cannot be read as a list"),
        ("torn.npy", b"\x93NUMPY\x01\x00", "cannot be read as a list"),
        ("mixed.jsonl", b'{"key": "a", "shard": "b"}\n{"key": "c"}\n', "some rows name a shard"),
        ("nobody.txt", b"somebody\n", "keep: none of the keys in "),
        ("number.jsonl", b'{"key": "key-001", "shard": 0}\n', "shard 0 is no text"),
    ],
)
def test_files_that_will_not_do_are_told_in_a_sentence(
    shards: ShardSet, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        select(shards, FilterConfig(keep=str(tmp_path / name)))
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_a_table_that_csv_refuses_is_told_in_a_sentence(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text("key\n" + "x" * 200_000 + "\n")
    limit = csv.field_size_limit(1000)
    try:
        with pytest.raises(UserError, match=r"long.csv cannot be read .*field larger than field limit"):
            select(shards, FilterConfig(keep=str(tmp_path / "long.csv")))
    finally:
        csv.field_size_limit(limit)


def test_a_pickled_array_is_not_opened(shards: ShardSet, tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a list"):
        select(shards, FilterConfig(keep=str(tmp_path / "evil.npy")))


def test_a_damaged_file_of_the_cache_is_worked_out_again(shards: ShardSet, tmp_path: Path) -> None:
    truth = chosen(shards, where="width > 12")
    (file,) = (tmp_path / "cache" / "filters").glob("*.npy")
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"x" + whole[1:]):
        file.write_bytes(damaged)
        assert chosen(shards, where="width > 12") == truth
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_told_in_a_sentence(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set DIPTYCH_CACHE"):
        select(shards, FilterConfig(where="width > 12"))


def test_unusable_samples_of_a_shard_are_never_chosen(shards: ShardSet, tmp_path: Path) -> None:
    """Samples that indexing left out stand between the others in the index and have no number."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(12):
            members = {"png": stored(photo(10 + i, 12, seed=i), "PNG"), "txt": b"" if i % 4 == 1 else b"word"}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:02d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_folder(folder)
    partly = open_shards(folder)
    assert len(partly) == 9
    ids = chosen(partly, where="width >= 14")
    assert [partly.key_of(i) for i in ids] == ["04", "06", "07", "08", "10", "11"]


def test_the_form_of_a_list_is_part_of_the_filter(shards: ShardSet, tmp_path: Path) -> None:
    """JSON lines called .txt are lines; called .jsonl they are keys, whatever was worked out before."""
    lines = b'{"key": "key-003"}\n'
    (tmp_path / "x.txt").write_bytes(lines)
    with pytest.raises(UserError, match="drop: none of the keys"):
        chosen(shards, drop=str(tmp_path / "x.txt"))
    (tmp_path / "x.jsonl").write_bytes(lines)
    assert chosen(shards, drop=str(tmp_path / "x.jsonl")) == [i for i in range(N) if i != 3]


def test_lists_are_read_as_editors_and_tables_write_them(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfkey-001\r\nkey-002\r\n")
    assert chosen(shards, keep=str(tmp_path / "bom.txt")) == [1, 2]
    (tmp_path / "bare.jsonl").write_text('{"key": "key-001", "shard": "00000"}\n')
    assert chosen(shards, keep=str(tmp_path / "bare.jsonl")) == [1]


def test_what_is_kept_in_a_cache_that_cannot_be_written_is_used(shards: ShardSet, tmp_path: Path) -> None:
    truth = chosen(shards, where="width > 12")
    for lock in (tmp_path / "cache" / "filters").glob("*.lock"):
        lock.unlink()
        lock.mkdir()  # which nobody can open as a file, not even root
    assert chosen(shards, where="width > 12") == truth


def test_a_full_disk_is_told_in_a_sentence(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*set DIPTYCH_CACHE"):
        select(shards, FilterConfig(where="width > 11"))


def test_a_selection_is_pickled_with_its_counts(shards: ShardSet) -> None:
    selection = select(shards, FilterConfig(where="width > 12"))
    assert selection is not None
    twin = pickle.loads(pickle.dumps(selection))
    assert np.array_equal(twin.shard_sizes, selection.shard_sizes)
    assert np.array_equal(twin.sample_ids(np.arange(5)), selection.sample_ids(np.arange(5)))


def test_a_comparison_that_found_nothing_drops_nothing(shards: ShardSet, tmp_path: Path) -> None:
    """``diptych data verify --against --write-filter`` writes a table without rows then."""
    file = tmp_path / "drop.parquet"
    pyarrow.parquet.write_table(
        pa.table({"key": pa.array([], pa.string()), "shard": pa.array([], pa.string())}), file
    )
    assert chosen(shards, drop=str(file)) == list(range(N))
    with pytest.raises(UserError, match="none is left by keep"):
        chosen(shards, keep=str(file))
