"""What is wrong with a labelled table before anything is trained: ``diptych finetune CONFIG --validate``.

Findings that make scores dishonest, or that would stop the run, fail; the others are notes. Pictures are
compared by the sha256 of their bytes and texts by their words: two encodings of one picture pass for two.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..configs.errors import UserError
from ..data.canonical import canonical_caption
from .adapt.matching import with_negatives
from .config import FinetuneConfig
from .config.search import encoder_cost, import_optuna, trainings
from .encoders.features import Progress, silent
from .encoders.unimodal import open_source
from .session import data_config, plan, too_many
from .splits.checks import Planned, faults
from .splits.folds import strata_of
from .tables.cells import BrokenPicture, Picture, PictureReader
from .tables.links import PICTURE, TEXT, linked
from .tables.manifest import Rows, Splits, parse_rows, read_manifest
from .tasks.targets import encode_targets
from .tasks.task import Ints

__all__ = ["Finding", "same_words", "validate"]

Json = dict[str, Any]
EXAMPLES = 5
CONTENT = {"different pictures": PICTURE, "different texts": TEXT}
TEXT_BATCH = 1024
Contents = Sequence[tuple[Hashable, ...]]
"""Of every row what it shows, by which it is compared with others."""
MISSING_GAP = 0.1  # shares of a missing modality that differ by more than this are worth a note


@dataclass(frozen=True)
class Finding:
    """One thing that was found: ``fails`` if scores would not be honest or the run would stop; ``examples``
    are ids of rows."""

    kind: str
    fails: bool
    text: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Rows that are scored, ``test``, and all rows that are known by then, ``known``."""

    name: str
    test: Ints
    known: Ints


def validate(config: FinetuneConfig, *, progress: Progress = silent) -> Json:
    """Look a config's table over.

    Returns plain values for JSON: ``rows``, ``groups``, ``parts`` (splits or folds with label counts and
    shares of missing modalities), ``leakage``, ``truncated``, ``findings``, and whether it is ``clean``, that
    is, none of these fails; of a config with a search also ``trainings``, how many it makes.
    Raises UserError for a table that cannot be read at all.
    """
    findings: list[Finding] = []
    rows = _read(config, findings)
    whole = Splits(np.arange(len(rows)), np.arange(0), np.arange(0))
    targets, classes = encode_targets(rows, config.task, whole, min_rows=0)
    histogram = _histogram(targets, classes)
    planned = _plan(config, rows, findings)
    parts = _named(config, planned)
    shown = _shown(config, parts, len(rows))
    _small_classes(config, rows, parts, targets, classes, findings)
    contents: dict[str, Contents] = {"group": [(group,) for group in rows.groups]}
    broken: list[int] = []
    if "image" in rows.modalities:
        contents["image"], broken = _pictures(config, rows, findings, progress)
    _faults(config, rows, planned, broken, findings)
    if "text" in rows.modalities:
        texts = rows.cells["text"]
        contents["text"] = [() if text is None else (same_words(text),) for text in texts]
    leakage = _leakage(config, rows, _tests(config, parts), contents, targets, findings)
    report: Json = {
        "table": rows.source,
        "rows": len(rows),
        "groups": len(set(rows.groups)),
        "parts": [_part(rows, name, chosen, histogram) for name, chosen in shown],
        "leakage": leakage,
    }
    if config.search is not None:
        report["trainings"] = _search(config, planned, findings)
    _missing(report["parts"], findings)
    if "text" in rows.modalities:
        report["truncated"] = _truncated(config, rows, findings)
    findings.sort(key=lambda finding: not finding.fails)
    clean = not any(finding.fails for finding in findings)
    return report | {"findings": [asdict(finding) for finding in findings], "clean": clean}


def same_words(text: str) -> str:
    """What two texts that differ in case, space or punctuation alone have in common."""
    canonical = canonical_caption(text)
    return re.sub(r"[\W_]+", " ", canonical).strip() or canonical


