"""Which checkpoints stay: against the rules read one by one, on any mix of whole and damaged ones."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diptych.configs.load import load_config
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.manifest import Found
from diptych.pretrain.retention import CheckpointConfig, KeepBest, superseded

METRIC = "val/image_to_text_R@5"


def one(step: int, whole: bool, score: float | None) -> Found:
    metrics = {} if score is None else {METRIC: score}
    return Found(Path(f"step_{step:08d}"), step, None if whole else "cut", {"metrics": metrics})


LISTS = st.dictionaries(
    st.integers(0, 30), st.tuples(st.booleans(), st.none() | st.sampled_from([0.1, 0.2, 0.3])), max_size=12
)


@given(LISTS, st.integers(1, 4), st.none() | st.integers(1, 6), st.none() | st.integers(1, 3), st.data())
def test_only_what_no_rule_holds_goes(
    steps: dict[int, Any], keep: int, every: int | None, best: int | None, data: st.DataObject
) -> None:
    found = [one(step, *steps[step]) for step in sorted(steps, reverse=True)]
    newest = data.draw(st.none() | st.sampled_from(sorted(steps)) if steps else st.none())
    policy = None if best is None else KeepBest(count=best)
    going = superseded(found, keep=keep, keep_every_steps=every, keep_best=policy, newest=newest)
    gone = {f.step for f in going}
    whole = [s for s in sorted(steps, reverse=True) if steps[s][0] and (newest is None or s <= newest)]
    # the newest whole ones stay, and nothing between them or newer is touched
    assert not gone & set(whole[:keep])
    assert all(step < min(whole[:keep]) for step in gone)
    if every is not None:
        assert not [step for step in gone if step % every == 0]
    scored = sorted((-steps[s][1], -s) for s in whole if steps[s][1] is not None)[:best]
    if best is not None:
        assert not gone & {-s for _, s in scored}
    # and all else goes
    held = set(whole[:keep]) | ({-s for _, s in scored} if best is not None else set())
    held |= {s for s in steps if every is not None and s % every == 0}
    expected = {s for s in steps if whole and s < min(whole[:keep])} - held
    assert gone == expected


def test_a_damaged_newest_one_does_not_count() -> None:
    found = [one(30, False, None), one(20, True, None), one(10, True, None), one(5, True, None)]
    assert [f.step for f in superseded(found, keep=1)] == [10, 5]
    assert [f.step for f in superseded(found, keep=2)] == [5]
    assert superseded([one(30, False, None), one(20, True, None)], keep=1) == []


def test_rules_that_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"keep_every_steps: 250 is no multiple of .*every_steps \(100\)"
    ):
        CheckpointConfig(every_steps=100, keep_every_steps=250)
    file = tmp_path / "c.yaml"
    base = "data: {train: x}\nmodel: {arch: ViT-B-32}\ntrain: {epochs: 1}\n"
    file.write_text(base + "checkpoint: {keep_best: {}}\n")
    with pytest.raises(Exception, match=r"needs held-out shards; give evaluate.data"):
        load_config(PretrainConfig, file)
    file.write_text(base + "evaluate: {data: y, every_steps: 300}\ncheckpoint: {keep_best: {}}\n")
    with pytest.raises(Exception, match=r"evaluate.every_steps \(300\) must be a multiple"):
        load_config(PretrainConfig, file)
