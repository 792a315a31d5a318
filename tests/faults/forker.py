"""A process that has all modules loaded and forks a process of a run for every line it is sent, each in a
fraction of the time that Python takes to import torch.

A program of its own (``killing.Forker`` starts it): it has no thread, no CUDA and no process group when it
forks. Lines of JSON go in, one line of JSON comes back for each:

    {"words": [..], "environment": {..}, "log": PATH, "point": {..} or null}    -> {"pid": N}
    {}    -> {"ended": {PID: {"code": -9, "cpu_s": .., "mib": ..}, ..}}    what has ended since

``words`` are those of the ``diptych`` command, or of the function ``main`` (``module:name``), which is looked
for in ``paths`` first. ``point`` is where the process ends itself by SIGKILL: before
the ``number``-th audit event (PEP 578) whose ``EVENT ARGUMENT`` the pattern ``event`` matches, once there
was one that ``after`` matches, or in the ``number``-th call of the function ``call`` (``module:name``),
``delay_s`` later.
"""

import ctypes
import gc
import importlib
import json
import os
import re
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
OF_FILES = ("os.", "shutil.", "open")
MODULES = (
    "torch",
    "open_clip",
    "accelerate",
    "diptych.cli.main",
    "diptych.cli.pretrain",
    "diptych.pretrain.train",
)


def die(delay_s: float) -> None:
    """End this process by the kernel's hand, at once or in the middle of what it does then."""
    if delay_s <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.setitimer(signal.ITIMER_REAL, delay_s)  # SIGALRM, which nobody handles, ends it as SIGKILL does


class Point:
    """Counts what comes by and dies at its number."""

    def __init__(self, number: int, delay_s: float) -> None:
        self.left, self.delay_s, self.process = number, delay_s, os.getpid()

    def passed(self) -> None:
        self.left -= 1
        if self.left == 0 and os.getpid() == self.process:  # not a data worker, which inherits this
            die(self.delay_s)


def arm(point: dict[str, Any]) -> None:
    """Watch for the point."""
    counter = Point(point["number"], point["delay_s"])
    if "call" in point:
        module_name, _, name = point["call"].partition(":")
        module = importlib.import_module(module_name)
        function = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counter.passed()
            return function(*arguments, **options)

        setattr(module, name, counting)
        return
    patterns = [re.compile(point["event"]), *([re.compile(point["after"])] if "after" in point else [])]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        told = f"{event} {arguments[0] if arguments else ''}" if event.startswith(OF_FILES) else ""
        if told and patterns[-1].search(told):
            if len(patterns) == 1:
                counter.passed()
            else:
                patterns.pop()

    sys.addaudithook(hook)


def become(job: dict[str, Any]) -> int:
    """Be a process of the run; the exit code."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the forker's end is everybody's
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ |= job["environment"]
    if job["point"] is not None:
        arm(job["point"])
    sys.path[:0] = job.get("paths", [])
    module, _, name = job.get("main", "diptych.cli.main:main").partition(":")
    return int(getattr(importlib.import_module(module), name)(job["words"]) or 0)


def ended() -> dict[int, dict[str, Any]]:
    """Children that have ended since the last call."""
    found: dict[int, dict[str, Any]] = {}
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        cpu_s = usage.ru_utime + usage.ru_stime
        code = os.waitstatus_to_exitcode(status)
        found[pid] = {"code": code, "cpu_s": cpu_s, "mib": usage.ru_maxrss / 1024}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    patience = 100
    while (threads := os.listdir("/proc/self/task")) != [str(os.getpid())]:  # an import's own may be ending
        patience -= 1
        assert patience, f"{len(threads)} threads before the first fork; start with OMP_NUM_THREADS=1"
        time.sleep(0.05)
    for line in sys.stdin:
        job = json.loads(line)
        if not job:
            print(json.dumps({"ended": ended()}), file=answers, flush=True)
        elif (pid := os.fork()) == 0:
            os.close(answers.fileno())
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.exit(become(job))
        else:
            print(json.dumps({"pid": pid}), file=answers, flush=True)


if __name__ == "__main__":
    main()
