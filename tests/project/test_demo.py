"""The demo: its steps are commands that exist, its last lines say what was reached, it runs as a whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.cli.demo import plan
from diptych.cli.demo_summary import NEXT, summary

from ..finetune.report_runs import make_finetune, make_pretrain
from .commands import check_words, diptych_words, joined_lines
from .repository import ROOT


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_a_command_that_is_understood(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    steps = plan(quick=quick, processes=2)
    assert [step.name for step in steps] == ["fetch", "verify", "pretrain", "evaluate", "finetune", "report"]
    for step in steps:
        words = list(step.command)
        if step.module == "diptych.pretrain.launch":
            words = ["pretrain", *words[words.index("diptych.pretrain") + 1 :]]
        check_words(words)


def test_the_last_lines_hold_the_scores_beside_chance(tmp_path: Path) -> None:
    pretrained = make_pretrain(tmp_path / "pretrain")
    evaluation = json.loads((pretrained / "evaluate.json").read_text())
    evaluation["retrieval"]["openmoji_no_people"] = evaluation["retrieval"]["pets"]
    (pretrained / "evaluate.json").write_text(json.dumps(evaluation))
    lines = list(
        summary(pretrained, make_finetune(tmp_path / "tuned"), {"fetch": 61.0, "pretrain": 480.0}, 2)
    )
    text = "\n".join(lines)
    r5 = evaluation["retrieval"]["openmoji_no_people"]["image_to_text"]["R@5"]
    shown = f"{r5['value']:.3f} ({r5['low']:.3f} to {r5['high']:.3f}), chance {r5['chance']:.4f}"
    assert f"picture to caption R@5  {shown}; a vendor never trained on, 1400 captions" in lines
    assert "0.410 (0.390 to 0.430), chance 0.0100, majority 0.142; 97 classes" in text
    assert (
        "0.630 (0.620 to 0.640), chance 0.5000; best head gated; image alone 0.499; text alone 0.500" in text
    )
    assert "204,800 samples in 399 steps" in text
    assert "900 samples/s with 2 processes" in text
    assert "fetch 61 s, pretrain 8.0 min" in text
    assert len(lines) - 2 <= 11
    for line in joined_lines(NEXT):
        if words := diptych_words(line):
            check_words(words)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_road_in_small(
    tmp_path: Path, require: Callable[[object, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = [sys.executable, "-m", "diptych.cli", "demo", "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    require("cannot be reached" not in done.stderr, "the npm registry is out of reach")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "a vendor never trained on" in done.stdout
    assert "best head" in done.stdout
    assert (tmp_path / "runs/demo-quick-pretrain/report.html").is_file()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
