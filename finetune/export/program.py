"""A fine-tuned model, encoders and head and calibration, as one ``torch.export`` program."""

import json
import random
import string
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ...configs.errors import UserError
from ...pretrain.model import Encoders
from ..encoders.columns import column_features
from ..encoders.encoding import prepare
from ..encoders.features import FeatureRows
from ..encoders.tokens import image_tokens, project_text
from ..fusion.head import Head
from ..predictor import Predictor
from ..runs.saved import SavedHead, open_encoder
from ..tables.cells import PictureFolder
from ..tables.files import Columns
from ..tasks.thresholds import has_thresholds
from .formats import NOTE, Say

__all__ = [
    "BATCHES",
    "PROGRAM",
    "Fused",
    "difference",
    "document",
    "inputs_of",
    "refuse_inputs",
    "trace",
    "write_program",
]

PROGRAM = "model.pt2"
BATCHES = (1, 5)
"""Batch sizes at which a program is compared with the predictor."""


class PaddedEncoders(nn.Module):
    """The towers on padded batches, giving what a head reads (see ``features``)."""

    def __init__(self, model: Encoders, head: Head) -> None:
        super().__init__()
        self.clip = model.clip
        self.model = [model]  # no submodule: the towers are one already
        self.tokens = head.reads_tokens
        self.modalities = head.modalities
        clips = "text" not in model.widths or model.tokenizer.name is None
        self.pad_id = None if clips else int(model.tokenizer.pad_id)

    def image(self, pixels: Tensor) -> dict[str, Tensor]:
        """``image``, or ``image_tokens`` of pixels float32 [b, 3, S, S]."""
        model = self.model[0]
        if self.tokens:
            return {"image_tokens": image_tokens(model, pixels)}
        return {"image": self._scaled("image", model.clip.visual(model.model.pixels(pixels)))}

    def text(self, ids: Tensor) -> dict[str, Tensor]:
        """``text``, or ``text_tokens`` and ``text_mask``, of ids int64 [b, L]."""
        text: Any = self.clip.text
        if not self.tokens:
            return {"text": self._scaled("text", text(ids))}
        if isinstance(text, TextTransformer):
            out = text.forward_intermediates(
                ids, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
            )
            tokens = cast(Any, out["text_intermediates"])[-1]
        else:
            assert isinstance(text, HFTextEncoder)
            mask = (ids != cast(Any, text.config).pad_token_id).long()
            tokens = text.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"text_tokens": project_text(text, tokens), "text_mask": self._real(ids)}

    def _scaled(self, kind: str, features: Any) -> Tensor:
        features = features[0] if isinstance(features, tuple) else features
        return F.normalize(features, dim=-1) if kind in self.model[0].normalized else features

    def _real(self, ids: Tensor) -> Tensor:
        """True for tokens of the text, bool [b, L]: of CLIP's own tokenizer up to the highest id, which ends
        a text; else up to the last one that is no padding."""
        position = torch.arange(ids.shape[1], device=ids.device)
        if self.pad_id is None:
            return position <= ids.argmax(dim=1, keepdim=True)
        return position <= (position * (ids != self.pad_id)).amax(dim=1, keepdim=True)

    def features(
        self,
        image: Tensor | None,
        ids: Tensor | None,
        vectors: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
    ) -> Any:
        """Features as heads take them, zeros where a modality is missing."""
        found = {k: vector for k, vector in vectors.items() if k in self.modalities}
        if image is not None and "image" in self.modalities:
            found |= self.image(image)
        if ids is not None and "text" in self.modalities:
            found |= self.text(ids)
        for name, value in found.items():
            k = name if name in present else name.partition("_")[0]
            there = present[k].view(-1, *[1] * (value.ndim - 1))
            mask = value.dtype == torch.bool  # of which onnxruntime has no torch.where
            found[name] = value & there if mask else torch.where(there, value, torch.zeros_like(value))
            if name.endswith("_tokens"):  # the predictor keeps them so
                found[name] = found[name].half()
        return found


