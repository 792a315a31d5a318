"""Builds in parts: the same bytes from any number of processes and after any kill, keys unique over all, and
what was finished is taken over only where nothing has changed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data import build, parts, writer
from diptych.data.build import build_shards
from diptych.data.index import read_manifest
from diptych.data.scanning import Limits
from diptych.data.shards import open_shards
from diptych.data.sources import Columns
from diptych.data.verify import verify_folder

from .images import photo, stored
from .samples import picture, samples, write
from .test_build import pictures, read_all, table


def source_of(folder: Path, n: int = 23, bad: tuple[int, ...] = (3, 11, 12)) -> Path:
    names = pictures(folder, n)
    rows = [
        {"image": "pics/none.png" if i in bad else name, "caption": f"caption {i}", "id": f"id-{i}"}
        for i, name in enumerate(names)
    ]
    return table(folder / "t.csv", rows)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


OPTIONS: dict[str, Any] = {"samples_per_shard": 4, "max_bad_fraction": 0.5}


def made_by(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Numbers of the parts that are really made from now on; a kill at one of them."""
    seen: list[int] = []
    add = parts._add

    def told(settings: Any, part: Any, *rest: Any) -> None:
        if part.number == stop_at:
            raise KeyboardInterrupt
        if part.number not in seen:
            seen.append(part.number)
        add(settings, part, *rest)

    monkeypatch.setattr(parts, "_add", told)
    return seen


