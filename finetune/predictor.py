"""Predictions of a fine-tuned run: ``Predictor.load(run).predict(table)``.

Tables are files, pandas data frames, pyarrow tables, dicts of columns or lists of rows. A modality may be
missing in some rows, or in all of them by leaving out its column.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..configs.documents import as_written
from ..configs.errors import UserError
from ..pretrain.model import Encoders
from ..pretrain.retrieval import top_k
from .adapt.presence import Shown, has_weights, logits_under, weights_of
from .config import LabelledDataConfig, ModalityConfig
from .encoders.columns import ColumnState, column_features, read_states
from .encoders.features import FeatureRows, Progress, extract, silent
from .explain.relevance import Member, Relevance, relevance_of
from .explain.shapley import Explanation, coalitions, explained_class, shapley, values_of
from .runs.saved import SavedHead, device_of, head_folder, open_encoder, read_head, read_json
from .scores.scored import score_table
from .tables.cells import PictureFolder
from .tables.files import Columns, columns_of
from .tables.manifest import Rows, parse_rows
from .tables.sources import Form, read_source
from .tasks.task import Floats, Task
from .tasks.thresholds import decided
from .tasks.vectors import halves

__all__ = ["Predictor"]

BATCH = 4096


class Predictor:
    """A fine-tuned head with its encoders, all seeds averaged."""

    def __init__(
        self,
        run: Path,
        info: Mapping[str, Any],
        name: str,
        saved: list[SavedHead],
        device: torch.device,
        states: Mapping[str, ColumnState] | None = None,
    ) -> None:
        self.run = run
        self.head = name
        """Name of the head."""
        self.task = Task(info["task"], tuple(info["classes"]))
        self.separator: str | None = info.get("separator")
        """What stood between the labels of the training table's cells (multilabel), if they were text."""
        self.classes: list[str] = list(info["classes"])
        """Class names in the order of ``predict_proba``'s columns."""
        self.modalities: dict[str, ModalityConfig] = declared_in(info["modalities"])
        """The modalities and their columns."""
        self.states = dict(states or {})
        """How cells of modalities without encoder become vectors."""
        self.has_weights = has_weights(saved[0].head)
        """Whether the head weighs its modalities."""
        self.max_pixels = int(info["max_pixels"])
        """Pictures with more pixels are not decoded."""
        self.thresholds: list[float] = info.get("thresholds", {}).get(name, [0.5] * len(self.classes[-1:]))
        """From which probability on the positive class, or each label, is predicted; none for other tasks."""
        self._columns = LabelledDataConfig(manifest="", modalities=self.modalities, id=info["id"])
        self._info, self._saved, self._device = info, saved, device
        self._models: dict[Path, Encoders] = {}

    @classmethod
    def load(cls, run: str | Path, *, head: str | None = None, device: str = "auto") -> "Predictor":
        """Open a run folder; ``head`` is one of its heads (default: the one that the inner rows chose).

        Raises UserError if the folder is no finished fine-tuning run, has no such head or no such device.
        """
        run = Path(run)
        if not (run / "run.json").is_file():
            raise UserError(
                f"{run} is no finished fine-tuning run (no run.json); give a folder of diptych finetune"
            )
        with as_written(run / "run.json", "make the run again"):
            return cls._open(run, head, device_of(device))

    @classmethod
    def _open(cls, run: Path, head: str | None, place: torch.device) -> "Predictor":
        info = read_json(run / "run.json")
        name = head or info["best"]
        if name not in info["heads"]:
            raise UserError(f"{run} has no head '{name}'; it has {', '.join(info['heads'])}")
        task, folder = Task(info["task"], tuple(info["classes"])), head_folder(run, name)
        key = info.get("keys", {}).get(name)
        if key is not None and read_json(folder / "head.json").get("key") != key:
            raise UserError(
                f"{run}: head '{name}' was trained again by a run that did not finish; let diptych finetune "
                "finish it"
            )
        saved = read_head(folder, info["widths"], info["token_widths"], task, info.get("pooled", ()))
        states = read_states(read_json(folder / "head.json").get("columns", {}))
        return cls(run, info, name, saved, place, states)

    @property
    def saved(self) -> list[SavedHead]:
        """The head of every seed."""
        return list(self._saved)

    def read_fold(self, folder: Path) -> list[SavedHead]:
        """A head of this run's task that is kept in another folder, as those of folds are."""
        info, columns = self._info, read_json(folder / "head.json").get("columns", {})
        widths = info["widths"] | {k: state.width for k, state in read_states(columns).items()}
        return read_head(folder, widths, info["token_widths"], self.task, info.get("pooled", ()))

    @property
    def encoders(self) -> list[Path]:
        """The folder of the encoders of every seed: its own where they were trained, else the run's."""
        return [one.encoder or self.run / "encoder" for one in self._saved]

    def export(self, kind: str, path: str | Path, *, force: bool = False) -> dict[str, float]:
        """Write the model to the folder ``path``: ``open_clip``, ``hf`` (its encoders), ``torch_export``
        or ``onnx`` (all of it); see ``export.formats``. Returns the largest differences that were found."""
        from .export.formats import export

        return export(self.run, kind, path, head=self.head, force=force)

    def predict(
        self,
        table: Any,
        *,
        format: Form | None = None,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> list[Any]:
        """The answer for every row: the most probable class; of ordered classes the one that holds the
        middle of the probabilities; of two classes the positive one, and for multilabel a list of the labels,
        from their ``thresholds`` on; for regression a float in the target's unit; for retrieval the
        cosine of the row's picture and text, NaN where one is missing. See ``predict_proba`` for what may be
        given."""
        return self.named(self.of_rows(self._rows(table, root, format), progress=progress))

    def named(self, p: Floats) -> list[Any]:
        """What is predicted of answers [n, C], see ``predict``."""
        return self.task.named(self._said(p))

    def _said(self, p: Floats) -> Floats:
        return decided(self.task, p, self.thresholds)

    def predict_proba(
        self,
        table: Any,
        *,
        format: Form | None = None,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> Floats:
        """Probabilities float64 [n, C] of the rows of a table: a path (CSV, TSV, JSONL, Parquet, a tar, or a
        folder that ``format`` says to be of ``shards`` or ``folders``), a data frame, a dict of columns or a
        list of rows. Of multilabel tasks each column is one label's.

        Image cells are paths (relative to the file's folder, else to the current one; never outside it, or
        outside ``root``), bytes, ``FOLDER#KEY`` or PIL images. Raises UserError for a picture that cannot be
        read, for a row without any modality, and for regression, which has no probabilities.
        """
        if self.task.type in ("regression", "retrieval"):
            raise UserError(f"{self.run}: {self.task.type} has no probabilities; use predict")
        rows = self._rows(table, root, format)
        return self.of_rows(rows, progress=progress)

    def explain(
        self,
        table: Any,
        *,
        of: str | None = None,
        format: Form | None = None,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> list[dict[str, float]]:
        """Per row what each modality contributed to the answer, exact Shapley values (``shapley.py``): of
        the log odds of the predicted class (multilabel: the most probable label), or of the class ``of``; for
        regression of the number, in the target's unit.

        They sum to the value for the row as it is less the value for nothing. See ``predict_proba`` for what
        may be given; UserError also for an unknown class.
        """
        return self.explain_rows(self._rows(table, root, format), of=of, progress=progress)[1].rows()

    def explain_rows(
        self, rows: Rows, *, of: str | None = None, progress: Progress = silent
    ) -> tuple[Floats, Explanation]:
        """The answers [n, C] to parsed rows, and contributions to them with the values that they lead from
        and to, and the head's own weights of its modalities where it has them."""
        if self.task.type == "retrieval":
            raise UserError(f"{self.run}: a cosine has no contributions by modality; use predict")
        modalities = tuple(self.modalities)
        sets = coalitions(modalities)
        shown = [{k: np.full(len(rows), k in some) for k in modalities} for some in sets]
        answers, weights = self._answers(rows, shown, progress, weights=True)
        # of labels the most probable is explained, of two classes the one that is predicted
        known = answers[-1] if self.task.type == "multilabel" else self._said(answers[-1])
        classes = explained_class(self.task, known, of)
        values = {some: values_of(p, classes) for some, p in zip(sets, answers, strict=True)}
        named = None if classes is None else [self.task.classes[c] for c in classes]
        phi = shapley(values, modalities)
        ends = values[sets[0]], values[sets[-1]]
        return answers[-1], Explanation(modalities, phi, *ends, named, weights)

    def relevance(
        self,
        table: Any,
        *,
        of: str | None = None,
        format: Form | None = None,
        root: str | Path | None = None,
    ) -> list[Relevance]:
        """Per row which patches of the picture and which words the answer rests on (attention times gradient,
        see ``relevance``), of what ``explain`` explains. Towers without attention tell nothing, and why. See
        ``predict_proba`` for what may be given; UserError also for an unknown class.
        """
        if self.task.type == "retrieval":
            raise UserError(f"{self.run}: a cosine has no relevance of patches and words; use predict")
        rows = self._rows(table, root, format)
        p = self.of_rows(rows)
        known = p if self.task.type == "multilabel" else self._said(p)
        classes = explained_class(self.task, known, of)
        members = [
            Member(one, self.model(place), self.states)
            for one, place in zip(self._saved, self.encoders, strict=True)
        ]
        return relevance_of(members, self.task, rows, classes, max_pixels=self.max_pixels)

    def weights_of(self, rows: Rows) -> Floats | None:
        """The head's own weights of its modalities [n, M], the mean over seeds; None if it has none."""
        return self._answers(rows, [{}], silent, weights=True)[1]

    def embed(
        self,
        table: Any,
        *,
        format: Form | None = None,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, NDArray[np.float32]]:
        """Embeddings float32 [n, D] per modality, of a dual encoder of length 1; NaN in rows where it is
        missing.

        Of heads that were trained with their encoders those of the first seed's: encoders of different seeds
        have no common space. Of retrieval tasks what is compared instead: their inner product is the mean
        over seeds of the cosines. See ``predict_proba`` for what may be given.
        """
        rows = self._rows(table, root, format)
        if self.task.type == "retrieval":
            return self._vectors(rows, progress)
        features = self._features(self._saved[0].encoder or self.run / "encoder", rows, None, progress)
        made: dict[str, NDArray[np.float32]] = {}
        for k, index in features.index.items():
            items = index.cpu().numpy()
            made[k] = np.full((len(items), features.tables[k].shape[1]), np.nan, dtype=np.float32)
            made[k][items >= 0] = features.tables[k].cpu().numpy()[items[items >= 0]]
        return made

    def _vectors(self, rows: Rows, progress: Progress) -> dict[str, NDArray[np.float32]]:
        made: dict[str, NDArray[np.float32]] = {}
        for k, half in zip(("image", "text"), halves(self.of_rows(rows, progress=progress)), strict=True):
            missing = ~half.any(axis=1, keepdims=True)
            made[k] = np.where(missing, np.nan, half).astype(np.float32)
        return made

    def search(
        self,
        queries: Any,
        gallery: Any,
        *,
        k: int = 10,
        root: str | Path | None = None,
        progress: Progress = silent,
    ) -> tuple[NDArray[np.int64], Floats]:
        """The k best rows of a gallery for each query of a retrieval task, best first: row numbers int64 and
        cosines float64, [q, k] each. Rows of one have pictures alone and of the other texts alone; see
        ``predict_proba`` for what may be given.

        Raises UserError for another task, and for tables of which it is not plain what is searched for.
        """
        if self.task.type != "retrieval":
            raise UserError(f"{self.run} has no vectors to search by; fine-tune with task.type: retrieval")
        found = [self.embed(table, root=root, progress=progress) for table in (queries, gallery)]
        has = [{k: ~np.isnan(v).any(axis=1) for k, v in one.items()} for one in found]
        for source, aim in (("image", "text"), ("text", "image")):
            whole = has[0][source].all() and has[1][aim].all()
            if whole and not has[0][aim].any() and not has[1][source].any():
                values, places = top_k(found[0][source], found[1][aim], k)
                return places, values
        raise UserError(
            "search: give queries of pictures alone and a gallery of texts alone, or the other way round"
        )

    def evaluate(
        self,
        table: Any,
        *,
        format: Form | None = None,
        root: str | Path | None = None,
        samples: int | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """The run's metrics, with 95 % intervals, on a labelled table: ``head``, ``n``, ``n_groups`` and
        ``metrics``, ``{name: {value, low, high}}`` with None for what is undefined.

        The table has the run's target column. Intervals resample the run's groups where the table has their
        column, else rows; ``samples``: how often (default: as in the run). UserError also for labels that the
        run does not know.
        """
        if isinstance(table, str | Path):
            columns, rows = self.read(table, root, format)
        else:
            columns, rows = columns_of(table), self._rows(table, root, format)
        p = self.of_rows(rows, progress=progress)
        info = dict(self._info) if samples is None else dict(self._info) | {"bootstrap": samples}
        return {"head": self.head} | score_table(self.task, info, columns, rows, p, self._said(p))

    def of_rows(self, rows: Rows, *, progress: Progress = silent) -> Floats:
        """Probabilities of parsed rows; for regression the answers [n, 1]."""
        return self._answers(rows, [{}], progress)[0][0]

    def _answers(
        self, rows: Rows, shown: Sequence[Shown], progress: Progress, *, weights: bool = False
    ) -> tuple[list[Floats], Floats | None]:
        """Answers [n, C] for each way of hiding modalities, averaged over seeds, and likewise the weights
        [n, M] where they are wanted and the head has some."""
        parts: list[list[Floats]] = [[] for _ in shown]
        weighed: list[Floats] = []
        shared = None
        for one in self._saved:
            if one.encoder is None:
                if shared is None:
                    shared = self._features(self.run / "encoder", rows, one, progress)
                source = shared
            else:
                source = self._features(one.encoder, rows, one, progress)
            head = one.head.to(self._device)
            logits = logits_under(head, source, shown, batch_size=BATCH)
            for found, own in zip(parts, logits, strict=True):
                found.append(self.task.probabilities(one.calibrated(own)))
            if weights and self.has_weights:
                weighed.append(weights_of(head, source, batch_size=BATCH))
        answers = [self.task.averaged(found) for found in parts]
        return answers, np.mean(weighed, axis=0) if weighed else None

    def model(self, encoder: Path) -> Encoders:
        """The encoders in one of the folders ``encoders``, opened once."""
        if encoder not in self._models:
            self._models[encoder] = open_encoder(encoder, self._device)
        return self._models[encoder]

    def _features(self, encoder: Path, rows: Rows, one: SavedHead | None, progress: Progress) -> FeatureRows:
        features, broken = extract(
            self.model(encoder),
            rows,
            tokens=one is not None and one.head.reads_tokens,
            inputs=one is not None and one.head.reads_inputs,
            max_pixels=self.max_pixels,
            progress=progress,
        )
        if broken:
            first = min(broken)
            picture, reason = broken[first]
            raise UserError(
                f"{rows.source}: row {rows.first + first + 1}: image {picture} cannot be read: {reason}; "
                "mend it or empty the cell"
            )
        return features.beside(column_features(rows, self.states)).to(self._device)

    def read(
        self, path: str | Path, root: str | Path | None = None, format: Form | None = None
    ) -> tuple[Columns, Rows]:
        """All columns of a table file, shards or folders, and their parsed rows."""
        table = read_source(path, format)
        if table.damaged:
            raise UserError(f"{table.damaged[0]}; mend it or remove it")
        folder = PictureFolder(table.folder, Path(root) if root else None)
        return table.columns, self.parse(table.columns, folder, table.name)

    def _rows(self, table: Any, root: str | Path | None, format: Form | None = None) -> Rows:
        if isinstance(table, str | Path):
            return self.read(table, root, format)[1]
        folder = PictureFolder(Path(root) if root is not None else Path.cwd())
        return self.parse(columns_of(table), folder, "the table")

    def parse(self, columns: Columns, folder: PictureFolder, source: str, first: int = 0) -> Rows:
        """Rows of columns, or of a chunk of them with ``first`` rows before it."""
        config = self._columns.model_copy(update={"manifest": source})
        return parse_rows(columns, config, folder, source=source, target=None, first=first)


def declared_in(modalities: Mapping[str, Any]) -> dict[str, ModalityConfig]:
    """The modalities of run.json; earlier runs name the column of each alone."""
    given = {k: {"column": m} if isinstance(m, str) else m for k, m in modalities.items()}
    return {k: ModalityConfig.model_validate_json(json.dumps(m)) for k, m in given.items()}
