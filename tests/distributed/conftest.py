"""Real gloo process groups inside a test: ``ranks(world_size, function, *arguments)``."""

import multiprocessing
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def _server() -> Any:
    """One helper process that has torch loaded and from which ranks are forked, each within milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "open_clip"])
    return context


@pytest.fixture
def ranks(_server: Any, tmp_path: Path) -> Run:
    """Run ``function(rank, world_size, *arguments)`` of the calling test file in as many processes of one
    gloo group, and return what each returned (tensors, lists, dicts), by rank."""

    def run(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = tmp_path / f"{function.__name__}_{world_size}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        torch.save(arguments, folder / "arguments.pt")
        file = function.__code__.co_filename
        jobs = [
            _server.Process(
                target=runpy.run_path,
                args=(str(Path(__file__).parent / "rank_main.py"),),
                kwargs={"init_globals": {"JOB": (file, function.__name__, rank, world_size, str(folder))}},
            )
            for rank in range(world_size)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
        errors = [p.read_text() for p in sorted(folder.glob("error_*.txt"))]
        for job in jobs:
            if job.exitcode is None:
                job.kill()
                errors.append("a rank did not end within 120 s")
        assert not errors, "\n".join(errors)
        return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]

    return run
