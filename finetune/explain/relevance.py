"""Which patches and words an answer rests on: attention times its gradient, rolled out (see ``rollout``).

v is what ``explain`` explains: the log odds of a class, or a regression's number, mean over seeds. Towers run
by their own reference forward, one per seed. For heads on embeddings r starts at what a tower reads (the
class token, the mean, the end of the text), less that start: what is told is what attention brought there.
For heads on tokens it starts at what the head took of each token. Relevance is not negative and says where
evidence was read, not whether it was right; numbers of different modalities have no common scale.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from ...pretrain import lean_timm
from ...pretrain.model import Encoders
from ...pretrain.packing import pad_text
from ..config import ENCODED
from ..encoders.columns import ColumnState, column_features
from ..encoders.encoding import read_pixels
from ..encoders.tokens import project_image, project_text
from ..fusion.head import Head
from ..fusion.joint import Joint
from ..fusion.ordinal import Ordinal
from ..runs.saved import SavedHead
from ..tables.cells import Picture, PictureReader
from ..tables.manifest import Rows
from ..tasks.task import Floats, Ints, Task
from .rollout import Attended, NoAttention, evidence, head_starts, unrolled
from .shapley import LEAST

__all__ = ["Member", "Relevance", "relevance_of"]

ROWS = 8
"""Rows at once: every attention map is kept with its graph."""


@dataclass(frozen=True)
class Relevance:
    """Of one row: ``image`` float64 [rows, columns] of the picture's patches as the model sees it, ``text``
    its words with their relevance; None where the row has no such modality, the head does not read it, or it
    cannot be told: then ``without`` says why, by modality."""

    image: NDArray[np.float64] | None = None
    text: list[tuple[str, float]] | None = None
    without: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Member:
    """A head of one seed with the encoders that it reads. ``states``: how cells of modalities without encoder
    become vectors."""

    saved: SavedHead
    model: Encoders
    states: Mapping[str, ColumnState] = field(default_factory=dict[str, ColumnState])


@dataclass(frozen=True)
class _Tower:
    """How a tower's tokens make its embedding. ``start``: inputs to weights [b, n] of its last tokens;
    ``prefix``: tokens before the patches; ``pools``: whether the last map is that of an attention pooling."""

    layers: int
    start: Callable[[Tensor, int], Tensor]
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    pools: bool = False


def _at(place: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    return lambda x, n: F.one_hot(place(x), n).float()


def _first(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _mean_from(prefix: int) -> Callable[[Tensor, int], Tensor]:
    def start(x: Tensor, n: int) -> Tensor:
        made = torch.zeros(len(x), n, device=x.device)
        made[:, prefix:] = 1 / (n - prefix)
        return made

    return start


def _image_tower(visual: Any) -> _Tower:
    """Raises NoAttention."""
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise NoAttention("its image tower pools by many queries")
        rows, columns = visual.grid_size
        start = _at(_first) if visual.pool_type == "tok" else _mean_from(1)
        return _Tower(len(visual.transformer.resblocks), start, 1, (rows, columns))
    trunk: Any = getattr(visual, "trunk", None)
    if not isinstance(visual, TimmModel) or lean_timm.supports(trunk) is not None:
        raise NoAttention(f"its image tower, {_name(visual)}, has no attention over all patches")
    prefix, pool = int(trunk.num_prefix_tokens), trunk.global_pool
    if pool not in ("token", "avg", "map"):
        raise NoAttention(f"its image tower pools by '{pool}'")
    start = _at(_first) if pool == "token" else _mean_from(prefix)
    grid: tuple[int, int] = tuple(trunk.patch_embed.grid_size)
    return _Tower(len(trunk.blocks), start, prefix, grid, pools=pool == "map")


def _text_tower(text: Any) -> _Tower:
    """Raises NoAttention."""
    if isinstance(text, HFTextEncoder):
        config: Any = text.config
        layers, pad = int(config.num_hidden_layers), config.pad_token_id
        if isinstance(text.pooler, MeanPooler):
            return _Tower(layers, lambda ids, n: F.normalize((ids[:, :n] != pad).float(), p=1, dim=1))
        if isinstance(text.pooler, ClsPooler | ClsLastHiddenStatePooler):
            return _Tower(layers, _at(_first))
        raise NoAttention(f"its text tower pools by {type(text.pooler).__name__}")
    if not isinstance(text, TextTransformer) or text.cls_emb is not None:
        raise NoAttention(f"its text tower is {_name(text)}")
    layers = len(text.transformer.resblocks)
    places: dict[str, Callable[[Tensor], Tensor]] = {
        "argmax": lambda ids: ids.argmax(1),
        "eos": lambda ids: (ids == text.eos_id).int().argmax(1),
        "first": _first,
        "last": lambda ids: _first(ids) + ids.shape[1] - 1,
    }
    if text.pool_type not in places:
        raise NoAttention(f"its text tower pools by '{text.pool_type}'")
    return _Tower(layers, _at(places[text.pool_type]))


def _name(tower: Any) -> str:
    return type(getattr(tower, "trunk", tower)).__name__


@dataclass
class _Side:
    """One modality of a batch: the batch's rows that have it, what went in, and what attention did there."""

    rows: Tensor
    inputs: Tensor
    lengths: list[int]
    tower: _Tower | None
    why: str
    maps: list[Tensor] = field(default_factory=list[Tensor])


