"""Saving beside the training: the snapshot is of its moment, failures are survived, and nothing is kept from
the loop."""

import errno
import gc
import json
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain import checkpoint, saver
from diptych.pretrain.checkpoint import newest_checkpoint, read_document, verify
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver

from .states import contents, make_state, step, tensors

WRITE = checkpoint.write_files


def make(run: Path, state: Any = None, **config: Any) -> tuple[Saver, list[dict[str, Any]]]:
    """A saver of a run folder, and the rows that it tells."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").touch()
    made = Saver(run, state or make_state(), CheckpointConfig(every_steps=1, **config))
    rows: list[dict[str, Any]] = []
    made.tell = rows.append
    return made, rows


class Gate:
    """Holds the writing until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        monkeypatch.setattr(checkpoint, "write_files", self.write)

    def write(self, *arguments: Any) -> Any:
        assert self.open.wait(20)
        return WRITE(*arguments)


def test_training_while_the_thread_writes_does_not_leak_into_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, alone = make_state(), make_state()
    for state in (beside, alone):
        torch.manual_seed(1)
        step(state)
        if state is alone:
            make(tmp_path / "alone", alone, asynchronous=False)[0].save()
            break
        gate = Gate(monkeypatch)
        made, _ = make(tmp_path / "beside", beside)
        made.save()
        kept = torch.get_rng_state()
        for _ in range(5):
            step(beside)
        assert newest_checkpoint(tmp_path / "beside") is None
        gate.open.set()
        made.wait()
        torch.set_rng_state(kept)
    names = [tmp_path / name / "checkpoints" / "step_00000001" for name in ("beside", "alone")]
    assert contents(names[0]) == contents(names[1])
    assert len(contents(names[0])) == 6
    assert verify(names[0]) is None
    assert not tensors(names[0])["train_model.safetensors/logit_scale"].equal(beside.clip.logit_scale)


def test_no_copy_of_the_state_outlives_its_save(tmp_path: Path) -> None:
    made, _ = make(tmp_path / "run")
    gc.collect()
    gc.disable()
    try:
        made.save()
        assert made._now is not None
        copy = weakref.ref(made._now.snapshot)
        assert copy() is not None
        made.wait()
        assert copy() is None
    finally:
        gc.enable()


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    state = make_state()
    made, rows = make(tmp_path / "run", state)
    step(state)
    made.finish()
    drawn = torch.rand(3)
    other = make_state(seed=9)
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    other.load(newest)
    assert (other.step, other.samples_seen, other.stream.at) == (1, 8, 1)
    assert torch.rand(3).equal(drawn)
    again, _ = make(tmp_path / "again", other)
    again.saved_step = 0
    torch.manual_seed(5)
    again.finish()
    one, two = tensors(newest), tensors(tmp_path / "again" / "checkpoints" / newest.name)
    assert one.keys() == two.keys()
    assert [n for n, v in one.items() if not v.equal(two[n])] == ["rng.safetensors/rank_00000/cpu"]
    (row,) = rows
    assert row["saved_step"] == 1
    assert row["bytes"] == sum(p.stat().st_size for p in newest.iterdir()) - (
        (newest / "manifest.json").stat().st_size
    )


def test_one_save_is_in_flight_and_a_wait_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    made, rows = make(tmp_path / "run")
    step(made.state)
    made.save()
    assert made.flags() == [0, 0]
    made.heed(0, 0)
    step(made.state)
    threading.Timer(0.5, gate.open.set).start()
    monkeypatch.setattr("diptych.pretrain.saver.NOTABLE_S", 0.0)
    made.save()
    assert made.saved_step == 1
    assert [row["saved_step"] for row in rows if "saved_step" in row] == [1]
    (told,) = [row["warning"] for row in rows if "warning" in row]
    assert "the checkpoint of step 1, which was still being written when that of step 2 was due" in told
    while made.flags() == [0, 0]:
        time.sleep(0.01)
    made.heed(*made.flags())
    assert made.saved_step == 2
    assert made.flags() == [0, 0]


def test_a_mistake_in_the_thread_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(checkpoint, "write_files", broken)
    made, _ = make(tmp_path / "run")
    step(made.state)
    made.save()
    with pytest.raises(ZeroDivisionError, match="ours"):
        made.wait()


