"""Frozen encoders over many pictures and texts, in batches, each picture decoded once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..data.decode import DecodeError, eval_image
from ..data.image_header import MAX_PIXELS
from ..pretrain.model import Encoders
from .cells import BrokenPicture, Picture, PictureReader
from .tokens import image_inputs, image_tokens, text_inputs, text_tokens

__all__ = ["Arrays", "encode_pictures", "encode_texts", "prepare", "read_pixels"]

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
) -> Arrays:
    """``features`` float32 [n, D], ``broken`` [n], the reason or "", and where asked for ``tokens`` and
    ``inputs`` float16 [n, P, W]."""
    features: list[Tensor] = [torch.zeros(0, model.widths["image"])]
    found: list[Tensor] = []
    before: list[Tensor] = []
    broken: list[str] = []
    for start in range(0, len(pictures), batch_size):
        pixels, reasons = read_pixels(model, pictures[start : start + batch_size], reader, max_pixels)
        features.append(model.encode_images(pixels, batch_size))
        if tokens:
            found.append(image_tokens(model, pixels).half().cpu())
        if inputs:
            before.append(image_inputs(model, pixels).half().cpu())
        broken += reasons
        advance(len(pixels))
    arrays: Arrays = {"features": torch.cat(features).numpy(), "broken": np.array(broken, dtype="U200")}
    blank = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
    if tokens:
        found = found or [image_tokens(model, blank)[:0].half().cpu()]
        arrays["tokens"] = torch.cat(found).numpy()
    if inputs:
        before = before or [image_inputs(model, blank)[:0].half().cpu()]
        arrays["inputs"] = torch.cat(before).numpy()
    return arrays


def encode_texts(
    model: Encoders,
    texts: Sequence[str],
    *,
    tokens: bool,
    inputs: bool = False,
    advance: Callable[[int], None],
) -> Arrays:
    """``features`` float32 [n, D], and where asked for ``tokens`` and ``inputs`` float16 [n, L, W] with
    ``mask`` bool [n, L], L the longest text's tokens."""
    parts = [list(texts[i : i + TEXT_BATCH]) for i in range(0, len(texts), TEXT_BATCH)]
    features: list[Tensor] = [torch.zeros(0, model.widths["text"])]
    found: list[tuple[Tensor, Tensor]] = []
    before: list[Tensor] = []
    for part in parts:
        features.append(model.encode_captions(part))
        if tokens:
            got, mask = text_tokens(model, part)
            found.append((got.half().cpu(), mask.cpu()))
        if inputs:
            before.append(text_inputs(model, part).half().cpu())
        advance(len(part))
    arrays: Arrays = {"features": torch.cat(features).numpy()}
    if tokens:
        if not found:
            got, mask = text_tokens(model, [""])
            found.append((got[:0].half().cpu(), mask[:0].cpu()))
        longest = max(mask.shape[1] for _, mask in found)
        wide = [(got, mask, longest - mask.shape[1]) for got, mask in found]
        arrays["tokens"] = torch.cat([F.pad(got, (0, 0, 0, more)) for got, _, more in wide]).numpy()
        arrays["mask"] = torch.cat([F.pad(mask, (0, more)) for _, mask, more in wide]).numpy()
    if inputs:
        before = before or [text_inputs(model, [""])[:0].half().cpu()]
        longest = max(got.shape[1] for got in before)
        arrays["inputs"] = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in before]).numpy()
    return arrays
