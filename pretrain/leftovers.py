"""Shared memory that killed data workers left behind, removed when their run forgets them or
starts again.

PyTorch hands a worker's batch over in a file of /dev/shm that carries the worker's process id, and unlinks it
at once; a worker killed in between leaves it. The run folder says which workers a run had, so that no other
run's files are touched.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ..configs.documents import as_written, read_document
from ..configs.errors import UserError
from ..configs.files import atomic_write_text

__all__ = ["note_workers", "remove_shared_memory"]

SHARED = Path("/dev/shm")
OLD_S = 1.0
"""A file that is younger may be one that a living process is about to unlink."""


def note_workers(run: Path, rank: int, workers: list[int]) -> None:
    """Write down the process ids of a rank's data workers, or forget them where there are none any more,
    after removing what those noted before have left. A disk that is full is no reason to stop."""
    with suppress(OSError):
        path = run / "workers" / f"{_machine()}_{rank:05d}.json"
        _clean(path)
        if workers:
            path.parent.mkdir(exist_ok=True)
            atomic_write_text(path, json.dumps({"workers": workers}) + "\n")
        else:
            path.unlink(missing_ok=True)
            path.parent.rmdir()  # if it was the last one


def remove_shared_memory(run: Path) -> None:
    """Unlink what this run's workers left on this machine, and forget those that are no more.

    Call it on one process of each machine, before there are workers.
    """
    with suppress(OSError):
        for path in (run / "workers").glob(f"{_machine()}_*.json"):
            _clean(path)


def _clean(path: Path) -> None:
    """Unlink what the workers of one record left. A record that somebody changed is left alone."""
    with suppress(OSError, UserError), as_written(path):
        workers = [int(pid) for pid in read_document(path)["workers"]]
        gone = [pid for pid in workers if not Path("/proc", str(pid)).exists()]
        for file in [file for pid in gone for file in SHARED.glob(f"torch_{pid}_*")]:
            with suppress(OSError):
                facts = file.stat()
                if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > OLD_S:
                    file.unlink()
        if gone == workers:
            path.unlink(missing_ok=True)


def _machine() -> str:
    """What process ids are unique in, this boot of this machine and this container, as a word for a file's
    name."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
