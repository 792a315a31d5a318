"""Expressions over the columns of an index, such as ``width >= 200 and text_len > 2``.

Python's own grammar, of which only comparisons, ``and``, ``or``, ``not``, ``in`` and arithmetic on columns
and constants are taken; it is walked, never run.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .image_header import FORMATS

__all__ = ["COLUMNS", "columns_of", "evaluate", "parse"]

COLUMNS = ("width", "height", "short", "long", "aspect", "text_len", "image_size", "format")
"""Pixels across, down, along the shorter and the longer side, width by height; characters of the caption;
bytes of the image; "jpg", "png" or "webp"."""
MAX_LENGTH = 1000

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_COMBINE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}


def parse(text: str) -> ast.expr:
    """The expression's tree. Raises UserError for what is not taken and for what has no truth value."""
    if len(text) > MAX_LENGTH:
        raise UserError(f"where: an expression of {len(text)} characters; {MAX_LENGTH} are the most")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"where: '{text}' is no expression ({reason}); for instance {_EXAMPLE}") from error
    one = {name: np.ones(1) for name in COLUMNS} | {"format": np.array(["jpg"])}
    try:
        with np.errstate(all="ignore"):
            value = _value(tree, one, text)
    except (ArithmeticError, RecursionError) as error:
        raise UserError(
            f"where: '{text[:80]}' cannot be worked out ({error}); for instance {_EXAMPLE}"
        ) from error
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_:
        raise UserError(f"where: '{text}' is neither true nor false of a sample; for instance {_EXAMPLE}")
    return tree


_EXAMPLE = "'width >= 200 and text_len > 2'"


def evaluate(tree: ast.expr, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Of which samples the expression is true, bool [n]; ``columns``: see ``columns_of``."""
    with np.errstate(all="ignore"):
        return _value(tree, columns, ast.unparse(tree))


def columns_of(records: NDArray[np.void]) -> dict[str, NDArray[Any]]:
    """The columns of samples, [n] each, from their records in an index."""
    width, height = records["width"].astype(np.float64), records["height"].astype(np.float64)
    return {
        "width": width,
        "height": height,
        "short": np.minimum(width, height),
        "long": np.maximum(width, height),
        "aspect": width / np.maximum(height, 1),
        "text_len": records["text_len"].astype(np.float64),
        "image_size": records["image_size"].astype(np.float64),
        "format": np.array(FORMATS)[records["format"]],
    }


def _value(node: ast.expr, columns: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Name(id=name):
            if name not in columns:
                near = get_close_matches(name, COLUMNS, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
                raise UserError(f"where: there is no column '{name}' in '{text}'; {hint}")
            return columns[name]
        case ast.Constant(value=str() as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.BoolOp(op=op, values=parts):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return join.reduce([_truth(part, columns, text) for part in parts])
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return ~_truth(part, columns, text)
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_number(part, columns, text)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _COMBINE:
            return _COMBINE[type(op)](_number(left, columns, text), _number(right, columns, text))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            sides = [left, *rest]
            found = [
                _compare(op, a, b, columns, text) for op, a, b in zip(ops, sides[:-1], sides[1:], strict=True)
            ]
            return np.logical_and.reduce(found)
        case _:
            raise UserError(
                f"where: '{ast.unparse(node)}' in '{text}' is not taken; compare columns and numbers"
            )


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, columns: Mapping[str, Any], text: str) -> Any:
    a = _value(left, columns, text)
    if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List | ast.Set):
        values = [_value(one, columns, text) for one in right.elts]
        found: Any = np.logical_or.reduce([_same_kind(a, value, operator.eq, text) for value in values])
        return ~found if isinstance(op, ast.NotIn) else found
    if type(op) not in _COMPARE:
        raise UserError(
            f"where: '{ast.unparse(right)}' in '{text}' must be a list after in, as in format in ('jpg',)"
        )
    return _same_kind(a, _value(right, columns, text), _COMPARE[type(op)], text)


def _same_kind(a: Any, b: Any, compare: Callable[[Any, Any], Any], text: str) -> Any:
    """The comparison of two numbers or two texts, one of them a column."""
    if (np.asarray(a).dtype.kind == "U") != (np.asarray(b).dtype.kind == "U"):
        raise UserError(
            f"where: '{text}' compares a text with a number; format is a text, the others numbers"
        )
    if not isinstance(a, np.ndarray) and not isinstance(b, np.ndarray):
        raise UserError(f"where: '{text}' compares two constants; name a column")
    for side in (a, b):
        if isinstance(side, str) and side not in FORMATS[1:]:
            raise UserError(f"where: no format is called '{side}' in '{text}'; it is jpg, png or webp")
    return compare(a, b)


def _truth(node: ast.expr, columns: Mapping[str, Any], text: str) -> Any:
    value = _value(node, columns, text)
    if not isinstance(value, np.ndarray) or value.dtype != np.bool_:
        raise UserError(f"where: '{ast.unparse(node)}' in '{text}' is neither true nor false; compare it")
    return value


def _number(node: ast.expr, columns: Mapping[str, Any], text: str) -> Any:
    value = _value(node, columns, text)
    if isinstance(value, str) or np.asarray(value).dtype.kind not in "iuf":
        raise UserError(f"where: '{ast.unparse(node)}' in '{text}' is no number")
    return value
