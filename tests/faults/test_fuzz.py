"""Shards, indexes and manifests damaged at random, thousands of times: what is read is true or refused, never
a wrong pair; every refusal names its file; and ``verify`` finds what was done."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from xxhash import xxh3_64_hexdigest

from diptych.configs.errors import UserError
from diptych.data.foreign import index_folder
from diptych.data.index import map_index, read_manifest
from diptych.data.shards import DamagedSample, RawSample, open_shards
from diptych.data.verify import verify_folder

from ..data.samples import member_offsets, sample_members, samples, write, write_tar
from .damage import ANY, SAME_LENGTH, Damage, check_names, cut, cut_at_a_block, is_true, read_all

TRUTH = {sample[0]: sample for sample in samples(12)}
FILES = ("00000.tar", "00000.idx", "00001.tar", "00001.idx", "00002.tar", "00002.idx", "manifest.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole"), samples(12))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


def cases(
    folder: Path, pattern: str, damages: tuple[Damage, ...], n: int, seed: int, every: int
) -> Iterator[tuple[str, int, int, bool]]:
    """Damage a file, let the test look, and mend it: name, first and last changed place, and, in one of
    ``every`` cases, that ``verify`` is to be asked too."""
    rng = random.Random(seed)
    files = sorted(folder.glob(pattern))
    content = {path: path.read_bytes() for path in files}
    for case in range(n):
        path = rng.choice(files)
        data = bytearray(content[path])
        damage = rng.choice(damages)
        first, last = damage(data, rng)
        if bytes(data) == content[path]:
            continue
        path.write_bytes(data)
        yield path.name, first, last, case % every == 0
        path.write_bytes(content[path])


def verify_names(folder: Path, name: str) -> None:
    """``verify`` finds the fault and names the shard of the file, or refuses with the file's name."""
    try:
        report = verify_folder(folder)
    except UserError as error:
        check_names(str(error), {name})
        return
    shards = {finding.shard for finding in report.findings}
    assert shards, name
    if name != "manifest.jsonl":
        assert name.replace(".idx", ".tar") in shards


def damaged_tars(folder: Path, n: int, seed: int, every: int = 1) -> None:
    members = {path.name: member_offsets(path) for path in folder.glob("*.tar")}
    for name, first, last, asked in cases(folder, "*.tar", SAME_LENGTH, n, seed, every):
        got = read_all(folder, {name})
        assert not isinstance(got, UserError)
        touched = {
            member.rpartition(".")[0]
            for member, (offset, size) in members[name].items()
            if size and first < offset + size and last >= offset
        }
        assert set(got) == set(TRUTH)
        for key, sample in got.items():
            if isinstance(sample, RawSample):
                assert is_true(sample, TRUTH[key])
                # a scribble may leave bytes as they were: then nothing is wrong
                assert first != last or key not in touched
            else:
                assert key in touched
        if asked:
            verify_names(folder, name)


def damaged_indexes(folder: Path, n: int, seed: int, every: int = 1) -> None:
    for name, _, _, asked in cases(folder, "*.idx", ANY, n, seed, every):
        assert isinstance(read_all(folder, {name}), UserError)
        if asked:
            verify_names(folder, name)


def forged_indexes(folder: Path, n: int, seed: int, every: int = 1) -> None:
    """The manifest vouches for the damaged index: pairs are true still, whatever it claims."""
    manifest = (folder / "manifest.jsonl").read_bytes()
    truth = {(sample[1], sample[3]) for sample in TRUTH.values()}
    for name, _, _, asked in cases(folder, "*.idx", ANY, n, seed, every):
        rows = read_manifest(folder)
        digest = xxh3_64_hexdigest((folder / name).read_bytes())
        forged = [replace(row, idx_xxh3=digest) if row.shard[:5] == name[:5] else row for row in rows]
        (folder / "manifest.jsonl").write_text("".join(row.to_json() + "\n" for row in forged))
        got = read_all(folder, {name, name.replace(".idx", ".tar")})
        for sample in {} if isinstance(got, UserError) else got.values():
            assert isinstance(sample, DamagedSample) or (sample.image, sample.caption) in truth
        if asked:
            verify_names(folder, name)
        (folder / "manifest.jsonl").write_bytes(manifest)


