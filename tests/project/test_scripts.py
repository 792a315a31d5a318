"""Makefile, CI and Slurm scripts: they parse, name what exists, and say plainly what is missing."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from .repository import ROOT, tracked

SCRIPTS = [path for path in tracked() if path.suffix in (".sbatch", ".sh") or path.parts[0] == ".ci"]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_a_script_parses_and_stops_at_the_first_error(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^set -euo pipefail$", (ROOT / path).read_text(), re.MULTILINE)


def test_ci_runs_the_same_two_commands_as_a_contributor() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.findall(r"make ([a-z-]+)", script) == ["test", "test-slow"]
    assert "DIPTYCH_REQUIRE_ALL=1" in script


def test_help_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = make("help").stdout
    assert {line.split()[1] for line in listed.splitlines()} == targets
    assert {"demo", "test", "test-slow", "lint", "bench", "clean"} <= targets


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_install_first_and_only_once(target: str, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    plan = make("-n", target, f"VENV={environment}").stdout
    order = ["-m venv", "install --progress-bar off -c constraints.txt -q torch", "-e '.[demo,test,fast]'"]
    places = [plan.index(words) for words in order]
    assert places == sorted(places)
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").touch()
    (environment / ".diptych").write_text(str(ROOT))
    assert "pip" not in make("-n", target, f"VENV={environment}").stdout
    (environment / ".diptych").write_text("another checkout")
    assert "-e '.[demo,test,fast]'" in make("-n", target, f"VENV={environment}").stdout


def test_a_missing_python_is_told_in_one_sentence(tmp_path: Path) -> None:
    done = make("install", f"VENV={tmp_path}/env", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "error: Diptych needs Python 3.11 or newer, and 'no-such-python' is" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (tmp_path / "env").exists()


def test_every_requirement_has_a_tested_version() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in _lines(ROOT / "constraints.txt")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [
        *project["dependencies"],
        *(one for name in ("demo", "test", "fast") for one in extras[name]),
    ]
    wanted = {re.split(r"[<>=\[]", one)[0].lower().replace("_", "-") for one in installed}
    assert wanted <= pinned


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
