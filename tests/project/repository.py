"""What is in the repository: tracked files, and product code as syntax trees."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "configs",
    "data",
    "pretrain",
    "finetune",
    "cli",
)  # each may import itself and what stands before it
FINETUNE = (
    "config",
    "tables",
    "tasks",
    "fusion",
    "encoders",
    "splits",
    "adapt",
    "scores",
    "runs",
    "explain",
    "",
    "export",
    "report",
)  # folders of finetune/, "" its own files; likewise, but for what a function imports when it is called


@cache
def tracked() -> tuple[Path, ...]:
    """Paths of all tracked files that are there, relative to the root, sorted."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(name for name in listed.stdout.split("\0") if name)
    return tuple(Path(name) for name in names if (ROOT / name).is_file())


def product_files() -> list[Path]:
    """Tracked Python files of the five packages, relative to the root."""
    return [path for path in tracked() if path.parts[0] in PACKAGES and path.suffix == ".py"]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file of the repository."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> list[str]:
    """``data/corpora/icons.py`` -> ``["data", "corpora", "icons"]``; a package is named by its folder."""
    parts = list(path.with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, dotted name, at the top of the file?) of everything that a file imports.

    Relative imports are written from the root of the import package: ``from ..data.shards import x`` is
    ``diptych.data.shards.x``.
    """
    package = list(path.parent.parts)
    top = set(map(id, tree(path).body))
    found: list[tuple[int, str, bool]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inner = package[: len(package) - (node.level - 1)]
                base = ".".join(["diptych", *inner, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}", id(node) in top) for alias in node.names]
    return found
