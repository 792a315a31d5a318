"""The ``diptych`` command: quick to answer, every example works as pasted, every mistake is one sentence."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.cli import report as report_command
from diptych.cli.main import COMMANDS, build_parser, main, parse_line
from diptych.configs.errors import UserError

from .commands import check_words, diptych_words, joined_lines
from .repository import ROOT

DATA_COMMANDS = ("fetch", "build", "index", "verify", "stats", "trace")
LINES = [(name,) for name in COMMANDS] + [("data", name) for name in DATA_COMMANDS]
PRETRAIN = str(ROOT / "configs/demo/pretrain.yaml")
FINETUNE = str(ROOT / "configs/demo/finetune_match.yaml")


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command line is refused."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_help_has_an_example_that_works_as_pasted(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(words, capsys)
    if words == ("data",):
        return
    examples = [found for line in joined_lines(text) if (found := diptych_words(line))]
    assert examples, "no example"
    for example in examples:
        assert tuple(example[: len(words)]) == words
        check_words(example)


def test_the_first_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    for line in joined_lines(build_parser().epilog or ""):
        if words := diptych_words(line):
            check_words(words)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from diptych.cli.main import build_parser; build_parser(); "
        "print(sorted({'torch', 'numpy', 'open_clip', 'pyarrow', 'rich', 'wandb', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert f'version = "{capsys.readouterr().out.split()[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_overrides_may_stand_before_and_after_options() -> None:
    args = parse_line(["evaluate", "run", "a=1", "--config", "x.yaml", "b=2", "c=3"])
    assert (args.checkpoint, args.config, args.overrides) == ("run", "x.yaml", ["a=1", "b=2", "c=3"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian", "x.yaml"], "did you mean 'pretrain'?"),
        (["data", "fecth", "icons"], "did you mean 'fetch'?"),
        (["xyz"], "known are data, pretrain"),
        (["evaluate", "run", "--confg", "x.yaml"], "did you mean --config?"),
        (["evaluate"], "checkpoint"),
        (["report", "--out"], "--out"),
    ],
)
def test_a_line_that_does_not_parse_names_the_mend(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused(words, capsys)
    assert expected in sentence
    assert "--help" in sentence


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["pretrain", PRETRAIN, "optim.lrr=1"], ["optim.lrr", "did you mean 'lr'?"]),
        (["pretrain", PRETRAIN, "optim.lr=fast"], ["optim.lr", '"fast"', "number"]),
        (["pretrain", PRETRAIN, "train.precision=bf17"], ["train.precision", "did you mean bf16?"]),
        (["pretrain", PRETRAIN, "lr"], ["override 'lr'", "key=value"]),
        (["pretrain", PRETRAIN, "data.train=nowhere", "out=run"], ["nowhere"]),
        (["finetune", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["finetune", FINETUNE, "eval.seds=[1]"], ["eval.seds", "did you mean 'seeds'?"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["evaluate", "nowhere", "bootstrp=3"], ["bootstrp", "did you mean 'bootstrap'?"]),
        (["report", "nowhere"], ["nowhere", "is not there"]),
        (["report"], ["no runs"]),
        (["data", "verify", "nowhere"], ["nowhere"]),
        (["data", "build", "nowhere.csv", "--out", "out"], ["nowhere.csv"]),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value),
)
def test_a_mistake_ends_in_one_sentence(
    words: list[str],
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refused(words, capsys)
    assert [part for part in expected if part not in sentence] == [], sentence


def test_a_broken_config_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("train: {epochs: 1\nname: x\n")
    assert "a.yaml is not YAML" in refused(["pretrain", str(tmp_path / "a.yaml")], capsys)
    (tmp_path / "b.yaml").write_text("name: a\nname: b\n")
    assert "key 'name' stands twice" in refused(["pretrain", str(tmp_path / "b.yaml")], capsys)


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EACCES, "the right to use it"),
        (errno.EROFS, "make it writable"),
        (errno.EIO, "its disk or server is well"),
    ],
)
def test_what_the_machine_refuses_is_told_with_its_file(
    number: int, mend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(number, "Said by the system", "runs/a/report.html")

    monkeypatch.setattr(report_command, "run", full)
    sentence = refused(["report"], capsys)
    assert sentence.startswith("error: runs/a/report.html: said by the system; ")
    assert mend in sentence


def test_debug_shows_the_traceback_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["--debug", "report", "nowhere"],
        ["report", "--debug", "nowhere"],
        ["report", "nowhere", "--debug"],
    ):
        with pytest.raises(UserError):
            main(words)


def test_an_interrupted_command_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_command, "run", interrupted)
    assert main(["report", "a run"]) == 130
    assert capsys.readouterr().err.endswith("go on with: diptych report 'a run'\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -c 'import sys; from diptych.cli.main import main; sys.exit(main())'"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} --help | true"], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
