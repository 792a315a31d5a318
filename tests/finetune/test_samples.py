"""Tars and folders of pictures as labelled tables, beside webdataset's reader and torchvision's."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from diptych.configs.errors import UserError
from diptych.data.foreign import index_folder
from diptych.finetune.config import LabelledDataConfig, TaskConfig
from diptych.finetune.tables.cells import BrokenPicture, Picture, PictureReader
from diptych.finetune.tables.manifest import read_rows
from diptych.finetune.tables.sources import open_source, read_source

WEBDATASET = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
TASK = TaskConfig(type="multiclass", target="cls")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(folder: Path, shards: int = 2, per_shard: int = 5) -> list[Path]:
    """By webdataset's own writer: every third sample lacks its text, every fourth its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    tars: list[Path] = []
    for shard in range(shards):
        tars.append(folder / f"{shard:03d}.tar")
        with webdataset.TarWriter(str(tars[-1])) as writer:
            for number in range(shard * per_shard + 1, (shard + 1) * per_shard + 1):
                sample: dict[str, Any] = {"__key__": f"a/{number:03d}", "cls": number % 3}
                sample["json"] = {"price": number / 4, "tags": ["x", "y"], "text": f"of the JSON {number}"}
                sample |= {"txt": f"Nº {number}"} if number % 3 else {}
                sample |= {"png": png(number)} if number % 4 else {}
                writer.write(sample)
    return tars


def add(tar: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(tar, "a") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@WEBDATASET
@pytest.mark.parametrize("indexed", [False, True], ids=["plain", "indexed"])
def test_shards_hold_what_webdataset_reads(indexed: bool, tmp_path: Path) -> None:
    tars = write_shards(tmp_path / "set")
    if indexed:
        index_folder(tmp_path / "set")  # which leaves samples without text or picture out of pretraining
    truth = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False, empty_check=False))
    places: list[tuple[str, Any]] = [
        (str(tmp_path / "set"), "shards"),
        (f"{tmp_path}/set/{{000..001}}.tar", None),
    ]
    for place, form in [*places, (f"{tmp_path}/s*t/*.tar", None)]:
        table = read_source(place, form)
        assert list(table.columns) == [
            "__key__",
            "__folder__",
            "image",
            "text",
            "cls",
            "price",
            "tags",
            "json.text",
        ]
        assert table.columns["__key__"] == [sample["__key__"] for sample in truth]
        assert table.columns["__folder__"] == ["set"] * len(truth)
        assert table.columns["cls"] == [sample["cls"].decode() for sample in truth]
        expected = [sample["txt"].decode() if "txt" in sample else None for sample in truth]
        assert table.columns["text"] == expected
        for name, field in (("price", "price"), ("tags", "tags"), ("json.text", "text")):
            assert table.columns[name] == [json.loads(sample["json"])[field] for sample in truth]
        reader, pictures = PictureReader(), table.columns["image"]
        assert all(p is None or p.data is None for p in pictures)  # pictures are not held
        assert [p and reader.read(p) for p in pictures] == [sample.get("png") for sample in truth]
        source = open_source(place, form)
        assert (source.rows, list(source.names)) == (10, list(table.columns))
        chunks = list(source.chunks(4))
        assert [len(chunk["cls"]) for chunk in chunks] == [4, 4, 2]
        joined = {name: [cell for chunk in chunks for cell in chunk[name]] for name in source.names}
        assert joined == table.columns
    one = read_source(tars[1])
    assert one.columns["__key__"] == [sample["__key__"] for sample in truth[5:]]


def damage(tar: Path, kind: str) -> tuple[str, str]:
    """Damage a tar; the key that must be named, and words of the reason."""
    if kind == "cut":
        data = tar.read_bytes()
        tar.write_bytes(data[: data.rindex(b"a/010.txt")])  # the last header is gone, and what follows
        return "a/010", "may lack members: the tar ends at byte"
    if kind == "behind":
        with tar.open("ab") as file:
            file.write(b"more")
        return "", "has data behind its end mark"
    made: dict[str, tuple[bytes, str, str]] = {
        "text": (b"\xff\xfe", "txt", "has a '.txt' that is not UTF-8"),
        "json": (b"[1]", "json", "has a '.json' that cannot be read (it is no object)"),
        "half": (b'{"x": "\\ud800"}', "json", "has half a surrogate pair in its '.json'"),
        "cls": (b"\xff", "cls", "has a '.cls' that is not UTF-8"),
    }
    if kind in made:
        data, ending, reason = made[kind]
        add(tar, (f"b/0.{ending}", data))
        return "b/0", reason
    if kind == "twice":
        add(tar, ("b/0.txt", b"a"), ("b/0.txt", b"b"))
        return "b/0", "has two members '.txt'"
    add(tar, ("b/0.txt", b"a"), ("b/1.txt", b"a"), ("b/0.cls", b"1"))
    return "b/0", "is a second sample of its key in the tar"


