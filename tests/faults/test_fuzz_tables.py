"""Tables damaged at random: rows that are none are bad rows, a table that is none is refused by its name."""

import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from diptych.configs.errors import UserError
from diptych.data.sources import Columns, Row, open_source

from .damage import ANY, check_names

ROWS: list[dict[str, Any]] = [
    {"image": f"p{i}.png", "caption": f'caption {i} \N{CAT FACE}, with "quotes"\nand lines', "n": i}
    for i in range(150)
]


def table(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=60)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    return path


def damaged(path: Path, n: int, seed: int) -> Counter[str]:
    content, rng = table(path).read_bytes(), random.Random(seed)
    outcomes = Counter[str]()
    for _ in range(n):
        data = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            if data:
                rng.choice(ANY)(data, rng)
        path.write_bytes(data)
        try:
            rows = [row for _, row in open_source(path, Columns())]
            outcomes["bad rows" if not all(isinstance(row, Row) for row in rows) else "rows"] += 1
        except UserError as error:
            check_names(str(error), {str(path)})
            outcomes["refused"] += 1
    return outcomes


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_damaged_table_gives_rows_bad_rows_or_its_name(tmp_path: Path, ending: str) -> None:
    outcomes = damaged(tmp_path / f"t.{ending}", 300, 1)
    assert len(outcomes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_damaged_table_gives_rows_bad_rows_or_its_name_five_thousand_times(
    tmp_path: Path, ending: str
) -> None:
    damaged(tmp_path / f"t.{ending}", 5000, 2)
