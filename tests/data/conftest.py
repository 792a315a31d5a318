"""An S3 server with a set of shards in its bucket, behind a proxy that a test may break."""

from collections.abc import Generator
from pathlib import Path

import pytest

from .object_store import Proxy, forget_systems, hurry, s3_environment, s3_server, upload
from .samples import samples, write


@pytest.fixture(scope="module")
def port() -> Generator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture(scope="module")
def folder(port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 22 samples in 6 shards, here and in the bucket."""
    folder = write(tmp_path_factory.mktemp("local") / "set", samples(22))
    upload(folder, port, "set")
    return folder


@pytest.fixture
def proxy(port: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Proxy]:
    proxy = Proxy(port)
    s3_environment(monkeypatch, proxy.url)
    hurry(monkeypatch)
    yield proxy
    proxy.close()
    forget_systems()
