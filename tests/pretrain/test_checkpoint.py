"""Checkpoint folders: whole or absent, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain import checkpoint


def write(run: Path, step: int, keep: int = 2) -> Path:
    tensors = {"open_clip_model.safetensors": {"w": torch.full((1000,), float(step))}}
    return checkpoint.save(run, step, tensors=tensors, documents={"trainer.json": {"step": step}}, keep=keep)


def test_the_newest_whole_checkpoint_is_found_and_older_ones_go(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) is None
    for step in (5, 10, 1000000000):
        assert checkpoint.newest_checkpoint(tmp_path) != write(tmp_path, step)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000010", "step_1000000000"]
    newest = checkpoint.newest_checkpoint(tmp_path)
    assert newest is not None
    assert checkpoint.read_tensors(newest / "open_clip_model.safetensors")["w"][0] == 1e9
    assert checkpoint.read_document(newest / "trainer.json") == {"step": 1000000000}


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    file = newer / "open_clip_model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        (newer / "manifest.json").write_text("{")
    else:
        (newer / "manifest.json").unlink()
    assert checkpoint.newest_checkpoint(tmp_path) == older
    if "manifest" not in harm:
        assert "step_00000002" in caplog.text
    assert checkpoint.verify(newer) is not None


def test_a_full_disk_is_one_sentence_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path, 1)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left") as caught:
        checkpoint.save(tmp_path, 2, tensors={}, documents={}, write_more=full)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [first]


WRITER = """
import sys, torch
from pathlib import Path
from diptych.pretrain import checkpoint
tensors = {f"{i}.safetensors": {"w": torch.full((300_000,), 1.0)} for i in range(4)}
step = 0
while True:
    step += 1
    for part in tensors.values():
        part["w"].fill_(float(step))
    documents = {"trainer.json": {"step": step}}
    checkpoint.save(Path(sys.argv[1]), step, tensors=tensors, documents=documents, keep=1)
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_last_finished_checkpoint_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for attempt in range(6):
        run = tmp_path / str(attempt)
        command = [sys.executable, "-c", WRITER, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            time.sleep(float(rng.uniform(0, 0.2)))
            os.kill(process.pid, signal.SIGKILL)
            told = [1, *map(int, process.stdout.read().split())]
        newest = checkpoint.newest_checkpoint(run)
        assert newest is not None
        step = json.loads((newest / "trainer.json").read_text())["step"]
        assert step in (told[-1], told[-1] + 1)
        for i in range(4):
            assert checkpoint.read_tensors(newest / f"{i}.safetensors")["w"].eq(step).all()
        checkpoint.remove_leftovers(run)
        assert all(p.name.startswith("step_") for p in (run / "checkpoints").iterdir())
