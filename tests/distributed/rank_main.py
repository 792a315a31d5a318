"""One rank of a test's process group; run by the ``ranks`` fixture, which gives ``JOB``."""

import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

JOB: tuple[str, str, int, int, str] = globals()["JOB"]


def main() -> None:
    file, name, rank, world_size, folder = JOB
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # for Accelerate
    meet = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    try:
        package = ModuleType("rank_tests")  # so that the test finds its neighbours
        package.__path__ = [str(Path(file).parent)]
        sys.modules["rank_tests"] = package
        module = importlib.import_module(f"rank_tests.{Path(file).stem}")
        arguments: Any = torch.load(f"{folder}/arguments.pt", weights_only=True)
        torch.save(getattr(module, name)(rank, world_size, *arguments), f"{folder}/result_{rank}.pt")
    except BaseException:
        Path(folder, f"error_{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()


main()
