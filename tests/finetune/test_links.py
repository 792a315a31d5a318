"""What belongs together in tables of pairs, and pairs that are made not to match."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.finetune.adapt.matching import MatchTraining, derangements, with_negatives
from diptych.finetune.config import FinetuneConfig, LabelledDataConfig, ModalityConfig, TaskConfig
from diptych.finetune.config.head import HeadConfig
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.tables.cells import PictureFolder
from diptych.finetune.tables.links import KEY, PICTURE, TEXT, components, linked
from diptych.finetune.tables.manifest import Rows, Splits, parse_rows
from diptych.finetune.tasks.task import Task
from diptych.finetune.tasks.vectors import pair_loss


def brute_components(columns: Any) -> list[int]:
    """By merging until nothing changes."""
    n = len(columns[0])
    label = list(range(n))
    changed = True
    while changed:
        changed = False
        for a in range(n):
            for b in range(n):
                joined = any(c[a] == c[b] != 0 for c in columns)
                if joined and label[a] != label[b]:
                    label[a] = label[b] = min(label[a], label[b])
                    changed = True
    return label


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=12))
def test_components_are_those_of_merging(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, dtype=np.int64).T
    got, expected = components(*columns).tolist(), brute_components(columns.tolist())
    assert [[a == b for b in got] for a in got] == [[a == b for b in expected] for a in expected]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 4), st.integers(0, 99))
def test_derangements_leave_groups_and_differ_everywhere(labels: list[int], count: int, seed: int) -> None:
    groups = np.array(labels)
    found = derangements(groups, count, np.random.default_rng(seed))
    largest = int(np.bincount(groups).max())
    assert len(found) == min(count, max(0, len(groups) - 2 * largest + 1))  # there are such, or none at all
    for i, one in enumerate(found):
        assert sorted(one.tolist()) == list(range(len(groups)))
        assert (groups[one] != groups).all()
        assert all((one != other).all() for other in found[:i])


def test_every_derangement_of_few_rows_may_come_up() -> None:
    groups = np.arange(4)
    seen = {tuple(derangements(groups, 1, np.random.default_rng(s))[0].tolist()) for s in range(400)}
    assert len(seen) == 9  # all derangements of four


def _table(folder: Path, task: TaskConfig, **cells: list[Any]) -> Rows:
    (folder / "a.png").write_bytes(b"same bytes")
    (folder / "b.png").write_bytes(b"same bytes")
    (folder / "c.png").write_bytes(b"others")
    columns = {"image": ["a.png", "b.png", "c.png", "c.png"], "text": ["A cat.", "dog", "a  cat.", None]}
    data = LabelledDataConfig(manifest="table", split="split" if "split" in cells else None)
    rows = parse_rows(columns | cells, data, PictureFolder(folder), source="table", target=task.columns)
    return linked(rows, task, data)


def test_content_and_target_say_what_is_the_same(tmp_path: Path) -> None:
    task = TaskConfig(type="retrieval")
    assert task.target is None
    rows = _table(tmp_path, task)
    targets = np.array(rows.targets)
    assert targets[0, PICTURE] == targets[1, PICTURE] != targets[2, PICTURE] == targets[3, PICTURE]
    assert targets[0, TEXT] == targets[2, TEXT] != targets[1, TEXT]
    assert targets[3, TEXT] == 0
    assert len(set(targets[:, KEY].tolist())) == 4
    assert len(set(rows.groups)) == 1  # a and b by their bytes, a and c by their text
    named = _table(tmp_path, TaskConfig(type="retrieval", target="kind"), kind=["x", "y", "x", None])
    keys = np.array(named.targets)[:, KEY]
    assert keys[0] == keys[2] != keys[1]
    assert keys[3] not in keys[:3]
    again = _table(tmp_path, task, image=["c.png", "b.png", "a.png", "a.png"])
    assert np.array(again.targets)[0, PICTURE] == targets[2, PICTURE]  # numbers are of content, not of order


def test_what_belongs_together_may_not_straddle_splits(tmp_path: Path) -> None:
    task = TaskConfig(type="retrieval")
    with pytest.raises(UserError, match=r"rows 1 and 2 belong together.*train and test"):
        _table(tmp_path, task, split=["train", "test", "train", "train"])
    with pytest.raises(UserError, match="row 4 has no text; a pair of a matching task needs both"):
        _table(tmp_path, TaskConfig(type="matching"))


def _pairs(n: int, groups: list[str]) -> Rows:
    texts: list[str | None] = [f"text {i}" for i in range(n)]
    declared = {k: ModalityConfig(column=k) for k in ("image", "text")}
    cells = {"image": [None] * n, "text": texts}
    return Rows("table", [str(i) for i in range(n)], declared, cells, [1] * n, groups)


def test_made_pairs_are_balanced_and_of_their_own_part() -> None:
    config = FinetuneConfig.model_validate_json(
        '{"task": {"type": "matching", "negatives": 2}, "data": {"manifest": "t"}, "model": {"checkpoint": '
        '"c"}, "heads": {}}'
    )
    groups = [f"g{i // 2}" for i in range(20)]
    rows = _pairs(20, groups)
    splits = Splits(np.arange(8), np.arange(8, 14), np.arange(14, 20))
    made, parts = with_negatives(config, rows, [(None, splits)])
    got = parts[0][1]
    assert got.train.tolist() == list(range(8))
    for part, own in ((got.inner, splits.inner), (got.test, splits.test)):
        assert len(part) == 3 * len(own)
        texts = [made.cells["text"][i] for i in part]
        assert {texts.count(text) for text in texts} == {3}
        assert {rows.cells["text"].index(text) for text in texts} == set(own.tolist())
        for i in part[len(own) :]:
            a, b = made.ids[i].split(" + ")
            assert groups[int(a)] != groups[int(b)]
            assert (made.groups[i], made.targets[i]) == (groups[int(a)], 0)
            assert made.cells["text"][i] == f"text {b}"
    again, _ = with_negatives(config, rows, [(None, splits)])
    assert again == made
    with pytest.raises(UserError, match=r"2 texts that do not match cannot be found for each of the 6 inner"):
        with_negatives(config, _pairs(20, ["g"] * 12 + groups[12:]), [(None, splits)])


@pytest.mark.parametrize("negatives", ["random", "hard"])
def test_a_batch_meets_texts_of_other_groups_alone(negatives: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    n, seen = 12, list[Any]()
    table = torch.nn.functional.normalize(
        torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    groups = torch.arange(n) // 3
    rows = FeatureRows(
        {"image": table, "text": table}, dict.fromkeys(("image", "text"), torch.arange(n)), groups
    )
    config = FinetuneConfig.model_validate_json(
        '{"task": {"type": "matching"}, "data": {"manifest": "t"}, "model": {"checkpoint": "c"}, "heads": {},'
        ' "adapt": {"modality_dropout": 0}}'
    )
    head = build_head(HeadConfig(op="concat", dropout=0.0), {"image": 4, "text": 4}, 1)
    training = MatchTraining(
        head, Task("binary", ("0", "1"), negatives=negatives), config.adapt, config.early_stopping, 0, print
    )
    parts = head.parts
    monkeypatch.setattr(head, "parts", lambda f, p: seen.append(f) or parts(f, p))
    features, present = rows.batch(torch.arange(n))
    for _ in range(20):
        training.loss(features, present, torch.ones(n), None).backward()
    number = {tuple(row): i for i, row in enumerate(table.tolist())}
    apart = set[int]()
    for batch in seen:
        pairs = [
            (number[tuple(a)], number[tuple(b)])
            for a, b in zip(batch["image"].tolist(), batch["text"].tolist(), strict=True)
        ]
        assert pairs[:n] == [(i, i) for i in range(n)]
        assert all(groups[a] != groups[b] for a, b in pairs[n:])
        assert len(pairs) == (2 if negatives == "random" else 3) * n
        if negatives == "random":
            assert sorted(b for _, b in pairs[n:]) == list(range(n))
        apart.add(hash(tuple(pairs)))
    assert len(apart) > 10  # anew each time


def test_the_loss_takes_what_belongs_together_for_matches() -> None:
    """Beside the dense loss in float64: targets uniform over all rows with one number."""
    random = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 10, 6, generator=random, dtype=torch.float64), dim=2)
    links = torch.tensor([0, 1, 2, 0, 3, 4, 1, 5, 0, 6])
    log_scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(10) != 4
    vectors = (log_scale / 2).exp() * torch.cat([unit[0], unit[1]], dim=1)
    loss = pair_loss(vectors, valid, links)
    (gradient,) = torch.autograd.grad(loss, log_scale)
    logits = log_scale.exp() * unit[0][valid] @ unit[1][valid].T
    same = (links[valid][:, None] == links[valid]).double()
    aims = same / same.sum(1, keepdim=True)
    dense = -(aims * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2
    assert float(loss.detach()) == pytest.approx(float(dense.detach()), abs=1e-12)
    assert float(gradient) == pytest.approx(float(torch.autograd.grad(dense, log_scale)[0]), abs=1e-12)
