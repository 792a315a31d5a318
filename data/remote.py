"""Files of object stores and web servers, through fsspec: whole, in part, or into a file.

What may pass is tried again with growing waits, then raised as one UserError that names the URL. No request
waits without end. Credentials and endpoints are fsspec's own matter (docs/remote.md).
"""

import asyncio
import errno
import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec
import fsspec.config as fsspec_config
from xxhash import xxh3_64

from ..configs.errors import UserError

__all__ = ["RemoteFile", "RemoteFolder", "as_url", "read_ranges", "shown"]

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 5
FIRST_WAIT_S = 1.0  # doubled at each retry: 15 seconds in all
REQUEST_S = 30.0  # a whole answer that is held in memory, or some together
STALL_S = 30.0  # a download that brings nothing
CONNECT_S = 10.0
AT_ONCE = 32  # requests of one call that are under way together
CHUNK = 1 << 20

# what fsspec imports for a scheme, and the extra of ours that brings it
BACKENDS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "hf": ("huggingface_hub", None),  # open_clip brings it
    "memory": (None, None),
}


def as_url(text: str | Path) -> str | None:
    """The URL that ``text`` is, None for a path. ``Path`` makes one slash of two; they are restored.

    Raises UserError for ``pipe:`` commands and for schemes that are not read.
    """
    text = str(text)
    if text.startswith("pipe:"):
        raise UserError(
            f"'{text}' is a shell command, and Diptych runs none that a config or a list of shards names; "
            "give the URL itself (s3://, gs://, hf://, https://)"
        )
    found = re.match(r"([a-z][a-z0-9+.-]*):/{1,2}(?=[^/])", text)
    if found is None or (found[1] not in BACKENDS and "://" not in text):
        return None
    if found[1] not in BACKENDS:
        known = ", ".join(f"{scheme}://" for scheme in BACKENDS)
        raise UserError(f"'{shown(text)}' has a scheme that is not read; the ones that are: {known}")
    return f"{found[1]}://{text[found.end() :]}"


def shown(url: str) -> str:
    """A URL for messages: without a password and without its query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteFile:
    """One file behind a URL. Can be pickled and forked, and is safe for threads."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return urlsplit(self.url).path.rpartition("/")[2]

    def read(self) -> bytes:
        """All of it. Raises UserError if it cannot be had."""
        return _retrying(lambda: str(self), lambda: _request(self.url, "cat_file", self.url))

    def describe(self) -> tuple[int | None, str]:
        """Its size in bytes, where the server says it, and what the server tells versions of it apart by."""
        info: dict[str, Any] = _retrying(lambda: str(self), lambda: _request(self.url, "info", self.url))
        known = [str(info[name]) for name in ("ETag", "etag", "LastModified", "blob_id") if info.get(name)]
        return info.get("size"), " ".join(known)

    def download(self, path: Path, *, xxh3: str | None, most: int, exact: bool) -> None:
        """Write it to ``path``, with ``most`` bytes, or fewer where that is not ``exact``, and with the hash
        ``xxh3`` (16 digits) unless that is None.

        Raises UserError if it cannot be had, or is another file after all tries.
        """

        def attempt() -> None:
            _download(self.url, path, most)
            if (got := path.stat().st_size) != most and (exact or got > most):
                raise _WrongFile(f"it has {got} bytes, {most} were expected")
            if xxh3 is not None and (found := _hash_of(path)) != xxh3:
                raise _WrongFile(f"its xxh3 is {found}, the manifest says {xxh3}")

        _retrying(lambda: str(self), attempt)


