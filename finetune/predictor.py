"""Predictions of a fine-tuned run: ``Predictor.load(run).predict(table)``.

Tables are files, pandas data frames, pyarrow tables, dicts of columns or lists of rows. A modality may be
missing in some rows, or in all of them by leaving out its column.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.errors import UserError
from ..pretrain.model import LoadedModel
from .adapt import logits_of
from .cells import PictureFolder
from .config import LabelledDataConfig, ModalityConfig
from .features import Progress, extract, silent
from .manifest import Columns, Rows, parse_rows, read_columns
from .saved import SavedHead, open_encoder, read_head, read_json
from .tasks import Floats, Task, predicted

__all__ = ["Predictor"]


class Predictor:
    """A fine-tuned head with its encoders, all seeds averaged."""

    def __init__(
        self, run: Path, info: Mapping[str, Any], name: str, saved: list[SavedHead], device: torch.device
    ) -> None:
        self.run = run
        self.head = name
        """Name of the head."""
        self.task = Task(info["task"], tuple(info["classes"]))
        self.classes: list[str] = list(info["classes"])
        """Class names in the order of ``predict_proba``'s columns."""
        self.modalities: dict[str, str] = dict(info["modalities"])
        """Column per modality."""
        self._info, self._saved, self._device = info, saved, device
        self._models: dict[Path, LoadedModel] = {}

    @classmethod
    def load(cls, run: str | Path, *, head: str | None = None, device: str = "auto") -> "Predictor":
        """Open a run folder; ``head`` is one of its heads (default: the one that the inner rows chose).

        Raises UserError if the folder is no finished fine-tuning run or has no such head.
        """
        run = Path(run)
        if not (run / "run.json").is_file():
            raise UserError(
                f"{run} is no finished fine-tuning run (no run.json); give a folder of diptych finetune"
            )
        info = read_json(run / "run.json")
        name = head or info["best"]
        if name not in info["heads"]:
            raise UserError(f"{run} has no head '{name}'; it has {', '.join(info['heads'])}")
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        outputs = Task(info["task"], tuple(info["classes"])).outputs
        saved = read_head(run / "heads" / name, info["widths"], info["token_widths"], outputs)
        return cls(run, info, name, saved, torch.device(place))

    def predict(self, table: Any, **options: Any) -> list[str]:
        """The most probable class of every row; see ``predict_proba`` for what may be given."""
        return [self.classes[c] for c in predicted(self.predict_proba(table, **options))]

    def predict_proba(
        self,
        table: Any,
        *,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> Floats:
        """Probabilities float64 [n, C] of the rows of a table: a path (CSV, TSV, JSONL, Parquet), a data
        frame, a dict of columns or a list of rows.

        Image cells are paths (relative to the file's folder, else to the current one; never outside it, or
        outside ``root``), bytes, ``FOLDER#KEY`` or PIL images. Raises UserError for a picture that cannot be
        read and for a row without any modality.
        """
        rows = self._rows(table, root)
        return self.of_rows(rows, progress=progress)

    def of_rows(self, rows: Rows, *, progress: Progress = silent) -> Floats:
        """Probabilities of parsed rows."""
        parts: list[Floats] = []
        shared = None
        for one in self._saved:
            if one.encoder is None:
                if shared is None:
                    shared = self._features(self.run / "encoder", rows, one, progress)
                source = shared
            else:
                source = self._features(one.encoder, rows, one, progress)
            head = one.head.to(self._device)
            parts.append(self.task.probabilities(one.calibrated(logits_of(head, source))))
        return np.mean(parts, axis=0)

    def _features(self, encoder: Path, rows: Rows, one: SavedHead, progress: Progress) -> Any:
        if encoder not in self._models:
            self._models[encoder] = open_encoder(encoder, self._device)
        features, broken = extract(
            self._models[encoder],
            rows,
            tokens=one.head.reads_tokens,
            max_pixels=int(self._info["max_pixels"]),
            progress=progress,
        )
        if broken:
            first = min(broken)
            raise UserError(
                f"{rows.source}: row {first + 1}: image {rows.images[first]} cannot be read: "
                f"{broken[first]}; mend it or empty the cell"
            )
        return features.to(self._device)

    def read(self, path: str | Path, root: str | Path | None = None) -> tuple[Columns, Rows]:
        """All columns of a table file, and its parsed rows."""
        path = Path(path)
        columns = read_columns(path)
        return columns, self._parse(
            columns, PictureFolder(path.parent, Path(root) if root else None), str(path)
        )

    def _rows(self, table: Any, root: str | Path | None) -> Rows:
        if isinstance(table, str | Path):
            return self.read(table, root)[1]
        folder = PictureFolder(Path(root) if root is not None else Path.cwd())
        return self._parse(_columns(table), folder, "the table")

    def _parse(self, columns: Columns, folder: PictureFolder, source: str) -> Rows:
        modalities: Any = {k: ModalityConfig(column=c) for k, c in self.modalities.items()}
        config = LabelledDataConfig(manifest=source, modalities=modalities, id=self._info["id"])
        return parse_rows(columns, config, folder, source=source, target=None)


def _columns(table: Any) -> Columns:
    """Columns of a data frame, an arrow table, a dict of columns or a list of rows."""
    if hasattr(table, "to_pydict"):  # pyarrow
        return table.to_pydict()
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas
        return {str(k): list(v) for k, v in table.to_dict("list").items()}
    if isinstance(table, Mapping):
        columns = {str(k): list(v) for k, v in table.items()}
        if len({len(v) for v in columns.values()}) > 1:
            raise UserError("the table's columns have different lengths; give one cell per row")
        return columns
    if isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        names = dict.fromkeys(str(name) for row in table for name in row)
        return {name: [row.get(name) for row in table] for name in names}
    raise UserError(
        "a table must be a path, a data frame, a dict of columns or a list of rows, not "
        f"{type(table).__name__}"
    )
