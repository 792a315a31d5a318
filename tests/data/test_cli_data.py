"""``diptych data`` as a user runs it: what it prints where, exit codes, one sentence per mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from diptych.cli import data_build as command
from diptych.cli import data_verify
from diptych.cli.main import main
from diptych.data import overlap
from diptych.data.shards import open_shards

from .samples import flip, picture, sample_members, samples, write, write_tar
from .test_foreign import HALF, half_samples


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["data", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_build_example_works_as_pasted(tmp_path: Path) -> None:
    text = command.BUILD.partition("\n\n")[0]
    lines = [line.strip() for line in text.splitlines()[1:]]
    assert any(line.startswith("diptych data build") for line in lines)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("diptych", "-m diptych.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout == "wrote 2 of 2 rows into 1 shards in my-shards\n"
    shards = open_shards(tmp_path / "my-shards")
    assert [shards.read(i).caption for i in range(2)] == ["a red square", "a blue square"]
    assert [shards.read(i).meta["mood"] for i in range(2)] == ["warm", "cold"]


def test_build_prints_the_bad_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "t.csv").write_text("image,caption\na.png,good\nb.png,absent\n")
    table, out = str(tmp_path / "t.csv"), str(tmp_path / "out")
    code, printed, said = run(capsys, "build", table, "--out", out, "--max-bad-fraction", "0.5")
    assert code == 0
    assert printed == (
        f"wrote 1 of 2 rows into 1 shards in {out}\nleft out 1 bad rows, named in {out}/quarantine.jsonl\n"
    )
    assert f"{table}: row 2: missing: there is no file b.png in {tmp_path}" in said
    code, printed, said = run(capsys, "build", table, "--out", out)
    assert (code, printed) == (2, "")
    assert said.startswith(f"error: {out} holds shards already")
    code, _, said = run(capsys, "build", table, "--out", out, "--overwrite")
    assert code == 2
    assert "1 of 2 rows are bad" in said
    assert len(open_shards(out)) == 1


def test_build_says_what_it_kept_and_what_it_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    lines = ["image,caption", "a.png,1", "b.png,2", "c.png,3", "d.png,4", "none.png,5"]
    table, out = tmp_path / "t.csv", str(tmp_path / "out")
    table.write_text("\n".join(lines))
    words = ["build", str(table), "--out", out, "--samples-per-shard", "2", "--no-decode"]
    assert run(capsys, *words)[0] == 2
    table.write_text("\n".join(lines).replace("c.png,3", "c.png,three"))
    code, printed, _ = run(capsys, *words, "--max-bad-fraction", "0.2")
    assert code == 0
    assert printed.splitlines()[:3] == [
        "3 of 5 rows were finished by a build that was stopped, and are kept",
        "2 rows of a build that was stopped are made anew: they or the settings have changed",
        f"wrote 4 of 5 rows into 2 shards in {out}",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["build", "x.csv"], "--out"),
        (["build", "x.csv", "--out", "o", "--samples-per-shard", "0"], "must be at least 1"),
        (["build", "x.csv", "--out", "o", "--samples-per-shard", "many"], "many"),
        (["build", "x.csv", "--out", "o", "--max-bad-fraction", "2"], "between 0 and 1"),
        (["build", "absent.csv", "--out", "o"], "there is no absent.csv"),
        (["verfy", "x"], "did you mean 'verify'?"),
        (["verify", "absent"], "there is no folder absent"),
        (["index", "absent"], "there is no folder absent"),
        (["stats", "absent"], "there is no folder absent"),
        (["verify", "corpus:absent"], "diptych data fetch"),
        (["verify", "s3://bucket/shards"], "s3://bucket/shards is not on this machine"),
        (["index", "s3://bucket/shards"], "copy the shards to a folder"),
        (["fetch", "cats"], "cats"),
        (["verify", "x", "--decod"], "did you mean --decode?"),
    ],
)
def test_every_mistake_is_one_sentence(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, said = run(capsys, *words)
    assert (code, printed) == (2, "")
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert expected in said
    assert list(tmp_path.iterdir()) == []


def test_no_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys)
    assert code in (0, 2)
    for name in ("fetch", "build", "index", "verify", "stats", "trace"):
        assert name in printed


def test_verify_exits_with_1_and_names_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write(tmp_path, samples(4)))
    assert run(capsys, "verify", folder)[:2] == (
        0, f"verified 4 usable samples in 1 shards in {folder}: all is well\n"
    )  # fmt: skip
    flip(tmp_path / "00000.tar", int(open_shards(folder).records(0)[2]["image_offset"]) + 40)
    code, printed, said = run(capsys, "verify", folder)
    assert code == 1
    assert "2 faults (hash 2)" in printed
    assert "00000.tar: sample 'key-0002': hash: its image has changed since it was indexed" in said
    code, printed, said = run(capsys, "verify", folder, "--json", "--decode")
    report = json.loads(printed)
    assert (code, report["ok"], said) == (1, False, "")
    assert {"shard": "00000.tar", "key": "key-0002", "reason": "hash",
            "detail": "its image has changed since it was indexed"} in report["findings"]  # fmt: skip


def test_verify_against_an_evaluation_set_writes_the_filter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (data_verify.MATCHES, data_verify.MAX_DISTANCE) == (overlap.MATCHES, overlap.MAX_DISTANCE)
    content = samples(6)
    train, test = write(tmp_path / "train", content), write(tmp_path / "test", samples(2, first=50))
    words = ["verify", str(train), "--against", str(test), "--workers", "1"]
    code, printed, said = run(capsys, *words)
    assert (code, said) == (0, "")
    assert printed == f"compared 6 samples of {train} with {test}: none stands there\n"
    write(tmp_path / "other", [("x", content[4][1], content[4][2], "Picture NUMBER 1 \N{CAT FACE}", {})])
    words += ["--against", str(tmp_path / "other"), "--match", "image", "caption"]
    code, printed, said = run(capsys, *words, "--write-filter", str(tmp_path / "drop.parquet"))
    assert code == 1
    assert "2 also stand there (caption 1, image 1)" in printed
    assert (
        f"train without them with 'data.train=[{{data: {train}, drop: {tmp_path}/drop.parquet}}]'" in printed
    )
    assert (
        f"00000.tar: sample 'key-0001': caption: its caption is that of sample 'x' of {tmp_path}/other"
        in said
    )
    assert pyarrow.parquet.read_table(tmp_path / "drop.parquet")["key"].to_pylist() == [
        "key-0001",
        "key-0004",
    ]
    code, printed, _ = run(capsys, *words, "--json")
    assert (code, json.loads(printed)["matched"], json.loads(printed)["ok"]) == (1, 2, False)
    code, _, said = run(capsys, "verify", str(train), "--write-filter", "x.parquet")
    assert (code, "--write-filter needs --against" in said) == (2, True)


def test_verify_names_copies_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = samples(3)
    folder = str(write(tmp_path, [*content, ("copy", content[0][1], "png", "again", {})]))
    code, printed, _ = run(capsys, "verify", folder)
    assert code == 0
    assert "note: 1 images are copies; --duplicates names them all: sample 'copy' of 00000.tar" in printed
    code, printed, said = run(capsys, "verify", folder, "--duplicates")
    assert (code, "1 faults (duplicate-image 1)" in printed) == (1, True)
    assert "00000.tar: sample 'copy': duplicate-image: its image is that of sample 'key-0000'" in said


def test_limits_can_be_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write(tmp_path, [("big", picture(size=(700, 700)), "png", "more than a megabyte", {})]))
    assert run(capsys, "verify", folder)[0] == 0
    for limit in (["--max-image-mb", "1"], ["--max-pixels", "489999"]):
        code, printed, _ = run(capsys, "verify", folder, *limit)
        assert (code, "1 faults (size 1)" in printed) == (1, True)
    code, _, said = run(capsys, "verify", folder, "--max-image-mb", "257")
    assert (code, "must be from 1 to 256" in said) == (2, True)


def test_many_faults_are_counted_after_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}.png", picture()) for i in range(30)])
    code, printed, said = run(capsys, "verify", str(tmp_path))
    assert code == 1
    assert said.count("\n") == 21
    assert "... and 10 more" in said
    assert "note: no manifest.jsonl" in printed


def test_index_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", half_samples())
    code, printed, said = run(capsys, "index", str(tmp_path))
    assert code == 0
    assert f"indexed 2 samples in 1 shards in {tmp_path}\nleft out {len(HALF)} samples" in printed
    assert "0.tar: sample 'c-text': missing: it has no image" in said
    code, printed, _ = run(capsys, "index", str(tmp_path), "--overwrite", "--json")
    assert code == 0
    assert json.loads(printed)["samples"] == 2
    assert json.loads(printed)["reasons"]["caption"] == 3


def test_index_takes_captions_from_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", picture()), ("a.json", b'{"alt": "words"}')])
    code, _, said = run(capsys, "index", str(tmp_path))
    assert code == 2
    assert "choose with --caption-key" in said
    assert run(capsys, "index", str(tmp_path), "--caption-key", "alt")[0] == 0
    assert open_shards(tmp_path).read(0).caption == "words"


def test_stats_prints_tables_json_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = samples(9)
    content += [
        ("again", content[0][1], "png", "a [bold] caption", {}),
        ("more", *content[1][1:3], "a [bold] caption", {}),
    ]
    folder = str(write(tmp_path / "s[1]", content))  # square brackets are no markup
    sheet = tmp_path / "sheet.png"
    code, printed, _ = run(capsys, "stats", folder, "--sheet", str(sheet))
    assert code == 0
    assert f"{folder}: 11 samples in 3 shards" in printed
    assert "copied images: 2 (18.18 %)" in printed
    assert "a [bold] caption      2" in printed
    assert "shorter side, pixels" in printed
    assert f"wrote {sheet}" in printed
    assert sheet.read_bytes().startswith(b"\x89PNG")
    code, printed, said = run(capsys, "stats", folder, "--json", "--sheet", str(sheet))
    assert (code, json.loads(printed)["samples"]) == (0, 11)
    assert "wrote" in said


def test_trace_prints_the_same_order_for_every_topology(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "shards", samples(30))
    recipe = str(Path(__file__).parents[2] / "configs/demo/pretrain.yaml")
    words = [recipe, f"data.train={folder}", "train.global_batch_size=6", "--epoch", "2", "--start", "1"]
    code, one, _ = run(capsys, "trace", *words)
    assert code == 0
    lines = [json.loads(line) for line in one.splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(2, step) for step in range(1, 5)]
    ids = [i for line in lines for i in line["sample_ids"]]
    assert len(set(ids)) == len(ids) == 24
    assert run(capsys, "trace", *words, "--world-size", "3", "--workers", "2")[1] == one
    assert run(capsys, "trace", *words, "--steps", "1", "seed=5")[1] != one.splitlines()[0] + "\n"
    code, _, said = run(capsys, "trace", str(tmp_path / "none.yaml"))
    assert (code, said.count("\n")) == (2, 1)


def test_nothing_is_printed_on_standard_output_but_results(tmp_path: Path) -> None:
    """In a real process: bars go to standard error, and vanish where it is no terminal."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", sample_members(samples(2)))
    words = [sys.executable, "-m", "diptych.cli", "data", "index", str(tmp_path), "--workers", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"indexed 6 samples in 3 shards in {tmp_path}\n"
    assert done.stderr.strip() == ""