def _read(config: FinetuneConfig, findings: list[Finding]) -> Rows:
    """The rows, also of a table with repeated ids or groups in several splits, which a run refuses."""
    table, folder = read_manifest(config.data)
    columns = table.columns
    data = data_config(config).model_copy(update={"group_across_splits": "allow"})
    ids = [str(cell) for cell in columns.get(data.id, [])] if data.id else []
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        data = data.model_copy(update={"id": None})
        text = f"{len(repeated)} ids of column '{config.data.id}' stand on several rows; make them unique"
        findings.append(Finding("duplicate_id", True, text, tuple(repeated[:EXAMPLES])))
    rows = parse_rows(columns, data, folder, source=table.name, target=config.task.columns)
    rows = replace(rows, damaged=tuple(table.damaged))
    if rows.damaged:
        fails = too_many(len(rows) + len(rows.damaged), len(rows.damaged)) or data.on_error == "raise"
        text = (
            f"{len(rows.damaged)} samples cannot be read, the first: {rows.damaged[0]}; mend or remove them"
        )
        findings.append(Finding("damaged_sample", fails, text, tuple(d.key for d in rows.damaged[:EXAMPLES])))
    return linked(replace(rows, ids=ids) if repeated else rows, config.task, data)


Plan = list[tuple[str, Splits]]


def _plan(config: FinetuneConfig, rows: Rows, findings: list[Finding]) -> list[Planned]:
    """The parts of the run; none if they cannot be made."""
    try:
        return plan(config, rows)
    except UserError as error:
        findings.append(Finding("folds", True, str(error)))
        return []


def _named(config: FinetuneConfig, planned: Sequence[Planned]) -> Plan:
    """The parts that are tested, with their names."""
    if config.eval.folds is None:
        return [("", splits) for _, splits in planned]
    return [(f"repeat {f.repeat}, fold {f.fold}", splits) for f, splits in planned if f is not None]


def _faults(
    config: FinetuneConfig,
    rows: Rows,
    planned: Sequence[Planned],
    broken: Sequence[int],
    findings: list[Finding],
) -> None:
    """What the run would refuse; a small class, which is told already, is not told twice."""
    small = any(finding.kind == "small_class" and finding.fails for finding in findings)
    try:
        rows, planned = with_negatives(config, rows, planned)
    except UserError as error:
        findings.append(Finding("negatives", True, str(error)))
        return
    for kind, text in faults(config, rows, planned, broken).items():
        if not (small and kind == "targets"):
            findings.append(Finding(kind, True, text))


def _search(config: FinetuneConfig, planned: Sequence[Planned], findings: list[Finding]) -> str:
    """How many trainings a search makes of the run, in words; notes what it costs to train encoders."""
    try:
        import_optuna()
    except UserError as error:
        findings.append(Finding("search", True, str(error)))
    cost = encoder_cost(config, len(planned[-1][1].train)) if planned else None
    if cost is not None:
        findings.append(Finding("search", False, cost))
    return trainings(config)


def _shown(config: FinetuneConfig, parts: Plan, n: int) -> list[tuple[str, Ints]]:
    """The parts whose rows are counted: train, inner and test, or the folds."""
    if not parts:
        return [("all rows", np.arange(n))]
    if config.eval.folds is not None:
        return [(name, splits.test) for name, splits in parts]
    return [(name, getattr(parts[0][1], name)) for name in ("train", "inner", "test")]


def _tests(config: FinetuneConfig, parts: Plan) -> list[Part]:
    tests = [Part(name or "test", s.test, np.concatenate([s.train, s.inner])) for name, s in parts]
    if config.eval.folds is None and parts:
        tests.append(Part("inner", parts[0][1].inner, parts[0][1].train))
    return tests


