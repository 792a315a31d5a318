"""Scanning many tars: on all cores, and, after a kill, only those that were not finished."""

import fcntl
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from .engine import Engine, Progress, here, quiet, run_tasks
from .image_header import MAX_IMAGE_BYTES, MAX_PIXELS
from .index import index_bytes, map_index
from .scan import Check, Finding, ShardScan, scan_shard

__all__ = ["USUAL", "Limits", "ScanLog", "local_folder", "scan_shards", "stamp", "tar_names"]

LOG = "scans.jsonl"


@dataclass(frozen=True)
class Limits:
    """What is too large to be used: images with more pixels, and files of images with more bytes."""

    max_pixels: int = MAX_PIXELS
    max_image_bytes: int = MAX_IMAGE_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.max_image_bytes <= MAX_IMAGE_BYTES:
            raise UserError(f"--max-image-mb must be from 1 to {MAX_IMAGE_BYTES >> 20}")


USUAL = Limits()


def local_folder(folder: str | Path, engine: Engine) -> Path:
    """The folder that is meant, ``corpus:NAME/SPLIT`` perhaps. UserError for a URL."""
    if "://" in str(folder):
        raise UserError(f"{folder} is not on this machine; copy the shards to a folder and give that")
    return here(resolve_data_path(folder), engine)


def tar_names(folder: Path) -> list[str]:
    """Names of the tars in a folder, sorted; UserError if there is no folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder of tars")
    return sorted(p.name for p in folder.glob("*.tar") if p.is_file() and not p.name.startswith("."))


def stamp(tar: Path) -> dict[str, int]:
    """What tells, without reading it, that a tar is not the one it was: its size and when it was written."""
    state = tar.stat()
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}


class ScanLog:
    """Finished scans, kept in ``folder`` until all are: each as an ``.idx`` and a line of ``scans.jsonl``.

    A scan is found again only for the same ``settings``, JSON values, and a tar with the same ``stamp``.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self._lines: dict[str, dict[str, Any]] = {}
        self._lock: int | None = None
        try:
            lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        for text in lines:
            try:
                line = json.loads(text)
                self._lines[line["shard"]] = line
            except (ValueError, TypeError, KeyError):  # the kill came while it was written
                continue

    def lock(self) -> bool:
        """Keep others out until ``release``; False if another is in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            return False
        except OSError:  # a file system without locks
            pass
        return True

    def idx(self, name: str) -> Path:
        """Where the index of a tar is kept."""
        return self.folder / f"{Path(name).stem}.idx"

    def has(self, tar: Path, caption_key: str | None) -> bool:
        """Whether the scan of ``tar`` is here."""
        line = self._lines.get(tar.name)
        if line is None or line["tar"] != self._identity(tar, caption_key):
            return False
        try:
            return xxh3_64_hexdigest(self.idx(tar.name).read_bytes()) == line["idx_xxh3"]
        except FileNotFoundError:
            return False

    def get(self, tar: Path) -> ShardScan:
        """The scan of a tar, of which ``has`` is true."""
        line, index = self._lines[tar.name], map_index(self.idx(tar.name))
        size, digest = int(index.header["shard_bytes"]), int(index.header["shard_xxh3"])
        findings = [Finding(tar.name, *texts) for texts in line["findings"]]
        return ShardScan(size, digest, index.records, index.keys(), findings, line["json_keys"])

    def put(self, tar: Path, caption_key: str | None, scan: ShardScan) -> None:
        """Keep a scan."""
        idx = index_bytes(scan.size, scan.xxh3, scan.records, scan.keys)
        self.idx(tar.name).write_bytes(idx)
        line = {
            "shard": tar.name,
            "tar": self._identity(tar, caption_key),
            "idx_xxh3": xxh3_64_hexdigest(idx),
            "findings": [[finding.key, finding.reason, finding.detail] for finding in scan.findings],
            "json_keys": scan.json_keys,
        }
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _identity(self, tar: Path, caption_key: str | None) -> dict[str, Any]:
        return {**stamp(tar), "caption_key": caption_key, **self.settings}

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def scan_shards(
    folder: Path,
    names: Sequence[str],
    what: str,
    *,
    caption_keys: Sequence[str | None],
    limits: Limits = USUAL,
    check_image: Check | None = None,
    log: ScanLog | None = None,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress = quiet,
) -> Generator[ShardScan]:
    """Scan shards in order (``engine.run_tasks``); ``caption_keys``: one per shard. Those that ``log`` has
    are not read again, the others are put there. To be closed where it may not be gone through."""
    tasks = [(folder / name, key) for name, key in zip(names, caption_keys, strict=True)]
    kept = [log is not None and log.has(*task) for task in tasks]
    todo = [task for task, known in zip(tasks, kept, strict=True) if not known]
    scans = run_tasks(partial(_scan, limits, check_image), todo, workers=workers, engine=engine)
    try:
        with progress(what, len(names)) as advance:
            for task, known in zip(tasks, kept, strict=True):
                if known and log is not None:
                    yield log.get(task[0])
                else:
                    scan = next(scans)
                    if log is not None:
                        log.put(*task, scan)
                    yield scan
                advance(1)
    finally:
        scans.close()


def _scan(limits: Limits, check_image: Check | None, task: tuple[Path, str | None]) -> ShardScan:
    path, caption_key = task
    try:
        return scan_shard(
            path,
            caption_key=caption_key,
            max_pixels=limits.max_pixels,
            max_image_bytes=limits.max_image_bytes,
            check_image=check_image,
        )
    except FileNotFoundError:
        raise UserError(f"{path} has gone while its folder was read; run the command again") from None