def relevance_of(
    members: Sequence[Member],
    task: Task,
    rows: Rows,
    classes: Ints | None,
    *,
    max_pixels: int,
) -> list[Relevance]:
    """Relevance for every row, the mean over members. ``classes``: int64 [n], what is explained (see
    ``shapley.explained_class``). Pictures that cannot be read count as missing here; of rows of several
    pictures nothing is told."""
    if any(declared.pool for declared in rows.declared.values()):
        why = "rows of several pictures are not followed into the encoders"
        return [Relevance(without={k: why for k in ENCODED if k in rows.modalities}) for _ in rows.ids]
    out: list[Relevance] = []
    for start in range(0, len(rows), ROWS):
        chosen = np.arange(start, min(len(rows), start + ROWS))
        part = rows.take(chosen)
        said = None if classes is None else torch.from_numpy(classes[chosen])
        found = [_of_member(member, task, part, said, max_pixels) for member in members]
        out += [_mean([one[i] for one in found]) for i in range(len(part))]
    return out


def _mean(parts: Sequence[Relevance]) -> Relevance:
    first = parts[0]
    images = [one.image for one in parts if one.image is not None]
    image = np.mean(images, axis=0) if len(images) == len(parts) else None
    text = None
    if first.text is not None:
        by_word = zip(*(one.text or [] for one in parts), strict=True)
        text = [(words[0][0], float(np.mean([r for _, r in words]))) for words in by_word]
    return Relevance(image, text, first.without)


def _of_member(
    member: Member, task: Task, rows: Rows, classes: Tensor | None, max_pixels: int
) -> list[Relevance]:
    model, head = member.model, member.saved.head.to(member.model.device)
    core = head.inner if isinstance(head, Ordinal) else head
    assert isinstance(core, Head)
    seen, sides = Attended(), dict[str, _Side]()
    with torch.enable_grad(), seen:
        features, present = _features(member, core, rows, max_pixels, seen, sides)
        before = len(seen.maps)
        logits = member.saved.scale * head(features, present).double() + member.saved.shift
        own = seen.maps[before:]
        value = _values(task, logits, classes)
    layers = evidence(value, own)
    starts = head_starts(core, features, present, layers) if core.reads_tokens else {}
    found: list[dict[str, Any]] = [{"without": {}} for _ in range(len(rows))]
    for k, side in sides.items():
        r, why = _relevance(side, value, starts.get(k))
        for j, i in enumerate(side.rows.tolist()):
            if r is None:
                found[i]["without"][k] = why
            elif k == "image":
                assert side.tower is not None
                found[i]["image"] = r[j].double().cpu().numpy().reshape(side.tower.grid)
            else:
                ids = side.inputs[j, : side.lengths[j]].tolist()
                words = model.tokenizer.words(ids)
                found[i]["text"] = [(word, float(r[j, places].sum())) for word, places in words]
    return [Relevance(**one) for one in found]


def _relevance(side: _Side, value: Tensor, start: Tensor | None) -> tuple[Tensor | None, str]:
    """r [b', n'] over patches or tokens, or why there is none. ``start``: what the head took of each token,
    for all rows of the batch."""
    tower = side.tower
    if tower is None:
        return None, side.why
    layers = evidence(value, side.maps)
    if start is not None and not side.maps:  # the head reads what enters the towers
        return start[side.rows], ""
    n = layers[0].shape[-1]
    if start is not None:
        whole = layers[0].new_zeros(len(side.rows), n)
        taken = start[side.rows]
        whole[:, tower.prefix : tower.prefix + taken.shape[1]] = taken
        return unrolled(whole, layers)[:, tower.prefix :], ""
    begin = tower.start(side.inputs, n).to(layers[0])
    if tower.pools:
        return unrolled(layers[-1][:, 0], layers[:-1])[:, tower.prefix :], ""
    return (unrolled(begin, layers) - begin)[:, tower.prefix :], ""


