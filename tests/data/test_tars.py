"""The block reader against tarfile on whole tars, and on tars broken in every place."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from diptych.data.tars import BLOCK, Member, TarReader, member_header

from .samples import write_tar

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def read(data: bytes, *, wanted: bool = True) -> tuple[list[Member], TarReader]:
    reader = TarReader(io.BytesIO(data), lambda name, size: wanted)
    return list(reader), reader


def by_tarfile(data: bytes) -> list[Member]:
    out: list[Member] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.isreg() and (file := tar.extractfile(member)) is not None:
                out.append(Member(member.name, member.offset_data, member.size, file.read()))
    return out


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=120
).filter(lambda name: not name.endswith("/"))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5), st.sampled_from(FORMATS), st.booleans()
)
def test_tarfile_finds_the_same_members(members: list[tuple[str, bytes]], kind: int, wanted: bool) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # too long a name for USTAR
                continue
    data = buffer.getvalue()
    got, reader = read(data, wanted=wanted)
    expected = by_tarfile(data)
    assert [(m.name, m.offset, m.size) for m in got] == [(m.name, m.offset, m.size) for m in expected]
    assert [m.data for m in got] == [m.data if wanted else None for m in expected]
    assert (reader.problem, reader.kind) == (None, "")
    assert (reader.size, reader.xxh3) == (len(data), xxh3_64_intdigest(data))


@pytest.mark.parametrize("kind", FORMATS)
def test_links_folders_and_devices_are_passed_over(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for name, type_ in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE),
                            ("f", tarfile.FIFOTYPE), ("c", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name * (130 if kind != tarfile.USTAR_FORMAT else 1))
            info.type, info.linkname = type_, "/etc/passwd"
            tar.addfile(info)
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    got, reader = read(path.read_bytes())
    assert got == by_tarfile(path.read_bytes())
    assert len(got) == 5
    assert reader.problem is None


def test_a_huge_member_is_found_by_its_binary_size() -> None:
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.GNU_FORMAT)
    got, reader = read(header + b"only this", wanted=False)
    assert got == []
    assert reader.kind == "truncated"
    assert "member 'big.bin'" in str(reader.problem)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_cut_is_noticed(tmp_path: Path, kind: int) -> None:
    members = [("a.png", b"x" * 700), ("a.txt", b"y" * 512), ("b" * 90 + ".png", b"z" * 10)]
    data = write_tar(tmp_path / "x.tar", members, kind).read_bytes()
    whole = by_tarfile(data)
    end = whole[-1].offset + BLOCK  # where the end mark begins
    for cut in [*range(0, end + 1, 64), 1, 511, 513, end - 1]:
        got, reader = read(data[:cut])
        assert reader.kind == "truncated", cut
        assert f"ends at byte {cut}" in str(reader.problem)
        assert (reader.size, reader.xxh3) == (cut, xxh3_64_intdigest(data[:cut]))
        assert got == whole[: len(got)]
        # a member counts once all of its blocks are there
        assert len(got) == sum(m.offset + -(-m.size // BLOCK) * BLOCK <= cut for m in whole)
    got, reader = read(data[: end + BLOCK])
    assert (got, reader.problem) == (whole, None)


def test_a_damaged_header_is_noticed_where_tarfile_ends_silently(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "x.tar", [(f"{i}.txt", b"abc") for i in range(4)]).read_bytes())
    data[2 * 1024 + 3] ^= 1
    assert len(by_tarfile(bytes(data))) == 2
    got, reader = read(bytes(data))
    assert (len(got), reader.kind) == (2, "damaged")
    assert "damaged header at byte 2048" in str(reader.problem)
    assert reader.xxh3 == xxh3_64_intdigest(bytes(data))


def test_members_behind_the_end_mark_are_noticed(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", [("a.txt", b"abc")]).read_bytes()
    got, reader = read(data + data)
    assert (len(got), reader.kind) == (1, "trailing")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_raises_or_runs_away(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name in ("a" * 120 if kind != tarfile.USTAR_FORMAT else "a", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 100
            tar.addfile(info, io.BytesIO(b"q" * 100))
    content = bytearray(buffer.getvalue()[:6144])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    _, reader = read(bytes(content))
    assert reader.size == len(content)


def test_extended_headers_cannot_fill_the_memory() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    got, reader = read(info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
    assert (got, reader.kind) == ([], "damaged")


def test_headers_that_ustar_cannot_hold_are_refused() -> None:
    assert len(member_header("a" * 100, 8**11 - 1)) == BLOCK
    with pytest.raises(ValueError, match="longer"):
        member_header("a" * 101, 1)
    with pytest.raises(ValueError, match="overflow"):
        member_header("a", 8**11)
