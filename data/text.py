"""Captions to packed token ids, equal to open_clip's own tokenizers without their padding.

Packed captions travel as one int32 vector and their lengths: on web captions four of five ids of a padded
batch are padding (``pretrain.packing``). Ids are kept, so that a caption that comes again costs nothing.
"""

import functools
import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from ..configs.errors import UserError
from .canonical import canonical_caption, caption_hash

__all__ = ["Tokenizer", "Truncate", "build_tokenizer", "canonical_caption", "caption_hash", "tokenizer_for"]

Encode = Callable[[Sequence[str]], list[tuple[list[int], bool]]]
Truncate = Literal["end", "sentence", "random"]
"""What is left of a caption that is longer than the context: its beginning, its first whole sentences (its
beginning, where the first sentence is too long), or a window that is drawn."""

KEPT_CAPTIONS = 1 << 16
KEPT_WORDS = 1 << 18

_SENTENCE = re.compile(r"""[.!?\u2026]+["')\]\u201d\u2019]*(?=\s)|[\u3002\uff01\uff1f]|\n""")


class Tokenizer:
    """Captions to packed ids. Pickles as its name and settings, so that a worker process builds its own."""

    name: str | None
    """Name or folder of a Hugging Face tokenizer, None for CLIP's own."""
    context_length: int
    """The most ids of a caption; longer ones are cut, the end-of-text id kept."""
    pad_id: int
    """What open_clip fills the rest of a padded caption with."""
    cut: int
    """How many captions of the last ``pack`` were longer than the context and lost something."""

    def __init__(
        self,
        encode: Encode,
        name: str | None,
        context_length: int,
        pad_id: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """``encode``: captions to lists of 1 to ``context_length`` ids, and whether the end is missing. See
        ``build_tokenizer``."""
        self.name = name
        self.context_length = context_length
        self.pad_id = pad_id
        self._encode = encode
        self._settings = dict(settings or {})
        self._kept: dict[str, tuple[NDArray[np.int32], bool]] = {}
        self._kept_sentences: dict[str, tuple[NDArray[np.int32], bool]] = {}
        self.cut = 0

    def sha256(self) -> str:
        """Hash of what it does to texts; the name of a Hugging Face tokenizer alone says too little."""
        own = self._encode.describe() if isinstance(self._encode, _HuggingFaceEncode) else "CLIP"
        known = [own, self.context_length, self.pad_id, self._settings]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return build_tokenizer, (self.name, self.context_length, self._settings)

    def shortened(self, context_length: int) -> "Tokenizer":
        """The same tokenizer for at most ``context_length`` ids."""
        if context_length == self.context_length:
            return self
        return build_tokenizer(self.name, context_length, self._settings)

    def pack(
        self, captions: Sequence[str], truncate: Truncate = "end", draws: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``token_ids`` int32 [sum(seq_lens)], the captions' ids one after another, and ``seq_lens`` int32
        [b]. ``cut`` then tells how many captions were too long.

        ``truncate``: what is left of those; "random" takes a number in [0, 1) per caption from ``draws``.
        """
        if truncate == "sentence":
            rows = self._rows(self._kept_sentences, captions, self._sentences)
        else:
            rows = self._rows(self._kept, captions, self._encode)
        self.cut = sum(cut for _, cut in rows)
        parts = [ids for ids, _ in rows]
        if truncate == "random" and self.cut:
            assert draws is not None, "random windows need draws"
            for i, (_, cut) in enumerate(rows):
                if cut:
                    window = self._window(captions[i], draws[i])
                    parts[i] = np.array(self._encode([window])[0][0], dtype=np.int32)
        seq_lens = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *parts])), seq_lens

    def _rows(
        self, kept: dict[str, tuple[NDArray[np.int32], bool]], captions: Sequence[str], encode: Encode
    ) -> list[tuple[NDArray[np.int32], bool]]:
        unknown = list(dict.fromkeys(caption for caption in captions if caption not in kept))
        if unknown:
            if len(kept) > KEPT_CAPTIONS:  # the older half
                for caption in list(islice(kept, len(kept) // 2)):
                    del kept[caption]
                unknown = list(dict.fromkeys(caption for caption in captions if caption not in kept))
            for caption, (ids, cut) in zip(unknown, encode(unknown), strict=True):
                kept[caption] = np.array(ids, dtype=np.int32), cut
        return [kept[caption] for caption in captions]

    def _fits(self, caption: str) -> bool:
        return not self._encode([caption])[0][1]

    def _sentences(self, captions: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Encode, leaving out the last sentences of what is too long."""
        rows = self._encode(captions)
        for i, (caption, (_, cut)) in enumerate(zip(captions, rows, strict=True)):
            if cut:
                ends = [found.end() for found in _SENTENCE.finditer(caption)]
                fitting = bisect_left(ends, True, key=lambda end: not self._fits(caption[:end]))
                if fitting:
                    rows[i] = self._encode([caption[: ends[fitting - 1]]])[0][0], True
        return rows

    def _window(self, caption: str, draw: float) -> str:
        """The caption from a drawn word on: from any up to the first from which the whole rest fits."""
        starts: Sequence[int] = [found.start() for found in re.finditer(r"\S+", caption)]
        if not self._fits(caption[starts[-1] :]):  # one endless word, or a script without spaces
            starts = range(len(caption))
        last = bisect_left(starts, True, key=lambda start: self._fits(caption[start:]))
        return caption[starts[int(draw * min(last + 1, len(starts)))] :]


def build_tokenizer(
    name: str | None, context_length: int, settings: Mapping[str, Any] | None = None
) -> Tokenizer:
    """The tokenizer that open_clip uses for a model.

    ``name``: None for CLIP's own (``SimpleTokenizer``), else a Hugging Face name or folder (``HFTokenizer``).
    ``settings``: open_clip's ``tokenizer_kwargs``, for instance ``{"clean": "canonicalize"}``, and its
    ``tokenizer_mode``; with ``{"clean": "none"}`` a Hugging Face tokenizer gets the texts as they are. Raises
    UserError if the tokenizer cannot be had.
    """
    if context_length < 1:
        raise UserError(f"context_length: {context_length} must be at least 1")
    settings = dict(settings or {})
    if name is None:
        if unknown := set(settings) - {"clean"}:
            raise UserError(
                f"tokenizer_kwargs: {', '.join(sorted(unknown))} not known; CLIP's tokenizer has clean"
            )
        encode = _ClipEncode(context_length, str(settings.get("clean", "lower")))
        return Tokenizer(encode, None, context_length, 0, settings)
    tokenizer = _hugging_face(name, context_length, settings)
    pad_id: int | None = tokenizer.tokenizer.pad_token_id
    if pad_id is None:
        raise UserError(f"tokenizer {name} has no padding token; choose one that open_clip can use")
    return Tokenizer(_HuggingFaceEncode(tokenizer, pad_id), name, context_length, pad_id, settings)


def tokenizer_for(text_cfg: Mapping[str, Any], folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model, from the ``text_cfg`` of its open_clip config, as ``open_clip.get_tokenizer``
    reads it: ``hf_tokenizer_name``, ``context_length``, ``tokenizer_kwargs`` and ``tokenizer_mode``.

    ``folder``: where the files of a Hugging Face tokenizer are, in place of the name. Raises UserError if the
    tokenizer cannot be had.
    """
    name = text_cfg.get("hf_tokenizer_name") or None
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    if name and text_cfg.get("tokenizer_mode"):
        settings["tokenizer_mode"] = text_cfg["tokenizer_mode"]
    if name and folder is not None:
        name = str(folder)
    return build_tokenizer(name, int(text_cfg.get("context_length") or 77), settings)


class _ClipEncode:
    """open_clip's SimpleTokenizer, word by word with ids kept, about five times as fast."""

    def __init__(self, context_length: int, clean: str) -> None:
        self._tokenizer = _clip_tokenizer(clean)
        self._context_length = context_length
        self._quick = clean == "lower"
        self._words: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str]) -> list[tuple[list[int], bool]]:
        start, end, length = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id, self._context_length
        rows: list[tuple[list[int], bool]] = []
        for caption in captions:
            ids = [start]
            for word in self._tokenizer.pat.findall(self._clean(caption)):
                ids += self._words.get(word) or self._word(word)
            rows.append(([*ids[: length - 1], end], len(ids) >= length))
        return rows

    def _clean(self, caption: str) -> str:
        # ftfy and html.unescape leave printable ASCII without an ampersand alone, and cost ten times the rest
        if self._quick and caption.isascii() and caption.isprintable() and "&" not in caption:
            return " ".join(caption.split()).lower()
        return self._tokenizer.clean_fn(caption)

    def _word(self, word: str) -> list[int]:
        clip = self._tokenizer
        if len(self._words) > KEPT_WORDS:
            self._words.clear()
            clip.cache.clear()
            clip.cache.update((special, special) for special in ("<start_of_text>", "<end_of_text>"))
        symbols = "".join(clip.byte_encoder[byte] for byte in word.encode())
        ids = [clip.encoder[part] for part in clip.bpe(symbols).split(" ")]
        self._words[word] = ids
        return ids


@functools.cache
def _clip_tokenizer(clean: str) -> SimpleTokenizer:
    try:
        return SimpleTokenizer(clean=clean)
    except AssertionError as error:
        raise UserError(
            f"tokenizer_kwargs.clean: '{clean}' must be lower, whitespace or canonicalize"
        ) from error


class _HuggingFaceEncode:
    """open_clip's HFTokenizer without the padding."""

    def __init__(self, tokenizer: HFTokenizer, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self._pad_id = pad_id

    def __call__(self, captions: Sequence[str]) -> list[tuple[list[int], bool]]:
        own = self._tokenizer
        length = own.context_length
        assert length is not None
        cleaned = [own.clean_fn(caption) for caption in captions]
        if own.tokenizer_mode == "clips":  # the class token stands at the very end: nothing to take off
            rows = own(list(captions), length).tolist()
            whole = self._lengths(cleaned, add_special_tokens=False)
            return [(row, n > length - 3) for row, n in zip(rows, whole, strict=True)]
        rows = own.tokenizer(cleaned, max_length=length, truncation=True).input_ids
        full = [i for i, row in enumerate(rows) if len(row) >= length]
        whole = dict(zip(full, self._lengths([cleaned[i] for i in full]), strict=True))
        if own.strip_sep_token:
            separator = own.tokenizer.sep_token_id
            rows = [[0 if token == separator else token for token in row] for row in rows]
        return [(list(row) or [self._pad_id], whole.get(i, 0) > length) for i, row in enumerate(rows)]

    def describe(self) -> Any:
        """Everything that decides its ids, as JSON takes it."""
        own: Any = self._tokenizer.tokenizer
        special = {k: str(v) for k, v in own.special_tokens_map.items()}
        if not getattr(own, "is_fast", False):
            return [type(own).__name__, special, sorted(own.get_vocab().items())]
        whole = json.loads(own.backend_tokenizer.to_str())
        return [special, {k: v for k, v in whole.items() if k not in ("truncation", "padding")}]

    def _lengths(self, cleaned: list[str], **options: Any) -> list[int]:
        """How many ids the captions have as they are; quietly, though they may be too many."""
        if not cleaned:
            return []
        rows = self._tokenizer.tokenizer(cleaned, truncation=False, verbose=False, **options).input_ids
        return [len(row) for row in rows]


def _as_it_is(x: str) -> str:
    return x


def _hugging_face(name: str, context_length: int, settings: Mapping[str, Any]) -> HFTokenizer:
    options = {k: v for k, v in settings.items() if (k, v) != ("clean", "none")}
    try:
        tokenizer = HFTokenizer(name, context_length=context_length, **options)
    except ImportError as error:
        raise UserError(
            f"tokenizer {name} needs the package transformers; pip install transformers"
        ) from error
    except AssertionError as error:
        raise UserError(f"tokenizer_kwargs: {error}".rstrip(".")) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "folder" if Path(name).is_absolute() else "Hugging Face tokenizer"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what} {name} gives no tokenizer ({reason}); check the name or the network"
        ) from error
    if settings.get("clean") == "none":
        tokenizer.clean_fn = _as_it_is
    return tokenizer
