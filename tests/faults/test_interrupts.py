"""Ctrl-C, once and twice, and hang-ups, to runs that were started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diptych.configs.parent import LAUNCHER_ENDED
from diptych.pretrain.checkpoint import newest_checkpoint, verify
from diptych.pretrain.manifest import scan
from diptych.pretrain.stop import StopRequest
from diptych.pretrain.train import train

from ..data.object_store import BUCKET, Fault, Proxy
from ..pretrain.train_runs import finish, launch, load, make_data, write_config
from .test_stop import assert_same, gone, marker, servers, step_of, until

__all__ = ["servers"]

STEPS = 60
LAUNCHER = ["-m", "diptych.pretrain.launch", "--nproc-per-node=2"]
SAVE = 25
"""After so many steps there is a checkpoint."""
HELD = """
import runpy, sys, time
from pathlib import Path
from diptych.pretrain import checkpoint
from diptych.pretrain.train import _Run

word = Path({word!r})
complete, enter = checkpoint.complete, _Run._enter_step

def hold(what):
    if (word / "hold").exists() and (word / "hold").read_text() == what:
        (word / "held").touch()
        while True:
            time.sleep(0.05)

def completing(*arguments):
    hold("save")
    return complete(*arguments)

def entering(self):
    hold("step")
    return enter(self)

checkpoint.complete, _Run._enter_step = completing, entering
del sys.argv[1:3]  # -m diptych.pretrain
runpy.run_module("diptych.pretrain", run_name="__main__")
"""
"""What ``launch`` puts before its ``-m diptych.pretrain``: a step or a save never ends if it is told so."""
APART = """
import os, runpy, sys
if __name__ == "__main__":
    os.environ["AWS_ENDPOINT_URL"] = {urls}[int(os.environ["RANK"])]
    module = sys.argv[2]
    del sys.argv[:2]
    runpy.run_module(module, run_name="__main__")
"""
"""What ``launch`` puts before its ``-m diptych.pretrain``: each rank has a server of its own."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts")
    data = make_data(folder / "data")
    return write_config(
        folder / "run.yaml", data, train={"total_samples": 16 * STEPS}, checkpoint={"every_steps": SAVE}
    )


@pytest.fixture(scope="module")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(load(config, out))
    return out


@pytest.fixture(scope="module")
def straight_of_two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight_of_two") / "run"
    finish(launch(config, out, 2))
    return out


def assert_whole(run: Path) -> None:
    """Every checkpoint that has its name has all its bytes."""
    assert [problem for one in scan(run) if (problem := verify(one.folder))] == []


def quiet(err: str) -> bool:
    """Nothing of Python's own, and nothing of torchrun's."""
    return not any(word in err for word in ("Traceback", "Exception", "Signal", "Error"))


