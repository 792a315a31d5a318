"""Frozen encoders over many pictures and texts, in batches, each picture decoded once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...data.decode import DecodeError, eval_image
from ...data.image_header import MAX_PIXELS
from ...pretrain.model import Encoders
from ..tables.cells import BrokenPicture, Picture, PictureReader
from .tokens import image_inputs, image_tokens, text_inputs, text_tokens

__all__ = [
    "TEXT_BATCH",
    "Arrays",
    "encode_pictures",
    "encode_texts",
    "longest_text",
    "prepare",
    "read_pixels",
]

Arrays = dict[str, NDArray[Any]]
TEXT_BATCH = 1024


def prepare(model: Encoders, image: bytes | Tensor, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 [3, S, S] of an image file or of pixels uint8 [3, H, W], as the model wants it; DecodeError."""
    preprocess = model.config["preprocess_cfg"]
    return eval_image(
        image,
        model.image_size,
        resize_mode=preprocess["resize_mode"],
        interpolation=preprocess["interpolation"],
        fill_color=preprocess["fill_color"],
        max_pixels=max_pixels,
        resize=preprocess.get("resize"),
    )


def read_pixels(
    model: Encoders, pictures: Sequence[Picture], reader: PictureReader, max_pixels: int
) -> tuple[Tensor, list[str]]:
    """uint8 [n, 3, S, S], preprocessed as the model wants it, and why a picture is broken ("" if it is not;
    broken ones are white)."""
    size = model.image_size
    pixels = torch.full((len(pictures), 3, size, size), 255, dtype=torch.uint8)
    reasons = [""] * len(pictures)
    for i, picture in enumerate(pictures):
        try:
            pixels[i] = prepare(model, reader.read(picture), max_pixels)
        except (BrokenPicture, DecodeError) as error:
            reasons[i] = " ".join(str(error).split())[:200]
    return pixels, reasons


def encode_pictures(
    model: Encoders,
    pictures: Sequence[Picture],
    reader: PictureReader,
    *,
    tokens: bool,
    inputs: bool = False,
    batch_size: int,
    max_pixels: int,
    advance: Callable[[int], None],
) -> Iterator[Arrays]:
    """Batch by batch ``features`` float32 [n, D], ``broken`` [n], the reason or "", and where asked for
    ``tokens`` and ``inputs`` float16 [n, P, W]. Of no pictures one batch of no rows."""

    def arrays(pixels: Tensor, reasons: list[str]) -> Arrays:
        made: dict[str, Tensor] = {"features": model.encode_images(pixels, batch_size)}
        if tokens:
            made["tokens"] = image_tokens(model, pixels).half()
        if inputs:
            made["inputs"] = image_inputs(model, pixels).half()
        return {k: v.cpu().numpy() for k, v in made.items()} | {"broken": np.array(reasons, dtype="U200")}

    for start in range(0, len(pictures), batch_size):
        pixels, reasons = read_pixels(model, pictures[start : start + batch_size], reader, max_pixels)
        yield arrays(pixels, reasons)
        advance(len(pixels))
    if not pictures:
        blank = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
        yield {k: v[:0] for k, v in arrays(blank, [""]).items()}


def longest_text(model: Encoders, texts: Sequence[str]) -> int:
    """Tokens of the longest text; 0 without texts."""
    parts = (texts[i : i + TEXT_BATCH] for i in range(0, len(texts), TEXT_BATCH))
    return max((int(model.tokenizer.pack(part)[1].max()) for part in parts), default=0)


def encode_texts(
    model: Encoders,
    texts: Sequence[str],
    *,
    tokens: bool,
    inputs: bool = False,
    length: int = 0,
    advance: Callable[[int], None],
) -> Iterator[Arrays]:
    """Batch by batch ``features`` float32 [n, D], and where asked for ``tokens`` and ``inputs`` float16
    [n, L, W] with ``mask`` bool [n, L], L being ``length``, that of the longest text of all batches. Of no
    texts one batch of no rows."""

    def arrays(part: Sequence[str]) -> Arrays:
        made: dict[str, Tensor] = {"features": model.encode_captions(part)}
        if tokens:
            found, mask = text_tokens(model, part)
            more = max(0, length - mask.shape[1])
            made["tokens"] = F.pad(found.half().cpu(), (0, 0, 0, more))
            made["mask"] = F.pad(mask.cpu(), (0, more))
        if inputs:
            found = text_inputs(model, part).half().cpu()
            made["inputs"] = F.pad(found, (0, 0, 0, max(0, length - found.shape[1])))
        return {k: v.numpy() for k, v in made.items()}

    for start in range(0, len(texts), TEXT_BATCH):
        part = list(texts[start : start + TEXT_BATCH])
        yield arrays(part)
        advance(len(part))
    if not texts:
        yield {k: v[:0] for k, v in arrays([""]).items()}
