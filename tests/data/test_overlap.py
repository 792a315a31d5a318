"""Copies of evaluation pictures planted in a training set, and pictures that are none."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from diptych.configs.errors import UserError
from diptych.data.filters import FilterConfig, select
from diptych.data.overlap import OverlapReport, find_overlap
from diptych.data.phash import CROPS, distances, perceptual_hashes
from diptych.data.shards import open_shards

from .pictures import cropped, encoded, natural
from .samples import Sample, flip, write


def hashes(image: Image.Image) -> np.ndarray:
    found = perceptual_hashes(np.asarray(image.convert("RGB")))
    assert found is not None
    return found


def sample(key: str, image: Image.Image, caption: str, kind: str = "PNG", **options: object) -> Sample:
    extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    return key, encoded(image, kind, **options), extension, caption, {}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training set with copies of evaluation pictures, and the evaluation set."""
    root = tmp_path_factory.mktemp("overlap")
    test = [natural(1000 + i) for i in range(12)]
    write(
        root / "eval",
        [sample(f"e{i}", image, f"Evaluation  caption {i}") for i, image in enumerate(test)],
        per_shard=12,
    )
    planted = [
        sample("bytes", test[0], "planted 0"),
        sample("jpeg", test[1], "planted 1", "JPEG", quality=40),
        sample("webp", test[2], "planted 2", "WEBP", quality=50),
        sample("small", test[3].resize((96, 72)), "planted 3", "JPEG"),
        sample("squeezed", test[4].resize((224, 224)), "planted 4", "JPEG"),
        sample("cropped", cropped(test[5], 0.03, 0.01, 0.04, 0.03), "planted 5", "JPEG"),
        sample("grey", test[6].convert("L"), "planted 6", "JPEG"),
        sample("words", natural(1), "evaluation CAPTION 7"),
        sample("both", test[8], "evaluation caption 9"),
    ]
    others = [sample(f"own{i}", natural(2000 + i), f"a caption of its own {i}", "JPEG") for i in range(40)]
    write(root / "train", [*others[:20], *planted, *others[20:]], per_shard=10)
    return root / "train", root / "eval"


def found(report: OverlapReport) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for finding in report.findings:
        out.setdefault(finding.key, []).append(finding.reason)
    return out


PLANTED = {
    "bytes": ["image"],
    "both": ["caption", "image"],
    "words": ["caption"],
    **{key: ["similar-image"] for key in ("jpeg", "webp", "small", "squeezed", "cropped", "grey")},
}


