"""Every kind of damage to a checkpoint is found, named, and answered by the one before."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.pretrain.checkpoint import newest_checkpoint, newest_or_none, verify
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver

from ..pretrain.states import make_state, step


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    state = make_state()
    saver = Saver(run, state, CheckpointConfig(every_steps=1), {"config_sha256": "0" * 64})
    for _ in range(2):
        step(state)
        saver.scored({"val/image_to_text_R@5": 0.25})
        saver.save()
    saver.finish()
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def is_taken_back(run: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint of step 1 is taken, and what is wrong with the other is told."""
    newer = run / "checkpoints" / "step_00000002"
    caplog.clear()
    assert newest_checkpoint(run) == run / "checkpoints" / "step_00000001"
    (told,) = caplog.messages
    assert told.endswith("going back to an older checkpoint")
    assert str(newer) in told
    assert file in told
    assert verify(newer) is not None


NAMES = [
    "manifest.json",
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "train_model.safetensors",
    "trainer.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_flipped_bit_is_found(name: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = run / "checkpoints" / "step_00000002" / name
    whole = file.read_bytes()
    draw = random.Random(name)
    places = [draw.randrange(len(whole)) for _ in range(12)]
    if file.suffix == ".safetensors":  # the header's length, the header, the first and the last value
        end = 8 + int.from_bytes(whole[:8], "little")
        places += [0, 7, 8, end - 1, end, len(whole) - 1]
    elif name == "manifest.json":  # a change in every line
        starts = [0] + [i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10]
        places += [draw.randrange(a, b) for a, b in zip(starts, [*starts[1:], len(whole)], strict=True)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        is_taken_back(run, name, caplog)
    file.write_bytes(whole)
    assert newest_checkpoint(run) == file.parent


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", ["cut", "emptied", "lengthened", "removed"])
def test_a_file_that_is_cut_or_gone_is_named(
    harm: str, name: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = run / "checkpoints" / "step_00000002" / name
    whole = file.read_bytes()
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:-1], "emptied": b"", "lengthened": whole + b"\n"}[harm])
    is_taken_back(run, name, caplog)


def test_a_run_without_a_whole_checkpoint_does_not_start_over(run: Path) -> None:
    assert newest_or_none(run / "nowhere") is None
    for folder in (run / "checkpoints").iterdir():
        (folder / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds 2 checkpoints of which none is whole; remove that folder"):
        newest_or_none(run)


def test_a_newer_schema_is_refused_and_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diptych.pretrain import manifest

    folder = run / "checkpoints" / "step_00000002"
    facts = json.loads((folder / "manifest.json").read_text())
    del facts["sha256"]
    facts["schema"] = 3
    (folder / "manifest.json").write_text(manifest._text(facts))
    with pytest.raises(
        UserError, match=r"written by a newer version of Diptych \(its schema is 3, .* up to 2\)"
    ):
        newest_checkpoint(run)
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--yes"]) == 0
    assert folder.is_dir()
    assert (run / "checkpoints" / "step_00000001").is_dir()


def test_manifests_of_the_first_version_are_read(run: Path) -> None:
    folder = run / "checkpoints" / "step_00000002"
    facts = json.loads((folder / "manifest.json").read_text())
    old = {"step": facts["step"], "files": facts["files"]}
    (folder / "manifest.json").write_text(json.dumps(old, indent=1) + "\n")
    assert newest_checkpoint(run) == folder
    old["files"]["../../config.yaml"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(old, indent=1) + "\n")
    assert "outside its folder" in str(verify(folder))


@pytest.mark.parametrize(
    "own", [{"keep_every_steps": 1}, {"keep_best": {"metric": "val/image_to_text_R@5", "count": 2}}]
)
def test_pruning_keeps_what_the_runs_own_config_keeps(
    own: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {
        "data": {"train": "shards"},
        "model": {"arch": "ViT-B-32"},
        "train": {"epochs": 1},
    }
    config |= {"evaluate": {"data": "held-out"}, "checkpoint": {"every_steps": 1, **own}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "5", "--yes"]
    assert main(words) == 0
    assert capsys.readouterr().out == "0 checkpoints removed (0.0 MB), 2 stay\n"
    (run / "config.yaml").write_text("model: [")
    assert main(words) == 2
    assert str(run / "config.yaml") in capsys.readouterr().err
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_the_command_lists_verifies_and_prunes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for word in ("step        2", "16 samples", "sizes right", "MB", "image_to_text_R@5 0.250", "best"):
        assert word in lines[0]
    assert "best" not in lines[1]
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["samples_seen"], row["problem"]) for row in rows] == [
        (2, 16, None),
        (1, 8, None),
    ]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step 2: whole\nstep 1: whole\n"
    file = run / "checkpoints" / "step_00000002" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert f"step 2: {file} is damaged (its sha256 differs)" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(file.parent.with_name("step_00000001"))]) == 0
    assert capsys.readouterr().out == "step 1: whole\n"
    assert main(["checkpoint", "verify", str(file.parent.with_name("step_00000003"))]) == 2
    assert f"list {run}` names all" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "step 2 does not count: " in out
    assert "0 checkpoints removed" in out
    data[-3] ^= 4
    file.write_bytes(data)
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "1", "--yes"]) == 0
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    out = capsys.readouterr().out
    assert "would remove" in out
    assert "1 checkpoint (" in out
    assert "1 stay; add --yes" in out
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--yes"]) == 0
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]
    for words, told in (
        (["list", str(run / "x")], "no run folder"),
        (["prune", str(run), "--keep", "0"], "--keep"),
    ):
        assert main(["checkpoint", *words]) == 2
        assert told in capsys.readouterr().err
