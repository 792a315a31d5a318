"""Independent tasks on all cores, or on a Ray cluster: results in order, few tasks in flight, nothing left
behind when the program is stopped."""

import importlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..configs.errors import UserError

__all__ = ["Engine", "Progress", "here", "quiet", "run_tasks"]

Engine = Literal["local", "ray"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""``progress(what, total)`` gives a context in which a function is told of every bit done."""

T = TypeVar("T")
R = TypeVar("R")


def quiet(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """A progress that shows nothing."""
    return nullcontext(lambda done: None)


def here(path: str | Path, engine: Engine) -> Path:
    """``path`` as every worker finds it: Ray's have working directories of their own."""
    path = Path(path).expanduser()
    return path.absolute() if engine == "ray" else path


def run_tasks(
    function: Callable[[T], R], tasks: Iterable[T], *, workers: int = 1, engine: Engine = "local"
) -> Generator[R]:
    """``function(task)`` for every task, in order.

    "local": in ``workers`` processes, or in this one where there is one worker or one task. "ray": on the
    cluster that ``RAY_ADDRESS`` names, else in a Ray of this machine with ``workers`` CPUs; the tasks' files
    must then be reachable from every node. ``function`` and tasks must be picklable. Tasks are taken from the
    iterable as they are needed, a few more than are worked on. An error of a task is raised here and ends the
    rest; so does closing the generator: use it with ``contextlib.closing``, lest an error or Ctrl-C elsewhere
    leave it open. Raises UserError if a worker dies or Ray is not there.
    """
    if engine == "ray":
        yield from _on_ray(function, tasks, workers)
        return
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    if workers <= 1 or len(first) < 2:
        yield from map(function, chain(first, tasks))
    else:
        yield from _in_processes(function, chain(first, tasks), workers)


def _in_processes(function: Callable[[T], R], tasks: Iterator[T], workers: int) -> Generator[R]:
    context = get_context("spawn")  # a fork of a process with threads may hang
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_settle, initargs=(watched, function))
    flying: deque[Future[R]] = deque()
    try:
        for task in tasks:
            flying.append(pool.submit(_run, task))
            if len(flying) > workers + 1:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended abruptly, perhaps for lack of memory; run again with fewer --workers"
        ) from error
    finally:
        held.close()  # workers that still run end now
        pool.shutdown(cancel_futures=True)
        watched.close()


_function: list[Callable[[Any], Any]] = []  # in a worker: what is done with its tasks, sent once


def _settle(watched: Connection, function: Callable[[Any], Any]) -> None:
    """In a worker: leave Ctrl-C to the parent, and end as soon as the parent does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _function[:] = [function]

    def watch() -> None:
        try:
            watched.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(task: Any) -> Any:
    return _function[0](task)


def _on_ray(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--engine ray needs Ray; pip install 'diptych[ray]'") from error
    started = not ray.is_initialized()
    if started:
        quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quietly)
        else:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quietly)
    flying: deque[Any] = deque()
    try:
        remote, shared = ray.remote(_call), ray.put(function)
        ahead = int(ray.cluster_resources().get("CPU", workers)) + 1
        for task in tasks:
            flying.append(remote.remote(shared, task))
            if len(flying) > ahead:
                yield ray.get(flying.popleft())
        while flying:
            yield ray.get(flying.popleft())
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what the task raised
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Ray gave up: {' '.join(str(error).split())[:300]}; run the command again"
        ) from error
    finally:
        for left in flying:
            ray.cancel(left, force=True)
        if started:
            ray.shutdown()


def _call(function: Callable[[T], R], task: T) -> R:
    return function(task)
