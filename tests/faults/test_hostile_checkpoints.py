"""Manifests, optimizer states, layouts and random states from strangers, whose hashes are right: each is
taken or is one sentence, and what is shown of them holds nothing that a terminal would obey."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.pretrain.checkpoint import newest_checkpoint, read_document
from diptych.pretrain.resume import ResumeConfig, start_from
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver
from diptych.pretrain.sharded import layout

from ..pretrain.states import make_state, step
from .test_hostile_models import HOSTILE, changed

SCORE = "val/image_to_text_R@5"
WORSE: list[Any] = [
    *HOSTILE,
    float("inf"),
    -float("inf"),
    "a\0b",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb",
    {"\x1b[2J": 1},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    state = make_state()
    saver = Saver(run, state, CheckpointConfig(asynchronous=False), {"config_sha256": "0" * 64})
    for _ in range(2):
        step(state)
        saver.scored({SCORE: 0.25})
        saver.save()
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_00000002"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write a manifest whose own hash is right."""
    body = {key: value for key, value in facts.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": own}, indent=1) + "\n")


def refusal(use: Callable[[], object]) -> str:
    """The sentence that it ends in, "" if it does not."""
    try:
        use()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(3))
def test_a_manifest_of_somebody_else_is_taken_or_one_sentence(
    seed: int, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw, found = random.Random(seed), 0
    facts = read_document(newest(run) / "manifest.json")
    for _ in range(120):
        seal(newest(run), changed(facts, draw, WORSE, added=0.2))
        codes = [main(["checkpoint", action, str(run)]) for action in ("list", "verify")]
        codes += [main(["checkpoint", "list", "--json", str(run)])]
        codes += [main(["checkpoint", "prune", str(run), "--keep", "1"])]
        told = capsys.readouterr()
        assert set(codes) <= {0, 1}, told
        assert told.err == ""
        lines = told.out.splitlines()
        assert all(line.isprintable() and len(line) < 2000 for line in lines)
        caplog.clear()
        sentence = refusal(lambda: newest_checkpoint(run))
        assert not sentence or "newer version" in sentence
        assert all("\n" not in text for text in caplog.messages)
        found += "DAMAGED" in told.out
    assert found > 50


def test_numbers_past_every_bound_are_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = newest(run) / "manifest.json"
    facts = read_document(path)
    for key, value in {
        "step": float("inf"),
        "samples_seen": "x",
        "metrics": None,
        "written": "\x1b[2J",
    }.items():
        seal(newest(run), facts | {key: value})
        assert main(["checkpoint", "list", str(run)]) == 0
        assert f"({key!r}: " in capsys.readouterr().out
    seal(newest(run), facts | {"metrics": {"evil_R@5": 0.5}})
    assert main(["checkpoint", "list", str(run)]) == 0
    assert "evil_R@5 0.500" in capsys.readouterr().out


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


MOMENT = "visual.conv1.weight/exp_avg"
OPTIMIZERS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a short moment": lambda all_: all_.update({MOMENT: torch.zeros(2)}),
    "another shape of as many": lambda all_: all_.update({MOMENT: all_[MOMENT].flatten()}),
    "whole numbers": lambda all_: all_.update({MOMENT: all_[MOMENT].int()}),
    "a step of two": lambda all_: all_.update({"logit_scale/step": torch.ones(2)}),
    "no second moment": lambda all_: all_.pop("logit_scale/exp_avg_sq"),
    "one more": lambda all_: all_.update({"logit_scale/more": torch.ones(())}),
    "muon's": lambda all_: all_.update({"logit_scale/momentum_buffer": torch.ones(())}),
    "a parameter less": lambda all_: ([all_.pop(n) for n in list(all_) if n.startswith("logit_scale/")]),
    "a parameter more": lambda all_: all_.update({"other/step": torch.ones(())}),
    "a name without entry": lambda all_: all_.update({"other": torch.ones(())}),
}


@pytest.mark.parametrize("what", OPTIMIZERS)
def test_an_optimizer_state_that_does_not_fit_is_one_sentence_and_never_used(what: str, run: Path) -> None:
    """The fused kernel would read and write past the end of a moment that is too short."""
    rewritten(newest(run), "optimizer.safetensors", OPTIMIZERS[what])
    with pytest.raises(UserError, match="its optimizer belongs to another model or method") as caught:
        make_state(1).load(newest(run))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [torch.zeros(7).byte(), torch.zeros(5056), torch.full((5056,), 255).byte()])
def test_a_random_state_that_is_none_is_one_sentence(state: Tensor, run: Path) -> None:
    rewritten(newest(run), "rng.safetensors", lambda all_: all_.update({"rank_00000/cpu": state}))
    with pytest.raises(UserError, match=r"rng\.safetensors holds no random state"):
        make_state(1).load(newest(run))


