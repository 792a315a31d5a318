"""Logistic regression on the features and folds of a fine-tuning config: what its heads have to beat.

    python benchmarks/linear_baseline.py configs/finetune/clipart.yaml [--results FILE] [key=value ...]

scikit-learn's, on each modality alone and on both side by side, each centred and divided by one number as
heads see them. The inner rows of a fold choose the strength of the penalty; then it is fitted once more on
training and inner rows together, which the heads are not: they need inner rows to stop. Intervals are made as
those of a run: 95 % bootstrap over groups, gains paired, over the single modality that the inner rows choose.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import append_row, machine
from sklearn.linear_model import LogisticRegression

from diptych.configs.load import load_config
from diptych.finetune.config import ENCODED, FinetuneConfig
from diptych.finetune.encoders.features import silent
from diptych.finetune.scores.intervals import paired_intervals
from diptych.finetune.session import Session, open_sessions

KINDS = (*ENCODED, "both")
STRENGTHS = (0.001, 0.003, 0.01)
"""scikit-learn's C; the smaller, the more is penalised."""


def features(session: Session, kind: str, rows: Any) -> Any:
    """Features float32 [n, D] of some rows, centred and scaled by the training rows."""
    parts: list[Any] = []
    for k in ENCODED if kind == "both" else (kind,):
        train, x = (
            session.features.batch(torch.from_numpy(some))[0][k].numpy()
            for some in (session.splits.train, rows)
        )
        parts.append((x - train.mean(0)) / np.sqrt(((train - train.mean(0)) ** 2).mean()))
    return np.concatenate(parts, axis=1)


def fitted(strength: float, x: Any, y: Any) -> LogisticRegression:
    """One model; ``strength`` is scikit-learn's C."""
    return LogisticRegression(C=strength, max_iter=200).fit(x, y)


def answer(session: Session, kind: str) -> tuple[float, Any]:
    """Accuracy on a fold's inner rows, and probabilities [n, C] of its test rows."""
    parts = (session.splits.train, session.splits.inner, session.splits.test)
    train, inner, test = (features(session, kind, rows) for rows in parts)
    y_train, y_inner = (session.targets[rows] for rows in parts[:2])
    scores = {c: float(fitted(c, train, y_train).score(inner, y_inner)) for c in STRENGTHS}
    best = max(scores, key=lambda c: scores[c])
    model = fitted(best, np.concatenate([train, inner]), np.concatenate([y_train, y_inner]))
    p = np.zeros((len(test), session.task.outputs))
    p[:, model.classes_] = model.predict_proba(test)
    name = session.fold.name if session.fold else ""
    print(f"{name} {kind}: C {best:g}, inner accuracy {scores[best]:.3f}", flush=True)
    return scores[best], p


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as out:
        config = load_config(FinetuneConfig, options.config, [*options.overrides, f"out={out}"])
        *folds, _ = open_sessions(config, silent, print)
    found = {kind: [answer(session, kind) for session in folds] for kind in KINDS}
    rows = np.concatenate([session.splits.test for session in folds])
    y = folds[0].targets[rows]
    p = {kind: np.concatenate([one for _, one in found[kind]]) for kind in KINDS}
    single = max(ENCODED, key=lambda kind: np.mean([score for score, _ in found[kind]]))
    task = folds[0].task
    groups = [folds[0].rows.groups[i] for i in rows]
    scores, gains = paired_intervals(y, p, task.metrics, groups, task=task, against=single)
    majority = [np.bincount(s.targets[s.splits.train]).argmax() for s in folds]
    chance = np.concatenate(
        [s.targets[s.splits.test] == c for s, c in zip(folds, majority, strict=True)]
    ).mean()
    row = {
        "config": options.config.stem,
        "rows": len(set(rows.tolist())),
        "majority": round(float(chance), 4),
        "accuracy": {kind: scores[kind]["accuracy"].as_dict() for kind in KINDS},
        "gain": {"against": single, **gains["both"].as_dict()},
    }
    print(row)
    append_row("linear_baseline", row, options.results)


if __name__ == "__main__":
    main()