@WEBDATASET
@pytest.mark.parametrize("kind", ["cut", "behind", "text", "json", "half", "cls", "twice", "again"])
def test_damaged_samples_are_named_and_left_out_or_stop(kind: str, tmp_path: Path) -> None:
    tars = write_shards(tmp_path)
    whole = len(read_source(tmp_path, "shards").columns["cls"])
    key, reason = damage(tars[1], kind)
    table = read_source(tmp_path, "shards")
    assert [(d.place, d.key) for d in table.damaged] == [(str(tars[1]), key)]
    assert table.damaged[0].reason.startswith(reason)
    kept = {"cut": whole - 1, "again": whole + 2}.get(kind, whole)
    assert len(table.columns["cls"]) == kept
    data = LabelledDataConfig(manifest=str(tmp_path), format="shards", split=None)
    with pytest.raises(UserError, match=r"001.tar.* mend it or set data.on_error=quarantine$") as caught:
        read_rows(data, TASK)
    assert reason in str(caught.value)
    rows = read_rows(data.model_copy(update={"on_error": "quarantine"}), TASK)
    assert (len(rows), len(rows.damaged)) == (kept, 1)
    with pytest.raises(UserError, match="mend it or remove it"):
        open_source(tmp_path, "shards")


@WEBDATASET
def test_pictures_of_a_tar_that_changed_are_broken_and_not_taken_for_others(tmp_path: Path) -> None:
    tars = write_shards(tmp_path)
    picture: Picture = read_source(tmp_path, "shards").columns["image"][0]
    assert picture.place is not None
    data = bytearray(tars[0].read_bytes())
    data[picture.place[0] + 3] ^= 1
    tars[0].write_bytes(data)
    with pytest.raises(BrokenPicture, match="has changed"):
        PictureReader().read(picture)


@WEBDATASET
def test_an_index_tells_what_has_changed_since(tmp_path: Path) -> None:
    tars = write_shards(tmp_path)
    index_folder(tmp_path)
    picture: Picture = read_source(tmp_path, "shards").columns["image"][0]
    assert picture.place is not None
    whole = bytearray(tars[0].read_bytes())
    text = whole.index("Nº 2".encode())
    for at, key, reason in (
        (picture.place[0] + 3, "a/001", "has another picture than when it was indexed"),
        (text, "a/002", "has another text or JSON than when it was indexed"),
    ):
        data = bytearray(whole)
        data[at] ^= 1
        tars[0].write_bytes(data)
        damaged = read_source(tmp_path, "shards").damaged
        assert [(d.key, d.reason) for d in damaged] == [(key, reason)]
    tars[0].write_bytes(whole[:-512])
    with pytest.raises(UserError, match="the manifest says"):
        read_source(tmp_path, "shards")


def write_folders(root: Path) -> Path:
    """Classes with pictures at two depths and of three formats, some with texts."""
    for number, name in enumerate(
        ("dog/1.png", "cat/b.PNG", "cat/a.jpeg", "cat/a-b/1.webp", "cat/a/2.png", "dog/0.png")
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number * 40, 0, 0)).save(path)
    (root / "cat" / "a.txt").write_text("a cat", encoding="utf-8")
    (root / "dog" / ".DS_Store").write_bytes(b"\0")
    (root / "dog" / "notes.md").write_text("about dogs", encoding="utf-8")
    return root


