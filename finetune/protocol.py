"""The protocol of a fine-tuning run: what may be looked at, when, and how a score is made.

1. The table is read and checked; train, inner (val) and test rows are set apart, groups whole.
2. Every head is trained with every seed on the training rows; the inner rows stop it and calibrate it.
3. The inner rows choose the head that the run recommends, and the best single modality.
4. The test rows are scored once, all heads together: probabilities averaged over seeds, 95 % intervals over
   groups, and paired differences to the best single modality; the recommended head also with modalities
   missing.

With ``eval.cv`` every outer fold is treated so (see ``crossval``), unless ``eval.holdout`` asks for the fixed
splits. Every new set of models that is scored on fixed test rows is counted (see ``looks``). Finished heads
are kept: the same command goes on where it stopped, and trains anew only what has changed. Several processes
share encoding and training (see ``deal``); the first one chooses, scores and writes.
"""

import json
import logging
import shutil
from collections.abc import Callable
from typing import Any

from ..configs.files import atomic_write_text, remove_temporaries
from ..pretrain import distributed
from ..pretrain.agree import on_rank_0, others_watched
from ..pretrain.owner import RunLock
from .config import FinetuneConfig
from .crossval import cross_validate
from .deal import train_all
from .encoders.features import Progress, silent
from .heads import head_probabilities, history_of, kept_inner, kept_thresholds, train_head
from .missing import missing_answers, missing_matrix
from .runs.looks import look
from .runs.saved import device_of, read_json
from .scoring import choose, evaluate, threshold_facts, write_run
from .search import search_results
from .session import Session, open_sessions, run_folder
from .tasks.thresholds import decided

__all__ = ["finetune", "run_folder"]

Say = Callable[[str], None]
log = logging.getLogger(__name__)
FOLDERS = ("folds", "heads", "search", "training")
"""Of a run; temporary files may be left in them."""
TIMEOUT_S = 7 * 86400.0  # a process may wait for another's whole trainings; the launcher ends all if one ends


def finetune(config: FinetuneConfig, *, progress: Progress = silent, say: Say = log.info) -> dict[str, Any]:
    """Train and score all heads of a config; write the run folder and return what results.json holds.

    The same on every process of a launched run. Raises UserError for whatever the user can mend. See
    docs/finetune/runs.md for the files of a run.
    """
    device_of(config.device)  # tells one that is not there
    distributed.setup(config.device, timeout_s=TIMEOUT_S)
    lock = RunLock(run_folder(config))
    try:
        with others_watched():
            distributed.alone()
            on_rank_0(lambda: remove_temporaries(lock.take().folder, FOLDERS))
            if distributed.rank() > 0:
                progress, say = silent, log.debug
            return distributed.broadcast_json(_finetune(config, progress, say))
    finally:
        lock.release()
        distributed.teardown()


def _finetune(config: FinetuneConfig, progress: Progress, say: Say) -> dict[str, Any]:
    """One process's share; the result is the first one's."""
    sessions = open_sessions(config, progress, say)
    journal = sessions[0].journal
    try:
        result = _fixed(sessions[0], say) if config.eval.folds is None else cross_validate(sessions, say)
    except BaseException:
        journal.finish(exit_code=1)
        raise
    journal.finish()
    if distributed.rank() == 0:
        atomic_write_text(sessions[0].folder / "results.json", json.dumps(result, indent=1) + "\n")
        for session in sessions:  # also of heads that the config no longer has
            shutil.rmtree(session.place / "training", ignore_errors=True)
    return result


def _fixed(session: Session, say: Say) -> dict[str, Any]:
    """The run on fixed splits."""
    heads = session.config.all_heads()
    session.journal.histories = [history_of(session, name) for name in heads]
    train_all([(session, name) for name in heads], say)
    if distributed.rank() > 0:
        return {}
    for name, head in heads.items():
        train_head(session, name, head, say)
    best, single = choose(
        session.task, {name: kept_inner(session, name) for name in heads}, session.config.singles()
    )
    write_run(session, list(heads), best)
    test, task = session.splits.test, session.task
    p = {}
    with session.progress("scoring the test rows", len(heads)) as advance:
        for name in heads:
            p[name] = head_probabilities(session, name, test)
            advance(1)
    hidden = missing_answers(session, best, test)
    documents = {name: read_json(session.head_folder(name) / "head.json") for name in heads}
    limits = {name: kept_thresholds(session, name) for name in heads}
    said = {name: decided(task, p[name], limits[name]) for name in heads}
    looks = _look(session, documents, limits, best)
    result = evaluate(session, test, session.targets[test], p, said, documents, best=best, single=single)
    seen = decided(task, hidden, limits[best])
    result |= missing_matrix(session, best, test, session.targets[test], hidden, seen)
    result |= threshold_facts(session, limits) | {"test_looks": looks} | search_results([session])
    if session.config.eval.holdout and session.config.eval.cv is not None:
        result["holdout"] = {"cv": session.config.eval.cv.model_dump()}
    return result | {"n_train": len(session.splits.train), "n_inner": len(session.splits.inner)}


def _look(session: Session, documents: dict[str, Any], limits: dict[str, list[float]], best: str) -> int:
    """Count that these heads are about to be scored on the test rows."""
    keys = {name: document["key"] for name, document in documents.items()}
    facts = {"heads": list(keys), "best": best, "n_test": len(session.splits.test)}
    return look(session.folder, [keys, limits, session.test_key], facts)
