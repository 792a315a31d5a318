"""One rank of a test's process group; run by the ``ranks`` fixture, which gives ``JOB``."""

import importlib.util
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

JOB: tuple[str, str, int, int, str] = globals()["JOB"]


def main() -> None:
    file, name, rank, world_size, folder = JOB
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meet = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    try:
        spec = importlib.util.spec_from_file_location("rank_test", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arguments: Any = torch.load(f"{folder}/arguments.pt", weights_only=True)
        torch.save(getattr(module, name)(rank, world_size, *arguments), f"{folder}/result_{rank}.pt")
    except BaseException:
        Path(folder, f"error_{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()


main()
