"""Writing shards: the same bytes every time, and whole or absent whatever happens."""

import errno
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data.shards import RefusedSample, ShardWriter, open_shards
from diptych.data.writer import check_key

from .samples import (
    Sample,
    picture,
    sample_members,
    samples,
    write,
    write_tar,
)


def test_the_tar_is_the_one_that_tarfile_would_write(tmp_path: Path) -> None:
    content = samples(6)
    write(tmp_path / "ours", content, per_shard=10)
    theirs = write_tar(tmp_path / "theirs.tar", sample_members(content))
    assert (tmp_path / "ours/00000.tar").read_bytes() == theirs.read_bytes()


def test_equal_samples_give_equal_files_and_the_same_fingerprint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, samples(9))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["00000.idx", "00000.tar", "00001.idx", "00001.tar", "00002.idx", "00002.tar",
                     "manifest.jsonl", "sizes.json"]  # fmt: skip
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert open_shards(tmp_path / "a").fingerprint == open_shards(tmp_path / "b").fingerprint
    write(tmp_path / "c", samples(10))
    assert open_shards(tmp_path / "a").fingerprint != open_shards(tmp_path / "c").fingerprint


def test_sizes_json_is_what_open_clip_counts_by(tmp_path: Path) -> None:
    write(tmp_path, samples(9))
    assert json.loads((tmp_path / "sizes.json").read_text()) == {
        "00000.tar": 4,
        "00001.tar": 4,
        "00002.tar": 1,
    }


@pytest.mark.parametrize(
    "key",
    ["", "a.b", "/a", "a/", "a//b", "__meta__", "a\nb", "a\0b", "\ud800", "x" * 96, "\N{CAT FACE}" * 24],
)
def test_keys_that_readers_would_change_are_refused(key: str) -> None:
    with pytest.raises(RefusedSample) as error:
        check_key(key)
    assert error.value.reason == "key"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (("key-0000", picture(), "png", "twice", {}), "duplicate"),
        (("a", b"GIF89a", "png", "no image we know", {}), "decode"),
        (("a", picture()[:20], "png", "cut in the header", {}), "decode"),
        (("a", picture(), "jpg", "not what it says", {}), "format"),
        (("a", picture(), "gif", "not what it says", {}), "format"),
        (("a", picture(), "png", " \n", {}), "caption"),
        (("a", picture(), "png", "half \ud83d", {}), "json"),
        (("a", picture(), "png", "no number", {"x": float("nan")}), "json"),
        (("a", picture(), "png", "no json", {"x": b"bytes"}), "json"),
    ],
)
def test_a_refused_sample_says_why_and_leaves_the_writer_usable(
    tmp_path: Path, sample: Any, reason: str
) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(*samples(1)[0])
        with pytest.raises(RefusedSample) as error:
            writer.write(*sample)
        assert error.value.reason == reason
        writer.write("last", picture(), "PNG", "still works", {})
    assert open_shards(tmp_path).keys() == ["key-0000", "last"]


@pytest.mark.parametrize("when", [0, 1, 5, 9])
def test_an_error_in_the_block_leaves_nothing(tmp_path: Path, when: int) -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(when)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "x", broken())
    assert not (tmp_path / "x").exists()


def test_a_killed_writer_leaves_nothing_that_looks_valid_and_can_be_repeated(tmp_path: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from samples import samples; from diptych.data.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1], samples_per_shard=4) as writer:\n"
        "    for number, sample in enumerate(samples(11)):\n"
        "        writer.write(*sample)\n"
        "        if number == 9: os._exit(9)\n"
    )
    folder = tmp_path / "x"
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(Path(__file__).parent)], check=False)
    assert done.returncode == 9
    assert [path.name for path in folder.iterdir()] == [".partial"]
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        open_shards(folder)
    write(folder, samples(11))
    write(tmp_path / "y", samples(11))
    for path in (tmp_path / "y").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert len(list(folder.iterdir())) == len(list((tmp_path / "y").iterdir()))


def test_a_crash_while_shards_are_moved_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = Path.rename, list[Path]()

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, samples(9))
    monkeypatch.undo()
    with pytest.raises(UserError, match="has tars but no"):
        open_shards(tmp_path)
    with pytest.raises(UserError, match="holds shards already"):
        write(tmp_path, samples(9))


def test_two_writers_cannot_share_a_folder(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(*samples(1)[0])
        with pytest.raises(UserError, match="another process"), ShardWriter(tmp_path):
            pass
    assert len(open_shards(tmp_path)) == 1


def test_overwriting_replaces_the_whole_set_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, samples(12))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path, samples(2))
    write(tmp_path, samples(2, first=50), overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000.idx", "00000.tar", "manifest.jsonl", "notes.txt", "sizes.json"
    ]  # fmt: skip
    assert open_shards(tmp_path).keys() == ["key-0050", "key-0051"]
    with pytest.raises(RefusedSample):
        write(tmp_path, [*samples(5), samples(1)[0]], overwrite=True)
    assert open_shards(tmp_path).keys() == ["key-0050", "key-0051"]


def test_shards_also_end_at_a_number_of_bytes(tmp_path: Path) -> None:
    write(tmp_path, samples(6), per_shard=100, bytes_per_shard=4000)
    shards = open_shards(tmp_path)
    assert len(shards.shard_names) > 1
    assert shards.keys() == [sample[0] for sample in samples(6)]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write shards to"), ShardWriter(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="at least 1"):
        ShardWriter(tmp_path, samples_per_shard=0)


def test_large_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.data.writer.MAX_IMAGE_BYTES", 100)
    with pytest.raises(RefusedSample, match="bytes"):
        write(tmp_path / "x", samples(1))


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    write(tmp_path, samples(3))
    assert len(open_shards(tmp_path)) == 3


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"), ShardWriter(tmp_path / "x"):
        pass
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="with block"):
        ShardWriter(tmp_path / "x").write(*samples(1)[0])


def test_tarfile_extracts_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, samples(3))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [name for name, _ in sample_members(samples(3))]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.type) for m in members} == {
            (0, 0, 0, 0o644, tarfile.REGTYPE)
        }
        for member, (_, data) in zip(members, sample_members(samples(3)), strict=True):
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == data