def _features(
    member: Member, head: Head, rows: Rows, max_pixels: int, seen: Attended, sides: dict[str, _Side]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features of rows with their graph, and fills ``sides``."""
    model = member.model
    columns = column_features(rows, dict(member.states)).to(model.device)
    features, present = columns.batch(torch.arange(len(rows))) if columns.index else ({}, {})
    for k in (k for k in ENCODED if k in rows.modalities):
        side, there = _side(model, k, rows, max_pixels)
        present[k] = there.to(model.device)
        if k not in head.modalities:
            continue
        before = len(seen.maps)
        for name, value in _encoded(model, head, k, side).items():
            whole = value.new_zeros(len(rows), *value.shape[1:])
            features[name] = whole.index_put((side.rows.to(value.device),), value[: len(side.rows)])
        if not len(side.rows):  # something went in all the same, to know the widths
            continue
        sides[k] = side
        side.maps = seen.maps[before:]
        _check(side, joint=isinstance(head, Joint))
    return features, present


def _check(side: _Side, *, joint: bool) -> None:
    """Whether the tower's maps are those that were expected."""
    tower = side.tower
    if tower is None or joint:
        return
    square = [m for m in side.maps if m.shape[-1] == m.shape[-2] or m.shape[-2] == 1]
    sizes = {m.shape[-1] for m in side.maps}
    if len(side.maps) != tower.layers + tower.pools or len(square) != len(side.maps) or len(sizes) > 1:
        side.tower, side.why = None, "its attention cannot be looked at"


def _side(model: Encoders, k: str, rows: Rows, max_pixels: int) -> tuple[_Side, Tensor]:
    """What goes into a tower, and which rows have it."""
    tower, why = None, ""
    try:
        tower = _image_tower(model.clip.visual) if k == "image" else _text_tower(model.clip.text)
    except NoAttention as error:
        why = str(error)
    items = rows.cells[k]
    chosen = [i for i, item in enumerate(items) if item is not None]
    if k == "image":
        pictures: list[Picture] = [items[i][0] for i in chosen]
        pixels, broken = read_pixels(model, pictures, PictureReader(), max_pixels)
        whole = [j for j, reason in enumerate(broken) if not reason]
        chosen, lengths = [chosen[j] for j in whole], [0] * len(whole)
        blank = torch.zeros(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
        inputs = model.model.pixels(pixels[whole] if whole else blank)
    else:
        ids, seq_lens = model.tokenizer.pack([items[i] for i in chosen] or [""])
        inputs, lengths = pad_text(model.clip.text, ids, seq_lens).to(model.device), seq_lens.tolist()
    there = torch.zeros(len(rows), dtype=torch.bool)
    there[chosen] = True
    return _Side(torch.tensor(chosen, dtype=torch.int64), inputs, lengths, tower, why), there


def _encoded(model: Encoders, head: Head, k: str, side: _Side) -> dict[str, Tensor]:
    """What a head reads of a modality, by the tower's own forward."""
    clip: Any = model.clip
    if head.reads_inputs and k == "image":
        return {"image_inputs": clip.visual._embeds(side.inputs)[:, 1:]}
    if k == "image":
        if head.reads_tokens:
            return {"image_tokens": project_image(model, model.patch_tokens(side.inputs))}
        return {"image": _embedded(model, k, clip.visual(side.inputs))}
    longest, lengths = max(side.lengths), torch.tensor(side.lengths, device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    if head.reads_inputs:
        return {"text_inputs": clip.text._embeds(side.inputs)[0][:, :longest], "text_mask": mask}
    if head.reads_tokens:
        tokens = project_text(clip.text, model.word_tokens(side.inputs))[:, :longest]
        return {"text_tokens": tokens, "text_mask": mask}
    return {"text": _embedded(model, k, clip.text(side.inputs))}


def _embedded(model: Encoders, k: str, found: Any) -> Tensor:
    features: Tensor = found[0] if isinstance(found, tuple) else found
    return F.normalize(features, dim=-1) if k in model.normalized else features


def _values(task: Task, logits: Tensor, classes: Tensor | None) -> Tensor:
    """v [b] of logits [b, C]: log odds of the classes, or the number."""
    if classes is None:
        return logits[:, 0]
    classes = classes.to(logits.device)
    if task.type == "binary":
        return logits[:, 0] * (2 * classes - 1)
    if task.type == "multilabel":
        return logits.gather(1, classes[:, None])[:, 0]
    if task.type == "multiclass":
        chosen = logits.gather(1, classes[:, None])[:, 0]
        others = logits.scatter(1, classes[:, None], float("-inf")).logsumexp(1)
        return chosen - others
    p = task.answers(logits).gather(1, classes[:, None])[:, 0].clamp(LEAST, 1 - LEAST)
    return p.log() - torch.log1p(-p)


def shares(values: Sequence[float]) -> Floats:
    """Relevance as shares of the greatest, for drawing; all 0 where nothing is relevant."""
    found = np.array(values, dtype=np.float64)
    top = found.max(initial=0.0)
    return found / top if top > 0 else np.zeros_like(found)