class Fused(nn.Module):
    """Pixels and token ids to probabilities: the mean over seeds of calibrated answers, as ``Predictor``
    gives them."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.task, self.members = predictor.task, [_Calibrated(saved) for saved in predictor.saved]
        self.heads = nn.ModuleList([saved.head for saved in predictor.saved])
        places = list(dict.fromkeys(predictor.encoders))
        self.of_seed = [places.index(place) for place in predictor.encoders]
        self.models = [open_encoder(place) for place in places]
        head = predictor.saved[0].head
        self.encoders = nn.ModuleList([PaddedEncoders(model, head) for model in self.models])
        self.requires_grad_(False)

    def forward(
        self,
        image: Tensor | None = None,
        token_ids: Tensor | None = None,
        image_present: Tensor | None = None,
        text_present: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """float32 [b, C]: probabilities, for regression the answers [b, 1].

        image: float32 [b, 3, S, S], normalised; token_ids: int64 [b, L], padded; image_present, text_present:
        bool [b]; columns: of each modality without encoder its vectors float32 [b, W] under its name, and
        ``NAME_present`` bool [b]. What stands in a missing slot changes nothing.
        """
        given = {"image": image_present, "text": text_present}
        present = {k: v for k, v in given.items() if v is not None}
        columns = columns or {}
        vectors = {k: v for k, v in columns.items() if not k.endswith("_present")}
        present |= {k: columns[f"{k}_present"] for k in vectors}
        features = [
            cast(PaddedEncoders, e).features(image, token_ids, vectors, present) for e in self.encoders
        ]
        answers: list[Tensor] = []
        for head, member, place in zip(self.heads, self.members, self.of_seed, strict=True):
            logits = head(features[place], present)
            answers.append(self.task.answers(member.scale * logits.double() + member.shift))
        return torch.stack(answers).mean(0).float()


class _Calibrated:
    def __init__(self, saved: SavedHead) -> None:
        self.scale, self.shift = saved.scale, saved.shift


@contextmanager
def _plain_attention() -> Generator[None]:
    """torch's fused multi-head attention for inference is an operator of its own, which others cannot run."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def trace(fused: Fused, predictor: Predictor) -> Any:
    """The exported program, for any batch size. UserError for towers that torch.export cannot trace."""
    inputs, _ = _random_rows(predictor, fused.models[0], 2)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _plain_attention():
            return torch.export.export(
                fused.eval(), (), inputs, dynamic_shapes=tree_map(lambda _: {0: batch}, inputs), strict=False
            )
    except Exception as error:  # torch.export has a zoo of them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{predictor.run}: torch.export cannot trace this model: {reason}") from error


def refuse_inputs(predictor: Predictor) -> None:
    """Raise UserError for a task that no program answers, and for a head whose inputs none makes."""
    if predictor.task.type == "retrieval":
        raise UserError(
            f"{predictor.run}: a program answers rows by themselves, and retrieval compares them; export the "
            "encoders with --to open_clip or hf"
        )
    if any(one.head.reads_inputs for one in predictor.saved):
        raise UserError(
            f"{predictor.run}: head '{predictor.head}' reads patch and word embeddings, which a program "
            "cannot make; give another head with --head"
        )
    if any(declared.pool for declared in predictor.modalities.values()):
        raise UserError(f"{predictor.run}: a program reads one picture per row, and this run pools several")


def write_program(predictor: Predictor, folder: Path, say: Say) -> dict[str, float]:
    """Write ``model.pt2`` and what its inputs and outputs are; returns by how much the loaded program differs
    from the predictor, of regression in standard deviations of the training targets."""
    refuse_inputs(predictor)
    say(f"tracing head {predictor.head} with {len(predictor.saved)} seeds")
    fused = Fused(predictor)
    program = trace(fused, predictor)
    torch.export.save(program, folder / PROGRAM)
    (folder / NOTE).write_text(json.dumps(document(predictor, fused.models[0])), encoding="utf-8")
    say("comparing with the predictor")
    loaded = torch.export.load(folder / PROGRAM).module()
    found = max(difference(predictor, fused.models[0], loaded, n) for n in BATCHES)
    return {"answers" if predictor.task.type == "regression" else "probabilities": found}


def document(predictor: Predictor, model: Encoders) -> dict[str, Any]:
    """What export.json says of inputs and outputs."""
    shapes: dict[str, dict[str, str]] = {
        k: {f"columns.{k}": f"float32 [b, {state.width}]", f"columns.{k}_present": "bool [b]"}
        for k, state in predictor.states.items()
    }
    known: dict[str, Any] = {}
    if "image" in predictor.modalities:
        side = model.image_size
        shapes["image"] = {"image": f"float32 [b, 3, {side}, {side}]", "image_present": "bool [b]"}
        known["preprocess"] = model.config["preprocess_cfg"]
    if "text" in predictor.modalities:
        words = model.tokenizer
        shapes["text"] = {"token_ids": f"int64 [b, {words.context_length}]", "text_present": "bool [b]"}
        known |= {"tokenizer": words.name or "CLIP", "pad_id": words.pad_id}
    return known | {
        "head": predictor.head,
        "seeds": len(predictor.saved),
        "task": predictor.task.type,
        "classes": predictor.classes,
        "inputs": {name: shape for k in predictor.modalities for name, shape in shapes[k].items()},
        "output": f"float32 [b, {max(1, len(predictor.classes))}]",
        "thresholds": _thresholds(predictor),
        "calibration": [{"scale": one.scale, "shift": one.shift} for one in predictor.saved],
        "columns": {k: state.model_dump(mode="json") for k, state in predictor.states.items()},
    }


