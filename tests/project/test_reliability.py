"""docs/reliability.md: every test that it names exists, and its tables are those of the committed rows."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from .repository import ROOT, tracked, tree

DOCUMENT = ROOT / "docs" / "reliability.md"


def test_every_row_names_a_test_that_exists() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if re.match(r"\| .*\| .*`tests/.*\|$", line)]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row.rpartition(" | ")[2])
        assert named, row
        for file, function in named:
            assert Path(file) in tracked(), row
            tests = {n.name for n in ast.walk(tree(Path(file))) if isinstance(n, ast.FunctionDef)}
            assert any(name.startswith("test_") for name in tests), row
            assert not function or function in tests, row


def test_rows_without_a_test_are_not_claimed() -> None:
    head, _, rest = DOCUMENT.read_text().partition(
        "| fault | what happens | test that proves it |\n|---|---|---|\n"
    )
    assert head
    matrix = rest.partition("\n\n")[0].splitlines()
    assert matrix
    assert [row for row in matrix if "`tests/" not in row] == []


def test_the_tables_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plot = importlib.import_module("plot")
    text = DOCUMENT.read_text()
    assert plot.fill(text) == text
