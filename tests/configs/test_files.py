"""Files are whole or absent."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from diptych.configs.files import (
    Lines,
    atomic_write_bytes,
    atomic_write_text,
    cache_dir,
    remove_temporaries,
    temporary_beside,
    temporary_folder,
    temporary_name,
)

HOLD = """
import sys, time
from pathlib import Path
from diptych.configs.files import temporary_folder
with temporary_folder(Path(sys.argv[1])) as temporary:
    (temporary / "array").write_text("half")
    print(temporary.name, flush=True)
    time.sleep(600)
"""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_text(path, "old")

    def fail_halfway() -> None:
        with temporary_beside(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_byte_for_byte(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a", "ä\r\nb\n")
    assert (tmp_path / "a").read_bytes() == "ä\r\nb\n".encode()
    atomic_write_bytes(tmp_path / "a", b"\0")
    assert (tmp_path / "a").read_bytes() == b"\0"


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE", "/here")
    assert cache_dir() == Path("/here")
    monkeypatch.delenv("DIPTYCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_dir() == Path("/there/diptych")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "diptych"


def test_a_temporary_folder_becomes_what_it_is_for_or_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    with temporary_folder(path) as temporary:
        (temporary / "b").write_text("all")
        temporary.rename(path)
    with pytest.raises(RuntimeError), temporary_folder(tmp_path / "new" / "c") as temporary:
        raise RuntimeError
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]
    assert (path / "b").read_text() == "all"


def test_temporary_folders_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "entry")]
    with ExitStack() as stack:
        names: list[str] = []
        holders: list[subprocess.Popen[str]] = []
        for _ in range(2):
            holder = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(holder.kill)
            assert holder.stdout is not None
            names.append(holder.stdout.readline().strip())
            holders.append(holder)
        kept = {"notes.tmp", ".hidden", ".a.0123456789ab.tmp.more"}
        for name in kept:
            (tmp_path / name).mkdir()
        assert {entry.name for entry in tmp_path.iterdir()} == kept | set(names)
        holders[1].kill()
        holders[1].wait()
        with temporary_folder(tmp_path / "other") as temporary:
            assert {entry.name for entry in tmp_path.iterdir()} == kept | {names[0], temporary.name}
        assert (tmp_path / names[0] / "array").read_text() == "half"


def test_what_a_killed_run_left_under_temporary_names_goes_and_nothing_else(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "heads", tmp_path / "heads" / "late", tmp_path / "holdout"):
        folder.mkdir(exist_ok=True)
        temporary_name(folder / "file").touch()
        whole = temporary_name(folder / "folder")
        whole.mkdir()
        (whole / "deep").touch()
        (folder / ".x.tmp").touch()
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        temporary_name(folder / "young").touch()
    os.symlink(tmp_path / "holdout", tmp_path / "link")
    remove_temporaries(tmp_path, ["heads"])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert len([name for name in left if name.startswith("holdout/")]) == 5
    kept = [name for name in left if not name.startswith("holdout") and "young" not in name]
    assert kept == [".x.tmp", "heads", "heads/.x.tmp", "heads/late", "heads/late/.x.tmp", "link"]
    # a report that is being written, for instance
    assert len([name for name in left if "young" in name]) == 4


def test_temporary_folders_of_another_machine_are_left_for_a_week(tmp_path: Path) -> None:
    """Its locks are not seen here on NFS."""
    there = tmp_path / f".entry.{'0' * 12}.tmp"
    there.mkdir()
    (there / "array").touch()
    for at, age in ((there, 8), (there / "array", 6)):
        os.utime(at, (time.time() - age * 86400,) * 2)
    with temporary_folder(tmp_path / "other"):
        assert there.exists()
    os.utime(there / "array", (1, 1))
    with temporary_folder(tmp_path / "other"):
        assert not there.exists()


def test_lines_of_a_run_wait_while_its_disk_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    lines = Lines(run / "bad_steps.jsonl")
    run.rename(tmp_path / "disk")
    run.mkdir()  # the mount point
    lines.add("1\n", "2\n")
    assert list(run.iterdir()) == []
    assert "has its disk been unmounted?); what is new waits in memory" in caplog.text
    run.rmdir()
    (tmp_path / "disk").rename(run)
    lines.add("3\n")
    lines.close()
    assert (run / "bad_steps.jsonl").read_text() == "1\n2\n3\n"


def test_lines_go_into_a_new_file_where_the_old_one_was_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.add("1\n")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").touch()
    lines.add("2\n")
    lines.add("3\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "2\n3\n"
    assert [text.partition(" is not the file it was")[0] for text in caplog.messages] == [str(lines.path)]
    lines.close()
