"""Nested cross-validation: every head on every outer fold, scored on rows that its training never saw.

1. In every fold all heads are trained on the fold's training rows; its inner rows stop and calibrate them.
   The probabilities of the fold's test rows are kept with the head; their labels are not looked at.
2. Inner scores, averaged over all folds and repeats, choose the recommended head and the best single
   modality.
3. The recommended head is trained once more on all rows with an inner split: the model that predictions use.
4. The out-of-fold rows of all folds are scored together. Resamples draw groups over all folds, and a group
   comes with all its rows of all repeats: repeats even out the luck of a shuffle, they are no new rows.
5. A choice made once has seen every row's label in the inner split of some fold. So the score of choosing
   anew in each fold, by its own inner rows alone, is told beside it: ``chosen_per_fold``.

Scores are those of the procedure on unseen rows, not of the one model that is kept.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..configs.errors import UserError
from ..configs.files import temporary_beside
from ..pretrain import distributed
from .deal import train_all
from .heads import head_probabilities, history_of, kept_inner, kept_thresholds, train_head
from .missing import missing_answers, missing_matrix
from .runs.saved import read_json
from .scoring import choose, evaluate, rechosen, threshold_facts, write_run
from .search import search_results
from .session import Session
from .tasks.task import Floats, Ints, higher_is_better
from .tasks.thresholds import DECIDED, decided
from .tasks.vectors import halves

__all__ = ["cross_validate"]

Json = dict[str, Any]
OUT_OF_FOLD = "out_of_fold.safetensors"


def cross_validate(sessions: Sequence[Session], say: Callable[[str], None]) -> Json:
    """Run the folds (all sessions but the last) and train the recommended head on all rows (the last).

    Returns what results.json holds.
    """
    *folds, final = sessions
    heads = final.config.all_heads()
    final.journal.histories = [history_of(session, name) for session in folds for name in heads]
    if distributed.rank() == 0:
        for session, name in ((s, n) for s in folds for n in heads if _useless(s, n)):
            shutil.rmtree(session.head_folder(name))
    train_all([(session, name) for session in folds for name in heads], say)
    p, inner, best, single = _choose(folds, final, say) if distributed.rank() == 0 else ([], {}, "", "")
    best = str(distributed.broadcast_json(best))
    final.journal.histories.append(history_of(final, best))
    train_all([(final, best)], say)
    if distributed.rank() > 0:
        return {}
    train_head(final, best, heads[best], say)
    write_run(final, [best], best)
    return _score(folds, final, p, inner, best, single)


def _choose(
    folds: Sequence[Session], final: Session, say: Callable[[str], None]
) -> tuple[list[dict[str, Floats]], dict[str, dict[str, float]], str, str]:
    """Out-of-fold probabilities per fold and head, mean inner scores per head, and what they choose."""
    heads = final.config.all_heads()
    p: list[dict[str, Floats]] = []
    for session in folds:
        p.append({})
        for name, head in heads.items():
            train_head(session, name, head, say)
            p[-1][name] = _out_of_fold(session, name)
    inner = {name: _mean([kept_inner(session, name) for session in folds]) for name in heads}
    return p, inner, *choose(final.task, inner, final.config.singles())


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([one[key] for one in scores])) for key in scores[0]}


def _kept(path: Path, what: str = "probabilities") -> tuple[str, Floats]:
    """The key and the probabilities of a finished piece."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()["key"], file.get_tensor(what).numpy()
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove {path.parent} and fine-tune again"
        ) from error


def _useless(session: Session, name: str) -> bool:
    """Whether a head's own encoders are gone and the test rows of its fold have changed since."""
    folder = session.head_folder(name)
    if not (folder / OUT_OF_FOLD).is_file() or not _tuned(folder):
        return False
    return _kept(folder / OUT_OF_FOLD)[0] != session.test_key


def _tuned(folder: Path) -> bool:
    """Whether a head has encoders of its own."""
    return read_json(folder / "head.json")["adapt"]["method"] != "linear_probe"


