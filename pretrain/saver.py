"""Checkpoints of a run in training: written beside the next steps, and missing ones survived.

``save`` takes a copy of the state, which training waits for, and a thread writes, hashes and syncs it. Where
parameters are sharded every process writes its part, and rank 0 then makes open_clip's file and the manifest.
Until the folder has its name, nothing refers to it. Processes agree on how a save ended in the all-reduce
that every step has anyway (``flags``, ``heed``).

A save that fails is told and tried again; after ``checkpoint.max_failed_saves`` in a row the run stops. At
its end it is tried a few times more.
"""

import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..configs.errors import UserError, mend, unwritable
from ..configs.files import SameFolder, fsync_files
from . import checkpoint, distributed
from .agree import on_rank_0, together
from .manifest import scan, size_text
from .retention import CheckpointConfig, superseded
from .run import LINES
from .snapshot import Files, Snapshot, Stager
from .state import TrainState

__all__ = ["Saver", "require_shared"]

LAST_PAUSES_S = (1.0, 3.0, 9.0, 27.0)  # before each attempt at the end of a run, if one has failed
NOTABLE_S = 0.1  # a shorter wait is not worth a word


class _Job:
    """A thread, and what came of it."""

    def __init__(self, work: Callable[[], Files]) -> None:
        self._error: BaseException | None = None
        self.files: Files = {}
        self.problem = self.mend = ""
        # the thread lets go of its work at its end: the work knows the save, and the save knows this job, so
        # that a copy of the state would stay until the next collection of garbage
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Files]) -> None:
        try:
            self.files = work()
        except OSError as error:
            other = "mend that" if error.errno else "bring it back"  # the run's folder
            self.problem, self.mend = str(error), mend(error, elsewhere=False) or other
        except UserError as error:
            self.problem, self.mend = str(error), "mend that"
        except BaseException as error:  # a mistake of ours, raised where the loop is
            self._error = error

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait for its end; raises what was no failure to write."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Save:
    """A checkpoint on its way: this process's share of it, and on rank 0 the whole."""

    def __init__(self, run: Path, snapshot: Snapshot, facts: Mapping[str, Any], token: str) -> None:
        self.snapshot, self.facts, self.step = snapshot, facts, snapshot.step
        parent = run / "checkpoints"
        self.temporary = parent / checkpoint.unfinished_name(self.step, token)
        self.final = parent / checkpoint.folder_name(self.step)
        self.started = time.monotonic()
        self.stall_s = self.write_s = 0.0
        self.note = ""
        self.parts = False
        """Whether processes are still writing their parts."""
        self.job: _Job | None = None

    def write(self) -> Files:
        """Write this process's files."""
        self.snapshot.settled()
        files = checkpoint.write_files(self.temporary, self.snapshot.tensors, self.snapshot.texts)
        if self.snapshot.texts:
            self.snapshot.write_more(self.temporary)
        return files

    def finish(self, files: Files) -> Files:
        """On rank 0, when the ``files`` of all processes are durable: the rest, and the name."""
        for name, entry in files.items():
            path = self.temporary / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise UserError(f"{path} was written by another process and is not seen by rank 0")
        if self.snapshot.combine is not None:
            files = files | self.snapshot.combine(self.temporary)
        # whoever goes on from here needs the rows up to here
        fsync_files(self.temporary.parent.parent, LINES)
        checkpoint.complete(self.temporary, self.final, self.facts, files)
        self.write_s = time.monotonic() - self.started
        return files


