"""Files are whole or absent."""

from pathlib import Path

import pytest

from diptych.configs.files import atomic_write_bytes, atomic_write_text, cache_dir, temporary_beside


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
