"""Recorded attention is torch's own, and its rollout a reference written by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transformer import Attention as ClipAttention
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.finetune.config import HeadConfig
from diptych.finetune.explain.rollout import Attended, evidence, head_starts, unrolled
from diptych.finetune.fusion.operators import build_head

B, N, W, H = 2, 5, 8, 2


@pytest.mark.parametrize("mask", ["none", "causal", "rows", "bool"])
def test_multi_head_attention_is_torchs_to_rounding(mask: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(W, H, batch_first=True).double().eval()
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(B, N, W, dtype=torch.float64)
    masks: dict[str, Any] = {
        "none": None,
        "causal": torch.full((N, N), -math.inf, dtype=torch.float64).triu(1),
        "rows": torch.randn(B * H, N, N, dtype=torch.float64),
        "bool": torch.ones(N, N, dtype=torch.bool).triu(1),
    }
    want, weights = attention(x, x, x, attn_mask=masks[mask], average_attn_weights=False)
    with Attended() as seen:
        got, none = attention(x, x, x, attn_mask=masks[mask], need_weights=False)
    assert none is None
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(seen.maps[0], weights, atol=1e-12)


def test_fused_attention_is_torchs_to_rounding() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, n, 4, dtype=torch.float64) for n in (3, N, N))
    masks = [None, torch.rand(B, 1, 1, N) < 0.7, torch.randn(3, N, dtype=torch.float64)]
    masks[1][..., 0] = True  # type: ignore[index]  of this kind here
    for mask in masks:
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        with Attended():
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(got, want, atol=1e-12)
    with Attended() as seen:
        causal = F.scaled_dot_product_attention(k, k, v, is_causal=True)
    assert torch.allclose(causal, F.scaled_dot_product_attention(k, k, v, is_causal=True), atol=1e-12)
    assert seen.maps[0].triu(1).abs().max() == 0
    with Attended() as seen:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert seen.maps == []
    own = ClipAttention(W, H, qk_norm=True).eval()
    x = torch.randn(B, N, W)
    with torch.no_grad(), Attended() as seen:
        assert torch.allclose(own(x), own(x), atol=1e-6)
    assert len(seen.maps) == 2


# any array
def reference(tokens: Tensor, blocks: list[dict[str, Tensor]], read: int, direction: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """Relevance of one sequence [N, W] by loops: single-head-by-head attention, residual, R as a whole matrix
    (Chefer et al. 2021, eq. 5 and 6), gradients by autograd of one scalar."""
    x = tokens
    maps: list[list[Tensor]] = []
    for block in blocks:
        out = torch.zeros_like(x)
        maps.append([])
        for h in range(H):
            cut = slice(h * W // H, (h + 1) * W // H)
            q, k, v = (x @ block[name][:, cut] for name in ("q", "k", "v"))
            a = torch.softmax(q @ k.T / math.sqrt(W // H), dim=1)
            a.retain_grad()
            maps[-1].append(a)
            out[:, cut] = a @ v
        x = x + out
    (x[read] @ direction).backward()
    rollout = np.eye(N)
    for layer in maps:
        mean = np.zeros((N, N))
        for a in layer:
            assert a.grad is not None
            for i in range(N):
                for j in range(N):
                    mean[i, j] += max(0.0, float(a.grad[i, j] * a[i, j].detach())) / H
        rollout = rollout + mean @ rollout
    return rollout[read]


def test_rollout_is_the_reference() -> None:
    torch.manual_seed(0)
    blocks = [{name: torch.randn(W, W, dtype=torch.float64) for name in "qkv"} for _ in range(3)]
    tokens = torch.randn(B, N, W, dtype=torch.float64)
    direction, read = torch.randn(W, dtype=torch.float64), 2
    with Attended() as seen:
        x = tokens
        for block in blocks:
            q, k, v = (
                (x @ block[name]).unflatten(2, (H, W // H)).transpose(1, 2) for name in ("q", "k", "v")
            )
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        value = x[:, read] @ direction
    start = torch.zeros(B, N, dtype=torch.float64)
    start[:, read] = 1
    got = unrolled(start, evidence(value, seen.maps))
    for i in range(B):
        want = reference(tokens[i].clone().requires_grad_(), blocks, read, direction)
        assert np.allclose(got[i].numpy(), want, atol=1e-12)
        assert want.max() > 1.01  # something besides the token itself


# any array
def forward_rollout(op: str, head: Any, layers: list[np.ndarray], sizes: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    """The same rule with whole matrices from the first layer on: rows are tokens, columns those of the input
    (class tokens and bottlenecks are no input)."""
    total = sum(sizes)
    inputs = [np.eye(total)[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(2)]
    if op == "merged":
        r = np.concatenate([np.zeros((1, total)), *inputs])
        for e in layers:
            r = r[: len(e)] + e @ r  # the last layer has the row of cls alone
        return r[0]
    if op == "cross":
        image, text = inputs
        for itself, other in zip(layers[::2], layers[1::2], strict=True):
            text = text + itself @ text
            text = text + other @ image
        return text[: sizes[1] - 1].mean(0)  # the last is padding
    streams = [np.concatenate([np.zeros((1, total)), x]) for x in inputs]
    shared = np.zeros((len(head.shared), total))
    for i in range(0, len(layers), 2):
        heard = []
        for k in range(2):
            whole = np.concatenate([streams[k], shared])
            whole = whole[: len(layers[i + k])] + layers[i + k] @ whole
            streams[k] = whole[: 1 + sizes[k]]
            heard.append(whole[1 + sizes[k] :])
        shared = (heard[0] + heard[1]) / 2
    return (streams[0][0] + streams[1][0]) / 2


@pytest.mark.parametrize("op", ["merged", "cross", "bottleneck"])
def test_heads_on_tokens_are_rolled_out_as_whole_matrices_are(op: str) -> None:
    torch.manual_seed(3)
    widths = {"image": 6, "text": 4}
    config = HeadConfig.model_validate({"op": op, "width": 8, "heads": 2, "layers": 2, "dropout": 0.0})
    head = build_head(config, widths, 1, widths).eval()
    features = {"image_tokens": torch.randn(1, 5, 6), "text_tokens": torch.randn(1, 4, 4)}
    features["text_mask"] = torch.tensor([[True, True, True, False]])
    present = {k: torch.ones(1, dtype=torch.bool) for k in widths}
    with torch.enable_grad(), Attended() as seen:
        value = head(features, present)[:, 0]
    layers = evidence(value, seen.maps)
    assert len(layers) == {"merged": 2, "cross": 4, "bottleneck": 4}[op]
    starts = head_starts(head, features, present, layers)
    got = torch.cat([starts["image"], starts["text"]], dim=1)[0].numpy()
    want = forward_rollout(op, head, [e[0].double().numpy() for e in layers], [5, 4])
    assert np.allclose(got, want, atol=1e-6)
    assert got[-1] == 0
    assert (got[:5] > 0).any()
