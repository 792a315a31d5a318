"""A process whose data goes on elsewhere: its gradients are averaged like any, and nothing but the comparison
of places tells it."""

from pathlib import Path
from typing import Any

import pytest

from diptych.pretrain.train import _Run

from .test_replicas_across_ranks import end_of_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..pretrain.train_runs import make_data, write_config  # not known to the ranks

    folder = tmp_path_factory.mktemp("places")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def strayed_run(rank: int, world: int, config: str, out: str, options: list[str]) -> str:
    """A run in which rank 1 leaves out a batch after step 4; the message that it ends with."""
    enter = _Run._enter_step

    def entering(self: _Run) -> float:
        if rank == 1 and self.state.step == 3:
            epoch, step = self.stream.place
            self.stream.close()
            self.stream.place = epoch, step + 1
        return enter(self)

    return end_of_run(entering, config, out, options)


@pytest.mark.parametrize(
    ("world", "options", "found_at"),
    [
        (2, ["guard.replicas_every_steps=5"], 5),
        (3, ["guard.replicas_every_steps=5"], 5),
        (2, ["guard.replicas_every_steps=500"], 6),  # before a checkpoint
    ],
)
def test_another_place_in_the_data_ends_the_run_and_is_not_saved(
    ranks: Any, config: Path, tmp_path: Path, world: int, options: list[str], found_at: int
) -> None:
    out = tmp_path / "run"
    messages = ranks(world, strayed_run, str(config), str(out), options)
    assert len(set(messages)) == 1
    assert f"guard.replicas_every_steps: at step {found_at} " in messages[0]
    who = "rank 1 differs from the rest" if world > 2 else "ranks 0, 1 differ"  # of two none is the odd one
    assert f"{who} in the place in the data (1 of " in messages[0]
    assert not list((out / "checkpoints").glob("step_*"))
