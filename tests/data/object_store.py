"""An S3 server on this machine, and a proxy before it that breaks what passes through, as networks do."""

import logging
import re
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import fsspec
import pytest

from diptych.data import remote

BUCKET = "bucket"


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose line matches ``where``.

    "500": the server's answer is an error; "cut": the connection ends after ``at`` bytes of the body;
    "stall": it falls silent there; "short" and "long": the object has ``at`` bytes fewer or more and says so;
    "refuse": the connection ends before an answer.
    """

    kind: Literal["500", "cut", "stall", "short", "long", "refuse"]
    where: str
    times: int = 1
    at: int = 100


@dataclass
class Proxy:
    """Forwards each connection's one request. ``log``: the request lines with their ranges."""

    upstream: int
    faults: list[Fault] = field(default_factory=list[Fault])
    log: list[str] = field(default_factory=list[str])
    dead: bool = False
    pause: float = 0.0
    """Seconds before each answer."""
    meeting: tuple[str, threading.Barrier] | None = None
    """GET requests with the word are answered when so many are under way, never if fewer come."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, pattern: str) -> list[str]:
        """The GET requests so far whose line matches."""
        return [line for line in self.log if line.startswith("GET ") and re.search(pattern, line)]

    def close(self) -> None:
        self._stop.set()
        # a thread that waits in accept() keeps a closed listener alive
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            self._answer(client, head)

    def _answer(self, client: socket.socket, request: bytes) -> None:
        line = request.split(b"\r\n", 1)[0].decode()
        asked = re.search(rb"\r\nRange: (\S+)", request, re.IGNORECASE)
        with self._lock:
            self.log.append(f"{line} {asked[1].decode() if asked else ''}")
            fault = next((f for f in self.faults if f.times and re.search(f.where, line)), None)
            if fault is not None:
                fault.times -= 1
        if self.dead or (fault is not None and fault.kind == "refuse"):
            return
        if self.pause:
            time.sleep(self.pause)
        if self.meeting is not None and line.startswith("GET ") and self.meeting[0] in line:
            try:
                self.meeting[1].wait(30)
            except threading.BrokenBarrierError:  # too few came: no answer
                return
        if fault is not None and fault.kind == "500":
            client.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        head, body = self._forward(request)
        if fault is None:
            client.sendall(head + b"\r\n\r\n" + body)
            return
        if fault.kind in ("short", "long"):
            body = body[: -fault.at] if fault.kind == "short" else body + bytes(fault.at)
            length = b"Content-Length: %d" % len(body)
            head = re.sub(rb"(?i)content-length: \d+", length, head)
            head = re.sub(rb"(?i)\r\nx-amz-checksum-[^\r]*", b"", head)  # not all servers send some
            client.sendall(head + b"\r\n\r\n" + body)
            return
        client.sendall(head + b"\r\n\r\n" + body[: fault.at])
        if fault.kind == "stall":
            self._stop.wait(20)

    def _forward(self, request: bytes) -> tuple[bytes, bytes]:
        request = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", request)
        request = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        answer = b""
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(request)
            while data := server.recv(1 << 20):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        return head, body


@contextmanager
def s3_server() -> Generator[int]:
    """The port of an S3 server that holds its objects in memory, with an empty bucket ``BUCKET``."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield int(server.get_host_and_port()[1])
    finally:
        server.stop()


def s3_environment(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Credentials and endpoint, as a user gives them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def upload(folder: Path, port: int, name: str) -> None:
    """Put a folder's files under ``s3://BUCKET/name``, past the proxy."""
    system = fsspec.filesystem(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        key="testing",
        secret="testing",
        use_listings_cache=False,
    )
    if not system.exists(BUCKET):
        system.mkdir(BUCKET, acl="public-read")
    for path in sorted(folder.iterdir()):
        if path.is_file():
            system.pipe_file(f"{BUCKET}/{name}/{path.name}", path.read_bytes(), ACL="public-read")


def hurry(monkeypatch: pytest.MonkeyPatch, *, silence: float = 10.0) -> None:
    """Waits that fit a test; ``silence``: seconds after which a server counts as silent, more than a busy
    machine takes for an answer unless it is to be."""
    monkeypatch.setattr(remote, "TRIES", 3)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(remote, "REQUEST_S", 1.5 * silence)
    monkeypatch.setattr(remote, "STALL_S", silence)
    forget_systems()


def forget_systems() -> None:
    """File systems are made anew: they hold the endpoint of the test before."""
    remote._made.clear()
