"""Runs and checkpoints in the formats of others: open_clip, transformers' ``CLIPModel``, ``torch.export``,
ONNX.

An export is a folder, whole or absent. ``export.json`` in it says what it was made of and by how much its
answers differ from those of the model that it was made of.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...pretrain.model import LoadedModel, load_model
from ..predictor import Predictor
from ..runs.saved import open_encoder, write_encoder, write_folder

__all__ = ["KINDS", "NOTE", "export"]

KINDS = ("open_clip", "hf", "torch_export", "onnx")
PROGRAMS = ("torch_export", "onnx")
"""Formats that hold the head too."""
NOTE = "export.json"
TOLERANCE = 1e-4
"""The most that an export may differ from its source; all is computed in fp32."""

Say = Callable[[str], None]


def _quietly(line: str) -> None:
    del line


def export(
    source: str | Path,
    kind: str,
    out: str | Path,
    *,
    head: str | None = None,
    force: bool = False,
    say: Say = _quietly,
) -> dict[str, float]:
    """Write a fine-tuning run, a pretraining run, a checkpoint or an open_clip ``ARCH:TAG`` to the folder
    ``out``.

    ``open_clip``: both encoders as ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads them.
    ``hf``: a folder of transformers' ``CLIPModel``. ``torch_export`` and ``onnx``: encoders, head and
    calibration of a fine-tuning run as one program. Of a pretraining run the newest whole checkpoint is
    taken, with the averaged weights if there are such; of a fine-tuning run ``head`` (default: the
    recommended one), and where encoders were trained with it, those of its first seed.

    Returns the largest differences from the source by what was compared, empty for ``open_clip``. Raises
    UserError for an ``out`` that holds something (with ``force`` an earlier export gives way), for models
    that the format cannot hold, and for differences above 1e-4; then nothing is left behind.
    """
    out = Path(out)
    if kind not in KINDS:
        raise UserError(f"there is no export to '{kind}'; give {', '.join(KINDS)}")
    _check_out(out, force)
    found: dict[str, float] = {}
    if kind in PROGRAMS:
        predictor = _predictor(source, head, kind)

        def fill(folder: Path) -> None:
            if kind == "onnx":
                from .onnx import write_onnx

                found.update(_within(write_onnx(predictor, folder, say), source))
            else:
                from .program import write_program

                found.update(_within(write_program(predictor, folder, say), source))
            _note(folder, kind, source, predictor.head, found)
    else:
        model = _open(source, kind, head, say)

        def fill(folder: Path) -> None:
            if kind == "hf":
                from .hf import write_hf

                found.update(_within(write_hf(model, folder, say), source))
            else:
                write_encoder(model, folder)
            _note(folder, kind, source, head, found)

    _write(out, fill)
    return found


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to write")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise UserError(f"{out} holds something already; give another folder, or --force to replace it")
    if not (out / NOTE).is_file():
        raise UserError(f"{out} holds something that is no export (no {NOTE}); give another folder")


def _write(out: Path, fill: Callable[[Path], None]) -> None:
    """``write_folder``, and after an error also without the parents that were made for it."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        write_folder(out, fill)
    except BaseException:
        with suppress(OSError):  # the innermost first; what another process put there stays
            for folder in made:
                folder.rmdir()
        raise


def _predictor(source: str | Path, head: str | None, kind: str) -> Predictor:
    if not (Path(source) / "run.json").is_file():
        raise UserError(f"{source} has no head, which {kind} needs; give a folder of diptych finetune")
    return Predictor.load(source, head=head, device="cpu")


def _open(source: str | Path, kind: str, head: str | None, say: Say) -> LoadedModel:
    """The encoders of a run or checkpoint, on the CPU in fp32."""
    path = Path(str(source).removeprefix("local-dir:"))
    if (path / "run.json").is_file():
        predictor = Predictor.load(path, head=head, device="cpu")
        folder = predictor.encoders[0]
        others = len(set(predictor.encoders)) - 1
        say(f"encoders {folder}" + (f" (one of {others + 1}, one per seed)" if others else ""))
        model = open_encoder(folder)
        if not isinstance(model, LoadedModel):
            raise UserError(
                f"{path}: its encoders were trained apart, and {kind} is a format of dual encoders; give "
                f"torch_export or onnx, or take the folders in {folder} as they are, which timm and "
                "transformers read"
            )
        return model
    if head is not None:
        raise UserError(f"{source} has no head '{head}': it is no fine-tuning run; leave --head out")
    model = load_model(source)
    if path.is_dir() and model.file is not None:
        source = model.file.parent
    averaged = " (averaged weights)" if Path(source, "train_model.safetensors").is_file() else ""
    say(f"checkpoint {source}{averaged}")
    return model


def _within(differences: dict[str, float], source: str | Path) -> dict[str, float]:
    for name, value in differences.items():
        if not value <= TOLERANCE:  # NaN is none either
            raise UserError(
                f"{source}: the export's {name} differ by {value:.1e} from the model's, more than "
                f"{TOLERANCE:.0e}; nothing is written, please report this model"
            )
    return differences


def _note(
    folder: Path, kind: str, source: str | Path, head: str | None, differences: dict[str, float]
) -> None:
    """Complete ``export.json``: the format, what it was made of, the largest differences."""
    path = folder / NOTE
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    document = {"format": kind, "source": str(source), "head": head, "diptych": version("diptych")}
    text = json.dumps(document | {"largest_differences": differences} | known, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
