"""One self-contained HTML page for a pretraining run and a fine-tuning run: no script, no request, no server.

It reads the files that runs leave behind (``metrics.jsonl``, ``evaluate.json``, ``results.json``,
``config.yaml``) and shows what is there; what is absent becomes one line that says how to get it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ...configs.errors import UserError
from ...configs.files import atomic_write_text, resolve_data_path
from ...configs.versions import versions
from .finetune import finetune_sections, finetune_tiles
from .folds import fold_section, gain_tile
from .html import details, missing, table, text
from .missing import missing_section
from .pretrain import pretrain_sections, pretrain_tiles
from .search import search_section
from .style import STYLE

__all__ = ["RunFiles", "newest_runs", "read_run", "write_report"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class RunFiles:
    """What one run folder holds; absent files are empty."""

    folder: Path
    kind: Literal["pretrain", "finetune", "evaluate"]
    config: str
    rows: list[dict[str, Any]]
    evaluation: dict[str, Any]
    results: dict[str, Any]
    versions: dict[str, str]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); make it again") from error
    return data if isinstance(data, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last line cut by a crash is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _versions(folder: Path) -> dict[str, str]:
    """Versions that the newest checkpoint recorded, if it did."""
    for path in sorted(folder.glob("checkpoints/step_*/trainer.json"), reverse=True):
        found = _json(path).get("versions")
        if isinstance(found, dict):
            return {str(k): str(v) for k, v in found.items()}
    return {}


def _kind(folder: Path) -> Literal["pretrain", "finetune", "evaluate"] | None:
    if any((folder / name).exists() for name in ("results.json", "heads", "folds")):
        return "finetune"
    if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file():
        return "pretrain"
    return "evaluate" if (folder / "evaluate.json").is_file() else None


def read_run(folder: str | Path) -> RunFiles:
    """The files of a run folder; UserError if it is none."""
    folder = Path(folder)
    kind = _kind(folder)
    if kind is None:
        what = (
            "is not there" if not folder.exists() else "holds no metrics.jsonl, evaluate.json or results.json"
        )
        raise UserError(f"{folder} {what}; give run folders, for instance runs/NAME")
    config = folder / "config.yaml"
    return RunFiles(
        folder,
        kind,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        _rows(folder / "metrics.jsonl"),
        _json(folder / "evaluate.json"),
        _json(folder / "results.json"),
        _versions(folder),
    )


def newest_runs(parent: Path) -> list[Path]:
    """The newest pretraining run and the newest fine-tuning run in a folder of runs; UserError if it has
    none."""
    newest: dict[str, tuple[float, Path]] = {}
    for folder in sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []:
        found = _with_holdout(folder)
        kind = _kind(found[0])
        if kind in ("pretrain", "finetune"):
            names = ("metrics.jsonl", "results.json", "config.yaml")
            files = [one / name for one in found for name in names]
            times = [file.stat().st_mtime for file in files if file.is_file()]
            newest[kind] = max(newest.get(kind, (0.0, folder)), (max(times, default=0.0), folder))
    if not newest:
        raise UserError(f"there are no runs in {parent}; give their folders, for instance runs/NAME")
    return [newest[kind][1] for kind in ("pretrain", "finetune") if kind in newest]


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page for these runs (newest ones of ``runs/`` if none are given) and return its path.

    ``out`` defaults to ``report.html`` in the first run's folder. Raises UserError for folders that are no
    runs.
    """
    folders = [Path(run) for run in runs] or newest_runs(Path("runs"))
    folders = list(dict.fromkeys(one for folder in folders for one in _with_holdout(folder)))
    files = [read_run(folder) for folder in folders]
    path = Path(out) if out is not None else folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, page(files))
    return path


def _with_holdout(folder: Path) -> list[Path]:
    """A run, and after it the scores of its held-out split, if there are some; these alone of a folder that
    holds nothing else."""
    holdout = folder / "holdout"
    if not (holdout / "results.json").is_file():
        return [folder]
    return [holdout] if _kind(folder) is None else [folder, holdout]


def _name(run: RunFiles) -> str:
    folder = run.folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if folder.name == "holdout" else folder.name


