"""Runs that are killed again and again, started anew each time, and held against an undisturbed one.

``kill_until_done`` starts a run, kills it, starts the same command again and so on until the faults are used
up, then lets it finish; ``left_over`` and ``differences`` say what is wrong afterwards. Used by the tests and
by ``benchmarks/soak.py``.
"""

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

TRAIN = "diptych.pretrain.train"
# in a row of metrics: what tells of time and memory and not of training
CLOCK = re.compile(
    r"(share_|tflops_).*|mfu|tokens_per_sample|slowest_rank"
    r"|.*(_s|per_s|per_s_per_device|_fraction|_gib)(_(min|median|max))?"
)
PATIENCE_S = 180.0  # no start takes so long, even on a machine that has much else to do


@dataclass(frozen=True)
class Fault:
    """When a process of a run is killed. Either at a ``point`` in its code, see forker.py, or from outside
    ``delay_s`` after it has logged ``rows`` steps."""

    name: str
    point: dict[str, Any] | None = None
    rows: int = 0
    delay_s: float = 0.0
    ranks: str = "all"
    """Which ranks die: ``all`` at once, or one (``0``, ``1``) whose end the others must notice."""


def _at(name: str, number: int, delay_s: float, **what: str) -> Fault:
    return Fault(name, {"number": number, "delay_s": delay_s, **what})


def draw(rng: random.Random, name: str, *, rows: int = 10) -> Fault:
    """A fault of this name at a random instant; those in steps come within ``rows`` steps."""
    soon = rng.uniform(0, 0.02)
    now = rng.choice([0.0, soon])  # right at the call, or in the midst of what comes after it
    if name == "start":
        return Fault(name, delay_s=rng.uniform(0, 0.5))
    if name == "resume":  # what a start does to the files of the run
        event = r"^(os\.rename|os\.remove|open) .*(metrics|config|quarantine|trainer|manifest)"
        return _at(name, rng.randint(1, 8), 0.0, event=event)
    if name == "first batch":
        return _at(name, 1, soon, call=f"{TRAIN}:forward_backward")
    if name == "step":
        return _at(name, rng.randint(2, rows), soon, call=f"{TRAIN}:forward_backward")
    if name == "save":  # the temporary folder has been made
        return _at(name, rng.randint(1, 2), rng.uniform(0, 0.06), event=r"^os\.mkdir .*\.tmp")
    if name == "rename":  # of a checkpoint: a start renames other files, too
        return _at(name, rng.randint(1, 2), now, event=r"^os\.rename .*/checkpoints/\.step_.*\.tmp")
    if name == "prune":  # in the midst of removing an old checkpoint, not what an earlier kill left of one
        files = {"event": r"^os\.(remove|rmdir) ", "after": r"^os\.rename .*/checkpoints/step_"}
        return _at(name, rng.randint(1, 6), 0.0, **files)
    if name == "evaluate":
        return _at(name, 1, now, call=f"{TRAIN}:quick_retrieval")
    assert name == "anywhere", name
    return Fault(name, rows=rng.randint(0, rows), delay_s=rng.uniform(0, 0.3))


NAMES = (
    "start",
    "resume",
    "first batch",
    "step",
    "save",
    "rename",
    "prune",
    "evaluate",
    "anywhere",
)