def _histogram(targets: Any, classes: Sequence[str]) -> Callable[[Ints], Json]:
    """How the labels of some rows are counted: per class, or for numbers their range."""
    if strata_of(targets) is not None:
        return lambda rows: dict(
            zip(classes, np.bincount(targets[rows], minlength=len(classes)).tolist(), strict=True)
        )
    if targets.ndim == 2 and not classes:  # pairs
        return lambda rows: {name: len(np.unique(targets[rows, column])) for name, column in CONTENT.items()}
    if targets.ndim == 2:
        return lambda rows: dict(zip(classes, (targets[rows] > 0.5).sum(axis=0).tolist(), strict=True))

    def numbers(rows: Ints) -> Json:
        some = targets[rows]
        return {"min": float(some.min()), "mean": float(some.mean()), "max": float(some.max())}

    return numbers


def _part(rows: Rows, name: str, chosen: Ints, histogram: Callable[[Ints], Json]) -> Json:
    missing = {k: float(np.mean([cells[i] is None for i in chosen])) for k, cells in rows.cells.items()}
    return {
        "name": name,
        "rows": len(chosen),
        "groups": len({rows.groups[i] for i in chosen}),
        "labels": histogram(chosen),
        "missing": missing,
    }


def _small_classes(
    config: FinetuneConfig,
    rows: Rows,
    parts: Plan,
    targets: Any,
    classes: Sequence[str],
    findings: list[Finding],
) -> None:
    """Classes without enough training rows in some fold, and those that some fold cannot test."""
    if strata_of(targets) is None or config.task.of_pairs:
        return
    needed, cv = config.data.min_class_rows, config.eval.folds
    dealt = {int(i) for _, s in parts for i in (*s.train, *s.inner, *s.test)}
    for number, name in enumerate(classes):
        counts = [int((targets[splits.train] == number).sum()) for _, splits in parts]
        groups = {rows.groups[i] for i in np.flatnonzero(targets == number) if not parts or i in dealt}
        if counts and min(counts) < needed:
            where = parts[int(np.argmin(counts))][0]
            text = (
                f"class '{name}' has {min(counts)} training rows{f' in {where}' if where else ''}, needed "
                f"are {needed} (data.min_class_rows); it has {len(groups)} groups: add rows or remove it"
            )
            findings.append(Finding("small_class", True, text))
        elif cv is not None and len(groups) < cv.folds:
            text = f"class '{name}' has {len(groups)} groups for {cv.folds} folds: some folds do not test it"
            findings.append(Finding("small_class", False, text))


def _pictures(
    config: FinetuneConfig, rows: Rows, findings: list[Finding], progress: Progress
) -> tuple[Contents, list[int]]:
    """sha256 of every row's pictures that can be read, and the rows that have others."""
    reader, found = PictureReader(), dict[Picture, str | None]()
    cells: list[tuple[Picture, ...]] = [cell or () for cell in rows.cells["image"]]
    distinct = list(dict.fromkeys(picture for cell in cells for picture in cell))
    with progress("reading pictures", len(distinct)) as advance:
        for picture in distinct:
            try:
                found[picture] = reader.fingerprint(picture)
            except BrokenPicture:
                found[picture] = None
            advance(1)
    broken = [i for i, cell in enumerate(cells) if any(found[picture] is None for picture in cell)]
    if broken:
        many = too_many(len(rows) + len(rows.damaged), len(rows.damaged) + len(broken))
        text = f"{len(broken)} rows name a picture that cannot be read; mend them or empty the cells"
        fails = many or config.data.on_error == "raise"
        findings.append(Finding("broken_picture", fails, text, _ids(rows, broken)))
    read = [tuple(dict.fromkeys(sha for picture in cell if (sha := found[picture]))) for cell in cells]
    return list(read), broken


