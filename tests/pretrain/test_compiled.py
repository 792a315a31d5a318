"""Compiled blocks: the same numbers, names and few graphs, whatever the captions' lengths."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.pretrain.compiled import MAX_GRAPHS, compile_blocks
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model

TEXT: dict[str, Any] = {"context_length": 12, "width": 16, "heads": 2, "layers": 3, "vocab_size": 64}
VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}


def model() -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(build_model(ModelConfig(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT)).double())


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (2 + seed % 5,), generator=generator)
    captions = [torch.randint(1, 63, (int(n),), generator=generator) for n in lengths]
    for caption in captions:
        caption[-1] = 63
    image = torch.randint(0, 256, (len(lengths), 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {"image": image, "token_ids": torch.cat(captions).int(), "seq_lens": lengths.int()}


def gradients(root: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    root.zero_grad()
    out = root(data)
    (out["image_features"] * out["text_features"]).sum().backward()
    return {name: p.grad.clone() for name, p in root.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, about its own tracing
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_graphs_serve_every_batch_with_the_same_gradients(checkpointing: bool) -> None:
    torch.compiler.reset()
    graphs: list[int] = []

    def counted(graph: Any, _inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    plain, ours = model(), model()
    assert compile_blocks(ours, backend=counted) == 5
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.clip.set_grad_checkpointing(checkpointing)
    for seed in range(12):
        expected, found = gradients(plain, batch(seed)), gradients(ours, batch(seed))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-12, rtol=0, msg=name)
    kinds = 2  # two widths
    assert 0 < len(graphs) <= MAX_GRAPHS * kinds
    torch.compiler.reset()


@pytest.mark.slow
def test_the_benchmark_appends_its_row(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "compile.py"
    small = ["--batches", "4", "--batch", "3", "--layers", "1", "--width", "64", "--side", "32"]
    rows = tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, str(script), *small, "--results", str(rows)], check=True, timeout=300)
    (row,) = (json.loads(line) for line in rows.read_text().splitlines())
    assert row["benchmark"] == "compile"
    assert row["gain"] > 0
    assert row["compile_s"] > 0
    assert 0 < row["graphs"] <= MAX_GRAPHS
