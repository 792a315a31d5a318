"""What a run takes of its machine: it gives it back, and does without who watches it."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diptych.pretrain.leftovers import note_workers, remove_shared_memory

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


def left_by(pid: int) -> Path:
    file = SHARED / f"torch_{pid}_1_0"
    file.touch()
    return file


def test_shared_memory_of_dead_workers_of_this_run_is_removed_and_no_other(tmp_path: Path) -> None:
    run, dead, another = tmp_path, dead_pid(), dead_pid()
    mine, living, others = left_by(dead), left_by(os.getpid()), left_by(another)
    try:
        note_workers(run, 0, [dead])
        note_workers(run, 1, [os.getpid()])
        elsewhere = json.dumps({"machine": "elsewhere", "workers": [another]})
        (run / "workers" / "rank_00002.json").write_text(elsewhere)
        (run / "workers" / "rank_00003.json").write_text("half a li")
        assert remove_shared_memory(run) == [mine.name]
        assert not mine.exists()
        assert living.exists()
        assert others.exists()
        assert sorted(path.name for path in (run / "workers").iterdir()) == [
            f"rank_0000{number}.json" for number in (1, 2, 3)
        ]
        note_workers(run, 1, [])
        assert remove_shared_memory(run) == []
    finally:
        for file in (mine, living, others):
            file.unlink(missing_ok=True)


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


@pytest.mark.slow
def test_a_run_that_nobody_watches_any_more_goes_on(config: Path, tmp_path: Path) -> None:
    """As with ``2>&1 | head -1``, or a terminal that is gone and whose hang-up is ignored."""
    with launch(config, tmp_path / "run", 1) as process:
        assert process.stderr is not None
        assert "starts: 20 steps" in process.stderr.readline()
        process.stderr.close()
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "trained 20 steps" in process.stdout.read()
    assert [step for step, _ in losses(tmp_path / "run")] == [*range(1, 21)]


@pytest.mark.slow
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
    print(f"MiB {memory}, open files {files}, files in /dev/shm {shared}")
    assert memory[1] < 1.03 * memory[0]
    assert files[1] <= files[0] + 1
    assert shared[1] <= shared[0] + 1
