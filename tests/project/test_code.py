"""Rules that a reader of the code relies on: one import direction, data is never executed, short files."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from .repository import FINETUNE, PACKAGES, ROOT, imports, product_files, tracked, tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# import names that differ from the package's name
IMPORT_NAMES = {
    "pil": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "open-clip": "open-clip-torch",
}


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(node: ast.Call, name: str) -> object:
    found = [k.value for k in node.keywords if k.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def test_imports_go_one_way() -> None:
    wrong: list[str] = []
    for path in product_files():
        allowed = PACKAGES[: PACKAGES.index(path.parts[0]) + 1]
        for line, name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "diptych" and parts[1] not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []


def test_imports_of_finetune_go_one_way() -> None:
    def part(parts: Sequence[str]) -> str:
        return parts[1] if (ROOT / "finetune" / parts[1]).is_dir() else ""

    wrong: list[str] = []
    for path in product_files():
        if path.parts[0] != "finetune":
            continue
        own = part(path.parts)
        allowed = FINETUNE[: FINETUNE.index(own) + 1]
        for line, name, at_top in imports(path):
            parts = name.removeprefix("diptych.").split(".")
            if at_top and parts[0] == "finetune" and part(parts) not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []


def test_the_product_imports_itself_relatively() -> None:
    absolute = [
        f"{path}:{node.lineno}"
        for path in product_files()
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "diptych" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("diptych"))
    ]
    assert absolute == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("wandb", {"pretrain/tracking.py"}),
        ("torch.distributed", {f"pretrain/{name}.py" for name in ("distributed", "meeting", "launch")}),
    ],
)
def test_a_library_with_side_effects_is_used_in_one_place(library: str, homes: set[str]) -> None:
    users = {
        str(path)
        for path in product_files()
        for _, name, _ in imports(path)
        if name == library or name.startswith(library + ".")
    }
    assert users == homes


def test_every_import_is_a_declared_dependency_and_extras_are_imported_late() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s<>=!~;\[]", r)[0].lower().replace("_", "-") for r in requirements}

    always = names(PROJECT["dependencies"])
    extras = set[str]().union(*(names(group) for group in PROJECT["optional-dependencies"].values()))
    wrong: list[str] = []
    for path in product_files():
        for line, name, at_top in imports(path):
            first = name.split(".")[0]
            if first in sys.stdlib_module_names or first == "diptych":
                continue
            package = first.lower().replace("_", "-")
            package = IMPORT_NAMES.get(package, package)
            if package not in always and (at_top or package not in extras):
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []


def test_nothing_from_outside_is_executed() -> None:
    wrong: list[str] = []
    for path in product_files():
        for line, name, _ in imports(path):
            if name.split(".")[0] in ("dill", "cloudpickle", "shelve", "marshal"):
                wrong.append(f"{path}:{line} imports {name}")
        for node, called in calls(path):
            where = f"{path}:{node.lineno} {called}"
            unsafe = called in (
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "subprocess.getoutput",
                "yaml.unsafe_load",
            )
            unsafe |= called.startswith("pickle.") and called != "pickle.UnpicklingError"
            unsafe |= keyword(node, "shell") is True or keyword(node, "allow_pickle") is True
            unsafe |= called == "torch.load" and keyword(node, "weights_only") is not True
            unsafe |= keyword(node, "trust_remote_code") is True
            if unsafe:
                wrong.append(where)
    assert wrong == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in tracked()
        if path.suffix == ".py"
    }
    assert {path: n for path, n in lengths.items() if n > 400} == {}
    product = [lengths[str(path)] for path in product_files()]
    assert np.median(product) <= 200


def test_functions_fit_a_screen() -> None:
    lengths = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in product_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
    }
    assert np.percentile(list(lengths.values()), 95) <= 50
    assert {name: n for name, n in lengths.items() if n > 90} == {}


def test_every_package_is_typed_and_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = {
        name.removeprefix("diptych.").replace(".", "/") for name in config["tool"]["setuptools"]["packages"]
    }
    folders = {str(path.parent) for path in product_files()}
    assert folders == listed
    needed = [Path(folder, name) for folder in sorted(folders) for name in ("__init__.py", "py.typed")]
    assert [str(path) for path in needed if path not in tracked()] == []
