"""Signals to runs of two processes: whom they reach, and what the processes are waiting for then."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from diptych.pretrain import distributed, meeting
from diptych.pretrain.checkpoint import newest_checkpoint, read_tensors
from diptych.pretrain.stop import LOOK_S
from diptych.pretrain.train import train

from ..data.object_store import BUCKET, Fault, Proxy, s3_server, upload
from ..pretrain.train_runs import finish, launch, load, losses, make_data, write_config

SOON_S = 25.0
"""Within which all have saved: torchrun's 30 s, less what a busy machine takes."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


@pytest.fixture(scope="module")
def straight(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(launch(config, out, 2))
    return out


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    mine, expected = newest_checkpoint(run), newest_checkpoint(other)
    assert mine is not None
    assert expected is not None
    for file in sorted(path.name for path in expected.glob("*.safetensors")):
        values = read_tensors(mine / file)
        for name, value in read_tensors(expected / file).items():
            assert values[name].equal(value), (file, name)


def until(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def step_of(run: Path) -> int:
    return max((step for step, _ in losses(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {pid: Path("/proc", pid, "environ").read_bytes().partition(b"\0RANK=")[2] for pid in pids}
    return {int(value.partition(b"\0")[0]): int(pid) for pid, value in found.items() if value}


def running(word: str) -> list[int]:
    """Processes whose command line has the word."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def gone(word: str, seconds: float = SOON_S) -> list[int]:
    """What still runs after so long."""
    end = time.monotonic() + seconds
    while (left := running(word)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def marker(run: Path, name: str = "stopped.json") -> dict[str, object]:
    return json.loads((run / name).read_text())


@pytest.fixture
def servers(config: Path) -> Generator[list[Proxy]]:
    """A way to one bucket for each rank; the run's shards are in it."""
    with s3_server() as port:
        upload(config.parent / "data" / "train", port, "set")
        upload(config.parent / "data" / "val", port, "val")
        proxies = [Proxy(port) for _ in range(2)]
        yield proxies
        for proxy in proxies:
            proxy.close()


def launch_apart(
    config: Path, out: Path, servers: list[Proxy], folder: Path, *words: str
) -> subprocess.Popen[str]:
    """A run whose ranks reach their shards by servers of their own."""
    script = folder / "rank.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ['AWS_ENDPOINT_URL'] = {[s.url for s in servers]}[int(os.environ['RANK'])]\n"
        "from diptych.cli.main import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(config), f"out={out}", f"data.train=s3://{BUCKET}/set", "data.cache_gb=0"),
            *words,
        ],
        env={**os.environ, **keys, "AWS_DEFAULT_REGION": "us-east-1", "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "starved", "told"), [(1, 1, "launcher"), (1, 0, 1), (0, 1, 0)])
def test_ranks_of_which_one_has_no_data_save_the_same_step(
    workers: int,
    starved: int,
    told: int | str,
    config: Path,
    straight: Path,
    servers: list[Proxy],
    tmp_path: Path,
) -> None:
    """Whether the launcher, the rank that waits for data or the one that waits for it is told."""
    out = tmp_path / "run"
    process = launch_apart(config, out, servers, tmp_path, f"data.workers={workers}")
    until(lambda: step_of(out) >= 3, process)
    servers[starved].faults.append(Fault("stall", r"\.tar", times=1000, at=0))
    time.sleep(4)
    assert step_of(out) < 20
    began = time.monotonic()
    os.kill(process.pid if told == "launcher" else ranks_of(process)[int(told)], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < SOON_S
    assert process.returncode == (1 if told == "launcher" else 0), err[-3000:]
    step = step_of(out)
    assert 3 <= step < 20
    assert marker(out) == {
        "step": step,
        "samples_seen": 16 * step,
        "checkpoint": f"checkpoints/step_{step:08d}",
        "reason": "SIGTERM",
    }
    assert not gone(str(out))
    finish(launch(config, out, 2))
    assert_same(out, straight)
    assert not (out / "stopped.json").exists()
    assert marker(out, "finished.json")["step"] == 20


@pytest.mark.slow
def test_a_rank_that_scores_hears_what_another_was_told(
    config: Path, straight: Path, servers: list[Proxy], tmp_path: Path
) -> None:
    """Rank 0 waits for held-out shards, and rank 1 for rank 0."""
    out = tmp_path / "run"
    servers[0].faults.append(Fault("stall", r"/val/.*\.tar", times=1000, at=0))
    held_out = (f"evaluate.data=s3://{BUCKET}/val", "evaluate.every_steps=4")
    process = launch_apart(config, out, servers, tmp_path, *held_out)
    until(lambda: servers[0].gets(r"/val/.*\.tar"), process)
    time.sleep(2)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-3000:]
    assert (marker(out)["step"], marker(out)["reason"]) == (4, "SIGTERM")
    finish(launch(config, out, 2))
    assert_same(out, straight)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", 0])
def test_a_start_that_hangs_ends_when_told(
    told: str | int, config: Path, servers: list[Proxy], tmp_path: Path
) -> None:
    """Rank 1 waits for its data, and rank 0 for rank 1, in a call that hears no signal."""
    out = tmp_path / "run"
    servers[1].faults.append(Fault("stall", "manifest", times=1000, at=0))
    process = launch_apart(config, out, servers, tmp_path)
    until(lambda: servers[1].gets("manifest") and (out / "lock").exists(), process)
    time.sleep(2)
    began = time.monotonic()
    os.kill(process.pid if told == "launcher" else ranks_of(process)[int(told)], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (1 if told == "launcher" else 0), err[-3000:]
    assert time.monotonic() - began < SOON_S
    assert marker(out) == {"step": 0, "samples_seen": 0, "checkpoint": None, "reason": "SIGTERM"}
    assert not gone(str(out))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_save_and_end_when_their_launcher_is_killed(
    workers: int, config: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = launch(config, out, 2, f"data.workers={workers}")
    until(lambda: step_of(out) >= 4, process)
    process.kill()
    assert not gone(str(out))
    process.communicate()
    step = step_of(out)
    assert 4 <= step < 20
    assert marker(out)["checkpoint"] == f"checkpoints/step_{step:08d}"
    finish(launch(config, out, 2))
    assert_same(out, straight)


def test_a_signal_of_its_own_after_word_from_another_is_no_failure(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has left, so that what they did together fails; then the signal comes here, too."""

    def fails(*arguments: object, **named: object) -> torch.device:
        threading.Timer(LOOK_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
        monkeypatch.setattr(meeting, "noticed", lambda key: "SIGTERM")
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "setup", fails)
    outcome = train(load(config, tmp_path / "run"))
    assert (outcome.step, outcome.reason) == (0, "SIGTERM")
    assert marker(tmp_path / "run")["reason"] == "SIGTERM"


EARLY = """
import os, signal, sys

class Told:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Told())
from diptych.cli.main import main
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


def test_a_signal_while_torch_is_loaded_is_a_stop_too(config: Path, tmp_path: Path) -> None:
    words = [str(config), f"out={tmp_path / 'run'}"]
    done = subprocess.run([sys.executable, "-c", EARLY, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped while it started" in done.stdout
    assert marker(tmp_path / "run") == {"step": 0, "samples_seen": 0, "checkpoint": None, "reason": "SIGTERM"}
    refused = subprocess.run(
        [sys.executable, "-c", EARLY, "nowhere.yaml"], capture_output=True, text=True, timeout=200
    )
    assert refused.returncode == 2
    assert "nowhere.yaml" in refused.stderr