def test_planted_copies_are_found_and_nothing_else(sets: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = sets
    report = find_overlap(train, [test], write_filter=tmp_path / "drop.parquet")
    assert found(report) == PLANTED
    assert (report.samples, report.matched, report.unread) == (49, 9, 0)
    assert report.reasons == {"similar-image": 6, "image": 2, "caption": 2}
    details = {(finding.key, finding.reason): finding.detail for finding in report.findings}
    assert details["bytes", "image"] == f"its image is that of sample 'e0' of {test}"
    assert details["words", "caption"] == f"its caption is that of sample 'e7' of {test}"
    assert f"like that of sample 'e5' of {test}, " in details["cropped", "similar-image"]
    table = pyarrow.parquet.read_table(tmp_path / "drop.parquet")
    assert table.column_names == ["key", "shard", "reason", "detail"]
    assert {(row["key"], row["shard"]) for row in table.to_pylist()} == {
        (f.key, f.shard) for f in report.findings
    }
    shards = open_shards(train)
    for row in table.to_pylist():
        assert shards.read(shards.find(row["key"])).shard == row["shard"]


def test_the_filter_is_one_that_training_reads(sets: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = sets
    find_overlap(train, [test], write_filter=tmp_path / "drop.parquet")
    shards = open_shards(train)
    selection = select(shards, FilterConfig(drop=str(tmp_path / "drop.parquet")))
    assert selection is not None
    kept = selection.sample_ids(np.arange(int(selection.shard_sizes.sum())))
    assert {shards.key_of(int(i)) for i in kept} == set(shards.keys()) - set(PLANTED)


def test_processes_give_the_same_findings(sets: tuple[Path, Path]) -> None:
    train, test = sets
    match = ["image", "caption"]  # without decoding: processes that load torch begin slowly
    assert find_overlap(train, [test], match=match, workers=2) == find_overlap(train, [test], match=match)


def test_several_evaluation_sets_are_told_apart(sets: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = sets
    other = write(tmp_path / "other", [sample("x", natural(1), "no such caption")])
    report = find_overlap(train, [other, test])
    assert found(report) == PLANTED | {"words": ["caption", "image"]}
    assert report.findings[-1].detail.endswith(str(test))
    assert report.to_json()["ok"] is False
    assert report.to_json()["matched"] == 9


@pytest.mark.parametrize(
    ("match", "keys"),
    [
        (["image"], {"bytes", "both"}),
        (["caption"], {"words", "both"}),
        (["similar-image"], set(PLANTED) - {"words"}),
    ],
)
def test_what_is_compared_can_be_chosen(sets: tuple[Path, Path], match: list[str], keys: set[str]) -> None:
    report = find_overlap(sets[0], [sets[1]], match=match)
    assert set(found(report)) == keys
    assert set(report.reasons) == set(match)


def test_a_set_without_copies_gives_an_empty_filter(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [sample(f"a{i}", natural(i), f"a {i}") for i in range(5)])
    b = write(tmp_path / "b", [sample(f"b{i}", natural(50 + i), f"b {i}") for i in range(5)])
    report = find_overlap(a, [b], write_filter=tmp_path / "drop.parquet")
    assert (report.matched, report.to_json()["ok"]) == (0, True)
    assert pyarrow.parquet.read_table(tmp_path / "drop.parquet").num_rows == 0


def test_unrelated_pictures_stay_far_apart() -> None:
    every = np.array([hashes(natural(seed, 160, 120)) for seed in range(400)])
    nearest = []
    for number, own in enumerate(every):
        others = np.delete(every, number, axis=0)
        nearest.append(int(distances(own[0], others.reshape(-1)).min()))
    # 160,000 pictures against 12 crops each: none comes near the 6 that count as a copy
    assert min(nearest) >= 10
    assert np.mean(nearest) > 14


def test_pieces_of_real_photographs_are_told_apart_and_found_again() -> None:
    pieces = [
        photograph[y : y + side, x : x + side]
        for photograph in load_sample_images().images
        for side in (71, 107)
        for y in range(0, 427 - side, side)
        for x in range(0, 640 - side, side)
    ]
    found = [(piece, own) for piece in pieces if (own := perceptual_hashes(piece)) is not None]
    assert len(found) > 70  # the others are sky and water
    every = np.array([own for _, own in found])
    for number, (piece, own) in enumerate(found):
        apart = distances(own[0], every.reshape(-1)).reshape(every.shape).min(axis=1)
        assert sorted(apart)[1] > 10
        with Image.open(io.BytesIO(encoded(Image.fromarray(piece), quality=40))) as image:
            copy = perceptual_hashes(np.asarray(image.convert("RGB")))
        if copy is not None:
            again = distances(copy[0], every[:, 0])
            assert int(again.argmin()) == number
            assert again[number] <= 6


@pytest.mark.parametrize("seed", range(3))
def test_copies_stay_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = natural(300 + seed)
    own = hashes(image)
    for quality in (30, 60, 90):
        with Image.open(io.BytesIO(encoded(image, quality=quality))) as copy:
            assert distances(own[0], hashes(copy)[:1])[0] <= 4
    for size in ((64, 48), (100, 100), (640, 480)):
        assert distances(own[0], hashes(image.resize(size))[:1])[0] <= 4
    for _ in range(20):
        part = hashes(cropped(image, *rng.uniform(0, 0.04, 4)))
        assert min(distances(part[0], own)) <= 6
    assert len(own) == len(CROPS)


def test_blank_pages_and_plain_gradients_match_nothing_but_their_own_bytes(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 120).astype(np.uint8)
    noise = np.random.default_rng(0).normal(128, 2, (90, 120)).astype(np.uint8)
    blank = {
        "white": Image.new("RGB", (120, 90), "white"),
        "black": Image.new("RGB", (64, 64), "black"),
        "navy": Image.new("RGB", (90, 90), "navy"),
        "ramp": Image.fromarray(np.tile(ramp, (90, 1))),
        "noise": Image.fromarray(noise),
    }
    for image in blank.values():
        assert perceptual_hashes(np.asarray(image.convert("RGB"))) is None
    test = write(tmp_path / "eval", [sample(k, i, f"{k} in eval") for k, i in blank.items()])
    own = [sample(k, i, f"{k} in train", "JPEG") for k, i in blank.items()]
    train = write(tmp_path / "train", [*own, sample("same", blank["white"], "the same page")])
    assert found(find_overlap(train, [test])) == {"same": ["image"]}


def test_damaged_samples_are_counted_and_the_rest_compared(sets: tuple[Path, Path], tmp_path: Path) -> None:
    train = write(tmp_path / "t", [sample(f"k{i}", natural(1000 + i), f"k {i}", "JPEG") for i in range(3)])
    flip(train / "00000.tar", int(open_shards(train).records(0)[1]["image_offset"]) + 500)
    report = find_overlap(train, [sets[1]])
    assert (set(found(report)), report.unread) == ({"k0", "k2"}, 1)


def test_mistakes_are_one_sentence(sets: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = sets
    with pytest.raises(UserError, match="is the data set itself"):
        find_overlap(train, [train])
    with pytest.raises(UserError, match="'images' must be some of image, similar-image, caption"):
        find_overlap(train, [test], match=["images"])
    with pytest.raises(UserError, match=r"name it drop\.parquet"):
        find_overlap(train, [test], write_filter=tmp_path / "drop.csv")
    with pytest.raises(UserError, match="there is no folder"):
        find_overlap(train, [test], write_filter=tmp_path / "no/drop.parquet")
    with pytest.raises(UserError, match="at least one"):
        find_overlap(train, [])
    assert list(tmp_path.iterdir()) == []
