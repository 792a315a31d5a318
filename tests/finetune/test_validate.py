"""``diptych finetune --validate``: every kind of fault, planted one at a time in a clean table of squares."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.cli.main import main
from diptych.finetune import heads
from diptych.finetune.validate import same_words

from .labelled import COLUMNS, match_rows, write_config, write_csv, write_task

Rows = list[list[Any]]
ID, IMAGE, TEXT, TARGET, GROUP, SPLIT = range(6)
CV = "eval.cv={folds: 3, repeats: 2}"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and a checkpoint; the tests write their own tables."""
    folder = tmp_path_factory.mktemp("validate")
    write_task(folder)
    write_config(folder, "{late: {op: late}}")
    return folder


def validated(task: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["finetune", str(task / "finetune.yaml"), "--validate", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def found(report: dict[str, Any], *, fails: bool | None = None) -> list[str]:
    return [f["kind"] for f in report["findings"] if fails is None or f["fails"] == fails]


def others(report: dict[str, Any]) -> list[str]:
    """What else was found than that every text of the squares stands in all splits."""
    return [kind for kind in found(report) if kind != "text_leak"]


@pytest.mark.parametrize("words", [(), (CV,)], ids=["fixed", "folds"])
def test_a_clean_table_is_clean_and_counted(
    words: tuple[str, ...], task: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = match_rows(task)
    write_csv(task / "match.csv", rows)
    monkeypatch.delattr(heads, "fit")  # nothing is trained
    code, report = validated(task, capsys, *words)
    assert (code, report["clean"], found(report, fails=True)) == (0, True, [])
    assert (report["rows"], report["groups"]) == (160, 10)
    if not words:
        assert [part["name"] for part in report["parts"]] == ["train", "inner", "test"]
        for part, split in zip(report["parts"], ("train", "val", "test"), strict=True):
            chosen = [row for row in rows if row[SPLIT] == split]
            assert part["rows"] == len(chosen)
            assert part["labels"] == dict(sorted(Counter(str(row[TARGET]) for row in chosen).items()))
            assert part["missing"] == {"image": 0, "text": 0}
    else:
        names = [f"repeat {r}, fold {f}" for r in range(2) for f in range(3)]
        assert [part["name"] for part in report["parts"]] == names
        assert sum(part["rows"] for part in report["parts"]) == 2 * 160
        assert all(part["labels"]["0"] == part["labels"]["1"] for part in report["parts"])
    # every text stands in all splits beside both answers: known, but no answer by itself
    assert {entry["kind"] for entry in report["leakage"]} == {"text"}
    assert all(entry["answered"] == 0 for entry in report["leakage"])
    assert not (task / "run").exists()


def repeat_an_id(rows: Rows) -> None:
    rows[5][ID] = rows[9][ID]


def share_a_picture(rows: Rows) -> None:
    rows[0][IMAGE] = rows[-1][IMAGE]


def copy_a_picture(rows: Rows) -> None:
    """Another file with the same bytes."""
    rows[0][IMAGE] = "images/copy.png"


def share_a_text(rows: Rows) -> None:
    rows[0][TEXT], rows[-1][TEXT], rows[-1][TARGET] = "A Crimson,  square!", "a crimson square", 1


def straddle(rows: Rows) -> None:
    rows[0][GROUP] = rows[-1][GROUP]


def starve_a_class(rows: Rows) -> None:
    for row in rows:
        row[TARGET] = 2 if row[GROUP] == "s9" else row[TARGET]


def break_a_picture(rows: Rows) -> None:
    rows[0][IMAGE] = "images/absent.png"


def with_fault(
    plant: Callable[[Rows], None], task: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, Any]]:
    """What is said of the table of squares with one fault."""
    rows = match_rows(task)
    shutil.copy(task / rows[-1][IMAGE], task / "images" / "copy.png")
    plant(rows)
    write_csv(task / "match.csv", rows)
    more = ("task.type=multiclass",) if plant is starve_a_class else ()
    return validated(task, capsys, *words, *more)


FIXED = [
    (repeat_an_id, "duplicate_id", "1 ids of column 'id' stand on several rows"),
    (share_a_picture, "image_leak", "2 test rows share their image with rows that train"),
    (copy_a_picture, "image_leak", "2 test rows share their image with rows that train"),
    (share_a_text, "text_leak", "1 of them always beside their own label"),
    (straddle, "group_leak", "16 test rows share their group with rows that train"),
    (starve_a_class, "small_class", "class '2' has 0 training rows, needed are 2"),
    (break_a_picture, "broken_picture", "1 rows name a picture that cannot be read"),
]


@pytest.mark.parametrize(("plant", "kind", "said"), FIXED, ids=[plant.__name__ for plant, _, _ in FIXED])
def test_each_fault_between_fixed_splits_is_found_alone(
    plant: Callable[[Rows], None], kind: str, said: str, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = with_fault(plant, task, capsys)
    assert (code, report["clean"]) == (1, False)
    assert found(report, fails=True) == [kind]
    assert said in report["findings"][0]["text"]
    if kind in ("image_leak", "text_leak", "group_leak"):
        [entry] = [e for e in report["leakage"] if e["kind"] == kind[:-5] and e["part"] == "test"]
        assert entry["of"] == 32


CROSSED = [
    (repeat_an_id, "duplicate_id", "1 ids of column 'id' stand on several rows"),
    (copy_a_picture, "image_leak", "share their image with rows that train"),
    (share_a_text, "text_leak", "2 of them always beside their own label"),
    (starve_a_class, "small_class", "class '2' has 0 training rows in repeat 0, fold"),
]


@pytest.mark.parametrize(("plant", "kind", "said"), CROSSED, ids=[plant.__name__ for plant, _, _ in CROSSED])
def test_each_fault_between_folds_is_found_alone(
    plant: Callable[[Rows], None], kind: str, said: str, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = with_fault(plant, task, capsys, CV)
    assert (code, found(report, fails=True)) == (1, [kind])
    assert said in report["findings"][0]["text"]


MULTILABEL = 'task={type: multilabel, separator: "|"}'


def as_labels(rows: Rows) -> None:
    for row in rows:
        row[TARGET] = "ab"[row[TARGET]]


def with_a_label_of_the_test(rows: Rows) -> None:
    as_labels(rows)
    rows[-1][TARGET] = "a|only"


def with_a_label_of_one_row(rows: Rows) -> None:
    as_labels(rows)
    rows[0][TARGET] = "a|rare"


def with_equal_numbers(rows: Rows) -> None:
    for row in rows:
        row[TARGET] = 5 if row[SPLIT] == "train" else row[TARGET]


def weigh_one_group(rows: Rows) -> None:
    for row in rows:
        row.append(int(row[GROUP] == "s0"))


def with_one_class_inside(rows: Rows) -> None:
    rows[:] = [row for row in rows if row[SPLIT] != "val" or row[TARGET] == 1]


def with_one_degree_inside(rows: Rows) -> None:
    for i, row in enumerate(rows):
        row[TARGET] = 1 if row[SPLIT] == "val" else i % 3


def with_one_class_per_group(rows: Rows) -> None:
    for row in rows:
        row[TARGET] = int(row[GROUP] in ("s0", "s1", "s2", "s3"))


def as_they_are(rows: Rows) -> None:
    pass


REGRESSION = "task={type: regression}"
STOPPED = [
    (with_a_label_of_the_test, (MULTILABEL,), "targets", "'only' in column 'target' is no label of the"),
    (with_a_label_of_one_row, (MULTILABEL, CV), "targets", "'rare'"),
    (with_equal_numbers, (REGRESSION,), "targets", "holds one number in all training rows"),
    (as_they_are, ("task.class_weight={2: 3.0}", CV), "class_weight", "'2' is no class of the task (0, 1)"),
    (as_they_are, ("early_stopping.metric=qwk", CV), "early_stopping", "'qwk' is no metric of binary tasks"),
    (
        as_they_are,
        (REGRESSION, "heads={l: {op: late, rule: product}}"),
        "heads",
        "heads.l.rule: product is for tasks of classes",
    ),
    (weigh_one_group, ("data.weight=weight", CV), "weights", "the weights of all training rows are 0"),
    (
        with_one_class_inside,
        (),
        "inner_metric",
        "what the 16 inner rows hold in column 'target' leaves auroc, which stops training, without a "
        "meaning; choose other val rows or early_stopping.metric: loss",
    ),
    (
        with_one_degree_inside,
        ("task={type: ordinal, classes: ['0', '1', '2']}",),
        "inner_metric",
        "leaves qwk, which stops training, without a meaning",
    ),
    (
        with_one_class_per_group,
        (CV,),
        "inner_metric",
        "inner rows of fold 0 of repeat 0 hold in column 'target' leaves auroc, which stops training, "
        "without a meaning; set a larger eval.inner_share or early_stopping.metric: loss",
    ),
]


@pytest.mark.parametrize(("plant", "words", "kind", "said"), STOPPED)
def test_what_would_stop_the_run_is_found_once_and_in_the_runs_words(
    plant: Callable[[Rows], None],
    words: tuple[str, ...],
    kind: str,
    said: str,
    task: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(heads, "fit")  # nothing is trained
    rows = match_rows(task)
    plant(rows)
    write_csv(task / "match.csv", rows, (*COLUMNS, "weight")[: len(rows[0])])
    code, report = validated(task, capsys, *words)
    assert (code, found(report, fails=True)) == (1, [kind])
    text = report["findings"][0]["text"]
    assert said in text
    assert main(["finetune", str(task / "finetune.yaml"), *words]) == 2
    assert text in capsys.readouterr().err
    assert not (task / "run").exists()
    if kind == "inner_metric":
        code, report = validated(task, capsys, *words, "early_stopping={metric: loss}")
        assert (code, found(report, fails=True)) == (0, [])


def test_inner_rows_are_judged_without_those_of_broken_pictures(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(heads, "fit")
    rows = match_rows(task)
    last = next(row for row in rows if row[SPLIT] == "val" and row[TARGET] == 0)
    rows = [row for row in rows if row is last or row[SPLIT] != "val" or row[TARGET] == 1]
    last[IMAGE] = "images/absent.png"
    write_csv(task / "match.csv", rows)
    words = ("data.on_error=quarantine", f"out={tmp_path / 'run'}")
    code, report = validated(task, capsys, *words)
    assert (code, found(report, fails=True)) == (1, ["inner_metric"])
    text = report["findings"][0]["text"]
    assert "what the 16 inner rows hold" in text
    assert main(["finetune", str(task / "finetune.yaml"), *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), (CV,)], ids=["fixed", "folds"])
@pytest.mark.parametrize("kind", [MULTILABEL, REGRESSION], ids=["multilabel", "regression"])
def test_a_shared_text_answers_labels_and_numbers_only_beside_its_own(
    kind: str, words: tuple[str, ...], task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = match_rows(task)
    if kind == MULTILABEL:
        as_labels(rows)
    write_csv(task / "match.csv", rows)  # every text stands beside both answers
    code, report = validated(task, capsys, kind, *words)
    assert (code, found(report, fails=True)) == (0, [])
    rows[0][TEXT] = rows[-1][TEXT] = "a crimson square"
    rows[0][TARGET], rows[-1][TARGET] = ("a", "b") if kind == MULTILABEL else (0.25, 0.75)
    write_csv(task / "match.csv", rows)
    assert validated(task, capsys, kind, *words)[0] == 0
    rows[-1][TARGET] = rows[0][TARGET]
    write_csv(task / "match.csv", rows)
    code, report = validated(task, capsys, kind, *words)
    assert (code, found(report, fails=True)) == (1, ["text_leak"])
    assert f"{2 if words else 1} of them always beside their own label" in report["findings"][0]["text"]


def test_what_is_allowed_or_only_too_hopeful_is_a_note(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = match_rows(task)
    straddle(rows)
    share_a_text(rows)
    write_csv(task / "match.csv", rows)
    code, report = validated(task, capsys, "data.group_across_splits=allow")
    assert code == 0
    assert others(report) == ["group_leak"]
    assert "1 of them always beside their own label" in json.dumps(report)
    rows = match_rows(task)
    inner = next(row for row in rows if row[SPLIT] == "val")
    inner[IMAGE] = rows[0][IMAGE]  # known in training: the inner scores hope too much, the test's do not
    write_csv(task / "match.csv", rows)
    code, report = validated(task, capsys)
    assert (code, others(report)) == (0, ["image_leak"])
    assert "1 inner rows share their image" in json.dumps(report)


def test_missing_modalities_long_texts_and_small_classes_are_noted(
    task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = match_rows(task)
    for row in rows:
        row[TARGET] = "rare" if row[GROUP] in ("s0", "s1") else row[TARGET]
        row[IMAGE] = "" if row[SPLIT] == "test" and row[TARGET] == 1 else row[IMAGE]
    rows[0][TEXT] = "word " * 300
    write_csv(task / "match.csv", rows)
    code, report = validated(task, capsys, "task.type=multiclass")
    assert (code, others(report)) == (0, ["missing", "truncated"])
    assert report["parts"][2]["missing"] == {"image": 0.5, "text": 0}
    assert report["parts"][0]["labels"] == {"0": 32, "1": 32, "rare": 32}
    assert (report["truncated"]["rows"], report["truncated"]["of"]) == (1, 160)
    code, report = validated(task, capsys, "task.type=multiclass", CV, "data.min_class_rows=1")
    assert "small_class" in found(report)
    assert "class 'rare' has 2 groups for 3 folds" in json.dumps(report)


def test_the_console_says_it_in_a_table_and_lines(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = match_rows(task)
    share_a_picture(rows)
    write_csv(task / "match.csv", rows)
    assert main(["finetune", str(task / "finetune.yaml"), "--validate"]) == 1
    printed = capsys.readouterr().out
    assert "160 rows in 10 groups" in printed
    assert "0 48, 1 48" in printed
    assert (
        f"FAILS: 2 test rows share their image with rows that train; give rows of one picture one group "
        f"(data.group) or remove copies (for instance {rows[-2][ID]}, {rows[-1][ID]})" in printed
    )
    assert printed.rstrip().endswith("not clean")
    write_csv(task / "match.csv", match_rows(task))
    assert main(["finetune", str(task / "finetune.yaml"), "--validate"]) == 0
    assert "clean: nothing found that would make scores dishonest" in capsys.readouterr().out
    assert main(["finetune", str(task / "finetune.yaml"), "--validate", "eval.cv={folds: 11}"]) == 1
    assert "FAILS: eval.cv.folds: 11 folds cannot be made of 10 groups" in capsys.readouterr().out
    assert main(["finetune", str(task / "finetune.yaml"), "--json"]) == 2
    assert "--json belongs to --validate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Red  Square", "red square"),
        ("red-square!", "Red, square"),
        ("Cafe\u0301", "caf\u00e9"),
        ("\u2600", "\u2600 "),
    ],
)
def test_texts_of_the_same_words_are_the_same(one: str, other: str) -> None:
    assert same_words(one) == same_words(other) != ""
    assert same_words(one) != same_words(other + " cat")