def test_any_number_of_processes_makes_the_same_bytes(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    for name, workers in (("one", 1), ("two", 2)):
        report = build_shards([source], tmp_path / name, val_fraction=0.3, workers=workers, **OPTIONS)
        assert (report.rows, report.written, report.kept) == (23, 20, 0)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert not list((tmp_path / "one").rglob(".*"))
    for folder in report.folders:
        assert verify_folder(tmp_path / "one" / folder, decode=True).findings == []


def test_a_shard_is_what_the_writer_would_have_made_of_its_samples(tmp_path: Path) -> None:
    report = build_shards([source_of(tmp_path, 40, bad=())], tmp_path / "out", val_fraction=0.3, **OPTIONS)
    for name in ("train", "val"):
        shards = open_shards(tmp_path / "out" / name)
        again = tmp_path / "again" / name
        every = read_all(tmp_path / "out" / name)
        with writer.ShardWriter(again, samples_per_shard=100) as one:
            for raw in every:
                one.write(raw.key, raw.image, raw.extension, raw.caption, raw.meta)
        assert [open_shards(again).read(i).caption for i in range(len(every))] == [
            raw.caption for raw in every
        ]
        # small pieces are joined as far as they fit
        sizes = shards.shard_sizes.tolist()
        assert max(sizes) <= 4
        assert all(a + b > 4 for a, b in itertools.pairwise(sizes))
    assert report.written == 40
    whole = build_shards([tmp_path / "t.csv"], tmp_path / "whole", samples_per_shard=100)
    with writer.ShardWriter(tmp_path / "direct", samples_per_shard=100) as one:
        for raw in read_all(tmp_path / "whole"):
            one.write(raw.key, raw.image, raw.extension, raw.caption, raw.meta)
    assert whole.folders["."]["fingerprint"] == open_shards(tmp_path / "direct").fingerprint


def test_a_build_that_was_stopped_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    build_shards([source], tmp_path / "whole", **OPTIONS)
    made_by(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        build_shards([source], tmp_path / "out", **OPTIONS)
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        open_shards(tmp_path / "out")
    monkeypatch.undo()
    seen = made_by(monkeypatch)
    report = build_shards([source], tmp_path / "out", **OPTIONS)
    assert (seen, report.kept, report.anew) == ([3, 4, 5], 12, 0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("change", ["row", "file", "settings", "piece", "record"])
def test_what_has_changed_since_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = source_of(tmp_path)
    made_by(monkeypatch, stop_at=4)
    with pytest.raises(KeyboardInterrupt):
        build_shards([source], tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    options: dict[str, Any] = dict(OPTIONS)
    staging = tmp_path / "out/.building"
    if change == "row":
        source.write_text(source.read_text().replace("caption 5", "another caption"))
    elif change == "file":
        (tmp_path / "pics/p5.webp").write_bytes(picture(99, "webp"))
    elif change == "settings":
        options["limits"] = Limits(max_pixels=10_000)
    elif change == "piece":
        os.truncate(staging / "00000001.all.0.piece", 600)
    else:
        (staging / "00000001.json").write_text("{")
    seen = made_by(monkeypatch)
    report = build_shards([source], tmp_path / "out", **options)
    assert seen == ([0, 1, 2, 3, 4, 5] if change == "settings" else [1, 4, 5])
    assert report.kept == (0 if change == "settings" else 12)
    assert report.anew == {"row": 4, "file": 4, "settings": 16}.get(change, 0)
    build_shards([source], tmp_path / "whole", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_rows_that_were_mended_after_a_failed_build_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    with pytest.raises(UserError, match="3 of 23 rows are bad"):
        build_shards([source], tmp_path / "out", samples_per_shard=4)
    (tmp_path / "pics/none.png").write_bytes(picture(7))
    seen = made_by(monkeypatch)
    report = build_shards([source], tmp_path / "out", samples_per_shard=4)
    assert (seen, report.written, report.kept) == ([0, 2, 3], 23, 11)


def test_keys_are_unique_over_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = pictures(tmp_path, 12)
    ids = ["a", "b", "c", "a", "d", "b", "b", "e", "f", "g", "a", "h"]
    source = table(
        tmp_path / "t.csv",
        [
            {"image": name, "caption": f"{i}", "id": key}
            for i, (name, key) in enumerate(zip(names, ids, strict=True))
        ],
    )
    seen = made_by(monkeypatch)
    report = build_shards([source], tmp_path / "out", columns=Columns(key="id"), **OPTIONS)
    assert [(bad["row"], bad["reason"]) for bad in report.bad] == [
        (4, "duplicate"), (6, "duplicate"), (7, "duplicate"), (11, "duplicate")
    ]  # fmt: skip
    assert [raw.caption for raw in read_all(tmp_path / "out")] == ["0", "1", "2", "4", "7", "8", "9", "11"]
    assert seen == [0, 1, 2]
    assert verify_folder(tmp_path / "out").findings == []
    with pytest.raises(UserError, match="4 of 12 rows are bad"):
        build_shards([source], tmp_path / "no", columns=Columns(key="id"), samples_per_shard=5)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("when", range(1, 12, 2))
def test_a_kill_while_shards_are_moved_is_mended_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, overwrite: bool
) -> None:
    source = source_of(tmp_path)
    build_shards([source], tmp_path / "whole", **OPTIONS)
    if overwrite:
        write(tmp_path / "out", samples(40))
    rename, calls = Path.rename, list[Path]()

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == when:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        build_shards([source], tmp_path / "out", overwrite=overwrite, **OPTIONS)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        open_shards(tmp_path / "out")
    report = build_shards([source], tmp_path / "out", **OPTIONS)
    assert report.kept == 23
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_shards_that_came_after_a_kill_are_not_taken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "00002.tar":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        build_shards([source], tmp_path / "out", **OPTIONS)
    monkeypatch.undo()
    (tmp_path / "out/00001.tar").write_bytes(b"somebody's own")
    for _ in range(2):
        with pytest.raises(UserError, match=r"00001\.tar is not what a killed build left"):
            build_shards([source], tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out/00001.tar").read_bytes() == b"somebody's own"


def test_shards_that_are_there_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    write(tmp_path / "out/val", samples(3))
    with pytest.raises(UserError, match="out/val holds shards already"):
        build_shards([source], tmp_path / "out", val_fraction=0.3, **OPTIONS)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["val"]


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    settings = parts.Settings(tmp_path / "out/.building")
    with build._staged(tmp_path / "out", settings, overwrite=False):
        with pytest.raises(UserError, match="another process writes shards"):
            build_shards([source], tmp_path / "out", **OPTIONS)
        (tmp_path / "out/.building").mkdir(exist_ok=True)


def test_where_files_cannot_be_linked_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    build_shards([source], tmp_path / "linked", **OPTIONS)

    def no_links(*names: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    build_shards([source], tmp_path / "copied", **OPTIONS)
    assert content(tmp_path / "linked") == content(tmp_path / "copied")


def test_a_real_kill_and_a_second_run(tmp_path: Path) -> None:
    """kill -9 of the command while its processes work."""
    names = pictures(tmp_path, 12)
    rows = [{"image": names[i % 12], "caption": f"c {i}"} for i in range(8000)]
    source = table(tmp_path / "t.csv", rows)
    words = [sys.executable, "-m", "diptych.cli", "data", "build", str(source), "--samples-per-shard", "50"]
    words.append("--no-decode")
    child = subprocess.Popen(
        [*words, "--out", str(tmp_path / "out"), "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    staging, end = tmp_path / "out/.building", time.monotonic() + 60
    while len(list(staging.glob("*.json"))) < 5:
        assert time.monotonic() < end
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.read()  # returns when the last of its processes has ended
    done = len(list(staging.glob("*.json")))
    assert 5 <= done < 160
    report = build_shards([source], tmp_path / "out", samples_per_shard=50, decode=False)
    assert 50 * done - 50 <= report.kept <= 50 * done
    build_shards([source], tmp_path / "whole", samples_per_shard=50, decode=False)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert len(read_manifest(tmp_path / "out")) == 160
    assert json.loads((tmp_path / "out/build_report.json").read_text())["written"] == 8000


def test_a_set_is_not_built_around_train_and_val_nor_the_other_way_round(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{i}.png").write_bytes(stored(photo(9, 9, seed=i), "PNG"))
        (tmp_path / "photos" / f"{i}.txt").write_text(f"picture {i}")
    build_shards([tmp_path / "photos"], tmp_path / "split", val_fraction=0.3)
    with pytest.raises(UserError, match="holds train and val already"):
        build_shards([tmp_path / "photos"], tmp_path / "split")
    build_shards([tmp_path / "photos"], tmp_path / "whole")
    with pytest.raises(UserError, match="holds a set of shards itself"):
        build_shards([tmp_path / "photos"], tmp_path / "whole", val_fraction=0.3)