def _ids(rows: Rows, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(rows.ids[i] for i in numbers[:EXAMPLES])


def _leakage(
    config: FinetuneConfig,
    rows: Rows,
    tests: Sequence[Part],
    contents: Mapping[str, Contents],
    targets: Any,
    findings: list[Finding],
) -> list[Json]:
    """Content of test rows that is known from training, per kind and part, and what that means."""
    leakage: list[Json] = []
    for kind, content in contents.items():
        shared: dict[bool, set[int]] = {True: set(), False: set()}  # by whether the part is tested or inner
        answered = set[int]()
        for part in tests:
            found, told = _shared(content, part, targets)
            if found:
                entry = {"kind": kind, "part": part.name, "rows": len(found), "of": len(part.test)}
                leakage.append(entry | {"answered": len(told)})
            shared[part.name != "inner"] |= set(found)
            answered |= set(told) if part.name != "inner" else set()
        if shared[True]:
            findings.append(_leak(config, rows, kind, sorted(shared[True]), sorted(answered)))
        if shared[False]:
            text = (
                f"{len(shared[False])} inner rows share their {kind} with training rows: stopping and choice"
            )
            text += " are too hopeful, test scores are not"
            findings.append(Finding(f"{kind}_leak", False, text, _ids(rows, sorted(shared[False]))))
    return leakage


def _shared(content: Contents, part: Part, targets: Any) -> tuple[list[int], list[int]]:
    """Test rows of whose content something is known, and those of them that memory alone answers: all known
    rows with it have their label."""
    labels: dict[Hashable, set[Any]] = defaultdict(set)
    answers = [tuple(np.ravel(target).tolist()) for target in targets]
    for i in part.known:
        for one in content[i]:
            labels[one].add(answers[i])
    found = [int(i) for i in part.test if any(one in labels for one in content[i])]
    told = [i for i in found if any(labels.get(one) == {answers[i]} for one in content[i])]
    return found, told


def _leak(
    config: FinetuneConfig, rows: Rows, kind: str, found: Sequence[int], answered: Sequence[int]
) -> Finding:
    """What shared content means. A shared text fails only where training rows give it one label, the right
    one: a text that stands beside several labels answers nothing by itself."""
    allowed = config.eval.folds is None and config.data.group_across_splits == "allow"
    what = f"{len(found)} test rows share their {kind} with rows that train"
    if kind == "group":
        text = f"{what}; keep groups whole" + (" (allowed by data.group_across_splits)" if allowed else "")
        return Finding("group_leak", not allowed, text, _ids(rows, found))
    if kind == "image":
        text = f"{what}; give rows of one picture one group (data.group) or remove copies"
        return Finding("image_leak", True, text, _ids(rows, found))
    text = f"{what}, {len(answered)} of them always beside their own label"
    if answered and not allowed:
        text += "; give such rows one group (data.group) or remove them"
    return Finding("text_leak", bool(answered) and not allowed, text, _ids(rows, answered or found))


def _missing(parts: Sequence[Json], findings: list[Finding]) -> None:
    """A note where a modality is missing much more often in one part than in another."""
    for k in parts[0]["missing"]:
        shares = {part["name"]: part["missing"][k] for part in parts}
        least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        if shares[most] - shares[least] > MISSING_GAP:
            text = f"{k} is missing in {shares[most]:.0%} of {most} and {shares[least]:.0%} of {least}"
            findings.append(Finding("missing", False, text))


def _truncated(config: FinetuneConfig, rows: Rows, findings: list[Finding]) -> Json:
    """Texts that are longer than the encoder's context."""
    tokenizer = open_source(config.model).tokenizer
    texts = [text for text in rows.cells["text"] if text is not None]
    cut = 0
    for start in range(0, len(texts), TEXT_BATCH):
        tokenizer.pack(texts[start : start + TEXT_BATCH])
        cut += tokenizer.cut
    length = tokenizer.context_length
    if cut:
        text = f"{cut} of {len(texts)} texts are longer than the {length} tokens that the encoder reads"
        findings.append(Finding("truncated", False, f"{text}; their ends are not seen"))
    return {"rows": cut, "of": len(texts), "context_length": length}