class Disk:
    """A disk that is full for so many saves, each time after some bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.times = times
        monkeypatch.setattr(checkpoint, "write_files", self.write)
        monkeypatch.setattr(saver, "LAST_PAUSES_S", (0.0, 0.0, 0.0))

    def write(self, folder: Path, *arguments: Any) -> Any:
        if self.times > 0:
            self.times -= 1
            folder.mkdir()
            (folder / "rng.safetensors").write_bytes(b"abc")
            raise OSError(errno.ENOSPC, "No space left on device")
        return WRITE(folder, *arguments)


def test_a_failed_save_is_told_tried_again_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, times=2)
    made, rows = make(tmp_path / "run", max_failed_saves=3)
    for _ in range(4):
        step(made.state)
        made.save()
        made.wait()
    assert [row.get("failed_saves") or row.get("saved_step") for row in rows] == [1, 2, 3, 4]
    assert "No space left" in rows[0]["warning"]
    assert "saved is step 0 (failure 1, of 3 in a row" in rows[0]["warning"]
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000004"]


def test_it_is_tried_again_after_a_while_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, times=1)
    made, _ = make(tmp_path / "run", retry_s=60)
    step(made.state)
    made.save()
    made.wait()
    assert made.flags() == [0, 0]
    made._retry_at -= 60
    assert made.flags() == [0, 1]
    made.heed(*made.flags())
    assert made.due(3)
    made.finish()
    assert made.flags() == [0, 0]
    assert made.saved_step == 1


def test_too_many_failures_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, times=9)
    made, rows = make(tmp_path / "run", max_failed_saves=2)
    step(made.state)
    made.save()
    made.wait()
    step(made.state)
    made.save()
    with pytest.raises(UserError, match=r"max_failed_saves: 2 saves in a row.*No space left.*after step 0"):
        made.wait()
    assert len(rows) == 2
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(("times", "fails"), [(2, False), (3, True)])
def test_the_last_save_is_tried_a_few_times(
    times: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, times)
    made, rows = make(tmp_path / "run", max_failed_saves=1)
    step(made.state)
    if fails:
        with pytest.raises(UserError, match=r"No space left.*tried 3 times.*goes on after step 0"):
            made.finish()
    else:
        made.finish()
        assert made.saved_step == 1
    assert len(rows) == 3


def test_a_run_folder_that_has_vanished_is_not_made_anew(tmp_path: Path) -> None:
    made, rows = make(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    step(made.state)
    made.save()
    made.wait()
    assert "no longer holds this run" in rows[0]["warning"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_best_and_the_multiples_stay(tmp_path: Path) -> None:
    best = {"metric": "val/text_to_image_R@1", "count": 1}
    made, _ = make(tmp_path / "run", keep=1, keep_every_steps=4, keep_best=best)
    for score in (0.1, 0.5, 0.3, 0.2, 0.1, 0.4):
        step(made.state)
        made.scored({"val/text_to_image_R@1": score})
        made.save()
        made.wait()
    left = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(p.name[-2:]) for p in left] == [2, 4, 6]
    facts = json.loads((left[0] / "manifest.json").read_text())
    assert facts["metrics"] == {"val/text_to_image_R@1": 0.5}
    assert (facts["schema"], facts["samples_seen"], facts["world_size"]) == (2, 16, 1)


PARTS = ["optimizer (optimizer.safetensors)", "random states (rng.safetensors)", "stream (trainer.json)"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_and_may_be_left_out(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, _ = make(tmp_path / "run")
    step(made.state)
    made.finish()
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    file = part.partition("(")[2].rstrip(")")
    if file == "trainer.json":
        document = read_document(folder / file)
        del document["stream"]
        (folder / file).write_text(json.dumps(document))
    else:
        (folder / file).unlink()
    other = make_state(seed=3)
    with pytest.raises(UserError, match=r"resume.allow_partial") as caught:
        other.load(folder)
    assert f"lacks {part};" in str(caught.value)
    other.load(folder, allow_partial=True)
    assert f"lacks {part}, which begins anew" in caplog.text
    assert other.step == 1
    assert all(p.equal(q) for p, q in zip(other.clip.parameters(), made.state.clip.parameters(), strict=True))


def test_another_model_is_one_sentence(tmp_path: Path) -> None:
    made, _ = make(tmp_path / "run")
    step(made.state)
    made.finish()
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    with pytest.raises(UserError, match=r"holds another model \(\d+ tensors differ, text\.") as caught:
        make_state(text={"width": 48}).load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"optim.ema_decay: .* trained with an average"):
        make_state(ema=False).load(folder)
