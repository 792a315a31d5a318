"""What a run that stands still tells, and the time limits of its collectives."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from diptych.data.stream import open_stream
from diptych.pretrain import distributed, watch
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.watch import Watch, WatchConfig, record_flights

from .train_runs import load, make_data, write_config


class Standing:
    """A stream without workers, of known shards."""

    def worker_stacks(self) -> str:
        return ""

    def shards_due(self) -> list[str]:
        return ["00003.tar", "00007.tar"]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def standstill(tmp_path: Path, caplog: pytest.LogCaptureFixture, body: Any) -> tuple[list[str], str]:
    """What is told while ``body`` runs in a thread that a watch looks after."""
    with caplog.at_level(logging.WARNING):
        run = Watch(WatchConfig(watchdog_s=0.2), tmp_path)
        run.follow(lambda: 12, Standing())

        def work() -> None:
            run._main = threading.get_ident()
            body()

        with run:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    return [record.getMessage() for record in caplog.records], (
        tmp_path / "stacks/rank_00000.txt"
    ).read_text()


def test_a_standstill_is_told_once_per_doubled_time_with_stacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines, stacks = standstill(tmp_path, caplog, lambda: until(lambda: len(caplog.records) == 3))
    passed = [cast(tuple[Any, ...], record.args)[1] for record in caplog.records]
    assert passed[0] >= 0.2
    assert all(late >= 2 * early for early, late in pairwise(passed))
    assert "after step 12: computing; stacks are in" in lines[0]
    assert "in work" in stacks
    assert stacks.count("== ") == len(lines)


def test_waiting_for_data_is_called_so_with_the_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scope: dict[str, Any] = {
        "__name__": "diptych.data.stream",
        "until": until,
        "told": lambda: caplog.records,
    }
    exec("def __next__():\n    until(told)", scope)
    lines, _ = standstill(tmp_path, caplog, scope["__next__"])
    assert "waiting for data (its batch comes from 00003.tar, 00007.tar)" in lines[0]


def test_steps_that_end_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with Watch(WatchConfig(watchdog_s=0.5), tmp_path) as run:
        run.follow(lambda: int((time.monotonic() - start) / 0.1), Standing())
        time.sleep(1.0)
    assert not caplog.records
    assert not (tmp_path / "stacks").exists()


def test_time_limits_change_with_the_phase_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(distributed, "set_timeout", limits.append)
    run = Watch(WatchConfig(timeout_s=5, startup_timeout_s=50), tmp_path)
    for _ in range(3):
        run.step_done()
    run.be_patient()
    run.be_patient()
    run.step_done()
    assert limits == [5, 50, 5]


def test_the_flight_recorder_is_switched_on_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_FR_BUFFER_SIZE": "7"})
    record_flights(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/stacks/nccl_"


def test_workers_write_their_stacks_and_a_stopped_one_is_named(tmp_path: Path) -> None:
    file = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    config: PretrainConfig = load(file, tmp_path / "run", "data.workers=2")
    tokenizer = watch_tokenizer()
    with open_stream(config.data, seed=0, global_batch_size=16, image_size=32, tokenizer=tokenizer) as stream:
        next(stream)
        due = stream.shards_due()
        text = ""

        def all_told() -> bool:  # a worker that has only begun may not answer yet
            nonlocal text
            text = stream.worker_stacks()
            return text.count("_worker_loop") == 2

        until(all_told)
        assert set(due) <= set(path.name for path in (tmp_path / "data/train").glob("*.tar"))
        assert due
        assert text.count("data worker") == 2
        batches: Any = stream._batches
        worker = batches._workers[1]
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitpid(worker.pid, os.WUNTRACED)
        try:
            assert f"data worker 1 (process {worker.pid}) is stopped" in stream.worker_stacks()
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        next(stream)


def watch_tokenizer() -> Any:
    from diptych.data.text import tokenizer_for

    return tokenizer_for({"context_length": 12}, None)


def test_what_a_collective_is_called() -> None:
    scope: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d"}
    exec("import sys\ndef all_reduce():\n    return sys._getframe()", scope)
    assert watch.doing_now(scope["all_reduce"]()) == "in a collective"
