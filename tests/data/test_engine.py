"""Tasks over processes: in order, errors as they were raised, and no process left behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.data.engine import run_tasks
from diptych.data.writer import check_key

from .samples import write_tar
from .test_build_parts import content, source_of
from .test_foreign import half_samples

WARNING = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_and_tasks_are_taken_as_needed(workers: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    results = run_tasks(partial(pow, 3), tasks(), workers=workers)
    for number in range(40):
        assert next(results) == 3**number
        assert len(taken) <= number + workers + 3
    assert list(results) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_as_it_is(workers: int) -> None:
    results = run_tasks(check_key, ["a", "b", "c.d", "e"], workers=workers)
    with pytest.raises(UserError, match="has a dot"):
        list(results)


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(UserError, match="ended abruptly"):
        list(run_tasks(os._exit, [3, 4], workers=2))


SLEEPER = """
import signal, time
from contextlib import closing
from diptych.data.engine import run_tasks
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    with closing(run_tasks(time.sleep, [0, 0, 60, 60, 60], workers=2)) as results:
        next(results), next(results)
        print("begun", flush=True)
        list(results)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_when_the_parent_is_stopped(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"begun\n"
        begun = time.monotonic()
        parent.send_signal(how)
        assert parent.wait(20) != 0
        assert parent.stdout.read() == b""  # it ends when the last process that holds it has ended
    assert time.monotonic() - begun < 20


@WARNING
def test_ray_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'diptych\[ray\]'"):
        list(run_tasks(len, ["a"], engine="ray"))


@WARNING
@pytest.mark.slow
def test_ray_gives_the_same_results_and_errors() -> None:
    pytest.importorskip("ray")
    assert list(run_tasks(partial(pow, 3), range(30), workers=2, engine="ray")) == [3**n for n in range(30)]
    with pytest.raises(UserError, match="has a dot"):
        list(run_tasks(check_key, ["a", "b", "c.d", "e"], workers=2, engine="ray"))


@WARNING
@pytest.mark.slow
def test_ray_builds_indexes_and_verifies_what_processes_do(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = source_of(tmp_path)
    main = [sys.executable, "-m", "diptych.cli", "data"]
    for engine in ("local", "ray"):
        out, foreign = tmp_path / engine, tmp_path / f"{engine}-foreign"
        for number in range(3):
            write_tar(foreign / f"{number}.tar", half_samples())
        options = ["--engine", engine, "--workers", "2"]
        build = ["build", source, "--out", out, "--samples-per-shard", "4", "--max-bad-fraction", "0.5"]
        for words, code in ((build, 0), (["index", foreign], 0), (["verify", out, "--decode"], 0),
                            (["verify", foreign], 1)):  # fmt: skip
            done = subprocess.run([*main, *map(str, words), *options], capture_output=True, text=True)
            assert done.returncode == code, done.stderr
    assert content(tmp_path / "local") == content(tmp_path / "ray")
    for path in (tmp_path / "local-foreign").glob("*.idx"):
        assert path.read_bytes() == (tmp_path / "ray-foreign" / path.name).read_bytes()
