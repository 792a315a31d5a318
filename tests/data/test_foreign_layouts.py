"""Folders as other programs leave them: read here as webdataset's own reader reads them."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset

from diptych.data.foreign import index_folder
from diptych.data.shards import open_shards
from diptych.data.verify import verify_folder

from .samples import WEBDATASET, by_webdataset, picture, samples, write, write_tar


def img2dataset(folder: Path, numbers: tuple[int, ...] = (0, 1, 3), per_shard: int = 5) -> Path:
    """The files of a finished download: a key is the shard's number and the row's, failed rows are in the
    Parquet alone, and a shard whose download failed is not there."""
    for shard in numbers:
        members: list[tuple[str, bytes]] = []
        table: list[dict[str, object]] = []
        for row in range(per_shard):
            key = f"{shard:05d}{row:04d}"
            meta = {
                "caption": f"picture {row} of shard {shard}",
                "url": f"https://example.com/{key}.jpg",
                "key": key,
                "status": "success" if row != 2 else "failed_to_download",
                "error_message": None if row != 2 else "HTTP Error 404: Not Found",
                "width": 9 if row != 2 else None,
                "height": 7 if row != 2 else None,
                "exif": "{}",
                "sha256": "00",
            }
            table.append(meta)
            if row != 2:
                members += [
                    (f"{key}.jpg", picture(10 * shard + row, "jpg")),
                    (f"{key}.json", json.dumps(meta, indent=4).encode()),
                    (f"{key}.txt", str(meta["caption"]).encode()),
                ]
        write_tar(folder / f"{shard:05d}.tar", members)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{shard:05d}.parquet")
        stats = {"count": per_shard, "successes": per_shard - 1, "failed_to_download": 1}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def same_as_webdataset(folder: Path, caption_key: str | None = None) -> int:
    shards = open_shards(folder)
    expected = by_webdataset([str(path) for path in sorted(folder.glob("*.tar"))])
    assert len(shards) == len(expected)
    for sample_id, sample in enumerate(expected):
        raw = shards.read(sample_id)
        image = next(sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample)
        meta = json.loads(sample["json"]) if "json" in sample else {}
        caption = meta[caption_key] if caption_key is not None else sample["txt"].decode()
        assert (raw.key, raw.image, raw.caption, raw.meta) == (sample["__key__"], image, caption, meta)
        assert raw.shard == Path(sample["__url__"]).name
    return len(expected)


@WEBDATASET
@pytest.mark.parametrize("caption_key", [None, "caption", "url"])
def test_img2datasets_output_is_read_as_it_is(tmp_path: Path, caption_key: str | None) -> None:
    folder = img2dataset(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = index_folder(folder, caption_key=caption_key)
    assert (report.findings, [row.shard for row in report.rows]) == (
        [],
        ["00000.tar", "00001.tar", "00003.tar"],
    )
    assert same_as_webdataset(folder, caption_key) == 12
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert verify_folder(folder, decode=True).findings == []


@WEBDATASET
def test_two_downloads_may_have_the_same_names_and_keys(tmp_path: Path) -> None:
    for name in ("cc3m", "laion"):
        index_folder(img2dataset(tmp_path / name))
    one, two = open_shards(tmp_path / "cc3m"), open_shards(tmp_path / "laion")
    assert one.keys() == two.keys()
    assert same_as_webdataset(tmp_path / "laion") == 12


@WEBDATASET
def test_shards_of_webdatasets_shard_writer(tmp_path: Path) -> None:
    writer = webdataset.ShardWriter(str(tmp_path / "part-%06d.tar"), maxcount=4, verbose=0)
    with writer:
        for key, image, extension, caption, meta in samples(11):
            writer.write({"__key__": f"a/b/{key}", extension: image, "txt": caption, "json": meta})
    assert index_folder(tmp_path).findings == []
    assert same_as_webdataset(tmp_path) == 11
    assert open_shards(tmp_path).shard_sizes.tolist() == [4, 4, 3]


@WEBDATASET
def test_captions_in_json_alone_and_upper_case_endings(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for number, ending in enumerate(("JPG", "jpeg", "PNG", "webp")):
        kind = {"JPG": "jpg", "jpeg": "jpg", "PNG": "png", "webp": "webp"}[ending]
        meta = {"caption": f"number {number}"}
        members += [
            (f"k{number}.{ending}", picture(number, kind)),
            (f"k{number}.json", json.dumps(meta).encode()),
        ]
    write_tar(tmp_path / "x.tar", members)
    assert index_folder(tmp_path, caption_key="caption").findings == []
    assert same_as_webdataset(tmp_path, "caption") == 4


@WEBDATASET
def test_our_shards_are_read_by_webdataset_and_indexed_again_to_the_same_set(tmp_path: Path) -> None:
    write(tmp_path, samples(13))
    assert same_as_webdataset(tmp_path) == 13
    fingerprint = open_shards(tmp_path).fingerprint
    index_folder(tmp_path, overwrite=True)
    assert same_as_webdataset(tmp_path) == 13
    assert open_shards(tmp_path).fingerprint == fingerprint