class Saver:
    """Writes the checkpoints of a run. Every rank has one and calls it in the same steps."""

    def __init__(
        self,
        run: Path,
        state: TrainState,
        config: CheckpointConfig,
        facts: Mapping[str, Any] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """``facts`` go into every manifest, ``texts`` by file's name into every checkpoint. The run's folder
        is there; rank 0 makes that of checkpoints."""
        self.run, self.state, self.config = run, state, config
        self.facts, self.texts = dict(facts or {}), dict(texts or {})
        self.tell: Callable[[dict[str, Any]], None] = lambda row: None
        """Gets a row whenever a save has ended or made training wait."""
        self.is_taken: Callable[[], bool] = lambda: False
        """Whether another process has taken the run's folder; asked on rank 0, in the thread."""
        self.saved_step = state.step
        """The newest step that is durable; at first the one that the run goes on from."""
        on_rank_0(lambda: _make(run / "checkpoints"))
        self._same = SameFolder(run)
        self._stager = Stager(copies=config.asynchronous)
        self._token = distributed.broadcast_json(secrets.token_hex(4))
        self._attempts = self._failed = 0
        self._scores: tuple[int, Mapping[str, float]] = (-1, {})
        self._now: _Save | None = None
        self._problem = self._mend = ""
        self._retry_at = 0.0
        self._retry = False

    def flags(self) -> list[int]:
        """For the all-reduce (sum) of a step: whether this process's share of the save under way has ended,
        and whether it is time to try again."""
        ended = self._now is not None and (self._now.job is None or not self._now.job.running)
        retry = distributed.rank() == 0 and self._failed > 0 and time.monotonic() >= self._retry_at
        return [int(ended), int(retry)]

    def heed(self, ended: int, retry: int) -> None:
        """Take in the sums. Raises UserError, on all ranks, if too many saves in a row have failed."""
        self._retry = retry > 0 and self._now is None
        if ended == distributed.world_size():
            self._go_on()
            self._give_up_if_hopeless()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return step % self.config.every_steps == 0 or self._retry

    @property
    def waits(self) -> bool:
        """Whether ``save`` will wait until something is written, the same on every rank."""
        return self._now is not None or not self.config.asynchronous

    def scored(self, scores: Mapping[str, float]) -> None:
        """What the held-out shards gave at this step; rank 0 alone knows."""
        self._scores = (self.state.step, dict(scores))

    def save(self) -> None:
        """Start to write the checkpoint of this step; all ranks call it."""
        if self._now is not None:
            self._wait_for_the_one_before()
        self._begin()
        if not self.config.asynchronous:
            self.wait()

    def finish(self) -> None:
        """Come back when the last finished step is durable; all ranks call it. A save that fails is tried
        again a few times; then UserError is raised, on all ranks."""
        for pause in (*LAST_PAUSES_S, None):
            while self._now is not None:
                self._go_on()
            if self.saved_step == self.state.step:
                return
            if pause is not None:
                time.sleep(pause if self._failed else 0)
                self._begin()
        raise UserError(
            f"{self._problem}, and it was tried {len(LAST_PAUSES_S)} times; {self._mend}, then the same "
            f"command goes on after step {self.saved_step}"
        )

    def wait(self) -> None:
        """Until nothing is on its way; all ranks call it. Raises UserError as ``heed`` does."""
        while self._now is not None:
            self._go_on()
        self._give_up_if_hopeless()

    def close(self) -> None:
        """Let this process's thread end, without the others: for the end of a run, also by an error."""
        job = None if self._now is None else self._now.job
        if job is not None and not isinstance(sys.exception(), KeyboardInterrupt):
            job.join()

    def _begin(self) -> None:
        start, state = time.monotonic(), self.state
        self._attempts += 1
        self._retry = False
        facts = {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "world_size": distributed.world_size(),
            **self.facts,
            "metrics": self._scores[1] if self._scores[0] == state.step else {},
        }
        snapshot = state.snapshot(self._stager, self.texts)
        now = _Save(self.run, snapshot, facts, f"{self._token}_{self._attempts}")
        now.parts = state.sharded
        if now.parts:
            now.job = _Job(lambda: self._in_place(now.write))
        elif distributed.rank() == 0:
            now.job = _Job(lambda: self._complete(now, self._in_place(now.write)))
        now.stall_s = time.monotonic() - start
        self._now = now

    def _in_place(self, write: Callable[[], Files]) -> Files:
        """Write, if the run's folder is the one it was; that of checkpoints may have been removed."""
        self._same.check()
        (self.run / "checkpoints").mkdir(exist_ok=True)
        return write()

    def _complete(self, now: _Save, files: Files) -> Files:
        if self.is_taken():
            raise UserError(f"another process has taken {self.run}")
        files = now.finish(files)
        try:
            keep = self.config.model_dump(include={"keep", "keep_every_steps"})
            found = scan(self.run)
            for old in superseded(found, **keep, keep_best=self.config.keep_best, newest=now.step):
                checkpoint.remove(old.folder)
            now.note = self._room(sum(int(entry["bytes"]) for entry in files.values()))
        except (OSError, UserError) as error:  # the checkpoint itself is durable
            now.note = f"an older checkpoint cannot be removed ({error})"
        return files

    def _room(self, size: int) -> str:
        """What to say where the next checkpoint, which is complete before an older one goes, does not fit."""
        free = shutil.disk_usage(self.run).free
        if free >= size:
            return ""
        return f"{size_text(free)} are free where the next checkpoint needs {size_text(size)}; make room"

    def _go_on(self) -> None:
        """Wait for the threads, exchange what came of them, and do what follows."""
        now = self._now
        assert now is not None
        if now.job is not None:
            now.job.join()
        own: dict[str, Any] = {}
        if now.job is not None:
            own = {"problem": now.job.problem, "mend": now.job.mend, "files": now.job.files}
        every = distributed.gather_json(own)
        failed = next((one for one in every if one.get("problem")), {"problem": "", "mend": ""})
        problem, self._mend = failed["problem"], failed["mend"]
        files = {name: entry for one in every for name, entry in one.get("files", {}).items()}
        if now.parts and not problem:
            now.parts = False
            now.job = _Job(lambda: self._complete(now, files)) if distributed.rank() == 0 else None
            return
        self._now = None
        self._settle(now, problem, files)

    def _settle(self, now: _Save, problem: str, files: Files) -> None:
        self._problem = problem
        if not problem:
            self._failed, self.saved_step = 0, now.step
            size = sum(int(entry["bytes"]) for entry in files.values())
            row = {"saved_step": now.step, "stall_s": now.stall_s, "write_s": now.write_s, "bytes": size}
            self.tell(row | ({"warning": now.note} if now.note else {}))
            return
        self._failed += 1
        self._retry_at = time.monotonic() + self.config.retry_s
        self._problem = f"{now.final} cannot be written ({problem})"
        if distributed.rank() == 0:
            shutil.rmtree(now.temporary, ignore_errors=True)
        warning = (
            f"{self._problem}; training goes on and tries again, saved is step {self.saved_step} "
            f"(failure {self._failed}, of {self.config.max_failed_saves} in a row that are let pass)"
        )
        self.tell({"failed_saves": self._failed, "warning": warning})

    def _give_up_if_hopeless(self) -> None:
        if self._failed >= self.config.max_failed_saves:
            raise UserError(
                f"checkpoint.max_failed_saves: {self._failed} saves in a row have failed, at last: "
                f"{self._problem}; {self._mend}, then the same command goes on after step {self.saved_step}"
            )

    def _wait_for_the_one_before(self) -> None:
        assert self._now is not None
        start, before = time.monotonic(), self._now.step
        self.wait()
        waited = time.monotonic() - start
        if waited >= NOTABLE_S:
            warning = (
                f"training waited {waited:.1f} s for the checkpoint of step {before}, which was still being "
                f"written when that of step {self.state.step} was due; raise checkpoint.every_steps"
            )
            self.tell({"waited_s": waited, "warning": warning})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(f"out: {folder}", error) from error


def require_shared(run: Path) -> None:
    """Raise UserError, on all ranks, if one of them does not see rank 0's ``run``; all ranks call it."""
    probe = run / f".seen_{distributed.broadcast_json(secrets.token_hex(6))}"
    on_rank_0(lambda: _make(probe))
    try:
        with together():
            if not probe.is_dir():
                raise UserError(
                    f"out: rank {distributed.rank()} does not see what rank 0 writes into {run}; set out to "
                    "a folder that all hosts share"
                )
    finally:
        if distributed.rank() == 0:
            probe.rmdir()
