"""Ranks that are slow or stand still: the rows and the log say which, and nothing is ended."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.load import load_config
from diptych.data.batches import BatchMaker
from diptych.pretrain import distributed
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.model import ContrastiveModel
from diptych.pretrain.train import train

LONG_S, SHORT_S = 1.0, 0.5  # more a step of the slowest rank and of the second
EACH = 3  # steps in a row of metrics; as many of the small data make an epoch


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..pretrain.train_runs import make_data, write_config  # not known to the ranks

    folder = tmp_path_factory.mktemp("watched")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def uneven_run(rank: int, world: int, config: str, out: str) -> int:
    """After one epoch that nothing slows down, ranks 1 and 2 take longer over their features for an epoch,
    then ranks 2 and 0 over their data."""
    computing, reading = [0.0, LONG_S, SHORT_S][rank], [SHORT_S, 0.0, LONG_S][rank]
    now = [0]
    read, image = BatchMaker.batch, ContrastiveModel.encode_image

    def batch(self: BatchMaker, epoch: int, step: int) -> Any:
        now[0] = epoch
        time.sleep(reading if epoch == 2 else 0)
        return read(self, epoch, step)

    def encode_image(self: ContrastiveModel, *args: Any) -> torch.Tensor:
        time.sleep(computing if now[0] == 1 else 0)
        return image(self, *args)

    BatchMaker.batch, ContrastiveModel.encode_image = batch, encode_image
    distributed.teardown = lambda: None  # the group is the test's
    options = [f"out={out}", f"train.log_every_steps={EACH}", f"train.total_samples={3 * EACH * 16}"]
    return train(load_config(PretrainConfig, Path(config), [*options, "evaluate.data=null"])).step


@pytest.mark.slow
def test_rows_name_the_slowest_rank_its_time_and_the_longest_wait_for_data(
    ranks: Any, config: Path, tmp_path: Path
) -> None:
    from ..pretrain.train_runs import rows

    assert set(ranks(3, uneven_run, str(config), str(tmp_path / "run"))) == {3 * EACH}
    even, computing, reading = rows(tmp_path / "run")
    for row in (even, computing, reading):
        assert 0 < row["rank_s_min"] <= row["rank_s_median"] <= row["rank_s_max"]
        assert row["data_wait_fraction"] <= row["data_wait_fraction_max"] <= 1
    usual = even["rank_s_max"]  # on a busy machine it may be long
    for row in (computing, reading):  # the slow rank's own time, not that of those that wait for it
        assert row["rank_s_median"] >= SHORT_S
        assert LONG_S <= row["rank_s_max"] <= 1.2 * row["step_s"]
        assert row["rank_s_min"] < row["rank_s_max"] - LONG_S / 2
        assert row["rank_s_max"] < LONG_S + SHORT_S + 5 * usual
    assert computing["slowest_rank"] == 1
    assert computing["data_wait_fraction_max"] < reading["data_wait_fraction_max"]
    assert reading["slowest_rank"] == 2
    assert reading["data_wait_fraction_max"] > 0.4
    assert reading["data_wait_fraction"] < reading["data_wait_fraction_max"]  # rank 0's


STANDING = """
import os, runpy, signal, sys, time
from pathlib import Path
from diptych.data.batches import BatchMaker
from diptych.pretrain.train import _Run

word = Path({word!r})
read, enter = BatchMaker.batch, _Run._enter_step

def batch(self, epoch, step):
    while (epoch, step) == (1, 1) and not (word / "go").exists():  # of step 5
        time.sleep(0.05)
    return read(self, epoch, step)

def entering(self):
    if self.state.step == 9:
        os.kill(os.getpid(), signal.SIGSTOP)
    return enter(self)

if os.environ["RANK"] == "1":
    (word / "pid").write_text(str(os.getpid()))
    BatchMaker.batch, _Run._enter_step = batch, entering
del sys.argv[1:3]  # -m diptych.pretrain
runpy.run_module("diptych.pretrain", run_name="__main__")
"""


def line_with(process: subprocess.Popen[str], *words: str) -> str:
    """The next line of a process's log with all the words."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if all(word in line for word in words):
            return line
    raise AssertionError("".join(lines[-30:]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_rank_0_tells_what_the_rank_that_it_waits_for_does_and_the_run_goes_on(
    workers: int, config: Path, tmp_path: Path
) -> None:
    """Rank 1 gets no data for step 5 and is stopped meanwhile, and again before step 10."""
    from ..pretrain.train_runs import launch, losses

    run, script = tmp_path / "run", tmp_path / "standing.py"
    script.write_text(STANDING.format(word=str(tmp_path)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    options = ["watch.watchdog_s=1.5", f"data.workers={workers}"]
    process = launch(config, run, 2, *options, launcher=torchrun, own_group=True)
    try:
        told = line_with(process, "no step has ended for", "after step 4: in ")  # a collective
        assert told.startswith("rank 0: ")
        assert ": in a collective, where it waits: rank 1 is waiting for data (its batch comes from " in told
        assert f".tar); stacks are in {run / 'stacks' / 'rank_00000.txt'}" in told
        stacks = [(run / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
        assert "s: in a collective\n" in stacks[0].partition("step 4, ")[2]
        assert "s: waiting for data (its batch comes from " in stacks[1].partition("step 4, ")[2]
        assert "standing.py" in stacks[1].partition("step 4, ")[2]  # where it reads, in a worker, too
        assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
        # and not what it answered before
        line_with(
            process, "no step has ended for", "after step 4: in ", "rank 1 is not answering: see its host"
        )
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
        (tmp_path / "go").touch()
        told = line_with(process, "no step has ended for", "after step 9: in ")
        assert told.startswith("rank 0: ")
        assert "where it waits: rank 1 is not answering: see its host; stacks are in" in told
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(OSError):  # torchrun's ranks have groups of their own; a stopped one hears nothing
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        process.communicate()
    assert [step for step, _ in losses(run)] == [*range(1, 21)]
