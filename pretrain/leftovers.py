"""Shared memory that killed data workers left behind, removed at the next start of their run.

PyTorch hands a worker's batch over in a file of /dev/shm that carries the worker's process id, and unlinks it
at once; a worker killed in between leaves it. The run folder says which workers a run had, so that no other
run's files are touched.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from ..configs.documents import as_written, read_document
from ..configs.errors import UserError
from ..configs.files import atomic_write_text

__all__ = ["note_workers", "remove_shared_memory"]

SHARED = Path("/dev/shm")


def note_workers(run: Path, rank: int, workers: list[int]) -> None:
    """Write down the process ids of a rank's data workers, or forget them where there are none any more. A
    disk that is full is no reason to stop."""
    path = run / "workers" / f"rank_{rank:05d}.json"
    with suppress(OSError):
        if workers:
            path.parent.mkdir(exist_ok=True)
            document = {"machine": _machine(), "workers": workers}
            atomic_write_text(path, json.dumps(document) + "\n")
        else:
            path.unlink()
            path.parent.rmdir()  # if it was the last one


def remove_shared_memory(run: Path) -> list[str]:
    """Unlink what this run's workers left on this machine, and forget workers that are no more; the names.

    Call it on one process of each machine, before there are workers.
    """
    removed: list[str] = []
    for path in sorted((run / "workers").glob("rank_*.json")):
        # of another machine, half gone, or changed by somebody: left alone
        with suppress(OSError, UserError), as_written(path):
            document = read_document(path)
            if document["machine"] != _machine():
                continue
            workers = [int(pid) for pid in document["workers"]]
            gone = [pid for pid in workers if not Path("/proc", str(pid)).exists()]
            for file in [file for pid in gone for file in SHARED.glob(f"torch_{pid}_*")]:
                if file.stat().st_uid == os.getuid():
                    file.unlink()
                    removed.append(file.name)
            if gone == workers:
                path.unlink()
    return removed


def _machine() -> str:
    """What process ids are unique in: this boot of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
