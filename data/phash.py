"""Perceptual hashes: 64 bits that hardly change when a picture is compressed, scaled or cropped a little.

The picture is made grey and 32 x 32; the signs of its 8 x 8 lowest cosine frequencies about their median are
the bits (the pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
Compression and scaling change 0 to 4 of the bits, unrelated pictures differ in 32, give or take 4. A crop
moves everything, so a picture also has the hashes of the crops of itself in ``CROPS``.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["CROPS", "distances", "perceptual_hashes"]

CROPS = (
    (0.0, 0.0, 1.0, 1.0),
    *((cut, cut, 1 - cut, 1 - cut) for cut in (0.02, 0.04, 0.06)),
    *((0.04, 0.0, 1.0, 1.0), (0.0, 0.04, 1.0, 1.0), (0.0, 0.0, 0.96, 1.0), (0.0, 0.0, 1.0, 0.96)),
    *((0.04, 0.04, 1.0, 1.0), (0.0, 0.0, 0.96, 0.96), (0.04, 0.0, 1.0, 0.96), (0.0, 0.04, 0.96, 1.0)),
)
"""Left, top, right, bottom of each hashed crop as a share of the picture; the first is all of it."""
GRID, KEPT, READ = 32, 8, 128
LEAST_STRENGTH = 8.0
"""A picture whose frequencies lie closer to their median, in grey levels, has no perceptual hash: a blank
page, a plain gradient, a little noise. Photographs have 35 and more; what compression adds is below 2."""

_angles = np.arange(KEPT)[:, None] * (2 * np.arange(GRID) + 1) * np.pi / (2 * GRID)
_COSINES = np.cos(_angles) * np.sqrt(np.where(np.arange(KEPT) == 0, 1, 2) / GRID)[:, None]


def perceptual_hashes(pixels: NDArray[np.uint8]) -> NDArray[np.uint64] | None:
    """uint64 [len(CROPS)], the hashes of a picture uint8 [H, W, 3] and of its crops; None where it shows too
    little for its hash to mean anything."""
    grey = Image.fromarray(pixels).convert("L").resize((READ, READ), Image.Resampling.BOX)
    boxes = [(READ * a, READ * b, READ * c, READ * d) for a, b, c, d in CROPS]
    small = np.stack(
        [np.asarray(grey.resize((GRID, GRID), Image.Resampling.BILINEAR, box=box)) for box in boxes]
    )
    frequencies = (_COSINES @ small.astype(np.float64) @ _COSINES.T).reshape(len(boxes), -1)
    frequencies -= np.median(frequencies[:, 1:], axis=1, keepdims=True)  # the first is the brightness
    if np.median(np.abs(frequencies[0, 1:])) < LEAST_STRENGTH:
        return None
    bits = frequencies > 0
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def distances(one: np.uint64, others: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """In how many bits a hash differs from each of others."""
    return np.bitwise_count(others ^ one)
