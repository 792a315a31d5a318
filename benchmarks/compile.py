"""What torch.compile gains on whole training steps of real caption lengths, what it costs, and how many
graphs it builds.

    python benchmarks/compile.py [--batches 200] [--batch 64] [--layers 6] [--width 256]

The same model with and without ``compile_blocks`` takes the same batches, in turn; the row holds ``gain``
(median of CPU seconds without over with), ``compile_s`` (CPU seconds of the first step beyond a later one)
and ``graphs``.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rows import append_row
from torch._dynamo.utils import counters

from diptych.pretrain.compiled import compile_blocks
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer

COUNTS = json.loads((Path(__file__).resolve().parent / "caption_lengths.json").read_text())["counts"]
START, END = 49406, 49407


def batch_of(size: int, side: int, number: int) -> dict[str, torch.Tensor]:
    """Random pixels and captions of LAION's lengths."""
    generator = torch.Generator().manual_seed(number)
    lengths = torch.multinomial(torch.tensor(COUNTS, dtype=torch.double), size, True, generator=generator) + 1
    ids = torch.randint(1, START, (int(lengths.sum()),), generator=generator)
    last = lengths.cumsum(0) - 1
    ids[last], ids[last - lengths + 1] = END, START
    image = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"image": image, "token_ids": ids.int(), "seq_lens": lengths.int()}


class Run:
    """A model with its optimizer."""

    def __init__(self, config: ModelConfig, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model = ContrastiveModel(build_model(config)).train()
        self.optimizer = build_optimizer(self.model, OptimConfig())
        if compiled:
            compile_blocks(self.model)

    def step(self, batch: dict[str, Any]) -> float:
        """One optimizer step; CPU seconds."""
        start = time.process_time()
        self.optimizer.zero_grad()
        contrastive_loss(**self.model(batch)).backward()
        self.optimizer.step()
        return time.process_time() - start


def main() -> None:
    """Measure and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("batches", 200), ("batch", 64), ("layers", 6), ("width", 256), ("side", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--results", type=Path, help="another file for the row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    vision = {"layers": given.layers, "width": given.width, "head_width": 64, "patch_size": 16}
    text = {"layers": given.layers, "width": given.width, "heads": given.width // 64}
    config = ModelConfig(embed_dim=256, vision_cfg={**vision, "image_size": given.side}, text_cfg=text)
    plain, compiled = Run(config, compiled=False), Run(config, compiled=True)
    seconds: list[tuple[float, float]] = []
    for number in range(given.batches):
        batch = batch_of(given.batch, given.side, number)
        seconds.append((plain.step(batch), compiled.step(batch)))
        if number in (0, 1) or number % 20 == 19:
            print(f"batch {number + 1}: {seconds[-1][0]:.2f} s, compiled {seconds[-1][1]:.2f} s", flush=True)
    later = seconds[2:] or seconds
    figures = {
        "model": f"ViT {given.width}x{given.layers} at {given.side}, batch {given.batch}",
        "batches": given.batches,
        "cpu_s": statistics.median(a for a, _ in later),
        "cpu_s_compiled": statistics.median(b for _, b in later),
        "gain": round(statistics.median(a / b for a, b in later), 3),
        "compile_s": round(seconds[0][1] - statistics.median(b for _, b in later), 1),
        "graphs": counters["stats"]["unique_graphs"],
    }
    print(json.dumps(figures))
    append_row("compile", figures, given.results)


if __name__ == "__main__":
    main()
