"""``hf://`` against a server that answers as the hub does for one data set."""

import json
import re
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from diptych.configs.errors import UserError
from diptych.data import remote
from diptych.data.shards import open_shards

from .samples import samples, write

URL = "hf://datasets/user/name/set"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[Path, list[str]]]:
    """The data set's folder, and the requests so far."""
    folder = write(tmp_path / "set", samples(10))
    log: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            log.append(f"{self.path} {self.headers.get('Range') or ''}")

        def answer(self, data: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                data = (folder / self.path.rpartition("/")[2]).read_bytes()
                asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                if asked is None:
                    return self.answer(data, ETag='"e"', X_Repo_Commit="1" * 40)
                part = data[int(asked[1]) : int(asked[2]) + 1]
                return self.answer(part, 206, Content_Range=f"bytes {asked[1]}-{asked[2]}/{len(data)}")
            if "/tree/" in self.path:
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                tree = [
                    {"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": f"set/{path.name}"}
                    for path in files
                ]
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": "user/name", "sha": "1" * 40, "siblings": [], "private": False, "tags": []}
            return self.answer(json.dumps(info).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    settings = {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": False}
    monkeypatch.setitem(fsspec.config.conf, "hf", settings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.02)
    yield folder, log
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("cache_gb", [1.0, 0.0], ids=["cached", "ranges"])
def test_a_data_set_on_the_hub_gives_the_samples_of_the_folder(
    hub: tuple[Path, list[str]], cache_gb: float
) -> None:
    folder, log = hub
    here, there = open_shards(folder), open_shards(URL, cache_gb=cache_gb)
    assert there.read_many(range(10)) == here.read_many(range(10))
    assert there.read(7) == here.read(7)
    asked = [line for line in log if ".tar" in line]
    if cache_gb:
        assert len(asked) == 3
        return
    assert len(asked) == 11
    for line in asked:  # the sample, not megabytes from there on
        first, last = map(int, line.rpartition("bytes=")[2].split("-"))
        assert last - first < 4096


def test_a_folder_that_is_not_there_is_told(hub: tuple[Path, list[str]]) -> None:
    with pytest.raises(UserError, match=r"hf://datasets/user/name/other/manifest\.jsonl cannot be read"):
        open_shards("hf://datasets/user/name/other")
