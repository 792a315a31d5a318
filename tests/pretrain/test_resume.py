"""Where a run starts, what may change then, and that it is alone in its folder."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.pretrain import owner
from diptych.pretrain.checkpoint import newest_checkpoint, read_document
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.owner import RunLock
from diptych.pretrain.run import FIXED, FREE, GUARDED, NONE, compare, write_config
from diptych.pretrain.train import train

from .train_runs import BATCH, held, load, losses, make_data
from .train_runs import write_config as write_file

SHORT = f"train.total_samples={4 * BATCH}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    return write_file(folder / "run.yaml", make_data(folder / "data"), evaluate={"data": None})


@pytest.fixture(scope="module")
def done(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    out = tmp_path_factory.mktemp("done") / "run"
    train(load(file, out, SHORT))
    return out


class Facts:
    """Keeps what a start tells."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def start(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def row(self, row: dict[str, Any]) -> None:
        pass


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Dotted keys of a config, a section's own where a section is a model."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{key}" for key in inner.model_fields)
        else:
            yield name


def in_child(work: Callable[[], object]) -> None:
    """Run in a process of its own; its UserError is raised here."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            work()
        except UserError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        if text := pipe.read():
            raise UserError(text)


def test_every_key_of_the_config_is_in_exactly_one_class() -> None:
    classes = [*FREE, *GUARDED, *FIXED]
    assert len(classes) == len(set(classes))
    every = list(keys(PretrainConfig))
    for key in every:
        found = [one for one in classes if key == one or key.startswith(one + ".")]
        assert len(found) == 1, (key, found)
    for one in classes:
        assert any(key == one or key.startswith(one + ".") for key in every), f"{one} is no key"


def test_never_and_must_refuse_in_one_sentence(file: Path, done: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resume: never, but .* holds 1 checkpoint; set out"):
        train(load(file, done, SHORT, "resume=never"))
    with pytest.raises(UserError, match=r"resume: must, but .* holds no checkpoint"):
        train(load(file, tmp_path / "new", SHORT, "resume=must"))
    assert not (tmp_path / "new").exists()
    assert train(load(file, done, SHORT, "resume=must")).step == 4
    assert train(load(file, tmp_path / "new", SHORT, "resume=never")).step == 4


def test_a_shorthand_takes_no_keys_by_accident(file: Path, done: Path, tmp_path: Path) -> None:
    assert load(file, tmp_path, "resume=must").resume.start == "must"
    assert load(file, tmp_path, "resume.force=true").resume.start == "auto"
    with pytest.raises(UserError, match=r"resume is 'must' and has no keys"):
        load(file, tmp_path, "resume=must", "resume.force=true")
    for out in (tmp_path / "run", done):  # also where there is something to go on from
        with pytest.raises(UserError, match=r"resume.start: muts .*did you mean must"):
            train(load(file, out, SHORT, "resume=muts"))


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_run_takes_up_another_and_counts_on(what: str, file: Path, done: Path, tmp_path: Path) -> None:
    newest = newest_checkpoint(done)
    assert newest is not None
    given = done if what == "run" else newest
    longer = f"train.total_samples={6 * BATCH}"
    with pytest.raises(
        UserError, match=r"train.total_samples was 64, now 96: the schedule ends with the run"
    ):
        train(load(file, tmp_path / "run", longer, f"resume={given}"))
    force = f"resume={{start: {given}, force: true}}"
    show = Facts()
    assert train(load(file, tmp_path / "run", longer, force), show).step == 6
    assert show.facts["step"] == 4
    assert [step for step, _ in losses(tmp_path / "run")] == [5, 6]
    assert train(load(file, tmp_path / "run", longer, force)).step == 6  # its own checkpoint, from now on
    assert newest_checkpoint(done) == newest
    (row,) = map(json.loads, (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
    assert row["step"] == 4
    assert row["forced"] == {"train.total_samples": [64, 96]}


def test_a_checkpoint_that_was_copied_away_is_compared_too(file: Path, done: Path, tmp_path: Path) -> None:
    newest = newest_checkpoint(done)
    assert newest is not None
    copied = Path(shutil.copytree(newest, tmp_path / "elsewhere"))
    given = (SHORT, f"resume={copied}")
    with pytest.raises(UserError, match=r"optim.lr was 0.002, now 0.5: .*resume.force=true"):
        train(load(file, tmp_path / "run", *given, "optim.lr=0.5"))
    assert train(load(file, tmp_path / "run", *given)).step == 4
    (copied / "config.yaml").unlink()  # its manifest tells
    with pytest.raises(UserError, match=r"config.yaml is missing; give another checkpoint"):
        train(load(file, tmp_path / "other", *given))
    facts = read_document(copied / "manifest.json")
    del facts["sha256"], facts["schema"], facts["files"]["config.yaml"]  # as version 0.1.0 wrote it
    (copied / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"has no config.yaml, so that settings cannot be compared"):
        train(load(file, tmp_path / "other", *given))
    forced = f"resume={{start: {copied}, force: true}}"
    assert train(load(file, tmp_path / "other", SHORT, forced)).step == 4


def test_a_run_folder_of_which_only_checkpoints_are_left_goes_on_in_its_group(
    file: Path, tmp_path: Path
) -> None:
    out, offline = tmp_path / "run", "tracking.wandb=offline"
    train(load(file, out, SHORT, offline))
    group = (out / "wandb_group.txt").read_text()
    shutil.move(out, tmp_path / "old")
    out.mkdir()
    shutil.copytree(tmp_path / "old" / "checkpoints", out / "checkpoints")
    longer = f"train.total_samples={6 * BATCH}"
    with pytest.raises(UserError, match=r"train.total_samples was 64, now 96"):
        train(load(file, out, longer, offline))
    assert train(load(file, out, longer, offline, "resume.force=true")).step == 6
    assert (out / "wandb_group.txt").read_text() == group
    train(load(file, tmp_path / "branch", SHORT, offline, f"resume={tmp_path / 'old'}"))
    assert (tmp_path / "branch" / "wandb_group.txt").read_text() != group


@pytest.mark.parametrize(
    "setting",
    ["project=a/b", "project=''", "entity='a:b'", "tags=['']", f"tags=[{'x' * 65}]", r'project="a\x1bb"'],
)
def test_names_that_weights_and_biases_refuses_are_refused_by_key(
    setting: str, file: Path, tmp_path: Path
) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"tracking: {key}.* is no (name|tag) for W&B; give") as caught:
        load(file, tmp_path, f"tracking.{setting}", "tracking.wandb=offline")
    assert str(caught.value).isprintable()
    assert load(file, tmp_path, f"tracking.{setting}", "tracking.wandb=off")  # they go nowhere
    with pytest.raises(UserError, match="holds a NUL character"):
        load(file, tmp_path, r'out="a\0b"')


def test_harmless_changes_are_told_and_others_refused_with_reasons(
    file: Path, done: Path, tmp_path: Path
) -> None:
    show = Facts()
    train(load(file, done, SHORT, "train.log_every_steps=3", "data.workers=1"), show)
    assert "taken: data.workers 0 -> 1, train.log_every_steps 1 -> 3" in show.facts["notes"]
    with pytest.raises(UserError) as caught:
        train(load(file, done, SHORT, "seed=1", "optim.lr=0.1"))
    message = str(caught.value)
    assert "seed was 0, now 1: the order of samples follows from it" in message
    assert "optim.lr was 0.002, now 0.1: " in message
    assert "resume.force=true" in message
    with pytest.raises(UserError, match=r"model.embed_dim was 16, now 8: .*model.pretrained") as caught:
        train(load(file, done, SHORT, "model.embed_dim=8", "resume.force=true"))
    assert "resume.force=true" not in str(caught.value)


def test_a_forced_change_of_order_goes_on_with_the_next_epoch(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A global batch of another size: samples seen count on, and as many come as the config says."""
    out = tmp_path / "run"
    train(load(file, out, SHORT))
    wide = (f"train.total_samples={6 * BATCH}", f"train.global_batch_size={BATCH // 2}", "resume.force=true")
    with caplog.at_level(logging.WARNING):
        outcome = train(load(file, out, *wide))
    assert "goes on with epoch 2" in caplog.text
    assert outcome.step == outcome.total_steps == 8
    newest = newest_checkpoint(out)
    assert newest is not None
    trainer = read_document(newest / "trainer.json")
    assert (trainer["samples_seen"], trainer["stream"]["epoch"]) == (6 * BATCH, 2)
    assert load_config(PretrainConfig, out / "config.yaml").train.global_batch_size == BATCH // 2


