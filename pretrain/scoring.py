"""The parts of an evaluation: retrieval with examples, zero-shot classes, linear probe.

Each part reads a ``Session``, which encodes every shard folder once, and adds its scores to the result.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field

from ..configs.errors import UserError
from ..configs.load import FolderName, StrictModel
from ..data.shards import DamagedSample, ShardSet, open_shards
from . import zero_shot
from .encode import Encoded, encode_images
from .examples import write_examples
from .galleries import Gallery, concept_ids, select, train_folder
from .model import LoadedModel
from .probe import ProbeConfig, linear_probe
from .retrieval import retrieval_scores, unique_captions
from .zero_shot import ZeroShotConfig

__all__ = ["EvaluateConfig", "Progress", "Session", "probe_part", "retrieval_part", "zero_shot_part"]

Json = dict[str, Any]


class EvaluateConfig(StrictModel):
    """Settings of ``diptych evaluate``; all have defaults."""

    data: str | None = None
    """A corpus folder (with galleries.json), a folder of shards, or one with sub-folders of shards. Null
    takes what the run was trained on, else the demo corpus."""
    galleries: tuple[str, ...] | None = None
    """Names of the galleries to score; null for all."""
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    probe: ProbeConfig = ProbeConfig()
    bootstrap: int = Field(default=2000, ge=100)
    """Bootstrap samples behind every interval."""
    examples: int = Field(default=6, ge=0, le=50)
    """Example queries in each direction per gallery; 0 draws none."""
    example_galleries: tuple[str, ...] = ("openmoji_no_people", "icon_park", "test_word")
    """Galleries to draw examples of; names that the data does not have are passed over, and where it has none
    of them all galleries are drawn."""
    batch_size: int = Field(default=256, ge=1)
    device: str = "auto"
    seed: int = 0
    out: FolderName | None = None
    """Folder for evaluate.json and evaluate/; null takes the run's folder, else runs/evaluate-NAME."""


