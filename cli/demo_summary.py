"""The lines that the demo ends with: what was reached, beside chance, and what to type next."""

import json
import resource
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["NEXT", "summary"]

NEXT = """Next, with your own pictures and captions (a table with the columns image and caption):

  diptych data build my.csv --out shards/mine --val-fraction 0.1
  diptych pretrain configs/demo/pretrain.yaml out=runs/mine \\
    data.train=shards/mine/train evaluate.data=shards/mine/val
  diptych evaluate runs/mine"""

GALLERIES = (
    ("openmoji_no_people", "a vendor never trained on"),
    ("test_word", "words never trained on"),
    ("icon_park", "another vendor, line icons"),
)


def summary(pretrained: Path, tuned: Path, seconds: Mapping[str, float], processes: int) -> Iterator[str]:
    """Lines on a pretraining run and a fine-tuning run; ``seconds`` are those of this call's steps."""
    yield from _evaluation(_json(pretrained / "evaluate.json"))
    yield from _fusion(_json(tuned / "results.json"))
    yield _training(pretrained / "metrics.jsonl", processes)
    spent = ", ".join(f"{name} {_duration(s)}" for name, s in seconds.items())
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # kilobytes on Linux
    yield _line("time", f"{spent}; largest process {gib:.1f} GiB")
    yield _line("checkpoint", f"{pretrained}/checkpoints (open_clip loads it too)")
    yield _line("the page", f"{pretrained}/report.html")
    yield ""
    yield NEXT


def _line(name: str, text: str) -> str:
    return f"{name:<24}{text}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _score(score: Mapping[str, Any], chance: float) -> str:
    """``0.352 (0.327 to 0.378), chance 0.0035``"""
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f}), chance {chance:.4f}"


def _evaluation(result: Mapping[str, Any]) -> Iterator[str]:
    retrieval = result.get("retrieval", {})
    for gallery, about in GALLERIES:
        if gallery in retrieval:
            got = retrieval[gallery]["image_to_text"]["R@5"]
            size = retrieval[gallery]["n_captions"]
            yield _line("picture to caption R@5", f"{_score(got, got['chance'])}; {about}, {size} captions")
    for key, name in (("zero_shot", "zero-shot"), ("linear_probe", "linear probe")):
        for where, scored in list(result.get(key, {}).items())[:1]:
            got = scored["accuracy"]
            text = f"{_score(got, got['chance'])}, majority {got['majority']:.3f}"
            yield _line(name, f"{text}; {scored['classes']} classes, {where}")


def _fusion(results: Mapping[str, Any]) -> Iterator[str]:
    heads = results.get("heads", {})
    best = heads.get(results.get("best"))
    if best is None:
        return
    score = best["metrics"]["accuracy"]
    alone = [
        f"{name} alone {heads[name]['metrics']['accuracy']['value']:.3f}"
        for name in ("image", "text")
        if name in heads
    ]
    shown = _score(score, float(results["chance"]))
    yield _line("picture and caption", "; ".join([f"{shown}; best head {results['best']}", *alone]))


def _training(path: Path, processes: int) -> str:
    from ..pretrain.tracking import read_metrics

    rows = [row for row in read_metrics(path) if row.get("kind") == "train"]
    if not rows:
        return _line("pretraining", "no steps were logged")
    speed = statistics.median(row["samples_per_s"] for row in rows)
    last = rows[-1]
    return _line(
        "pretraining",
        f"{last['samples_seen']:,} samples in {last['step']:,} steps, loss {last['loss']:.3f}, "
        f"{speed:,.0f} samples/s with {processes} process{'es' if processes > 1 else ''}",
    )