class Forker:
    """Starts processes of runs; see forker.py. A context: its end is the end of all of them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._ended: dict[int, dict[str, Any]] = {}
        self._ask({})  # it has loaded

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the forker ended with exit code {self._process.wait()}"
        return json.loads(line)

    def start(
        self,
        words: Sequence[str],
        log: Path,
        *,
        environment: dict[str, str],
        point: dict[str, Any] | None = None,
        **more: Any,
    ) -> int:
        """A new process ``diptych WORDS``, or what ``more`` says (see forker.py); its number."""
        job = {"words": list(words), "log": str(log), "environment": environment, "point": point, **more}
        return int(self._ask(job)["pid"])

    def look(self, pid: int) -> dict[str, Any] | None:
        """How the process ended: ``code``, ``cpu_s``, ``mib`` at its peak; None while it runs."""
        if pid not in self._ended:
            self._ended |= {int(pid): how for pid, how in self._ask({})["ended"].items()}
        return self._ended.get(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)  # it ends with its input


@dataclass
class Start:
    """One start of a run and how it ended."""

    fault: str
    first: int
    """The step of the newest checkpoint when it started; its own first step is the next."""
    done: int = 0
    """The last step that it logged, or ``first``."""
    saved: int = 0
    """The step of the newest checkpoint after its end."""
    codes: list[int] = field(default_factory=list[int])
    unaided: bool = True
    """Whether the ranks that were not killed ended by themselves."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    leaders: list[int] = field(default_factory=list[int])
    """Its processes, each of which leads a session."""
    peak_mib: float = 0.0
    samples: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    """What rank 0 held after so many ``steps`` of its own: ``rss_mib``, ``fds``, ``threads``."""
    torn: int = 0
    """Temporary folders that the kill left."""

    @property
    def killed(self) -> bool:
        """Whether the fault came before the run was over."""
        return any(self.codes)

    @property
    def lost(self) -> int:
        """Steps that must be done again."""
        return self.done - self.saved


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint folder that has its manifest, 0 if there is none."""
    steps = [json.loads(file.read_text())["step"] for file in run.glob("checkpoints/step_*/manifest.json")]
    return max(steps, default=0)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The whole rows of the metrics; a line that is being written is not one."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    return [json.loads(line) for line in lines]


def inode(run: Path) -> int:
    """Which file the metrics are, 0 if there are none."""
    file = run / "metrics.jsonl"
    return file.stat().st_ino if file.is_file() else 0


def free_port() -> int:
    """A port of the loopback address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sample(pid: int) -> dict[str, float]:
    """Memory, open files and threads of a process; empty if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        found = {key: re.search(rf"^{key}:\s+(\d+)", status, re.MULTILINE) for key in ("VmRSS", "Threads")}
        rss, threads = (int(match[1]) if match else 0 for match in found.values())
        return {"rss_mib": rss / 1024, "fds": fds, "threads": threads} if rss else {}
    except OSError:
        return {}


def session(leaders: Sequence[int]) -> list[int]:
    """Processes that are of the sessions of these, alive and not."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in leaders and fields[0] != "Z":
                found.append(int(entry.name))
    return found


class Runner:
    """Starts of one run; ``words`` are those of the command."""

    def __init__(self, forker: Forker, words: Sequence[str], run: Path, world_size: int = 1) -> None:
        self.forker, self.words, self.run, self.world_size = forker, words, run, world_size
        self.log = run.with_name(run.name + ".log")
        self.leaders: list[int] = []

    def once(self, fault: Fault | None) -> Start:
        """Start it and let the fault, or the end of the run, come."""
        start = Start(fault.name if fault else "", newest_step(self.run))
        before = inode(self.run)
        pids = [self._start(rank, fault) for rank in self._ranks()]
        self.leaders += pids
        start.leaders, begun = pids, time.monotonic()
        try:
            self._watch(pids, fault, before, start)
        finally:
            for pid in pids:
                self._kill(pid)
        ends = [self._end(pid) for pid in pids]
        start.codes = [end["code"] for end in ends]
        start.wall_s = time.monotonic() - begun
        start.cpu_s = sum(end["cpu_s"] for end in ends)
        start.peak_mib = max(end["mib"] for end in ends)
        start.saved = newest_step(self.run)
        steps = [row["step"] for row in rows_of(self.run)]
        start.done = max([start.first, *steps])
        start.torn = len(list(self.run.glob("checkpoints/.*")))
        return start

    def _ranks(self) -> list[dict[str, str]]:
        if self.world_size == 1:
            return [{}]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        world = {"WORLD_SIZE": str(self.world_size), "LOCAL_WORLD_SIZE": str(self.world_size)}
        return [meeting | world | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(self.world_size)]

    def _start(self, environment: dict[str, str], fault: Fault | None) -> int:
        rank = environment.get("RANK", "0")
        hit = fault is not None and rank == ("0" if fault.ranks == "all" else fault.ranks)
        point = fault.point if hit and fault is not None else None
        return self.forker.start(self.words, self.log, environment=environment, point=point)

    def _watch(self, pids: list[int], fault: Fault | None, before: int, start: Start) -> None:
        """Until a process has ended, by its fault, by the one that comes from here, or by itself."""
        outside = fault if fault is not None and fault.point is None else None
        deadline, due = time.monotonic() + PATIENCE_S, float("inf")
        while not any(self.forker.look(pid) for pid in pids):
            now = time.monotonic()
            # a start that goes on puts another file in the place of the metrics
            rows = rows_of(self.run) if inode(self.run) != before else []
            grown = max([start.first, *(row["step"] for row in rows)]) - start.first
            if grown > len(start.samples):
                start.samples += [{"steps": grown, **sample(pids[0])}] * (grown - len(start.samples))
                deadline = now + PATIENCE_S
            if outside is not None:
                due = min(due, now + outside.delay_s) if grown >= outside.rows else due
                if now >= due:
                    for pid in pids if outside.ranks == "all" else [pids[int(outside.ranks)]]:
                        self._kill(pid)
                    break
            assert now < deadline, f"no row within {PATIENCE_S} s: {self._tail()}"
            time.sleep(0.005)
        self._others(pids, fault, start)

    def _others(self, pids: list[int], fault: Fault | None, start: Start) -> None:
        """The first process has ended: the fault is everybody's, or the others notice or finish."""
        if fault is not None and fault.ranks == "all" and self._killed(pids):
            return  # the caller kills the rest
        until = time.monotonic() + (20.0 if fault is not None else PATIENCE_S)
        while not all(self.forker.look(pid) for pid in pids):
            if time.monotonic() > until:  # what torchrun does then
                start.unaided = False
                return
            time.sleep(0.01)

    def _killed(self, pids: list[int]) -> bool:
        ends = [self.forker.look(pid) for pid in pids]
        return any(end is not None and end["code"] != 0 for end in ends)

    def _kill(self, pid: int) -> None:
        if self.forker.look(pid) is None:
            os.kill(pid, signal.SIGKILL)

    def _end(self, pid: int) -> dict[str, Any]:
        while (end := self.forker.look(pid)) is None:
            time.sleep(0.002)
        return end

    def _tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.is_file() else "no log"


