"""Whole fine-tuning runs on real gloo processes: equal to one process, killed, carried over to one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.files import temporary_name

from ..faults.test_stop import gone, ranks_of
from ..finetune.fold_runs import pieces
from ..finetune.labelled import write_config, write_task
from ..finetune.runs import contents, timeless

SHORT = "adapt: {method: lp_ft, encoder_lr: 1.0e-3, encoder_batch_size: 32, encoder_epochs: 2}"
HEADS = f"{{late: {{op: late}}, cross: {{op: cross, width: 16}}, tuned: {{op: bilinear, {SHORT}}}}}"
CV = ("eval.cv={folds: 2, repeats: 1}", "search={trials: 2}")


def launch(folder: Path, processes: int, out: str, *words: str) -> subprocess.Popen[str]:
    """A run as a user starts it."""
    torchrun = ["-m", "diptych.pretrain.launch", f"--nproc-per-node={processes}"]
    command = ["-m", "diptych.finetune", str(folder / "finetune.yaml"), f"out={folder / out}", *words]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DIPTYCH_CACHE": str(folder / f"cache_{out}")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def left(run: Path) -> dict[str, Any]:
    """All that a run leaves, without times."""
    found: dict[str, Any] = dict(pieces(run)) | {"weights": contents(run)}
    found["results"] = timeless(json.loads((run / "results.json").read_text()))
    found["lines"] = (run / "metrics.jsonl").read_text()
    found["predictions"] = (run / "predictions.parquet").read_bytes()
    found["files"] = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    write_task(root, names=4)
    write_config(root, HEADS)
    return root


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Any]:
    """The undisturbed run of one process."""
    finish(launch(folder, 1, "alone", *CV))
    return left(folder / "alone")


@pytest.mark.slow
def test_dealt_trainings_leave_what_one_process_leaves(folder: Path, truth: dict[str, Any]) -> None:
    out = finish(launch(folder, 2, "dealt", *CV))
    assert out.count("wrote ") == 2  # one process tells the results
    found = left(folder / "dealt")
    for what in truth:
        assert found[what] == truth[what], what


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all", "launcher"])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    whom: str, folder: Path, truth: dict[str, Any]
) -> None:
    """Killed when some trainings are done, others have epochs, and others have not begun; processes whose
    launcher is killed end by themselves."""
    process = launch(folder, 2, f"killed_{whom}", *CV)
    run = folder / f"killed_{whom}"
    while not list(run.glob("folds/*/*/training/tuned/*/checkpoints/step_*")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)
    for pid in (process.pid, *(ranks_of(process).values() if whom == "all" else ())):
        os.kill(pid, signal.SIGKILL)
    assert not gone(str(run))
    process.communicate()
    assert not (run / "results.json").exists()
    temporary_name(run / "folds" / "results.json").touch()  # as a kill in mid-write leaves it
    finish(launch(folder, 1, run.name, *CV))
    found = left(run)
    for what in truth:
        assert found[what] == truth[what], what


@pytest.mark.slow
def test_a_mistake_and_a_killed_process_are_one_sentence_each(folder: Path) -> None:
    process = launch(folder, 2, "wrong", "model.checkpoint=/no/where")
    _, err = process.communicate(timeout=120)
    told = [line for line in err.splitlines() if "error: " in line or "Traceback" in line]
    assert process.returncode == 2
    assert len(told) == 1
    assert "/no/where" in told[0]
    process = launch(folder, 2, "lost", *CV)
    while not list((folder / "lost").glob("folds/*/*/training")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert "Traceback" not in err
    assert err.count("the same command") == 1
