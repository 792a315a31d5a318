"""Stages of a run: how many patches are dropped when."""

from diptych.pretrain.stages import Stage, patch_dropout_at

STAGES = (Stage(until_samples=100, patch_dropout=0.5), Stage(until_samples=200), Stage(patch_dropout=0.0))


def test_each_stage_drops_its_own_fraction() -> None:
    assert [patch_dropout_at(STAGES, seen, 0.25) for seen in (0, 99, 100, 199, 200, 10**9)] == [
        0.5,
        0.5,
        0.25,
        0.25,
        0.0,
        0.0,
    ]
    assert patch_dropout_at((), 5, 0.25) == 0.25
