"""The scripts for queues, run for real: torchrun on this machine, and stand-ins for Slurm's commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..pretrain.train_runs import losses, make_data, write_config
from ..project.repository import ROOT

SCRIPTS = ROOT / "configs" / "slurm"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("queue")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """``srun`` runs its command and tells its process id, ``scontrol`` tells what was asked of it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    texts = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$TOLD/pid"\nexec "$@"\n',
        "scontrol": 'echo "$@" >> "$TOLD/asked"\n[[ $1 == show ]] && echo 127.0.0.1\nexit 0\n',
    }
    for name, text in texts.items():
        (commands / name).write_text("#!/bin/bash\n" + text)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_GPUS_ON_NODE": "2", "PROCESSES": "2", "TOLD": str(tmp_path), "PATH": path}
    return {**os.environ, **slurm, "OMP_NUM_THREADS": "1"}


def start(script: str, environment: dict[str, str], *words: Any) -> subprocess.Popen[str]:
    command = ["bash", str(SCRIPTS / script), *map(str, words)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def until_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(losses(run)) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_slurm_job_queues_itself_again_until_the_run_is_complete(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def asked() -> list[str]:
        lines = (tmp_path / "asked").read_text().splitlines()
        return [line for line in lines if line.startswith("requeue")]

    job = start("pretrain.sbatch", environment, run, config)
    until_step(run, 3, job)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-3000:]
    assert asked() == [f"requeue {environment['SLURM_JOB_ID']}"]
    assert '"reason": "SIGTERM"' in out

    job = start("pretrain.sbatch", environment, run, config, "seed=1")  # a mistake is no reason to try again
    assert "seed was 0, now 1" in job.communicate(timeout=120)[1]
    assert job.returncode != 0
    assert len(asked()) == 1

    job = start("pretrain.sbatch", environment, run, config)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err[-3000:]
    assert out.endswith("is complete\n")
    assert [step for step, _ in losses(run)] == list(range(1, 21))
    assert json.loads((run / "finished.json").read_text())["step"] == 20
    assert len(asked()) == 1
    (tmp_path / "pid").unlink()
    job = start("pretrain.sbatch", environment, run, config)
    assert job.communicate(timeout=60)[0].endswith("is complete; to train it further, remove finished.json\n")
    assert job.returncode == 0
    assert not (tmp_path / "pid").exists()  # nothing was launched


@pytest.mark.slow
def test_torchruns_script_starts_dead_ranks_again_and_says_how_it_ended(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start("torchrun.sh", environment, run, config)
    until_step(run, 7, job)  # a checkpoint is there
    (victim,) = (json.loads((run / "lock").read_text())["pid"],)
    os.kill(victim, signal.SIGKILL)
    while not (run / "lock").exists() or json.loads((run / "lock").read_text() or "{}").get("pid") == victim:
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.1)
    until_step(run, 9, job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 75, err[-3000:]
    assert out.rpartition("stopped: ")[2].startswith('{"step": ')
    job = start("torchrun.sh", environment, run, config)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err[-3000:]
    assert [step for step, _ in losses(run)] == list(range(1, 21))


def test_told_to_stop_before_anything_runs_is_a_reason_to_start_again(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = start("pretrain.sbatch", environment, run, config)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err[-3000:]
    assert out.endswith("told to stop before its processes had begun\n")
    assert f"requeue {environment['SLURM_JOB_ID']}" in (tmp_path / "asked").read_text()

    job = start("torchrun.sh", environment, run, config)
    while not Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 75, err[-3000:]
    assert out.startswith("told to stop, and it left no stopped.json (exit code ")