def damaged_manifests(folder: Path, n: int, seed: int, every: int = 1) -> None:
    before = read_manifest(folder)
    for name, _, _, asked in cases(folder, "manifest.jsonl", ANY, n, seed, every):
        got = read_all(folder, set(FILES))
        for key, sample in {} if isinstance(got, UserError) else got.items():
            assert isinstance(sample, RawSample)
            assert is_true(sample, TRUTH[key])
        try:
            same = read_manifest(folder) == before
        except UserError:
            same = False
        if same:  # a space more, for instance
            assert verify_folder(folder).findings == []
        elif asked:
            verify_names(folder, name)


def damaged_foreign_tars(folder: Path, n: int, seed: int) -> None:
    """Without hashes: what is indexed are pairs of one key, changed at most where the damage is."""
    content = sample_members(samples(6))
    for number in range(2):
        write_tar(folder / f"{number}.tar", content)
    members = member_offsets(folder / "0.tar")
    for name, first, last, _ in cases(folder, "*.tar", (*SAME_LENGTH, cut, cut_at_a_block), n, seed, 1):
        for path in (*folder.glob("*.idx"), *folder.glob("*.json*")):
            path.unlink()
        index_folder(folder)
        shards = open_shards(folder)
        for sample_id in range(len(shards)):
            raw = shards.read(sample_id)
            key, image, extension, caption, meta = TRUTH[raw.key]
            if raw.shard != name:
                assert is_true(raw, TRUTH[raw.key])
                continue
            for part, same in ((extension, raw.image == image), ("txt", raw.caption == caption),
                               ("json", raw.meta == meta)):  # fmt: skip
                offset, size = members[f"{key}.{part}"]
                assert same or (first < offset + size and last >= offset), (key, part)


FUZZ = {
    "tars": damaged_tars,
    "indexes": damaged_indexes,
    "forged indexes": forged_indexes,
    "manifests": damaged_manifests,
}


@pytest.mark.parametrize("what", FUZZ)
def test_what_is_read_is_true_or_refused(folder: Path, what: str) -> None:
    FUZZ[what](folder, 800, 1, 5)
    assert verify_folder(folder).findings == []


def test_foreign_tars_give_pairs_of_one_key(tmp_path: Path) -> None:
    damaged_foreign_tars(tmp_path, 500, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("what", FUZZ)
def test_what_is_read_is_true_or_refused_ten_thousand_times(folder: Path, what: str, seed: int) -> None:
    FUZZ[what](folder, 2500, seed, 10)


@pytest.mark.slow
def test_foreign_tars_give_pairs_of_one_key_three_thousand_times(tmp_path: Path) -> None:
    damaged_foreign_tars(tmp_path, 3000, 2)


def test_every_length_of_a_cut_is_found(folder: Path) -> None:
    path = folder / "00001.tar"
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        got = read_all(folder, {"00001.tar"})
        assert isinstance(got, UserError)
        if length % 5 == 0:
            verify_names(folder, "00001.tar")


def test_a_tar_that_is_cut_while_it_is_open_gives_damaged_samples_and_true_ones(folder: Path) -> None:
    path = folder / "00001.tar"
    data = path.read_bytes()
    for length in range(0, len(data), 41):
        path.write_bytes(data)
        shards = open_shards(folder)
        shards.read(4)
        with path.open("r+b") as file:
            file.truncate(length)
        for sample_id in range(12):
            try:
                raw = shards.read(sample_id)
                assert is_true(raw, TRUTH[raw.key])
            except DamagedSample as damaged:
                check_names(str(damaged), {"00001.tar"})


def test_an_index_of_another_shard_is_refused(folder: Path) -> None:
    shutil.copy(folder / "00000.idx", folder / "00001.idx")
    got = read_all(folder, {"00001.idx"})
    assert isinstance(got, UserError)
    verify_names(folder, "00001.idx")
    assert map_index(folder / "00001.idx").header["n"] == 4
