"""Runs under torchrun that lose a process and go on by themselves."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from ..pretrain.train_runs import finish, launch, losses, make_data, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    # an epoch has three steps, so that 7 and 14 are in the midst of one
    return write_config(
        folder / "run.yaml", make_data(folder / "data"), checkpoint={"every_steps": 7, "keep": 9}
    )


def torchrun(nodes: str, processes: int) -> list[str]:
    return [
        *("-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={processes}"),
        *("--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=test"),
        *("--rdzv-conf=last_call_timeout=1", "--monitor-interval=0.2"),
    ]


def rank_of(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    ranks = psutil.Process(agent.pid).children()
    return next(one for one in ranks if one.environ().get("RANK") == str(rank))


def wait_for(step: int, run: Path, agent: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or f'"step": {step},' not in metrics.read_text():
        assert agent.poll() is None, agent.communicate()[1][-2000:]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_run_goes_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    finish(launch(config, tmp_path / "straight", 2))
    agent = launch(config, tmp_path / "run", 2, launcher=torchrun("1:2", 2), own_group=True)
    try:
        wait_for(9, tmp_path / "run", agent)
        rank_of(agent, 1).send_signal(signal.SIGKILL)
        _, err = agent.communicate(timeout=250)
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
    assert agent.returncode == 0, err[-3000:]
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "another process of this run has ended" in told[0]
    after = re.search(r"goes on after step (7|14)\b", err)  # 14 where this process had to wait
    assert after is not None, err[-3000:]
    trainer = tmp_path / "run" / "checkpoints" / f"step_{int(after[1]):08d}" / "trainer.json"
    assert json.loads(trainer.read_text())["stream"]["step"] > 0
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