def test_moved_data_is_no_other_setting_but_other_weights_are(file: Path, tmp_path: Path) -> None:
    def change(*words: str) -> Any:
        return compare(load(file, tmp_path, *words), [tmp_path / "config.yaml"])

    weighed = "data.train=[{{data: {}, weight: {}}}]"
    write_config(load(file, tmp_path, weighed.format("here", 1.0)), tmp_path, NONE, 0)
    assert change(weighed.format("/elsewhere/moved", 1.0)) == NONE
    with pytest.raises(UserError, match=r"other settings \(data.train was .*it says what an epoch is"):
        change(weighed.format("here", 2.0))
    assert change(weighed.format("here", 1.0), "data.max_bad_fraction=0.5", "data.on_bad=raise").forced == {}


def test_a_second_process_is_refused_until_the_first_is_gone(file: Path, done: Path) -> None:
    before = sorted(done.iterdir())
    with (
        held(done) as pid,
        pytest.raises(UserError, match=rf"is in use by process {pid} on .* since 20.*; wait"),
    ):
        train(load(file, done, SHORT))
    assert (done / "lock").exists()
    assert train(load(file, done, SHORT)).step == 4
    assert sorted(done.iterdir()) == before


def test_the_lock_is_its_owners_and_not_his_childrens(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run").take()
    with pytest.raises(UserError, match="is in use by process"):
        in_child(lambda: RunLock(tmp_path / "run").take())
    lock.release()
    assert not (tmp_path / "run").exists()  # nothing else was in it
    with RunLock(tmp_path / "run") as again:
        (tmp_path / "run" / "config.yaml").touch()
        assert again.held
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_process_that_may_be_a_restarted_one_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with held(run) as pid:
        with pytest.raises(UserError, match="is in use by process"):
            RunLock(run).take(patient=False)
        assert not caplog.messages
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        RunLock(run).take().release()
    assert [text for text in caplog.messages if "waiting up to 60 s" in text] == caplog.messages
    monkeypatch.setattr(owner, "RESTART_S", 0.6)
    began = time.monotonic()
    with held(run), pytest.raises(UserError, match="is in use by process"):
        RunLock(run).take()
    assert time.monotonic() - began >= 0.6


def test_a_lock_that_somebody_removes_is_taken_again_unless_another_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(owner, "LOOK_S", 0.0)
    with RunLock(run) as lock:
        (run / "config.yaml").touch()
        (run / "lock").unlink()
        lock.keep()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            in_child(lambda: RunLock(run).take())
        (run / "lock").unlink()
        with (
            held(run) as pid,
            pytest.raises(UserError, match=rf"was removed while .* in use by process {pid} on .*; wait"),
        ):
            lock.keep()
    assert (run / "lock").exists()  # the other's
    with RunLock(run) as lock:
        run.rename(tmp_path / "disk")  # a mount that vanishes
        run.mkdir()
        lock.keep()
        assert list(run.iterdir()) == []


def test_a_run_whose_folder_another_has_taken_over_ends(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Thief(Facts):
        def row(self, row: dict[str, Any]) -> None:
            if row["step"] == 2:
                (out / "lock").unlink()
                stack.enter_context(held(out))
                time.sleep(owner.LOOK_S)

    with (
        ExitStack() as stack,
        pytest.raises(UserError, match=r"lock was removed while this run trained, and .* is in use by"),
    ):
        train(load(file, out), Thief())
    assert newest_checkpoint(out) is None


@pytest.mark.parametrize(("was", "now"), PretrainConfig.moved.items())
def test_a_key_of_an_earlier_version_is_told_with_where_it_stands(
    file: Path, tmp_path: Path, was: str, now: str
) -> None:
    with pytest.raises(UserError, match=rf"{was}: stands under {now} now"):
        load(file, tmp_path, f"{was}=7")
    section, key = now.split(".")
    assert getattr(getattr(load(file, tmp_path, f"{now}=7"), section), key) == 7


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(file: Path, done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"saved step 4, but checkpoints/ holds none; put one back there"):
        train(load(file, run, SHORT))
    (run / "checkpoints").symlink_to(tmp_path / "nowhere")  # a disk that is not mounted
    with pytest.raises(UserError, match="saved step 4, but checkpoints/ holds none"):
        train(load(file, run, SHORT, "resume=never"))
    (run / "checkpoints").unlink()
    (run / "checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Not a directory\)"):
        train(load(file, run, SHORT))
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "finished.json").exists()
    (run / "checkpoints").unlink()
    (tmp_path / "kept").rename(run / "checkpoints")
    assert train(load(file, run, SHORT)).step == 4


def test_lines_that_are_no_rows_cost_no_rows(
    file: Path, done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    (run / "finished.json").unlink()
    whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = [
        b"garbage\n",
        b"\n",
        b"42\n",
        b'{"kind": "note"}\n',
        b'{"step": "2"}\n',
        b"\xff\xfe\n",
        b"[" * 9999 + b"\n",
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([whole[0], *odd, *whole[1:], b'{"kind": "tra']))
    for name in ("quarantine.jsonl", "bad_steps.jsonl"):
        (run / name).write_bytes(b"{}\n5\n")
    train(load(file, run, SHORT))
    assert (run / "metrics.jsonl").read_bytes() == b"".join([whole[0], *odd, *whole[1:]])
    assert (
        f"{run / 'metrics.jsonl'}: line 2 is no row of this run and is passed over (7 in all)" in caplog.text
    )


def test_a_fine_tunings_folder_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out: .*run holds a fine-tuning; set out to another folder"):
        train(load(file, tmp_path / "run", SHORT))