def check(start: Start, *, at_most: int, runner: Runner) -> None:
    """A start that was killed: by the fault alone, with ``at_most`` so many steps to do again."""
    told = f"{start}\n{runner.log.read_text()[-3000:] if runner.log.is_file() else ''}"
    assert start.saved >= start.first, f"a checkpoint is lost: {told}"
    assert start.lost <= at_most, f"more than an interval is lost: {told}"
    if runner.world_size == 1:
        assert start.codes[0] in (0, -signal.SIGKILL, -signal.SIGALRM), told


def kill_until_done(
    runner: Runner,
    faults: Iterator[Fault],
    *,
    at_most: int,
    tell: Callable[[Start], None] = lambda start: None,
) -> list[Start]:
    """All starts of the run; the last one finishes it. ``at_most``: steps that a kill may cost."""
    starts: list[Start] = []
    for fault in faults:
        starts.append(runner.once(fault))
        tell(starts[-1])
        check(starts[-1], at_most=at_most, runner=runner)
        if not starts[-1].killed:
            return starts
    starts.append(runner.once(None))
    tell(starts[-1])
    assert starts[-1].codes == [0] * runner.world_size, runner.log.read_text()[-3000:]
    return starts


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without what tells of time."""
    return {key: value for key, value in row.items() if not CLOCK.fullmatch(key)}


def trained(run: Path) -> list[dict[str, Any]]:
    """What the run's metrics say of training and scores; when a checkpoint was complete is a matter of
    time."""
    return [without_clock(row) for row in rows_of(run) if row["kind"] != "checkpoint"]


def contents(checkpoint: Path) -> dict[str, str]:
    """Hash of every file of a checkpoint but the manifest, which has them too; the config's without ``out``,
    where the run is."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json")
    found = {str(p.relative_to(checkpoint)): p.read_bytes() for p in files}
    if "config.yaml" in found:
        found["config.yaml"] = re.sub(rb"(?m)^out: .*$", b"", found["config.yaml"])
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Where a run is not the undisturbed one: metrics but for the clock, every byte of the checkpoints."""
    found: list[str] = []
    rows, others = trained(run), trained(undisturbed)
    if len(rows) != len(others):
        found.append(f"{len(rows)} rows of metrics instead of {len(others)}")
    found += [f"{a} instead of {b}" for a, b in zip(rows, others, strict=False) if a != b][:3]
    names, other_names = ({p.name for p in (one / "checkpoints").iterdir()} for one in (run, undisturbed))
    if names != other_names:
        found.append(f"checkpoints {sorted(names)} instead of {sorted(other_names)}")
    for name in sorted(names & other_names):
        mine, other = (contents(one / "checkpoints" / name) for one in (run, undisturbed))
        found += [f"{name}/{f}" for f in sorted(mine | other) if mine.get(f) != other.get(f)]
    return found


def left_over(run: Path, leaders: Sequence[int]) -> list[str]:
    """Temporary files of a run that is over, and processes that outlived theirs."""
    files = [str(p) for p in run.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]
    until = time.monotonic() + 10.0  # a data worker looks every five seconds whether its parent lives
    while (alive := session(leaders)) and time.monotonic() < until:
        time.sleep(0.1)
    return files + [f"process {pid}" for pid in alive]