def hang_up_ignored(config: Path, out: Path) -> subprocess.Popen[str]:
    """``nohup diptych pretrain CONFIG``."""
    return subprocess.Popen(
        ["nohup", sys.executable, "-m", "diptych.pretrain", str(config), f"out={out}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_a_run_that_is_interrupted_or_hung_up_saves_its_last_step_and_goes_on(
    number: signal.Signals, code: int, config: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(config, out, 1)
    until(lambda: step_of(out) >= 3, process)
    process.send_signal(number)
    said, err = process.communicate(timeout=60)
    assert process.returncode == code, err[-3000:]
    assert quiet(err), err
    step = step_of(out)
    assert 3 <= step < STEPS
    assert (
        said == f"stopped after step {step} of {STEPS}, which is saved; the same command goes on from there\n"
    )
    assert marker(out) == {
        "step": step,
        "samples_seen": 16 * step,
        "checkpoint": f"checkpoints/step_{step:08d}",
        "reason": number.name,
    }
    assert_whole(out)
    finish(launch(config, out, 1))
    assert_same(out, straight)
    assert not (out / "stopped.json").exists()


@pytest.mark.slow
def test_a_run_whose_hang_up_is_ignored_goes_on_to_its_end(
    config: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = hang_up_ignored(config, out)
    until(lambda: step_of(out) >= 3, process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert step_of(out) < STEPS
    finish(process)
    assert_same(out, straight)
    assert marker(out, "finished.json")["step"] == STEPS
    assert not (out / "stopped.json").exists()


HUNG_UP = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
from diptych.pretrain.launch import main
sys.exit(main(["--nproc-per-node=2", *sys.argv[1:]]))
"""


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.tmp"))


def holding(folder: Path) -> list[str]:
    """The launcher of a run that holds where ``folder/hold`` says."""
    script = folder / "held.py"
    script.write_text(HELD.format(word=str(folder)))
    return [str(script)]


@pytest.mark.slow
@pytest.mark.parametrize("busy", ["step", "save"])
def test_a_second_interrupt_does_not_wait_for_what_is_under_way(
    busy: str, config: Path, straight: Path, tmp_path: Path
) -> None:
    """It comes in the midst of a step, or while the checkpoint for which the first has asked is written."""
    out = tmp_path / "run"
    process = launch(config, out, 1, launcher=holding(tmp_path))
    until(lambda: (out / "checkpoints" / f"step_{SAVE:08d}").exists(), process)
    (tmp_path / "hold").write_text(busy)
    if busy == "step":
        until((tmp_path / "held").exists, process)
    process.send_signal(signal.SIGINT)
    until((tmp_path / "held").exists, process)
    time.sleep(0.3)
    assert process.poll() is None
    before = newest_checkpoint(out)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert said == ""
    assert quiet(err), err
    assert err.splitlines()[-1].startswith("interrupted; what was finished is kept, go on with: ")
    assert not (out / "stopped.json").exists()
    assert before is not None
    assert newest_checkpoint(out) == before
    assert_whole(out)
    assert writing(out) == (busy == "save")  # left as it was
    finish(launch(config, out, 1))
    assert_same(out, straight)
    assert not writing(out)


def interrupt(process: subprocess.Popen[str]) -> None:
    """As a terminal's Ctrl-C does."""
    os.killpg(process.pid, signal.SIGINT)


def heard(*numbers: signal.Signals, saved: bool = False) -> list[str]:
    """What each of several signals does to a run in training, in which the handler raises nowhere else."""
    out: list[str] = []
    stop = StopRequest()
    stop.saved = saved
    stop.closed()
    for number in numbers:
        try:
            stop.handle(number, None)
        except KeyboardInterrupt:
            out.append("ends")
        else:
            out.append(stop.reason)
    return out


def test_a_second_interrupt_ends_at_once_also_as_torchrun_passes_it_on() -> None:
    """It sends SIGINT for the first and SIGTERM for the second; the listener's knock is neither."""
    assert heard(signal.SIGINT, signal.SIGINT) == ["SIGINT", "ends"]
    assert heard(signal.SIGINT, LAUNCHER_ENDED, signal.SIGTERM) == ["SIGINT", "SIGINT", "ends"]
    assert heard(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP) == ["SIGTERM"] * 3
    assert heard(signal.SIGTERM, signal.SIGINT) == ["SIGTERM"] * 2
    # a launcher ends with SIGTERM those that are left when one has ended
    assert heard(signal.SIGINT, signal.SIGTERM, signal.SIGINT, saved=True) == ["SIGINT", "SIGINT", "ends"]


@pytest.mark.slow
def test_a_second_interrupt_at_the_terminal_of_two_processes_does_not_wait_for_a_save(
    config: Path, straight_of_two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(config, out, 2, launcher=[*LAUNCHER, *holding(tmp_path)], own_group=True)
    until(lambda: (out / "checkpoints" / f"step_{SAVE:08d}").exists(), process)
    (tmp_path / "hold").write_text("save")
    interrupt(process)
    until((tmp_path / "held").exists, process)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    interrupt(process)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 25  # torchrun kills after 30 s
    assert process.returncode == 130, err[-3000:]
    assert quiet(err), err
    assert not gone(str(out), seconds=2)
    assert writing(out)
    assert not (out / "stopped.json").exists()
    assert_whole(out)
    finish(launch(config, out, 2, launcher=LAUNCHER))
    assert_same(out, straight_of_two)


@pytest.mark.slow
def test_a_hang_up_is_ignored_under_the_launcher_too(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch(config, out, 2, launcher=["-c", HUNG_UP])
    until(lambda: step_of(out) >= 3, process)
    process.send_signal(signal.SIGHUP)
    finish(process)
    assert marker(out, "finished.json")["step"] == STEPS


@pytest.mark.slow
def test_an_interrupt_at_the_terminal_of_two_processes_saves_once(
    config: Path, straight_of_two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(config, out, 2, launcher=LAUNCHER, own_group=True)
    until(lambda: step_of(out) >= 3, process)
    interrupt(process)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert quiet(err), err
    step = step_of(out)
    assert 3 <= step < STEPS
    assert said.count("which is saved") == 1
    assert marker(out) == {
        "step": step,
        "samples_seen": 16 * step,
        "checkpoint": f"checkpoints/step_{step:08d}",
        "reason": "SIGINT",
    }
    saved = [json.loads(x).get("saved_step") for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert saved.count(step) == 1
    assert_whole(out)
    assert newest_checkpoint(out) is not None
    assert not gone(str(out))
    finish(launch(config, out, 2, launcher=LAUNCHER))
    assert_same(out, straight_of_two)


@pytest.mark.slow
def test_two_interrupts_end_processes_of_which_one_has_no_data(
    config: Path, straight_of_two: Path, servers: list[Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 waits for a shard, and rank 0 for rank 1."""
    out = tmp_path / "run"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    script = tmp_path / "rank.py"
    script.write_text(APART.format(urls=[server.url for server in servers]))
    words = (f"data.train=s3://{BUCKET}/set", "data.cache_gb=0", "data.workers=1")
    process = launch(config, out, 2, *words, launcher=[*LAUNCHER, str(script)], own_group=True)
    until(lambda: step_of(out) >= 3, process)
    servers[1].faults.append(Fault("stall", r"\.tar", times=1000, at=0))
    step = -1
    while step != step_of(out):  # batches that are ready are used up
        step = step_of(out)
        time.sleep(3)
    assert step < STEPS
    interrupt(process)
    time.sleep(0.3)
    assert process.poll() is None
    assert step_of(out) == step
    interrupt(process)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130, err[-3000:]
    assert quiet(err), err
    assert not gone(str(out), seconds=2)
    assert_whole(out)
    finish(launch(config, out, 2, launcher=LAUNCHER))
    assert_same(out, straight_of_two)
