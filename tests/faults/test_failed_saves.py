"""Whole runs on disks that fill up, turn read-only or vanish, and come back."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.pretrain import saver
from diptych.pretrain.checkpoint import newest_checkpoint, read_tensors
from diptych.pretrain.train import train

from ..pretrain.train_runs import load, losses, make_data, rows, write_config

pytestmark = pytest.mark.mount
STEPS = 12


def mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def mount(tmp_path: Path) -> Generator[Callable[..., Path]]:
    """``mount(name, *arguments)``: a mount point of the test's own."""
    made: list[Path] = []

    def make(name: str, *arguments: str) -> Path:
        point = tmp_path / name
        point.mkdir(exist_ok=True)
        if not mounted(*arguments, str(point)):
            pytest.skip("this user may not mount")
        made.append(point)
        return point

    yield make
    for point in reversed(made):
        subprocess.run(["umount", "-l", str(point)], capture_output=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failed")
    checkpoint = {"every_steps": 2}
    return write_config(folder / "run.yaml", make_data(folder / "data"), checkpoint=checkpoint, evaluate={})


SHORT = (f"train.total_samples={STEPS * 16}", "evaluate.data=null", "optim.ema_decay=null")


@pytest.fixture(scope="module")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    train(load(config, out, *SHORT))
    return out


class At:
    """Does something after a step of the run."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        self.actions = {int(name.removeprefix("step_")): action for name, action in actions.items()}

    def start(self, facts: dict[str, Any]) -> None:
        pass

    def row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] in self.actions:
            self.actions.pop(row["step"])()


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with (disk / "rest").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0")


def free(disk: Path) -> None:
    (disk / "ballast").unlink()
    (disk / "rest").unlink()


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    one, two = newest_checkpoint(run), newest_checkpoint(other)
    assert one is not None
    assert two is not None
    assert one.name == two.name
    for file in two.glob("*.safetensors"):
        expected = read_tensors(file)
        for name, value in read_tensors(one / file.name).items():
            assert value.equal(expected[name]), name


def warnings(run: Path) -> list[str]:
    return [row["warning"] for row in rows(run, "checkpoint") if "failed_saves" in row]


def test_a_disk_that_fills_up_costs_checkpoints_and_nothing_else(
    mount: Any, config: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("disk", "-t", "tmpfs", "-o", "size=96m", "tmpfs")
    run = disk / "run"
    outcome = train(load(config, run, *SHORT), At(step_3=lambda: fill(disk), step_9=lambda: free(disk)))
    assert outcome.step == STEPS
    told = warnings(run)
    assert len(told) >= 2
    assert "No space left on device" in told[0]
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))  # no row was lost
    assert_same(run, straight)
    # to the end full: one sentence, and the same command goes on when there is room
    monkeypatch.setattr(saver, "LAST_PAUSES_S", (0.0, 0.1))
    again = disk / "again"
    with pytest.raises(UserError, match=r"No space left .* make room there, then the same command") as caught:
        train(load(config, again, *SHORT), At(step_5=lambda: fill(disk)))
    assert "\n" not in str(caught.value)
    free(disk)
    newest = newest_checkpoint(again)
    assert newest is not None
    assert newest.name in ("step_00000002", "step_00000004")
    train(load(config, again, *SHORT))
    assert_same(again, straight)


def test_a_disk_without_room_for_the_next_checkpoint_is_told_before_that_fails(
    mount: Any, config: Path, straight: Path
) -> None:
    disk = mount("disk", "-t", "tmpfs", "-o", "size=96m", "tmpfs")
    run, ballast = disk / "run", disk / "ballast"
    newest = newest_checkpoint(straight)
    assert newest is not None
    size = sum(file.stat().st_size for file in newest.iterdir())

    def tighten() -> None:
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - size * 3 // 2))

    train(load(config, run, *SHORT), At(step_1=tighten, step_5=ballast.unlink))
    first, second, *_ = rows(run, "checkpoint")
    told = r"[\d.]+ MB are free where the next checkpoint needs [\d.]+ MB; make room"
    assert first["saved_step"] == 2
    assert re.fullmatch(told, first["warning"])
    assert "No space left on device" in second["warning"]
    assert_same(run, straight)


def test_too_many_failures_stop_a_run(mount: Any, config: Path) -> None:
    disk = mount("disk", "-t", "tmpfs", "-o", "size=96m", "tmpfs")
    with pytest.raises(UserError, match=r"checkpoint.max_failed_saves: 2 saves in a row have failed"):
        train(
            load(config, disk / "run", *SHORT, "checkpoint.max_failed_saves=2"),
            At(step_3=lambda: fill(disk)),
        )


def test_a_folder_that_turns_read_only_is_told_and_waited_for(
    mount: Any, config: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def lock() -> None:
        still = mount("still", "--bind", str(run))  # nobody writes through this one
        assert mounted("-o", "remount,ro,bind", str(still))
        mount("run", "--bind", str(still))

    def unlock() -> None:
        subprocess.run(["umount", "-l", str(run)], check=True)

    train(load(config, run, *SHORT), At(step_3=lock, step_9=unlock))
    told = warnings(run)
    assert len(told) >= 2
    assert "Read-only file system" in told[-1]
    assert_same(run, straight)


@pytest.mark.parametrize("names", [["checkpoints"], ["config.yaml", "lock"], ["metrics.jsonl"]])
def test_a_run_goes_on_without_what_somebody_removes_from_its_folder(
    names: list[str], config: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def remove() -> None:
        for name in names:
            (run / name).rename(tmp_path / name)

    train(load(config, run, *SHORT), At(step_7=remove))
    if names == ["metrics.jsonl"]:
        lines = (tmp_path / "metrics.jsonl").read_bytes() + (run / "metrics.jsonl").read_bytes()
        assert rows(run)[0]["step"] == 8
        (run / "metrics.jsonl").write_bytes(lines)
    assert_same(run, straight)
    assert train(load(config, run, *SHORT)).step == STEPS


@pytest.mark.parametrize("size", ["96k", "4k"])
def test_shared_memory_that_is_full_is_one_sentence(config: Path, tmp_path: Path, size: str) -> None:
    """As in a container, whose /dev/shm is small."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    small = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec " + '"$@"'
    words = [str(config), f"out={tmp_path / 'run'}", *SHORT, "data.workers=2", "data.prefetch=4"]
    command = ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-m", "diptych.pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.stderr[-3000:]
    assert told[0].startswith("error: data.workers: ")
    assert "/dev/shm" in told[0]
    assert done.returncode == 2
    if size != "4k":  # where torch adds what it makes of workers that cannot even be started
        assert "Traceback" not in done.stderr


def test_a_mount_that_vanishes_is_not_written_beneath(
    mount: Any, config: Path, straight: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    point = mount("point", "--bind", str(disk))

    def back() -> None:
        assert list(point.iterdir()) == []
        assert mounted("--bind", str(disk), str(point))

    def away() -> None:
        subprocess.run(["umount", "-l", str(point)], check=True)

    train(load(config, point, *SHORT), At(step_3=away, step_9=back))
    assert "no longer holds this run; has its disk been unmounted?" in warnings(disk)[-1]
    assert_same(disk, straight)
    assert json.loads((disk / "checkpoints" / "step_00000012" / "manifest.json").read_text())["step"] == STEPS
    assert not os.path.ismount(tmp_path)