def test_folders_hold_what_image_folder_reads(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets")
    truth = ImageFolder(str(root))
    table = read_source(root, "folders")
    assert list(table.columns) == ["__key__", "__folder__", "image", "label", "text"]
    assert [str(root / name) for name in table.columns["image"]] == [path for path, _ in truth.samples]
    assert table.columns["label"] == [truth.classes[number] for _, number in truth.samples]
    assert sorted(set(table.columns["label"])) == truth.classes
    texts = {"cat/a.jpeg": "a cat"}
    assert table.columns["text"] == [texts.get(name) for name in table.columns["image"]]
    assert table.columns["__key__"][1] == "cat/b"
    data = LabelledDataConfig(manifest=str(root), format="folders", split=None)
    rows = read_rows(data, TaskConfig(type="multiclass", target="label"))
    assert [str(p.path) for (p,) in rows.cells["image"]] == [path for path, _ in truth.samples]


def test_folders_of_splits_are_one_table(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        write_folders(tmp_path / "pets" / split)
    data = LabelledDataConfig(
        manifest=f"{tmp_path}/pets/{{train,val,test}}", format="folders", split="__folder__", id="__key__"
    )
    rows = read_rows(data, TaskConfig(type="multiclass", target="label"))
    assert [rows.splits.count(split) for split in ("train", "val", "test")] == [6, 6, 6]
    assert rows.ids[0] == "train/cat/a"
    assert all(p.path.is_file() for (p,) in rows.cells["image"])


def test_what_no_picture_of_a_folder_is_is_told(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets")
    (root / "dog" / "old.gif").write_bytes(b"GIF89a")
    (root / "dog" / "alone.txt").write_text("whose?")
    (root / "fish").mkdir()
    (root / "cat" / "a.txt").write_bytes(b"\xff")
    (root / "loop").symlink_to(root / "dog")
    (root / "dog" / "back").symlink_to(root / "dog")
    table = read_source(root, "folders")
    assert [(Path(d.place).name, d.reason) for d in table.damaged] == [
        ("a.jpeg", "has a .txt that is not UTF-8"),
        ("alone.txt", "has no picture of its name beside it"),
        ("old.gif", "is no picture of jpg, jpeg, png, webp"),
        ("fish", "holds no picture"),
        ("alone.txt", "has no picture of its name beside it"),
        ("old.gif", "is no picture of jpg, jpeg, png, webp"),
    ]
    (root / "whose.png").write_bytes(png(1))
    assert read_source(root, "folders").columns["label"][0] is None


@WEBDATASET
@pytest.mark.parametrize(
    ("place", "form", "said"),
    [
        ("set", None, "data.format: .*set may be shards .* or folders .*; say which"),
        ("{set,pets}", None, "may be shards .* or folders"),
        ("set/000.tar", "table", "is shards by its ending and not table; say shards or leave it out"),
        ("t.csv", "folders", "is table by its ending and not folders; say table or leave it out"),
        ("set", "table", "is a folder and no table; say shards or folders"),
        ("set", "folders", "holds tars; say shards"),
        ("pets", "shards", "holds no .tar files"),
        ("empty", "folders", "holds no samples; add some"),
        ("nowhere", None, "there is no .*nowhere; give a table, shards or folders"),
        ("nowhere", "shards", "there is no .*nowhere"),
        ("nowhere", "folders", "there is no folder .*nowhere"),
        ("set/{000..002}.tar", None, "there is no .*002.tar"),
        ("set/1*.tar", None, "there is nothing at .*; check the pattern"),
        ("set/000.tar::PLACE/set/000.tar", None, "is named twice"),
        ("set/000.tar.gz", None, "is compressed; unpack it"),
    ],
)
def test_a_name_that_does_not_tell_what_it_is_is_asked_about(
    place: str, form: Any, said: str, tmp_path: Path
) -> None:
    write_shards(tmp_path / "set")
    write_folders(tmp_path / "pets")
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("a\n1\n")
    place = f"{tmp_path}/{place}".replace("PLACE", str(tmp_path))
    with pytest.raises(UserError, match=said) as caught:
        read_source(place, form, key="data.format")
    assert "\n" not in str(caught.value)


def test_urls_and_commands_are_refused() -> None:
    for place in ("s3://bucket/{00..11}.tar", "https://host/000.tar", "pipe:cat x.tar"):
        with pytest.raises(UserError, match="is not on this machine"):
            read_source(place, "shards")
