"""Trainings of a run over its processes (torchrun, accelerate launch).

Every head, fold and seed is a training of its own, so whole ones are dealt out: nothing is communicated
while they go on, and each is, bit for bit, the training of one process. That serves tuned encoders too. Only
where a run has fewer trainings with encoders than processes, each of those is trained by all of them: the
encoders' work on a batch is split, the rest is done alike by all (see ``training``). DDP does not fit there:
a batch may hold no picture for one process, and the loss must see the whole batch's embeddings, after which
each process has its rows' whole gradient, and a sum is due where DDP takes the mean.

Searches for settings (see ``search``) are dealt out before, whole ones too. Results go through ``Piece``
folders in the run's folder, which all processes must see. The first process then does what one process does,
and finds every training done.
"""

from collections.abc import Callable, Sequence

from ..configs.errors import UserError
from ..pretrain import distributed
from ..pretrain.agree import on_rank_0
from .heads import How, finished, piece_of, settings_for, train_seed
from .session import Session

__all__ = ["Work", "train_all"]

Work = Sequence[tuple[Session, str]]
"""Heads by name, each with its session."""


def train_all(work: Work, say: Callable[[str], None]) -> None:
    """Leave a finished piece of every seed of every head that is not saved yet. All processes call it alike;
    one alone has nothing to do."""
    world, rank = distributed.world_size(), distributed.rank()
    if world == 1:
        return
    everything = [(i, seed) for i, (session, _) in enumerate(work) for seed in session.config.eval.seeds]
    tuned = [one for one in everything if _tunes(*work[one[0]])]
    shared = tuned if len(tuned) < world else []  # whatever is done already: a run goes on as it began
    found = on_rank_0(lambda: [one for one in everything if not _done(*work[one[0]], one[1])])
    todo = [(int(i), int(seed)) for i, seed in distributed.broadcast_json(found)]
    dealt = [one for one in todo if one not in shared]
    say(f"{len(todo):,} trainings over {world} processes")
    try:
        for i in list(dict.fromkeys(i for i, _ in todo))[rank::world]:
            settings_for(*work[i])  # kept in a file, from which all then read it
    except UserError as error:
        error.alone = True
        raise
    distributed.barrier()
    for i, seed in (one for one in todo if one in shared):
        train_seed(*work[i], _how(*work[i]), seed, _silent, keep=True, together=True)
    try:
        for i, seed in dealt[rank::world]:
            train_seed(*work[i], _how(*work[i]), seed, _silent, keep=True)
    except UserError as error:
        error.alone = True
        raise
    distributed.barrier()


def _how(session: Session, name: str) -> How:
    """A head's settings, searched or as they are written."""
    found = settings_for(session, name)
    if found is not None:
        return found.head, found.adapt
    return session.config.all_heads()[name], session.config.adapt_of(name)


def _silent(row: object) -> None:
    """Rows of the log are kept with the result and told by the first process."""


def _tunes(session: Session, name: str) -> bool:
    return session.config.adapt_of(name).tunes_encoders


def _done(session: Session, name: str, seed: int) -> bool:
    return finished(session, name) or piece_of(session, name, seed).finished