class RemoteFolder:
    """A folder behind a URL; ``folder / name`` is a file in it. The query of a URL goes with every file."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._web = parts.scheme in ("http", "https")
        query = f"?{parts.query}" if parts.query and self._web else ""
        self._base, self._query = url.removesuffix(query).rstrip("/"), query

    def __str__(self) -> str:
        return shown(self._base)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._base.rpartition("/")[2]

    def __truediv__(self, name: str) -> RemoteFile:
        return RemoteFile(f"{self._base}/{quote(name) if self._web else name}{self._query}")


def read_ranges(spans: Sequence[tuple[RemoteFile, int, int]]) -> list[bytes]:
    """``size`` bytes at ``offset`` of each (file, offset, size), concurrently.

    Only what failed is asked for again. Raises UserError if something cannot be had or a file ends before it.
    """
    got: list[bytes | None] = [None if size else b"" for _, _, size in spans]
    culprit = spans[0][0] if spans else None

    def attempt() -> None:
        nonlocal culprit
        missing = [i for i, data in enumerate(got) if data is None]
        wanted = [(spans[i][0].url, spans[i][1], spans[i][1] + spans[i][2]) for i in missing]
        failed: Exception | None = None
        for i, answer in zip(missing, _ranges(wanted), strict=True):
            file, at, size = spans[i]
            if isinstance(answer, Exception):
                failed, culprit = answer, file
            elif len(answer) < size:
                failed, culprit = _WrongFile(f"{len(answer)} of {size} bytes came from byte {at}"), file
            elif len(answer) > size:
                raise UserError(
                    f"{file}: the server sends more than the range that was asked for; "
                    "set data.cache_gb above 0, which reads whole shards"
                )
            else:
                got[i] = answer
        if failed is not None:
            raise failed

    _retrying(lambda: str(culprit), attempt)
    return [data for data in got if data is not None]


class _WrongFile(OSError):
    """What came is not what the manifest names."""


def _retrying(name: Callable[[], str], attempt: Callable[[], T]) -> T:
    """``attempt``'s result; a UserError that names the file if it fails for good or for the last time."""
    wait = FIRST_WAIT_S
    for left in range(TRIES - 1, -1, -1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as raised:  # backends raise what they please, often no OSError
            error = _cause(raised)
            reason = _reason(error)
            if (mend := _hopeless(error)) is not None:
                raise UserError(f"{name()} cannot be read: {reason}; {mend}") from error
            if not left:
                mend = (
                    "it is not what was written; upload it and its manifest again"
                    if isinstance(error, _WrongFile)
                    else "check the network and the server"
                )
                raise UserError(f"{name()} cannot be read after {TRIES} tries: {reason}; {mend}") from error
            # nobody waits for what threads bring ahead, and they may fail because the process ends
            level = logging.DEBUG if threading.current_thread().daemon else logging.WARNING
            log.log(level, "%s: %s; trying again in %.1f s", name(), reason, wait)
            time.sleep(wait)
            wait *= 2
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """What happened: over HTTP, fsspec says of any failure to look at a file that there is none."""
    cause = error.__cause__
    web = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and web and isinstance(cause, Exception) else error


def _reason(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"the server answers with status {status}"
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    if isinstance(error, TimeoutError) and not text:
        return "no answer in time"
    text = re.sub(r"\?[^\s'\"]+", "", text)  # a query may be a signature
    return text if isinstance(error, OSError) and text else f"{type(error).__name__} {text}".strip()


def _status(error: Exception) -> int | None:
    """The HTTP status that an error speaks of."""
    response: Any = getattr(error, "response", None)
    named = [
        getattr(error, "status", None),
        getattr(response, "status_code", None),
        getattr(error, "code", None),
    ]
    return next((status for status in named if isinstance(status, int) and 100 <= status < 600), None)


def _hopeless(error: Exception) -> str | None:
    """What to do about an error that no further try will mend; None if one may."""
    status = _status(error)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "make room in the cache's folder, or lower data.cache_gb"
    if isinstance(error, FileNotFoundError) or status == 404:
        return "there is no such file; check the URL"
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "check the credentials (docs/remote.md)"
    if status is not None and 400 <= status < 500 and status not in (408, 416, 425, 429):
        return "check the URL"
    return None


# -- fsspec's file systems -------------------------------------------------------------------------------

_lock = threading.Lock()
_made: dict[str, Any] = {}
_of_parent: list[Any] = []  # never closed by a child: their connections are the parent's


def _after_fork() -> None:
    # an event loop does not survive a fork
    global _lock
    _lock = threading.Lock()
    _of_parent.append(dict(_made))
    _made.clear()


os.register_at_fork(after_in_child=_after_fork)


def _system(url: str) -> Any:
    """The file system of a URL's scheme, made anew in every process."""
    scheme = urlsplit(url).scheme
    module, extra = BACKENDS[scheme]
    try:
        if module is not None:
            importlib.import_module(module)
        cls = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        how = f'pip install "diptych[{extra}]"' if extra else f"pip install {module}"
        raise UserError(f"{scheme}:// needs {module}, which is not installed; install it: {how}") from error
    if not cls.async_impl:
        return fsspec.filesystem(scheme)  # which fsspec keeps, one per thread
    with _lock:
        if scheme not in _made:
            _made[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True, **_defaults(scheme))
        return _made[scheme]


def _defaults(scheme: str) -> dict[str, Any]:
    """Options that bound how long a request takes, and leave retries to this module; what the user's
    configuration of fsspec says of the same option goes first."""
    given: dict[str, Any] = {}
    if scheme == "s3":
        timeouts = {"connect_timeout": CONNECT_S, "read_timeout": STALL_S, "retries": {"max_attempts": 0}}
        # one stream per file: many files are under way at once, and ten streams hold 500 MB
        given = {"config_kwargs": timeouts, "max_concurrency": 1}
    elif scheme in ("http", "https"):
        import aiohttp

        # aiohttp's own limit is five minutes for a whole file
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        given = {"client_kwargs": {"timeout": limits}}
    user: dict[str, Any] = fsspec_config.conf.get(scheme, {})
    return {name: value for name, value in given.items() if name not in user}


def _request(url: str, method: str, *args: Any) -> Any:
    """Call a file system's method; TimeoutError after ``REQUEST_S`` where the system is asynchronous."""
    system = _system(url)
    if system.async_impl:
        return _wait(system, getattr(system, f"_{method}")(*args), lambda _: REQUEST_S)
    return getattr(system, method)(*args)


def _wait(system: Any, work: Coroutine[Any, Any, T], patience: Callable[[float], float]) -> T:
    """The result of ``work``, done by the system's event loop. It is cancelled, and TimeoutError raised, when
    more seconds have passed than ``patience`` says, which is asked again and again with those that have."""
    start = time.monotonic()
    future = asyncio.run_coroutine_threadsafe(work, system.loop)
    try:
        while True:
            try:
                return future.result(timeout=0.25)
            except TimeoutError:
                if future.done():
                    raise
                if (passed := time.monotonic() - start) > patience(passed):
                    raise TimeoutError("no answer in time") from None
    finally:
        future.cancel()


def _download(url: str, path: Path, most: int) -> None:
    system = _system(url)
    if not system.async_impl:
        system.get_file(url, str(path))
        return
    seen, last = 0, 0.0

    def patience(passed: float) -> float:
        nonlocal seen, last
        now = path.stat().st_size if path.exists() else 0
        if now > most:
            raise _WrongFile(f"it has more than the {most} bytes that it may have")
        if now != seen:
            seen, last = now, passed
        return last + STALL_S

    _wait(system, system._get_file(url, str(path)), patience)


def _ranges(wanted: list[tuple[str, int, int]]) -> list[bytes | Exception]:
    """(url, start, end) each, or why not."""
    if not wanted:
        return []
    system = _system(wanted[0][0])
    urls, starts, ends = ([part[i] for part in wanted] for i in range(3))
    if system.async_impl:
        work = system._cat_ranges(urls, starts, ends, batch_size=AT_ONCE, on_error="return")
        return _wait(system, work, lambda _: REQUEST_S)

    def one(span: tuple[str, int, int]) -> bytes | Exception:
        try:
            # without a cache of the file object, which reads megabytes ahead
            return _system(span[0]).cat_file(span[0], start=span[1], end=span[2], cache_type="none")
        except Exception as error:
            return error

    with ThreadPoolExecutor(min(AT_ONCE, len(wanted))) as pool:
        return list(pool.map(one, wanted))


def _hash_of(path: Path) -> str:
    digest = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