def _out_of_fold(session: Session, name: str) -> Floats:
    """Probabilities of the fold's test rows, kept beside the head.

    Encoders that were trained with the head are removed then: of every fold and seed they would fill a disk,
    and predictions use those of the final model. What they say with modalities missing is kept before.
    """
    folder = session.head_folder(name)
    path = folder / OUT_OF_FOLD
    if path.is_file():
        key, p = _kept(path)
        if key == session.test_key:
            return p
    test = session.splits.test
    if _tuned(folder):
        missing = missing_answers(session, name, test)
        # in the first scenario all is seen; a single modality has none
        p = missing[0] if len(missing) else head_probabilities(session, name, test)
        kept = {"missing": missing, "probabilities": p}
    else:
        p = head_probabilities(session, name, test)
        kept = {"probabilities": p}
    tensors = {what: torch.tensor(values) for what, values in kept.items()}
    with temporary_beside(path) as temporary:
        save_file(tensors, temporary, metadata={"key": session.test_key})
    for encoder in folder.glob("encoder_seed_*"):
        shutil.rmtree(encoder)
    return p


def _hidden(session: Session, name: str) -> Floats:
    """Probabilities [S, n, C] of the fold's test rows with modalities missing."""
    folder = session.head_folder(name)
    if _tuned(folder):
        return _kept(folder / OUT_OF_FOLD, "missing")[1]
    return missing_answers(session, name, session.splits.test)


def _score(
    folds: Sequence[Session],
    final: Session,
    p: Sequence[Mapping[str, Floats]],
    inner: Mapping[str, Mapping[str, float]],
    best: str,
    single: str,
) -> Json:
    """The one place where labels of out-of-fold rows are read."""
    places = [(s.fold.repeat, s.fold.fold) for s in folds if s.fold is not None]
    rows = np.concatenate([session.splits.test for session in folds])
    repeat, fold = (
        np.repeat([place[i] for place in places], [len(s.splits.test) for s in folds]) for i in (0, 1)
    )
    order = np.lexsort((rows, repeat))  # of every repeat the rows as they stand in the table
    targets = [session.targets[session.splits.test] for session in folds]
    lost = [_hidden(session, best) for session in folds]
    if final.task.type == "vqa":
        final, places_of = _with_all_answers(folds, final)
        size = len(final.task.classes)
        p = [
            {name: _among(one, where, size) for name, one in own.items()}
            for own, where in zip(p, places_of, strict=True)
        ]
        targets, lost = (
            [_among(one, where, size) for one, where in zip(parts, places_of, strict=True)]
            for parts in (targets, lost)
        )
    limits = [{name: kept_thresholds(s, name) for name in inner} for s in folds]
    said = [
        {name: decided(s.task, one[name], own[name]) for name in inner}
        for s, one, own in zip(folds, p, limits, strict=True)
    ]
    together, decisions = (
        {name: _joined(answers, [name] * len(folds), order) for name in inner} for answers in (p, said)
    )
    more = {"repeat": repeat[order], "fold": fold[order]}
    apart = [final.task.of_fold(some, i) for i, some in enumerate(targets)]
    rows, truth = rows[order], np.concatenate(apart)[order]
    documents = _documents(folds, inner)
    result = evaluate(final, rows, truth, together, decisions, documents, best=best, single=single, more=more)
    first = said if final.task.metrics[0] in DECIDED else p  # what the first metric is of
    singles = final.config.singles()
    if best not in singles:
        chosen = [choose(s.task, {name: kept_inner(s, name) for name in inner}, singles) for s in folds]
        heads, singles = ([pair[i] for pair in chosen] for i in (0, 1))
        answers = (_joined(first, names, order) for names in (heads, singles))
        result["chosen_per_fold"] = {"heads": heads} | rechosen(final, rows, truth, *answers)
    parts = [_fold_row(s, t, one, best, single) for s, t, one in zip(folds, targets, first, strict=True)]
    for part, own in zip(parts, limits, strict=True):
        part |= threshold_facts(final, own)
    found = [decided(final.task, one, own[best]) for one, own in zip(lost, limits, strict=True)]
    hidden, seen = (np.concatenate(one, axis=1)[:, order] for one in (lost, found))
    result |= missing_matrix(final, best, rows, truth, hidden, seen)
    result |= threshold_facts(final, {best: kept_thresholds(final, best)})
    result |= search_results(folds, final, best)
    cv = final.config.eval.cv
    assert cv is not None
    return result | {
        "n_train": round(float(np.mean([len(s.splits.train) for s in folds]))),
        "n_inner": round(float(np.mean([len(s.splits.inner) for s in folds]))),
        "cv": cv.model_dump(),
        "folds": parts,
        "spread": _spread(parts, list(inner)),
        "final": {
            "heads": [best],
            "n_train": len(final.splits.train),
            "n_inner": len(final.splits.inner),
        },
    }


