"""A global batch that every rank knows whole and takes its rows of."""

from typing import Any

import torch

SIZE = 32


def global_batch(
    seed: int, rows: slice, *, size: int = 12, captions: int = 10, end_of_text: int = 49, sample_ids: int = 0
) -> dict[str, Any]:
    """Rows of a batch of ``size`` pairs: one damaged (5), ``captions`` different captions of up to 10 tokens
    below 48, closed by ``end_of_text``; samples numbered from ``sample_ids``, of epoch 2."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(2, 11, (size,), generator=generator)
    texts = [torch.randint(1, 48, (int(n),), generator=generator) for n in lengths]
    for text in texts:
        text[-1] = end_of_text
    return {
        "image": image[rows],
        "token_ids": torch.cat([*texts[rows], torch.zeros(0, dtype=torch.long)]).int(),
        "seq_lens": lengths[rows].int(),
        "valid": (torch.arange(size) != 5)[rows],
        "caption_hash": (torch.arange(size) % captions)[rows],
        "sample_id": torch.arange(size)[rows] + sample_ids,
        "epoch": 2,
    }
