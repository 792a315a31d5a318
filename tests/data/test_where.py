"""Expressions over index columns: what Python itself would say of each sample, and nothing is ever run."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.data.index import RECORD
from diptych.data.where import COLUMNS, columns_of, evaluate, parse

FORMATS = ("", "jpg", "png", "webp")


def records_of(rows: list[tuple[int, int, int, int, int]]) -> Any:
    records = np.zeros(len(rows), dtype=RECORD)
    for record, (width, height, text_len, size, kind) in zip(records, rows, strict=True):
        record["width"], record["height"], record["text_len"] = width, height, text_len
        record["image_size"], record["format"] = size, kind
    return records


def as_python(row: tuple[int, int, int, int, int]) -> dict[str, Any]:
    width, height, text_len, size, kind = row
    return {
        "width": width,
        "height": height,
        "short": min(width, height),
        "long": max(width, height),
        "aspect": width / height,
        "text_len": text_len,
        "image_size": size,
        "format": FORMATS[kind],
    }


ROWS = st.lists(st.tuples(*[st.integers(1, 60)] * 4, st.integers(1, 3)), min_size=1, max_size=20)
NUMBER = st.sampled_from([name for name in COLUMNS if name != "format"]) | st.integers(0, 60).map(str)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    kind = draw(st.sampled_from(["and", "or", "not", "compare", "compare", "chain", "format", "in"]))
    if depth and kind in ("and", "or"):
        return f"({draw(expressions(depth - 1))} {kind} {draw(expressions(depth - 1))})"
    if depth and kind == "not":
        return f"not {draw(expressions(depth - 1))}"
    if kind == "format":
        return f"format {draw(st.sampled_from(['==', '!=']))} '{draw(st.sampled_from(FORMATS[1:]))}'"
    if kind == "in":
        return f"format {draw(st.sampled_from(['in', 'not in']))} ('jpg', 'png')"
    column = draw(st.sampled_from([name for name in COLUMNS if name != "format"]))
    op = draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
    if kind == "chain":
        return f"{draw(st.integers(0, 60))} {op} {column} < {draw(NUMBER)}"
    sign = draw(st.sampled_from(["+", "-", "*"]))
    return f"{column} {sign} {draw(st.integers(1, 9))} {op} {draw(NUMBER)}"


@settings(deadline=None, max_examples=200)
@given(text=expressions(), rows=ROWS)
def test_an_expression_says_what_python_says(text: str, rows: list[tuple[int, int, int, int, int]]) -> None:
    truth = [bool(eval(text, {"__builtins__": {}}, as_python(row))) for row in rows]
    found = evaluate(parse(text), columns_of(records_of(rows)))
    assert found.dtype == np.bool_
    assert found.tolist() == truth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("width >=", "is no expression"),
        ("widht > 2", "no column 'widht' in 'widht > 2'; did you mean width"),
        ("similarity > 2", "there are width, height"),
        ("__import__('os').system('true')", "is not taken"),
        ("width.real > 2", "is not taken"),
        ("[x for x in (1,)] == width", "is not taken"),
        ("width", "neither true nor false"),
        ("width and height", "neither true nor false"),
        ("width > 'jpg'", "compares a text with a number"),
        ("format > 3", "compares a text with a number"),
        ("1 < 2", "compares two constants"),
        ("width in 3", "must be a list"),
        ("format + 1 == 2", "is no number"),
        ("width ** 99999999 > 1", "is not taken"),
        ("lambda: 1", "is not taken"),
        ("(" * 300 + "width" + ")" * 300, "no expression"),
        ("x" * 2000, "2000 characters"),
        ("width > 1/0", "cannot be worked out (float division by zero)"),
        ("width > 5 % 0", "cannot be worked out"),
        ("-" * 980 + "width > 1", "cannot be worked out"),
        ("format == 'jpeg'", "no format is called 'jpeg'"),
        ("format in ('jpg', 'gif')", "no format is called 'gif'"),
    ],
)
def test_what_is_not_taken_is_told_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_large_constants_do_not_wrap_around() -> None:
    rows = records_of([(10, 10, 1, 1, 1)])
    assert evaluate(parse("9223372036854775807 + width > 0"), columns_of(rows)).tolist() == [True]
