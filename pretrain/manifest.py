"""``manifest.json`` of a checkpoint: what belongs to it, written last.

It holds ``schema``, ``step``, ``samples_seen``, ``world_size``, ``config_sha256``, ``written`` (UTC), the
``metrics`` of an evaluation at this step, ``files`` (size and sha256 of each) and ``sha256``, the hash of its
own text without that line: no byte of a checkpoint can change unseen. Schema 1, of version 0.1.0, had
``step`` and ``files`` alone.
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ..configs.errors import UserError
from ..configs.files import fsync_folder
from .tensor_file import FileFacts, hash_file, write_text

__all__ = ["MANIFEST", "SCHEMA", "Found", "NewerCheckpoint", "scan", "seal", "size_text", "verify"]

MANIFEST = "manifest.json"
SCHEMA = 2
_MAX_BYTES = 64 << 20
_FOLDER = re.compile(r"step_(\d{8,})")

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Plain = Annotated[str, Field(pattern=r"^[\w@/.:+-]{1,100}$")]  # what is shown on a terminal


class _File(BaseModel):
    """A file of a checkpoint."""

    model_config = ConfigDict(strict=True)
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Facts(BaseModel):
    """What a manifest must hold, and may."""

    model_config = ConfigDict(strict=True)
    schema_: _Count = Field(default=1, alias="schema")
    step: _Count
    samples_seen: _Count = 0
    world_size: _Count = 1
    written: _Plain = "unknown"
    metrics: dict[_Plain, FiniteFloat] = Field(default_factory=dict)
    files: dict[Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")], _File]


class NewerCheckpoint(UserError):
    """A checkpoint of a schema that this version does not know."""


def size_text(count: float) -> str:
    """Bytes in words, as in ``1.25 GB`` or ``3.1 MB``."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class _Damage(Exception):
    """What is wrong with a checkpoint, as a sentence without its end."""


@dataclass(frozen=True)
class Found:
    """A checkpoint folder. ``problem`` says what is wrong with it at a glance: manifest and sizes, no hashes
    of the files."""

    folder: Path
    step: int
    problem: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size by the manifest."""
        files: Mapping[str, FileFacts] = self.facts.get("files", {})
        return sum(int(entry["bytes"]) for entry in files.values())


def _text(facts: Mapping[str, Any]) -> str:
    """The file's text: the facts, and their hash as the last of them."""
    own = hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()
    return json.dumps({**facts, "sha256": own}, indent=1) + "\n"


def seal(folder: Path, facts: Mapping[str, Any], files: Mapping[str, FileFacts]) -> None:
    """Sync and hash the files that are not in ``files``, and write the manifest last. Raises OSError."""
    every = dict(files)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in every:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            every[name] = hash_file(path)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = {"schema": SCHEMA, **facts, "written": now, "files": dict(sorted(every.items()))}
    write_text(folder / MANIFEST, _text(whole))
    fsync_folder(folder)


def _read(folder: Path) -> dict[str, Any]:
    """The manifest. Raises _Damage, and NewerCheckpoint for one that this version cannot understand."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _Damage(f"{path} is too big for a manifest")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _Damage(f"{folder} has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise _Damage(f"{path} cannot be read ({error})") from error
    try:
        facts = json.loads(text)
        if "schema" in facts or "sha256" in facts:
            body = {key: value for key, value in facts.items() if key != "sha256"}
            if _text(body) != text:
                raise _Damage(f"{path} is damaged (its own sha256 differs)")
            if (schema := int(facts["schema"])) > SCHEMA:
                raise NewerCheckpoint(
                    f"{folder} was written by a newer version of Diptych (its schema is {schema}, "
                    f"this version reads up to {SCHEMA}); update diptych, or set out to another folder"
                )
        _Facts.model_validate(facts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _Damage(f"{path} is damaged ({where[:100]!r}: {first['msg']})") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _Damage(f"{path} is damaged ({type(error).__name__}: {str(error)[:200]!r})") from error
    for name in facts["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise _Damage(f"{path} names a file outside its folder ({name})")
    return facts


def _check(folder: Path, facts: Mapping[str, Any], *, hashes: bool, without: Collection[str]) -> str | None:
    for name, entry in facts["files"].items():
        path = folder / name
        if name in without and not path.exists():
            continue
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes instead of {entry['bytes']}"
            if hashes and hash_file(path)["sha256"] != entry["sha256"]:
                return f"{path} is damaged (its sha256 differs)"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def verify(folder: Path, *, without: Collection[str] = ()) -> str | None:
    """None if every file is there and has its size and hash; else what is wrong. Those called as in
    ``without`` may be missing."""
    try:
        return _check(folder, _read(folder), hashes=True, without=without)
    except (_Damage, NewerCheckpoint) as damage:
        return str(damage)


def _inside(folder: Path) -> list[Path]:
    """What is in a folder, nothing if there is none; UserError if that cannot be known."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); make it a readable folder") from error


def scan(run: Path, *, strict: bool = False, without: Collection[str] = ()) -> list[Found]:
    """All checkpoints of a run, newest first, by the step in their manifest (by name only where there is
    none), each looked at without reading its big files. ``strict``: raise NewerCheckpoint for one that cannot
    be understood instead of listing it as a problem. ``without``: files that may be missing. Raises UserError
    if the folder cannot be read."""
    found: list[Found] = []
    for folder in _inside(run / "checkpoints"):
        named = _FOLDER.fullmatch(folder.name)
        if named is None:
            continue
        try:
            facts = _read(folder)
            problem = _check(folder, facts, hashes=False, without=without)
            found.append(Found(folder, int(facts["step"]), problem, facts))
        except _Damage as damage:
            found.append(Found(folder, int(named[1]), str(damage)))
        except NewerCheckpoint as newer:
            if strict:
                raise
            found.append(Found(folder, int(named[1]), str(newer)))
    return sorted(found, key=lambda one: (one.step, one.folder.name), reverse=True)