def _with_all_answers(folds: Sequence[Session], final: Session) -> tuple[Session, list[Ints]]:
    """The final session with a task of all answers that some fold's vocabulary has, and the places of each
    fold's own among them: a vocabulary is that of the fold's training rows."""
    names = list(dict.fromkeys(name for session in folds for name in session.task.classes))
    number = {name: i for i, name in enumerate(names)}
    places = [np.array([number[name] for name in session.task.classes]) for session in folds]
    return replace(final, task=replace(final.task, classes=tuple(names))), places


def _among(values: Floats, places: Ints, size: int) -> Floats:
    """Values [.., c] of a fold's own answers among ``size``; 0 for those that it cannot give."""
    made = np.zeros((*values.shape[:-1], size))
    made[..., places] = values
    return made


def _joined(p: Sequence[Mapping[str, Floats]], names: Sequence[str], order: Ints) -> Floats:
    """Out-of-fold probabilities [n, C] of all folds, of each fold those of the named head. Answers of
    retrieval are as wide as all seeds' vectors, or for a soup as one's; zeros change no cosine."""
    answers = [one[name] for one, name in zip(p, names, strict=True)]
    widest = max(one.shape[1] for one in answers)
    if any(one.shape[1] < widest for one in answers):
        widths = [((0, 0), (0, (widest - one.shape[1]) // 2)) for one in answers]
        answers = [
            np.concatenate([np.pad(half, width) for half in halves(one)], axis=1)
            for one, width in zip(answers, widths, strict=True)
        ]
    return np.concatenate(answers)[order]


def _documents(folds: Sequence[Session], inner: Mapping[str, Mapping[str, float]]) -> dict[str, Json]:
    """head.json of every head, with inner scores averaged and seconds added over folds."""
    documents: dict[str, Json] = {}
    for name in inner:
        found = [read_json(session.head_folder(name) / "head.json") for session in folds]
        seconds = sum(one["seconds"] for one in found)
        params = round(float(np.mean([one["params"] for one in found])))  # a search may choose other widths
        documents[name] = found[0] | {"inner": inner[name], "seconds": seconds, "params": params}
    return documents


def _fold_row(session: Session, targets: Any, p: Mapping[str, Floats], best: str, single: str) -> Json:
    """One line of the fold table: the first metric of every head on the fold's test rows alone, p being what
    it is of."""
    metric = session.task.metrics[0]
    values = {name: session.task.value(metric, targets, one) for name, one in p.items()}
    assert session.fold is not None
    row: Json = {"repeat": session.fold.repeat, "fold": session.fold.fold, "metric": metric}
    sizes = {f"n_{k}": len(getattr(session.splits, k)) for k in ("train", "inner", "test")}
    groups = len({session.rows.groups[i] for i in session.splits.test})
    row |= sizes | {"n_test_groups": groups}
    row["scores"] = {name: value if value == value else None for name, value in values.items()}
    gain = (values[best] - values[single]) * (1 if higher_is_better(metric) else -1)
    row["gain"] = gain if gain == gain and best != single else None
    return row


def _spread(parts: Sequence[Json], heads: Sequence[str]) -> Json:
    """Mean, standard deviation, least and greatest value over folds. Folds share training rows, so this is no
    interval (Bengio and Grandvalet 2004)."""
    found: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name in heads:
            if part["scores"][name] is not None:
                found[name].append(part["scores"][name])
    return {
        name: {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
        }
        for name, values in found.items()
    }
