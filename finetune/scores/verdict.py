"""When a gain may be judged by its interval."""

from collections.abc import Mapping
from typing import Any

__all__ = ["FEWEST_GROUPS", "no_verdict"]

FEWEST_GROUPS = 10
"""Resamples of fewer test groups are too alike: their interval is too narrow to judge by."""


def no_verdict(result: Mapping[str, Any]) -> str | None:
    """What is said in the place of a gain's interval and verdict where ``n_test_groups`` of results.json are
    too few; None where they are enough, or not known."""
    n = result.get("n_test_groups")
    return f"too few groups ({n}) for a verdict" if isinstance(n, int) and n < FEWEST_GROUPS else None
