"""Out of memory: numbers and mends in one sentence."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.configs.errors import UserError
from diptych.data.config import DataConfig
from diptych.pretrain.config import PretrainConfig, TrainConfig
from diptych.pretrain.memory import host_memory, memory_told, mends
from diptych.pretrain.model import ModelConfig

from .states import TEXT, VISION
from .train_runs import make_data, write_config

BATCH = TrainConfig(global_batch_size=64, total_samples=64)
MODEL = ModelConfig(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT)
CONFIG = PretrainConfig(data=DataConfig(train="shards"), model=MODEL, train=BATCH)


def test_a_failed_allocation_tells_numbers_and_two_settings() -> None:
    with pytest.raises(UserError) as told, memory_told(CONFIG):
        torch.empty(1 << 50, dtype=torch.uint8)
    text = str(told.value)
    assert "the host ran out of memory (asked for 1.05e+06 GiB, free " in text
    assert text.endswith("set train.micro_batch_size=32 and train.grad_checkpointing=true")


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ({"workers": 6, "prefetch": 3}, "set data.prefetch=1 and data.workers=3"),
        ({"workers": 2, "prefetch": 1}, "set data.workers=1 and train.global_batch_size=32 in a new run"),
    ],
)
def test_a_data_worker_without_memory_tells_two_settings(given: dict[str, int], mend: str) -> None:
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update=given)})
    with pytest.raises(UserError, match="a data worker ran out of memory") as told, memory_told(config):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0: not enough memory")
    assert str(told.value).endswith(mend)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_told(CONFIG):
        raise RuntimeError("shape")


def test_mends_need_less_than_what_is_set() -> None:
    last = BATCH.model_copy(update={"micro_batch_size": 1, "grad_checkpointing": True})
    other = ["train.global_batch_size=32 in a new run", "a smaller model in a new run"]
    assert mends(last, 1) == other
    assert mends(last, 4) == ["train.parallel=fsdp", *other]
    assert mends(BATCH, 4)[0] == "train.micro_batch_size=8"


def test_no_mend_is_refused() -> None:
    least = BATCH.model_copy(
        update={"global_batch_size": 2, "micro_batch_size": 1, "grad_checkpointing": True}
    )
    assert mends(least, 1) == ["a smaller model in a new run"]
    four = least.model_copy(update={"global_batch_size": 4, "parallel": "fsdp"})
    assert mends(four, 4) == ["a smaller model in a new run"]  # each process needs a sample


def test_memory_is_that_of_this_process() -> None:
    before = host_memory()
    kept = mmap.mmap(-1, 128 << 20)  # what the heap gives may be memory that the process has already
    np.frombuffer(kept, np.uint8)[:] = 1
    assert host_memory() - before == pytest.approx(0.125, abs=0.02)
    del kept


def test_a_run_past_its_limit_ends_with_code_2(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    script = (
        "import resource, sys\n"
        "from diptych.pretrain import train\n"
        "from diptych.cli.main import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 28),) * 2)\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    wide = ["model.vision_cfg.width=1024", "model.vision_cfg.head_width=64", "model.vision_cfg.layers=4"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(config), f"out={tmp_path / 'run'}", *wide],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory (asked for" in line
    assert "limited to" in line
    assert line.endswith("set train.micro_batch_size=8 and train.grad_checkpointing=true")