@pytest.fixture
def parts(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint in two parts, each tensor's rows dealt to both."""
    folder = Path(shutil.copytree(saved / "checkpoints" / "step_00000002", tmp_path / "parts"))
    files = {"ema": "open_clip_model", "weights": "train_model", "optimizer": "optimizer"}
    kinds = {kind: load_file(folder / f"{name}.safetensors") for kind, name in files.items()}
    document, dealt = layout(kinds), ({}, {})
    for kind, named in kinds.items():
        for name, tensor in named.items():
            key = f"{kind}/{name}"
            if tensor.ndim == 0:
                dealt[0][key] = tensor
                continue
            middle = len(tensor) // 2
            document["tensors"][key] |= {"dim": 0, "starts": [0, middle, len(tensor)]}
            dealt[0][key], dealt[1][key] = tensor[:middle].clone(), tensor[middle:].clone()
    for rank, tensors in enumerate(dealt):
        save_file(tensors, folder / f"part_{rank:05d}.safetensors")
    (folder / "layout.json").write_text(json.dumps(document | {"world_size": 2}))
    return folder


def test_parts_are_what_they_were_made_of(parts: Path, saved: Path) -> None:
    one, two = make_state(1), make_state(2)
    one.load(parts)
    two.load(saved / "checkpoints" / "step_00000002")
    whole = two.kept_alike()
    assert one.kept_alike().keys() == whole.keys()
    assert all(tensor.equal(whole[name]) for name, tensor in one.kept_alike().items())


def test_a_layout_of_somebody_else_is_taken_or_one_sentence(parts: Path) -> None:
    draw, refused = random.Random(0), 0
    document = json.loads((parts / "layout.json").read_text())
    for _ in range(150):
        (parts / "layout.json").write_text(json.dumps(changed(document, draw, WORSE, added=0.2)))
        told = refusal(lambda: make_state(1).load(parts))
        refused += bool(told)
        assert not told or str(parts) in told
        assert "\n" not in told
    assert refused > 60


PARTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "other dimensions": lambda all_: all_.update({KEY: torch.zeros(3)}),
    "other columns": lambda all_: all_.update({KEY: all_[KEY][:, :1].contiguous()}),
    "fewer rows": lambda all_: all_.update({KEY: all_[KEY][:1]}),
    "nothing": lambda all_: all_.pop(KEY),
}
KEY = "optimizer/visual.conv1.weight/exp_avg"


@pytest.mark.parametrize("what", PARTS)
def test_parts_that_do_not_fit_their_layout_are_one_sentence(what: str, parts: Path) -> None:
    rewritten(parts, "part_00001.safetensors", PARTS[what])
    with pytest.raises(UserError) as caught:
        make_state(1).load(parts)
    assert str(parts) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [32, -1, 16, 16]},
        {"dim": 4},
        {"dim": -1},
        {"starts": []},
        {"starts": [0, 40, 32]},
        {"starts": [0, 0]},
        {"starts": [0, 16, 10**12], "shape": [10**12, 3, 16, 16]},
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(entry: dict[str, Any], parts: Path) -> None:
    document = json.loads((parts / "layout.json").read_text())
    document["tensors"][KEY] |= entry
    (parts / "layout.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        make_state(1).load(parts)
    assert str(parts) in str(caught.value)


def test_a_checkpoint_from_before_the_first_update_is_whole(tmp_path: Path) -> None:
    """Every step so far was left out: the optimizer has no state yet."""
    state = make_state()
    state.step = 2
    Saver(tmp_path, state, CheckpointConfig(asynchronous=False)).save()
    folder = tmp_path / "checkpoints" / "step_00000002"
    other = make_state(1)
    other.load(folder)
    assert other.step == 2
    assert int(other.go_back(folder)["step"]) == 2
    step(other)  # and goes on


def test_an_optimizer_that_is_missing_begins_anew_also_where_a_run_goes_back(run: Path) -> None:
    (newest(run) / "optimizer.safetensors").unlink()
    state = make_state(1)
    step(state)
    assert state.optimizer.state
    with pytest.raises(UserError, match="lacks optimizer"):
        state.go_back(newest(run))
    state.go_back(newest(run), allow_partial=True)
    assert not state.optimizer.state
    step(state)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors"])
def test_a_missing_part_is_passed_over_or_done_without(
    name: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By default for an older checkpoint, where there is none for a sentence that names part and key."""
    (newest(run) / name).unlink()
    partly = ResumeConfig(allow_partial=True)
    assert start_from(ResumeConfig(), run) == newest(run).with_name("step_00000001")
    assert f"{name} is missing; going back to an older checkpoint" in caplog.text
    assert start_from(partly, run) == newest(run)
    shutil.rmtree(newest(run).with_name("step_00000001"))
    said = rf"resume\.allow_partial=true to go on without {name}"
    with pytest.raises(UserError, match=said):
        start_from(ResumeConfig(), run)
    with pytest.raises(UserError, match=said):
        start_from(ResumeConfig(start=str(newest(run))), run.with_name("new"))
    for start in (str(newest(run)), str(run)):
        new = start_from(ResumeConfig(start=start, allow_partial=True), run.with_name("new"))
        assert new == newest(run)
    file = newest(run) / "trainer.json"  # what is damaged is no missing part
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="none is whole; remove"):
        start_from(partly, run)
