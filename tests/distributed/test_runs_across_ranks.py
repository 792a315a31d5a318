"""Whole runs on real gloo processes: killed, resumed, and carried over to another number of processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diptych.pretrain.checkpoint import newest_checkpoint, read_tensors

from ..pretrain.train_runs import finish, launch, losses, make_data, rows, write_config

EVERY_7 = "checkpoint.every_steps=7"  # an epoch has three steps, so that 7 and 14 are in the midst of one


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def kill_after(step: int, config: Path, out: Path, processes: int, *overrides: str) -> None:
    """SIGKILL to the launcher and every rank once a step is logged and a checkpoint is there, which is of
    the midst of an epoch."""
    process = launch(config, out, processes, EVERY_7, *overrides)
    metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
    while (
        not metrics.is_file()
        or f'"step": {step},' not in metrics.read_text()
        or not any(checkpoints.glob("step_*"))
    ):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    # each rank leads a group of its own, and would save if it saw the launcher's end
    agent = psutil.Process(process.pid)
    for one in [*agent.children(recursive=True), agent]:
        one.kill()
    process.communicate()
    assert not (out / "stopped.json").exists()
    newest = newest_checkpoint(out)
    assert newest is not None
    assert json.loads((newest / "trainer.json").read_text())["stream"]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_killed_ranks_go_on_bit_for_bit(processes: int, config: Path, tmp_path: Path) -> None:
    finish(launch(config, tmp_path / "straight", processes, EVERY_7))
    kill_after(8, config, tmp_path / "killed", processes)
    finish(launch(config, tmp_path / "killed", processes, EVERY_7))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    mine, other = (newest_checkpoint(tmp_path / name) for name in ("killed", "straight"))
    assert mine is not None
    assert other is not None
    for file in sorted(path.name for path in other.glob("*.safetensors")):
        expected = read_tensors(other / file)
        for name, value in read_tensors(mine / file).items():
            assert value.equal(expected[name]), (file, name)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config: Path, tmp_path: Path) -> None:
    exact = "model.vision_cfg.patch_dropout=0.0"  # dropped patches are drawn by each rank
    finish(launch(config, tmp_path / "straight", 1, exact))
    kill_after(7, config, tmp_path / "moved", 2, exact)
    finish(launch(config, tmp_path / "moved", 3, exact, EVERY_7))
    moved, straight = losses(tmp_path / "moved"), losses(tmp_path / "straight")
    assert [step for step, _ in moved] == [step for step, _ in straight]
    # the schedule goes by samples seen, and knows of no processes
    rates, expected = ([row["lr"] for row in rows(tmp_path / name)] for name in ("moved", "straight"))
    assert rates == expected
    for (step, a), (_, b) in zip(moved, straight, strict=True):
        assert a == pytest.approx(b, rel=5e-4), step


@pytest.mark.slow
def test_accelerate_launch_starts_as_many_processes_as_asked(config: Path, tmp_path: Path) -> None:
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    finish(launch(config, tmp_path / "run", 0, launcher=[*launcher, *options]))
    folder = newest_checkpoint(tmp_path / "run")
    assert folder is not None
    assert '"world_size": 2' in (folder / "trainer.json").read_text()


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_sentence(config: Path, tmp_path: Path) -> None:
    process = launch(config, tmp_path / "run", 2, "data.train=/no/where")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "/no/where" in told[0]


def test_ranks_with_other_data_are_told_before_training(config: Path, tmp_path: Path) -> None:
    """On another node the same path may hold another set."""
    homes = [tmp_path / "a", tmp_path / "b"]
    for home, split in zip(homes, ("train", "val"), strict=True):
        home.mkdir()
        (home / "set").symlink_to(config.parent / "data" / split)
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ['HOME'] = {[str(home) for home in homes]}[int(os.environ['RANK'])]\n"
        "from diptych.cli.main import main\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(config), f"out={tmp_path / 'run'}", "data.train=~/set"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "data.train: rank 1 has other data than rank 0 (1 of 2 ranks differ" in told[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("trunk", "parallel"), [("test_resnet", "ddp"), ("test_resnet", "fsdp"), ("test_convnext", "fsdp")]
)
def test_convolutional_towers_train_on_two_ranks_and_tell_their_work(
    trunk: str, parallel: str, config: Path, tmp_path: Path
) -> None:
    tower = f"model.vision_cfg={{timm_model_name: {trunk}, timm_proj: linear, image_size: 32}}"
    short = ["train.total_samples=48", f"train.parallel={parallel}"]
    finish(launch(config, tmp_path / "run", 2, tower, *short))
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    assert all(row["tflops_computed"] > 0 for row in rows(tmp_path / "run"))
