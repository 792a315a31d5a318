"""What a run takes of its machine: it gives it back, and does without who watches it."""

import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diptych.pretrain.leftovers import note_workers, remove_shared_memory

from ..finetune.labelled import write_config as write_table
from ..finetune.labelled import write_task
from ..pretrain.train_runs import finish, launch, losses, make_data, write_config
from .test_stop import gone, ranks_of, until

SHARED = Path("/dev/shm")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def dead_pid() -> int:
    """The number of a process that is no more."""
    return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))


def left_by(pid: int, age_s: float = 60.0) -> Path:
    file = SHARED / f"torch_{pid}_1_0"
    file.touch()
    os.utime(file, (time.time() - age_s,) * 2)
    return file


def test_shared_memory_of_dead_workers_of_this_run_is_removed_and_no_other(tmp_path: Path) -> None:
    dead, fresh, another = dead_pid(), dead_pid(), dead_pid()
    mine, living, others, young = left_by(dead), left_by(os.getpid()), left_by(another), left_by(fresh, 0.0)
    try:
        note_workers(tmp_path, 0, [dead])
        note_workers(tmp_path, 1, [os.getpid(), fresh])
        records = sorted((tmp_path / "workers").iterdir())
        elsewhere = records[0].with_name("0123456789ab_00000.json")
        elsewhere.write_text(json.dumps({"workers": [another]}))
        records[0].with_name(records[0].name.replace("00000", "00002")).write_text("half a li")
        remove_shared_memory(tmp_path)
        assert not mine.exists()
        assert all(file.exists() for file in (living, others, young))
        assert not records[0].exists()
        assert records[1].exists()
    finally:
        for file in (mine, living, others, young):
            file.unlink(missing_ok=True)


def test_what_a_worker_that_died_alone_has_left_is_removed_when_it_is_forgotten(tmp_path: Path) -> None:
    for following in ([], [os.getpid()]):
        dead = dead_pid()
        mine = left_by(dead)
        try:
            note_workers(tmp_path, 3, [dead])
            note_workers(tmp_path, 3, following)
            assert not mine.exists()
            assert (tmp_path / "workers").exists() == bool(following)
        finally:
            mine.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_killed_run_s_shared_memory_is_removed_at_the_next_start(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(config, run, 1, "data.workers=2")
    until(lambda: run.exists() and (run / "metrics.jsonl").exists() and len(losses(run)) >= 3, process)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not gone(str(run))
    left, others = [left_by(pid) for pid in workers], left_by(dead_pid())
    try:
        assert len(left) == 2
        finish(launch(config, run, 1, "data.workers=2"))
        assert not any(file.exists() for file in left)
        assert others.exists()
        assert not (run / "workers").exists()
    finally:
        for file in (*left, others):
            file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_killed_data_worker_of_one_rank_is_one_sentence_and_the_run_goes_on(
    config: Path, tmp_path: Path
) -> None:
    """As by the kernel for lack of memory."""
    finish(launch(config, tmp_path / "straight", 2, "data.workers=1"))
    run = tmp_path / "run"
    process = launch(config, run, 2, "data.workers=1")
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 7, process)
    worker = psutil.Process(ranks_of(process)[1]).children()[0].pid
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1  # torchrun's own
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert f"data worker 0 (process {worker}) died (signal 9)" in told[0]
    assert "lower data.workers" in told[0]
    assert len(losses(run)) < 20
    assert not gone(str(run))
    finish(launch(config, run, 2, "data.workers=1"))
    assert losses(run) == losses(tmp_path / "straight")


def unwatched(how: str, until: str, module: str, *words: object) -> int:
    """The exit code of a command whose output is read up to a word only, from a pipe or a terminal."""
    ours, theirs = pty.openpty() if how == "terminal" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while until.encode() not in shown.replace(b"\r\n", b""):
        shown += os.read(ours, 100)
    os.close(ours)
    return process.wait(120)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["head", "terminal"])
def test_a_fine_tuning_that_nobody_watches_any_more_goes_on(how: str, tmp_path: Path) -> None:
    write_task(tmp_path, names=4)
    table = write_table(tmp_path, "{concat: {op: concat}, late: {op: late}}")
    assert unwatched(how, "concat", "diptych.finetune", table) == 0
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["head", "terminal"])
def test_a_run_that_nobody_watches_any_more_goes_on(how: str, config: Path, tmp_path: Path) -> None:
    """As with ``2>&1 | head -1``, and in a terminal that is gone and whose hang-up is ignored."""
    assert unwatched(how, "starts: 20 steps", "diptych.pretrain", config, f"out={tmp_path / 'run'}") == 0
    assert [step for step, _ in losses(tmp_path / "run")] == [*range(1, 21)]
    assert (tmp_path / "run" / "finished.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_files_and_shared_memory_stay_flat_over_thousands_of_steps(
    config: Path, tmp_path: Path
) -> None:
    """With data workers, an asynchronous save every 50 steps, old ones removed, and held-out scores."""
    run, steps = tmp_path / "run", 3000
    often = ("checkpoint.every_steps=50", "checkpoint.keep=2", "evaluate.every_steps=250")
    length = (f"train.total_samples={steps * 16}", "train.log_every_steps=10", "data.workers=1")
    process = launch(config, run, 1, *often, *length)
    before = set(os.listdir(SHARED))
    main = psutil.Process(process.pid)
    samples: list[tuple[int, float, int, int]] = []
    while process.poll() is None:
        time.sleep(0.25)
        try:
            taken = [main, *main.children()]
            memory = sum(one.memory_info().rss for one in taken) / 2**20
            files = sum(one.num_fds() for one in taken)
            step = losses(run)[-1][0]
        except (psutil.Error, OSError, IndexError):
            continue
        samples.append((step, memory, files, len(set(os.listdir(SHARED)) - before)))
    finish(process)
    early = [sample for sample in samples if 500 <= sample[0] < 1000]
    late = [sample for sample in samples if sample[0] >= steps - 500]
    assert min(len(early), len(late)) >= 5
    memory, files, shared = (
        [statistics.median(sample[kind] for sample in part) for part in (early, late)] for kind in (1, 2, 3)
    )
    assert memory[1] < 1.03 * memory[0]
    assert files[1] <= files[0] + 1
    assert shared[1] <= shared[0] + 1
