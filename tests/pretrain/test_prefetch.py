"""Pixels on the device, everything else where it was."""

import torch

from diptych.pretrain.prefetch import PixelCopier


def test_pixels_go_to_the_device_and_nothing_else_does() -> None:
    lengths, image = torch.tensor([3, 2]), torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    batch = {"image": image, "seq_lens": lengths, "epoch": 1}
    here = PixelCopier(torch.device("cpu"))(batch)
    assert torch.equal(here["image"], image)
    there = PixelCopier(torch.device("meta"))(batch)  # a device like any other that is not the CPU
    assert (there["image"].device.type, there["image"].dtype) == ("meta", torch.uint8)
    assert there["seq_lens"] is lengths
    assert there["epoch"] == 1
    assert batch["image"] is image
