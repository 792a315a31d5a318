"""What lies on disk when power fails: a kill cannot show it, so the order of the calls is looked at, which
the real code makes."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.files import atomic_write_text, temporary_beside
from diptych.pretrain.checkpoint import MANIFEST, save, verify

from .states import step
from .test_saver import make


@dataclass(frozen=True)
class Call:
    what: str
    """Sync, rename or delete."""
    path: Path
    to: Path | None = None
    size: int = 0
    """Of a file when it was synced."""


@dataclass
class Calls:
    """Of ``os.fsync``, of renames and of deletions, which all happen."""

    made: list[Call] = field(default_factory=list[Call])

    def sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(handle: int) -> None:
            real(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.made.append(Call("sync", path, size=os.fstat(handle).st_size))

        return call

    def rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **more: Any) -> None:
            real(source, target, **more)
            self.made.append(Call("rename", Path(source), Path(target)))

        return call

    def delete(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *words: Any, **more: Any) -> None:
            self.made.append(Call("delete", Path(path)))
            real(path, *words, **more)

        return call

    def find(self, what: str, path: Path, after: int = -1) -> int:
        """Place of the first such call after another; there must be one."""
        found = [n for n, c in enumerate(self.made) if n > after and (c.what, c.path) == (what, path)]
        assert found, f"no {what} of {path} after call {after} of {self.made}"
        return found[0]

    def find_name(self, path: Path) -> int:
        """Place of the rename that gave something this name."""
        (found,) = (n for n, c in enumerate(self.made) if c.to == path)
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(os, "fsync", calls.sync(os.fsync))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, calls.rename(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", calls.delete(shutil.rmtree))
    return calls


def assert_durable(calls: Calls, final: Path) -> None:
    """Files, manifest, their folder, the name, the folder of the names: each is on disk before the next."""
    named = calls.find_name(final)
    temporary = calls.made[named].path
    listed = json.loads((final / MANIFEST).read_text())["files"]
    assert {path.name for path in final.iterdir()} == {*listed, MANIFEST}
    sealed = calls.find("sync", temporary / MANIFEST)
    for name, entry in listed.items():
        synced = calls.find("sync", temporary / name)
        assert synced < sealed, name
        assert calls.made[synced].size == entry["bytes"], name
    assert calls.made[sealed].size == (final / MANIFEST).stat().st_size
    assert sealed < calls.find("sync", temporary, after=sealed) < named
    assert verify(final) is None


def assert_removed_later(calls: Calls, older: Path, newer: Path) -> None:
    """A checkpoint loses its name, and then its files, when the newer one has its name on disk."""
    durable = calls.find("sync", newer.parent, after=calls.find_name(newer))
    hidden = calls.find("rename", older)
    assert durable < hidden
    to = calls.made[hidden].to
    assert to is not None
    assert hidden < calls.find("delete", to)
    assert not older.exists()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_the_older_one_goes_after_that(
    asynchronous: bool, calls: Calls, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made, _ = make(run, asynchronous=asynchronous, keep=1)
    folders = [run / "checkpoints" / f"step_{number:08d}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders):
        with (run / "metrics.jsonl").open("a") as file:
            file.write("{}\n")
        step(made.state)
        made.save()
        made.wait()
        assert_durable(calls, folder)
        # and the rows up to here, without which the run could not go on from it as it was
        start = calls.find_name(folders[number - 1]) if number else -1
        rows = calls.find("sync", run / "metrics.jsonl", after=start)
        assert calls.made[rows].size == 3 * (number + 1)
        assert rows < calls.find("sync", run, after=rows) < calls.find_name(folder)
    for older, newer in pairwise(folders):
        assert_removed_later(calls, older, newer)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [folders[-1].name]


def test_the_last_checkpoint_of_a_run_is_on_disk_when_the_saver_has_finished(
    calls: Calls, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made, _ = make(run, keep=1)
    step(made.state)
    made.finish()
    final = run / "checkpoints" / "step_00000001"
    assert_durable(calls, final)
    calls.find("sync", final.parent, after=calls.find_name(final))


def test_a_checkpoint_in_the_place_of_a_damaged_one_is_on_disk_before_that_one_goes(
    calls: Calls, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made, _ = make(run)
    made.save()
    made.wait()
    calls.made.clear()
    made.save()
    made.wait()
    final = run / "checkpoints" / "step_00000000"
    assert_durable(calls, final)
    named, hidden = calls.find_name(final), calls.find("rename", final)
    assert calls.find("sync", calls.made[named].path) < hidden < named
    calls.find("sync", final.parent, after=named)


def test_files_that_others_write_into_a_checkpoint_are_on_disk_before_its_manifest(
    calls: Calls, tmp_path: Path
) -> None:
    """As ``transformers`` writes a tokenizer; by the function that saves the steps of a fine-tuning."""
    weights = {"weights.safetensors": {"w": torch.arange(1000.0)}}

    def write_more(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    older, newer = (
        save(tmp_path, number, tensors=weights, documents={"f.json": {}}, write_more=write_more, keep=1)
        for number in (1, 2)
    )
    assert_removed_later(calls, older, newer)
    assert_durable(calls, newer)
    assert (newer / "tokenizer.json").exists()


def test_a_file_is_on_disk_before_it_has_its_name_and_so_is_its_name(calls: Calls, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with temporary_beside(path) as temporary:
        temporary.write_bytes(b"abc")
    atomic_write_text(path, "abcdef")
    for size in (3, 6):
        synced, named, folder, *calls.made = calls.made
        assert (synced.what, synced.size) == ("sync", size)
        assert synced.path.parent == tmp_path
        assert (named.what, named.path, named.to) == ("rename", synced.path, path)
        assert (folder.what, folder.path) == ("sync", tmp_path)
    assert not calls.made
    assert path.read_text() == "abcdef"
