"""What holds for every test: a cache of its own, W&B offline, no connection off this machine."""

import os
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# a busy machine is no fault of a test; every run draws the same examples, unless new ones are asked for
hypothesis.settings.register_profile(
    "diptych",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=os.environ.get("DIPTYCH_EXPLORE") != "1",
)
hypothesis.settings.load_profile("diptych")
REQUIRE_ALL = os.environ.get("DIPTYCH_REQUIRE_ALL") == "1"
NO_TEST_AFTER = float(os.environ.get("DIPTYCH_NO_TEST_AFTER", "inf"))
"""Seconds since the epoch; a test that would begin later is skipped, and listed."""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's is read or written, and nothing is looked up on a hub."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def this_machine_only() -> Generator[None]:
    """Python sockets connect to loopback addresses and nowhere else."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        if inet and not (str(address[0]).startswith("127.") or address[0] in ("::1", "localhost")):
            raise RuntimeError(f"a test tried to reach {address[0]}; tests stay on this machine")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture
def require() -> Callable[[object, str], None]:
    """``require(condition, reason)``: skip with the reason where the condition does not hold. With
    ``DIPTYCH_REQUIRE_ALL=1`` in the environment that is a failure, see below."""

    def check(condition: object, reason: str) -> None:
        if not condition:
            pytest.skip(reason)

    return check


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A machine that is slow today runs as many tests as it has time for."""
    if time.time() > NO_TEST_AFTER:
        item.add_marker("late")
        pytest.skip(f"no time left for {item.nodeid}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where everything must run, a skipped test is a failed one; a GPU, leave to mount or time may be
    absent."""
    report = yield
    marked = any(item.get_closest_marker(name) is not None for name in ("gpu", "mount", "late"))
    excused = marked or hasattr(report, "wasxfail")
    if REQUIRE_ALL and report.skipped and not excused:
        report.outcome = "failed"
        report.longrepr = f"skipped, but DIPTYCH_REQUIRE_ALL=1: {report.longrepr[2]}"
    return report
