"""One encoder of pictures or of texts, and how it is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...data.text import Tokenizer

__all__ = ["Tower", "reason"]


@dataclass(frozen=True)
class Tower:
    """One encoder. ``config``: what it was built from; ``keep`` writes it into an existing folder and returns
    its entry in ``encoders.json``, the folder itself left out; ``tokenizer`` or ``preprocess`` is its own."""

    module: nn.Module
    width: int
    normalize: bool
    config: dict[str, Any]
    keep: Callable[[Path], dict[str, Any]]
    image_size: int = 0
    preprocess: dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None


def reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