def _thresholds(predictor: Predictor) -> dict[str, float]:
    """From which probability on the positive class, or each label, is said; empty for other tasks."""
    if not has_thresholds(predictor.task.type):
        return {}
    labels = predictor.classes[1:] if predictor.task.type == "binary" else predictor.classes
    limits = predictor.thresholds
    return dict(zip(labels, limits if len(limits) > 1 else limits * len(labels), strict=True))


def inputs_of(
    predictor: Predictor,
    model: Encoders,
    images: list[Tensor | None],
    texts: list[str | None],
    columns: FeatureRows | None = None,
) -> dict[str, Any]:
    """A program's inputs from uint8 [3, S, S] pixels and texts, None where a modality is missing, and the
    vectors of modalities without encoder."""
    inputs: dict[str, Any] = {}
    if "image" in predictor.modalities:
        blank = torch.zeros(3, model.image_size, model.image_size, dtype=torch.uint8)
        inputs["image"] = model.model.pixels(torch.stack([blank if x is None else x for x in images]))
        inputs["image_present"] = torch.tensor([x is not None for x in images])
    if "text" in predictor.modalities:
        ids, lengths = model.tokenizer.pack([x or "" for x in texts])
        padded = torch.full((len(texts), model.tokenizer.context_length), model.tokenizer.pad_id)
        for row, part in zip(padded, ids.split(lengths.tolist()), strict=True):
            row[: len(part)] = part
        inputs["token_ids"] = padded
        inputs["text_present"] = torch.tensor([x is not None for x in texts])
    if columns is not None:
        vectors, present = columns.batch(torch.arange(len(columns)))
        inputs["columns"] = vectors | {f"{k}_present": there for k, there in present.items()}
    return inputs


def _random_rows(predictor: Predictor, model: Encoders, n: int) -> tuple[dict[str, Any], Columns]:
    """A program's inputs for n random rows, and the same rows as a table: the first one has all modalities,
    then one after the other is missing in turn."""
    draw = random.Random(n)
    noise = torch.Generator().manual_seed(n)
    size = (3, model.image_size, model.image_size)
    images: list[Tensor | None] = []
    texts: list[str | None] = []
    rows: list[dict[str, Any]] = []
    names = list(predictor.modalities)
    for i in range(n):
        lost = names[i % (len(names) + 1) - 1] if len(names) > 1 and i % (len(names) + 1) else None
        pixels = torch.randint(0, 256, size, generator=noise, dtype=torch.uint8)
        words = ["".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(draw.randint(1, 5))]
        images.append(None if lost == "image" else pixels)
        texts.append(None if lost == "text" else " ".join(words))
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        cells: dict[str, Any] = {"image": picture, "text": texts[-1]}
        rows.append({})
        for k, declared in predictor.modalities.items():
            state = predictor.states.get(k)
            given = {str(declared.column): cells.get(k)} if state is None else state.drawn(declared, draw)
            rows[-1] |= {column: None if k == lost else cell for column, cell in given.items()}
    table: Columns = {column: [row[column] for row in rows] for column in rows[0]}
    parsed = predictor.parse(table, PictureFolder(Path.cwd()), "random rows")
    columns = column_features(parsed, predictor.states) if predictor.states else None
    reads = "image" in predictor.modalities
    prepared = [prepare(model, x) if reads and x is not None else None for x in images]
    return inputs_of(predictor, model, prepared, texts, columns), table


def difference(predictor: Predictor, model: Encoders, program: Callable[..., Tensor], n: int) -> float:
    """Largest absolute difference of n rows' answers, some of which lack a modality."""
    inputs, table = _random_rows(predictor, model, n)
    with torch.inference_mode():
        got = program(**inputs).double().numpy()
    if predictor.task.type == "regression":
        return float(np.abs(got[:, 0] - predictor.predict(table)).max() / predictor.saved[0].scale)
    return float(np.abs(got - predictor.predict_proba(table)).max())