def page(runs: Sequence[RunFiles]) -> str:
    """The whole page."""
    title = "Diptych: " + " and ".join(_name(run) for run in runs)
    tiles: list[str] = []
    sections: list[str] = []
    for run in runs:
        if sum(other.kind == run.kind for other in runs) > 1:  # several of a kind need their names
            name = f'<h2 class="run">{text(_name(run))}</h2>'
            tiles.append(f'<div class="tile"><b>{text(_name(run))}</b></div>')
            sections.append(name)
        if run.kind == "finetune":
            tiles += gain_tile(run.results) + finetune_tiles(run.results)
            sections.append(finetune_sections(run.folder, run.results, run.rows))
            sections.append(missing_section(run.results))
            sections.append(fold_section(run.results) + search_section(run.results))
            if run.results.get("heads") and run.results.get("type") != "retrieval":
                from .answers import answer_sections  # torch and the towers, for pictures and gates

                sections.append(answer_sections(run.folder, run.results))
        else:
            tiles += pretrain_tiles(run.evaluation)
            sections.append(pretrain_sections(run.folder, run.rows, run.evaluation))
    if not any(run.kind == "finetune" for run in runs):
        sections.append("<h2>Fusion</h2>" + missing("No fine-tuning run given:", "diptych finetune CONFIG"))
    if not any(run.kind != "finetune" for run in runs):
        sections.append("<h2>Training</h2>" + missing("No pretraining run given:", "diptych pretrain CONFIG"))
    shown = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{text(title)}</h1><p class="soft">{text(_subtitle(runs))}</p>{shown}{"".join(sections)}'
        f"<h2>Data</h2>{_data(runs)}<h2>How it was made</h2>{_settings(runs)}"
        "<footer>Scores are point values with 95 % bootstrap intervals over groups. Made by "
        "<code>diptych report"
        f"</code>; the page is one file and asks nothing of the network.</footer></main></body></html>\n"
    )


def _subtitle(runs: Sequence[RunFiles]) -> str:
    words = {
        "pretrain": "a contrastive pretraining run",
        "finetune": "a fine-tuning run on top of it",
        "evaluate": "an evaluated checkpoint",
    }
    parts = [words[run.kind] for run in runs]
    text_parts = ", ".join(parts)
    parameters = next((_parameters(run.evaluation) for run in runs if _parameters(run.evaluation)), "")
    return text_parts[:1].upper() + text_parts[1:] + (f"; {parameters}" if parameters else "") + "."


def _parameters(evaluation: dict[str, Any]) -> str:
    model = evaluation.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("parameters"), int):
        return ""
    size = f"{model['parameters'] / 1e6:.1f} million parameters"
    return (
        f"{model.get('image', '?')} beside {model.get('text', '?')}, {size}, "
        f"{model.get('image_size', '?')} pixels"
    )


def _data_root(run: RunFiles) -> Path | None:
    """The corpus that a run names: evaluate.json's data, else the parent of its training shards."""
    if isinstance(run.evaluation.get("data"), str):
        return Path(run.evaluation["data"])
    try:
        config = yaml.safe_load(run.config) if run.config else None
    except yaml.YAMLError:
        return None
    data = config.get("data") if isinstance(config, dict) else None
    train = data.get("train") if isinstance(data, dict) else None
    try:
        return resolve_data_path(train).parent if isinstance(train, str) else None
    except UserError:  # a corpus that is not here any more
        return None


def _split_row(folder: Path) -> list[Any]:
    """Name, samples, shards and bytes of a shard folder, from its manifest."""
    samples = size = shards = 0
    for row in _rows(folder / "manifest.jsonl"):
        shards += 1
        samples += int(row.get("num_ok", row.get("num_samples", row.get("samples", 0))) or 0)
        size += int(row.get("bytes", row.get("size", 0)) or 0)
    return [folder.name, f"{samples:,}", shards, f"{size / 1e6:.1f} MB" if size else "-"]


def _data(runs: Sequence[RunFiles]) -> str:
    root = next((root for root in map(_data_root, runs) if root is not None), None)
    if root is None or not root.is_dir():
        return missing("The data of these runs is not on this machine:", "diptych data fetch icons")
    folders = [p for p in (root, *sorted(root.iterdir())) if (p / "manifest.jsonl").is_file()]
    rows = [_split_row(folder) for folder in folders]
    parts = [table("", ["split", "samples", "shards", "size"], rows)]
    card = root / "README.md"
    if card.is_file():
        parts.append(
            details("Data card: sources, licences, splits", card.read_text(encoding="utf-8")[:200_000])
        )
    return "".join(parts) or missing("No shards with a manifest:", f"diptych data verify {root}")


def _settings(runs: Sequence[RunFiles]) -> str:
    parts = [details(f"{_name(run)}: config.yaml", run.config) for run in runs]
    recorded = next((run.versions for run in runs if run.versions), None)
    shown = recorded or versions()
    where = "recorded with the checkpoint" if recorded else "installed where this page was made"
    rows = [[name, version] for name, version in shown.items()]
    return "".join(parts) + table(f"Versions, {where}", ["package", "version"], rows)
