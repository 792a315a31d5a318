"""The icon corpus over its whole road, from packages to shards, galleries, tasks and card; nothing leaks."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from diptych.data.corpora.icons import fetch_icons
from diptych.data.corpora.pins import TIERS
from diptych.data.shards import RawSample, open_shards

from . import icon_packages

SPLITS = ("train", "val", "test_vendor", "test_word")
DEMO = TIERS["demo"]  # before the small one takes its place
Corpus = dict[str, list[RawSample]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        icon_packages.use_small_packages(patch, tmp_path_factory.mktemp("cache"))
        yield fetch_icons()


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    out: Corpus = {}
    for split in SPLITS:
        shards = open_shards(folder / split)
        out[split] = [shards.read(i) for i in range(len(shards))]
    return out


def everything(corpus: Corpus) -> list[RawSample]:
    return [sample for split in SPLITS for sample in corpus[split]]


def by_key(corpus: Corpus, key: str) -> RawSample:
    return next(sample for sample in everything(corpus) if sample.key == key)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "corpus.json").read_text())


def test_every_icon_is_in_one_split_or_counted_as_left_out(folder: Path, corpus: Corpus) -> None:
    drawn = sum(len(s["icons.json"]["icons"]) for s in icon_packages.demo_sets())
    mirrored = 1  # an alias that flips is a drawing of its own
    facts = figures(folder)
    assert len(everything(corpus)) + sum(facts["dropped"].values()) == drawn + mirrored
    keys = [sample.key for sample in everything(corpus)]
    assert len(set(keys)) == len(keys)
    assert {name: facts["splits"][name]["samples"] for name in SPLITS} == {s: len(corpus[s]) for s in SPLITS}
    assert facts["dropped"]["withdrawn by its maker"] == 5
    assert facts["dropped"]["an emoji in another skin colour"] == 5
    assert facts["dropped"]["blank or not drawable"] == 5
    assert facts["dropped"]["the same pixels as another icon of its family"] == 1


def test_a_sample_is_a_square_picture_with_a_caption_and_flat_facts(corpus: Corpus) -> None:
    sample = by_key(corpus, "alpha_grey-wolf")
    image = Image.open(io.BytesIO(sample.image))
    assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")
    assert sample.caption == "grey wolf"
    assert set(sample.meta) >= {
        "vendor",
        "family",
        "names",
        "tags",
        "categories",
        "emoji",
        "group",
        "subgroup",
    }
    assert sample.meta["emoji"] == icon_packages.code("grey wolf")
    assert sample.meta["group"] in ("animals-nature", "objects")
    assert sample.meta["subgroup"] == sample.meta["group"] + "-all"
    assert sample.meta["categories"] == ["Things"]
    assert sample.meta["licence"] == "CC-BY-4.0"


def test_emoji_are_called_by_their_label_and_found_with_and_without_code_points(corpus: Corpus) -> None:
    first = icon_packages.slug(icon_packages.NAMES[0])
    for vendor in ("alpha", "noto", "noto-v1", "streamline-emojis", "openmoji"):
        sample = by_key(corpus, f"{vendor}_{first}")
        assert sample.caption == "apple tree"  # from the label "Apple: tree"
        assert sample.meta["emoji"] == icon_packages.code(icon_packages.NAMES[0])


def test_renaming_aliases_are_names_and_flipping_ones_are_drawings(corpus: Corpus) -> None:
    assert by_key(corpus, "lines_home-add").meta["names"] == ["house add"]
    plain = Image.open(io.BytesIO(by_key(corpus, "lines_home-lock").image))
    mirrored = Image.open(io.BytesIO(by_key(corpus, "lines_home-mirrored").image))
    difference = np.abs(np.asarray(plain, dtype=int)[:, ::-1] - np.asarray(mirrored, dtype=int))
    assert difference.mean() < 1


def test_numbers_of_further_drawings_are_not_captioned(corpus: Corpus) -> None:
    assert by_key(corpus, "icon-park_home-add-one").caption == "home add"


def test_of_equal_pictures_the_one_with_the_shorter_caption_stays_with_all_names(corpus: Corpus) -> None:
    keys = [sample.key for sample in everything(corpus) if "twin" in sample.key]
    assert keys == ["lines_twin-brother"]
    assert by_key(corpus, keys[0]).meta["names"] == ["twin of many names"]


def test_no_family_stands_on_both_sides_of_training(corpus: Corpus) -> None:
    families = {split: {sample.meta["family"] for sample in corpus[split]} for split in SPLITS}
    assert families["test_vendor"] == {"openmoji", "icon-park"}
    assert not families["test_vendor"] & (families["train"] | families["val"])
    assert not families["train"] & {"streamline-emojis"}
    assert by_key(corpus, "noto-v1_river-stone").meta["family"] == "noto"


def test_held_out_words_stand_in_no_text_of_the_other_splits(folder: Path, corpus: Corpus) -> None:
    held = figures(folder)["held_out_words"]
    assert held
    pattern = re.compile(rf"\b({'|'.join(held)})(s|es)?\b")
    for split in ("train", "val", "test_vendor"):
        for sample in corpus[split]:
            texts = (sample.caption, *sample.meta["names"], *sample.meta["tags"])
            assert not any(pattern.search(text) for text in texts), (split, sample.key, texts)


def test_a_concept_of_the_word_test_is_drawn_nowhere_else(folder: Path, corpus: Corpus) -> None:
    held = figures(folder)["held_out_words"]
    test = corpus["test_word"]
    assert len({sample.meta["vendor"] for sample in test}) > 3, "all vendors' drawings leave together"
    texts = [" ".join((s.caption, *s.meta["names"])) for s in test]
    concepts = {s.caption for s in test if any(word in s.caption for word in held)}
    assert concepts
    assert all(
        any(word in text for word in held) or s.caption in concepts
        for text, s in zip(texts, test, strict=True)
    )
    for split in ("train", "val", "test_vendor"):
        assert not {s.caption for s in corpus[split]} & {s.caption for s in test}
        assert not {s.meta["emoji"] for s in corpus[split] if s.meta["emoji"]} & {
            s.meta["emoji"] for s in test
        }


def test_validation_has_an_unseen_vendor_and_unseen_concepts(corpus: Corpus) -> None:
    train = {sample.caption for sample in corpus["train"]}
    others = [s for s in corpus["val"] if s.meta["vendor"] != "streamline-emojis"]
    assert others
    assert all(sample.caption not in train for sample in others)
    assert sum(s.caption in train for s in corpus["val"] if s.meta["vendor"] == "streamline-emojis") > 10


def small_hash(sample: RawSample) -> bytes:
    image = Image.open(io.BytesIO(sample.image)).resize((24, 24), Image.Resampling.BOX)
    return (np.asarray(image) >> 4).tobytes()


def test_no_picture_of_training_looks_like_a_held_out_one(folder: Path, corpus: Corpus) -> None:
    held = {small_hash(s) for split in ("val", "test_vendor", "test_word") for s in corpus[split]}
    assert not held & {small_hash(sample) for sample in corpus["train"]}
    # the copy of a test picture was there and is gone
    assert figures(folder)["dropped"]["train: looks like a held-out picture"] == 1
    assert "copycat_stolen" not in {sample.key for sample in everything(corpus)}


def test_galleries_hold_what_they_say_and_their_hash(folder: Path, corpus: Corpus) -> None:
    galleries = json.loads((folder / "galleries.json").read_text())
    assert list(galleries) == ["openmoji_no_people", "openmoji", "icon_park", "test_word"]
    metas = {sample.key: sample.meta for sample in everything(corpus)}
    for gallery in galleries.values():
        assert gallery["keys"] == sorted(gallery["keys"])
        assert set(gallery["keys"]) <= {sample.key for sample in corpus[gallery["split"]]}
        assert gallery["sha256"] == hashlib.sha256("\n".join(gallery["keys"]).encode()).hexdigest()
    kept = set(galleries["openmoji_no_people"]["keys"])
    left = set(galleries["openmoji"]["keys"]) - kept
    assert left
    assert all(metas[key]["group"] == "people-body" for key in left)
    assert all(metas[key]["emoji"] and metas[key]["group"] != "people-body" for key in kept)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "tasks" / f"{name}.parquet").to_pylist()


def test_image_cells_name_samples_of_the_splits(folder: Path) -> None:
    for name in ("match", "category"):
        rows = table(folder, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            shards, key = row["image"].split("#")
            assert open_shards(folder / "tasks" / shards).find(key) >= 0


def test_either_modality_alone_tells_nothing_about_a_match(folder: Path) -> None:
    rows = table(folder, "match")
    for split in ("train", "val", "test"):
        part = [row for row in rows if row["split"] == split]
        assert len(part) > 20
        for column in ("image", "text"):
            counts = Counter((row[column], row["target"]) for row in part)
            assert all(counts[value, 0] == counts[value, 1] for value, _ in counts)
        truth = [row["target"] for row in part]
        texts = CountVectorizer().fit_transform([row["text"] for row in part])
        pictures = OneHotEncoder().fit_transform([[row["image"]] for row in part])
        for features in (texts, pictures):
            # fitted and scored on the same rows: the most that memorising could reach
            model = LogisticRegression(C=1e3).fit(features, truth)
            np.testing.assert_allclose(model.predict_proba(features), 0.5, atol=1e-3)


def test_no_mismatch_is_true_by_accident(folder: Path, corpus: Corpus) -> None:
    samples = {sample.key: sample for sample in everything(corpus)}
    emoji_called = {(s.caption, s.meta["emoji"]) for s in everything(corpus)}
    for row in table(folder, "match"):
        sample = samples[row["image"].split("#")[1]]
        called = {sample.caption, *sample.meta["names"]}
        if row["target"]:
            assert row["text"] == sample.caption
        else:
            assert row["text"] not in called
            assert not sample.meta["emoji"] or (row["text"], sample.meta["emoji"]) not in emoji_called


def test_matches_and_mismatches_stay_in_the_vendor_and_subgroup(folder: Path, corpus: Corpus) -> None:
    places: dict[str, set[tuple[str, str]]] = {}
    for sample in everything(corpus):
        places.setdefault(sample.caption, set()).add((sample.meta["vendor"], sample.meta["subgroup"]))
    for row in table(folder, "match"):
        meta = next(s.meta for s in everything(corpus) if s.key == row["image"].split("#")[1])
        assert (meta["vendor"], meta["subgroup"]) in places[row["text"]]
        assert row["group"] == (meta["emoji"] or row["group"])
        expected = {"train": {"alpha", "noto", "noto-v1", "lines"}, "test": {"openmoji"}}.get(row["split"])
        assert expected is None or meta["vendor"] in expected


def test_category_is_tested_on_concepts_and_a_vendor_that_training_lacks(folder: Path) -> None:
    rows = table(folder, "category")
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    assert parts["train"]
    assert parts["test"]
    groups = {split: {row["group"] for row in part} for split, part in parts.items()}
    assert not groups["test"] & (groups["train"] | groups["val"])
    assert not groups["val"] & groups["train"]
    assert all("#openmoji_" in row["image"] for row in parts["test"])
    assert not any("#openmoji_" in row["image"] for row in parts["train"])
    assert {row["target"] for row in parts["test"]} <= {row["target"] for row in parts["train"]}


def test_the_card_names_every_licence_count_and_limit(folder: Path, corpus: Corpus) -> None:
    card = (folder / "README.md").read_text()
    for documents in icon_packages.demo_sets():
        info = documents["info.json"]
        assert f"[{info['author']['name']}]({info['author']['url']})" in card
        assert f"[{info['license']['spdx']}]({info['license']['url']})" in card
    assert "Licence of the labels" in card
    assert f"{len(everything(corpus)):,} icons" in card
    for text in ("not photographs", "CC-BY-SA", "withdrawn by its maker", *figures(folder)["held_out_words"]):
        assert text in card