class Progress(Protocol):
    """What ``evaluate`` tells of its progress."""

    def __call__(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context whose value is called with the number of images done."""
        ...


@dataclass
class Session:
    """One evaluation: the model, the settings, and what is encoded so far."""

    model: LoadedModel
    config: EvaluateConfig
    progress: Progress
    root: Path
    shards: dict[Path, ShardSet] = field(default_factory=dict[Path, ShardSet])
    encoded: dict[Path, Encoded] = field(default_factory=dict[Path, Encoded])
    texts: "Texts | None" = None

    def open(self, folder: Path) -> ShardSet:
        """The shard set of a folder, opened once."""
        if folder not in self.shards:
            self.shards[folder] = open_shards(folder)
        return self.shards[folder]

    def encode(self, folder: Path, sample_ids: Any = None) -> Encoded:
        """Image features of a folder, encoded once; of ``sample_ids`` alone they are not kept."""
        if sample_ids is None and folder in self.encoded:
            return self.encoded[folder]
        shards = self.open(folder)
        total = len(shards) if sample_ids is None else len(sample_ids)
        with self.progress(f"encoding {folder.name}", total) as advance:
            got = encode_images(
                self.model.encode_images,
                shards,
                image_size=self.model.image_size,
                batch_size=self.config.batch_size,
                sample_ids=sample_ids,
                advance=advance,
            )
        if sample_ids is None:
            self.encoded[folder] = got
        return got

    def gallery(self, gallery: Gallery) -> Encoded:
        """The gallery's images; UserError if there are none."""
        got = select(self.encode(gallery.folder), gallery)
        if len(got) == 0:
            raise UserError(f"gallery {gallery.name}: {gallery.folder} holds no samples")
        return got


def retrieval_part(session: Session, gallery: Gallery, folder: Path, result: Json, *, examples: bool) -> None:
    """Scores of one gallery, with pictures of examples if asked for."""
    config, images = session.config, session.gallery(gallery)
    ids, captions = unique_captions(images.captions)
    texts = session.model.encode_captions(captions)
    result["retrieval"][gallery.name] = retrieval_scores(
        images.features,
        texts,
        ids,
        concepts=concept_ids(images.captions, images.metas),
        samples=config.bootstrap,
        seed=config.seed,
    )
    if examples and config.examples:
        result["examples"] += write_examples(
            folder,
            gallery.name,
            session.open(gallery.folder),
            images,
            texts,
            ids,
            captions,
            count=config.examples,
        )
        first = not result["pictures"]
        name = "retrieval_examples" if first else f"retrieval_examples_{gallery.name}"
        result["pictures"][name] = f"evaluate/examples_{gallery.name}.png"


def _labels(metas: Sequence[Json], target: str) -> list[str]:
    """The class name in each sample's JSON; empty where it has none."""
    return [str(meta.get(target) or "") for meta in metas]


@dataclass(frozen=True)
class Texts:
    """Captions, JSON and sample ids of the training split's readable samples."""

    folder: Path
    captions: list[str]
    metas: list[Json]
    sample_ids: list[int]


def _train_texts(session: Session) -> Texts | None:
    """Texts of the training split, without decoding a picture; None if there is none."""
    folder = train_folder(session.root)
    if folder is None or session.texts is not None:
        return session.texts
    shards, texts = session.open(folder), Texts(folder, [], [], [])
    for sample_id in range(len(shards)):
        try:
            raw = shards.read(sample_id)
        except DamagedSample:
            continue
        texts.captions.append(raw.caption)
        texts.metas.append(raw.meta)
        texts.sample_ids.append(sample_id)
    session.texts = texts
    return texts


def zero_shot_part(
    session: Session, galleries: list[Gallery], classes: zero_shot.Prompts | None, result: Json
) -> None:
    """Accuracy with prompts from the training split's members, and with bare names; or from the user's
    file."""
    config = session.config.zero_shot
    if classes is not None:
        for gallery in galleries:
            _classify(session, gallery, config.label, f"{gallery.name}/{config.label}", classes, result)
        return
    train = _train_texts(session)
    if train is None:
        result["notes"].append("zero-shot: no training split to take prompts from; set zero_shot.classes")
        return
    for gallery in galleries:
        if gallery.name not in config.galleries:
            continue
        for target in config.targets:
            members = zero_shot.member_prompts(train.captions, _labels(train.metas, target))
            found = set(_labels(session.gallery(gallery).metas, target)) - {""}
            bare = zero_shot.class_name_prompts(sorted(found))
            prompts = {name: members.get(name, bare[name]) for name in sorted(found)}
            name = f"{gallery.name}/{target}"
            scale = session.model.logit_scale if config.ensemble == "probability" else None
            _classify(session, gallery, target, name, prompts, result, logit_scale=scale)
            if config.bare_names:
                _classify(session, gallery, target, name + " (class names)", bare, result)


def _classify(
    session: Session,
    gallery: Gallery,
    target: str,
    name: str,
    prompts: zero_shot.Prompts,
    result: Json,
    *,
    logit_scale: float | None = None,
) -> None:
    images = session.gallery(gallery)
    labels = _labels(images.metas, target)
    rows = [i for i, label in enumerate(labels) if label in prompts]
    if not rows or len(prompts) < 2:
        result["notes"].append(f"zero-shot: no sample of {gallery.name} has a known class in '{target}'")
        return
    concepts = concept_ids(images.captions, images.metas)
    result["zero_shot"][name] = zero_shot.zero_shot_scores(
        images.features[rows],
        [labels[i] for i in rows],
        prompts,
        session.model.encode_captions,
        logit_scale=logit_scale,
        concepts=concepts[rows],
        samples=session.config.bootstrap,
        seed=session.config.seed,
    )


def _probe_rows(texts: Texts, config: ProbeConfig) -> tuple[list[int], list[str], list[str]]:
    """Rows of the training split to fit on, evenly spaced over the labelled ones, their labels and groups."""
    labelled = [i for i, label in enumerate(_labels(texts.metas, config.target)) if label]
    spaced = np.linspace(0, len(labelled) - 1, min(len(labelled), config.max_train))
    rows = [labelled[i] for i in np.unique(spaced.round().astype(np.int64))] if labelled else []
    metas = [texts.metas[i] for i in rows]
    groups = _labels(metas, config.holdout_by)
    if len(set(groups)) < 2:  # of one vendor: keep concepts whole instead
        groups = [str(c) for c in concept_ids([texts.captions[i] for i in rows], metas)]
    return rows, _labels(metas, config.target), groups


def probe_part(session: Session, galleries: list[Gallery], result: Json) -> None:
    """Fit the probe once on the training split and score it on each gallery that has labels."""
    config, texts = session.config.probe, _train_texts(session)
    tests: list[tuple[str, Encoded]] = []
    for gallery in galleries:
        if gallery.name in config.galleries:
            images = session.gallery(gallery)
            labelled = [i for i, label in enumerate(_labels(images.metas, config.target)) if label]
            if labelled:
                tests.append((gallery.name, images.take(labelled)))
    if texts is None or not tests:
        result["notes"].append(f"linear probe: no labels '{config.target}' in a training split and a gallery")
        return
    rows, labels, groups = _probe_rows(texts, config)
    if len(set(groups)) < 2 or len(set(labels)) < 2:
        result["notes"].append("linear probe: the training split has fewer than two classes or groups")
        return
    train = session.encode(texts.folder, np.array([texts.sample_ids[i] for i in rows], dtype=np.int64))
    at = {texts.sample_ids[row]: i for i, row in enumerate(rows)}
    read = [at[int(sample_id)] for sample_id in train.sample_ids]  # pictures that do not decode are left out
    labels, groups = [labels[i] for i in read], [groups[i] for i in read]
    scores = linear_probe(
        train.features,
        labels,
        groups,
        [(t.features, _labels(t.metas, config.target), concept_ids(t.captions, t.metas)) for _, t in tests],
        config,
        samples=session.config.bootstrap,
        seed=session.config.seed,
    )
    for (name, _), got in zip(tests, scores, strict=True):
        result["linear_probe"][f"{name}/{config.target}"] = got
