"""What to evaluate on: the fixed galleries of a corpus, or any shard folders of the user's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..configs.errors import UserError
from ..configs.files import cache_dir, resolve_data_path
from .encode import Encoded
from .retrieval import canonical_caption
from .statistics import Ints

__all__ = ["Gallery", "concept_ids", "data_root", "find_galleries", "run_folder", "select", "train_folder"]


@dataclass(frozen=True)
class Gallery:
    """A named list of samples of one shard folder; ``keys`` None means all of them."""

    name: str
    folder: Path
    keys: tuple[str, ...] | None = None


def run_folder(checkpoint: str | Path) -> Path | None:
    """The run that a path belongs to: itself, or the one above ``checkpoints/step_..``; None for other
    paths."""
    path = Path(str(checkpoint).removeprefix("local-dir:"))
    for candidate in (path, path.parent.parent if path.parent.name == "checkpoints" else path):
        if (candidate / "checkpoints").is_dir():
            return candidate
    return None


def data_root(checkpoint: str | Path, data: str | None) -> Path:
    """The folder to evaluate on: ``data`` if given, else the corpus or the held-out shards that the run
    names in its config, else the demo corpus in the cache. Raises UserError if there is none."""
    if data is not None:
        root = resolve_data_path(data)
        if not root.is_dir():
            raise UserError(f"data: there is no folder {root}; give a corpus or a folder of shards")
        return root
    run = run_folder(checkpoint)
    if run is not None and (run / "config.yaml").is_file():
        return _root_of_run(run / "config.yaml")
    demo = cache_dir() / "corpora" / "icons-demo"
    if not demo.is_dir():
        raise UserError(
            f"data: there is no corpus at {demo}; run `diptych data fetch icons`, or give data=FOLDER"
        )
    return demo


def _root_of_run(path: Path) -> Path:
    """Where a run's config says to evaluate: ``evaluate.data``, or the corpus that it or the training data is
    part of."""
    config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections: dict[str, Any] = config if isinstance(config, dict) else {}
    held_out = (sections.get("evaluate") or {}).get("data")
    train = (sections.get("data") or {}).get("train")
    sources = train if isinstance(train, list) else [{"data": train}]
    named = [held_out] if held_out else [one.get("data") for one in sources if isinstance(one, dict)]
    folders = [resolve_data_path(name) for name in named if isinstance(name, str) and "://" not in name]
    for folder in folders:
        if (folder.parent / "galleries.json").is_file():
            return folder.parent
    if held_out and folders and folders[0].is_dir():
        return folders[0]
    what = (
        f"evaluate.data is {held_out}, which is not below {Path.cwd()}"
        if held_out
        else "evaluate.data is null"
    )
    raise UserError(f"data: in {path} {what}; give data=FOLDER")


def _is_shard_set(folder: Path) -> bool:
    return (folder / "manifest.jsonl").is_file()


def find_galleries(root: Path, names: Sequence[str] | None = None) -> list[Gallery]:
    """Galleries of ``root``: those of its galleries.json, else its sub-folders of shards except ``train``,
    else all samples of ``root`` itself. ``names`` picks some; an unknown one is a UserError."""
    if (root / "galleries.json").is_file():
        found = _read_galleries(root)
    elif _is_shard_set(root):
        found = [Gallery(root.name or "data", root)]
    else:
        folders = sorted(p for p in root.iterdir() if p.name != "train" and _is_shard_set(p))
        found = [Gallery(folder.name, folder) for folder in folders]
    if not found:
        raise UserError(
            f"data: {root} holds neither galleries.json nor shards with a manifest.jsonl; "
            "make them with `diptych data build` or `diptych data index`"
        )
    if names is None:
        return found
    by_name = {gallery.name: gallery for gallery in found}
    for name in names:
        if name not in by_name:
            raise UserError(f"galleries: {root} has no gallery '{name}'; it has {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _read_galleries(root: Path) -> list[Gallery]:
    path = root / "galleries.json"
    try:
        data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return [
            Gallery(name, root / str(entry["split"]), tuple(map(str, entry["keys"])))
            for name, entry in data.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a list of galleries ({error}); fetch the corpus again") from error


def train_folder(root: Path) -> Path | None:
    """The training split beside the galleries, for prompts and the probe; None if there is none."""
    for folder in (root / "train", root.parent / "train"):
        if _is_shard_set(folder):
            return folder
    return None


def select(encoded: Encoded, gallery: Gallery) -> Encoded:
    """The gallery's rows of an encoded shard set, in the gallery's order; UserError if some are missing."""
    if gallery.keys is None:
        return encoded
    rows = {key: i for i, key in enumerate(encoded.keys)}
    missing = [key for key in gallery.keys if key not in rows]
    if missing:
        raise UserError(
            f"gallery {gallery.name}: {len(missing)} of {len(gallery.keys)} samples are not in "
            f"{gallery.folder}, "
            f"for instance {missing[0]}; fetch the corpus again"
        )
    return encoded.take([rows[key] for key in gallery.keys])


def concept_ids(captions: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> Ints:
    """Numbers of the concepts behind the samples, int64 [n]: what shares a caption or an emoji code, also at
    one remove, is one concept, since its scores rise and fall together."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    names: list[str] = []
    for caption, meta in zip(captions, metas, strict=True):
        name = "caption " + canonical_caption(caption)
        names.append(name)
        if meta.get("emoji"):
            parent[root(name)] = root(f"emoji {meta['emoji']}")
        root(name)
    return np.unique([root(name) for name in names], return_inverse=True)[1].astype(np.int64)
