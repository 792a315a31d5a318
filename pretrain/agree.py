"""How the processes of a run agree: on a mistake, on what one of them found, on the end of another."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

from ..configs.errors import UserError
from . import distributed

__all__ = ["launched", "on_rank_0", "others_watched", "together"]

T = TypeVar("T")
PEER_LOST = (
    "peer",
    "gloo",
    "NCCL",
    "socket",
    "pair closure",
)  # in what torch says when another process is gone


@contextmanager
def together() -> Generator[None]:
    """A UserError that any rank raises inside is raised on every rank. The block must not communicate."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if problems := [text for text in distributed.gather_json(problem) if text]:
        raise UserError(problems[0])


def on_rank_0(function: Callable[[], T]) -> T | None:
    """Run ``function`` on rank 0 alone; its UserError is raised on every rank. Returns its value there, None
    elsewhere."""
    value, problem = None, ""
    if distributed.rank() == 0:
        try:
            value = function()
        except UserError as error:
            problem = str(error)
    if problem := distributed.broadcast_json(problem):
        raise UserError(problem)
    return value


def launched() -> int:
    """How many processes the launcher has started for this run, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def others_watched() -> Generator[None]:
    """Inside, the end of another process is a UserError and not what torch says of its connections. The group
    may be made and left inside, too."""
    try:
        yield
    except RuntimeError as error:
        if launched() == 1 or not any(word in str(error) for word in PEER_LOST):
            raise
        late = any(word in str(error) for word in ("imed out", "timeout"))
        lost = UserError(
            f"another process of this run {'does not answer' if late else 'has ended'}, and all must work "
            "together; the same command goes on from what is saved"
        )
        lost.alone = True  # who tells it else?
        raise lost from error
