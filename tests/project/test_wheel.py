"""What is built is what is in the repository, no more and no less, and it runs outside of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from .repository import PACKAGES, ROOT, tracked


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made from it, of tracked files alone."""
    folder = tmp_path_factory.mktemp("built")
    for path in tracked():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / "source" / path)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_exactly_the_tracked_files_of_the_packages(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == {f"diptych/{path}" for path in tracked() if path.parts[0] in PACKAGES}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_build_needs(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {str(path) for path in tracked() if path.parts[0] in PACKAGES}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_runs_elsewhere_beside_a_folder_called_data(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "here" / "data").mkdir(parents=True)
    (tmp_path / "here" / "data" / "__init__.py").write_text("raise SystemExit('the wrong data')\n")
    code = (
        "import diptych.data, diptych.configs.load as m; "
        "from importlib.resources import files; from diptych.cli.main import main; "
        "recipes = list(files('diptych.configs').joinpath('demo').iterdir()); "
        "print(m.__file__, len(recipes)); main(['--version'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path, number = done.stdout.splitlines()[0].rsplit(" ", 1)
    assert path == str(tmp_path / "site/diptych/configs/load.py")
    assert int(number) >= 2
    assert done.stdout.splitlines()[1].startswith("diptych 0.")
