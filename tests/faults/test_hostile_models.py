"""Checkpoints, fine-tuning runs and configs from strangers: whatever they say ends in a model or in one
sentence, within bounded memory and time, and nothing of theirs is run or led out of its folder to."""

import copy
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import read_yaml
from diptych.finetune.predictor import Predictor
from diptych.pretrain.model import load_model
from diptych.pretrain.model_check import check_model_cfg
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver

from ..finetune.labelled import write_config, write_task
from ..finetune.runs import finetune
from ..pretrain.states import make_state, step

HOSTILE: list[Any] = [
    *(None, "", -1, 0, 3.5, True, 1e308, float("nan"), 10**9, 10**30, "x" * 100_000),
    *("../../../etc/passwd", "<script>alert(1)</script>", "hf-hub:no/such", "local-dir:/etc"),
    *([], {}, [[[]]], {"a": {"b": 1}}, [10**7] * 4),
]
TABLE = {"image": [None, None], "text": ["a red square", "blue"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a fine-tuning run made from it."""
    folder = tmp_path_factory.mktemp("made")
    write_task(folder)
    write_config(folder, "[concat, late]", epochs=1)
    finetune(folder)
    return folder


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(
    document: Any, draw: random.Random, values: Sequence[Any] = HOSTILE, *, added: float = 0.0
) -> Any:
    """The document with one value taken out or replaced, or, with probability ``added``, one more under a
    name that is such a value."""
    document = copy.deepcopy(document)
    *path, last = draw.choice(list(places(document)))
    inner = document
    for key in path:
        inner = inner[key]
    if draw.random() < 0.2:
        del inner[last]
    elif added and isinstance(inner, dict) and draw.random() < added:
        inner[str(draw.choice(values))[:300]] = copy.deepcopy(draw.choice(values))
    else:
        inner[last] = copy.deepcopy(draw.choice(values))
    return document


def damage(file: Path, draw: random.Random) -> None:
    if file.suffix == ".json" and draw.random() < 0.85:
        file.write_text(json.dumps(changed(json.loads(file.read_text()), draw)))
        return
    data = bytearray(file.read_bytes())
    match draw.randrange(3):
        case 0:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 1:
            del data[draw.randrange(len(data)) :]
        case _:
            data[:8] = draw.randbytes(8)  # the length of a safetensors header
    file.write_bytes(data)


def survive(made: Path, tmp_path: Path, seed: int, trials: int, use: Callable[[Path], object]) -> int:
    """Damage one file of a copy, use it, again and again; the number of sentences."""
    draw = random.Random(seed)
    files = sorted(p for p in made.rglob("*") if p.suffix in (".json", ".safetensors"))
    refused = 0
    for number in range(trials):
        copied = tmp_path / str(number)
        shutil.copytree(made, copied)
        damage(copied / draw.choice(files).relative_to(made), draw)
        before = time.monotonic()
        sentence = ""
        try:
            use(copied)
        except UserError as error:
            sentence = str(error)
            refused += 1
        assert len(sentence) < 1500
        assert "\n" not in sentence
        assert time.monotonic() - before < 30
        shutil.rmtree(copied)
    return refused


def predict(run: Path) -> None:
    Predictor.load(run).predict_proba(TABLE)


@pytest.mark.parametrize(("what", "use"), [("checkpoint", load_model), ("run", predict)])
def test_a_changed_folder_is_a_model_or_a_sentence(
    made: Path, tmp_path: Path, what: str, use: Callable[[Path], object]
) -> None:
    assert survive(made / what, tmp_path, 0, 25, use) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("what", "use"), [("checkpoint", load_model), ("run", predict)])
def test_a_changed_folder_is_a_model_or_a_sentence_three_hundred_times(
    made: Path, tmp_path: Path, what: str, use: Callable[[Path], object], seed: int
) -> None:
    assert survive(made / what, tmp_path, seed, 150, use) > 10


def test_a_training_state_of_somebody_else_is_taken_or_one_sentence(tmp_path: Path) -> None:
    """Hashes do not help here: who changes a file can change its hash."""
    state, draw = make_state(), random.Random(0)
    step(state)
    Saver(tmp_path, state, CheckpointConfig(asynchronous=False)).save()
    file = tmp_path / "checkpoints" / "step_00000001" / "trainer.json"
    before, refused = json.loads(file.read_text()), 0
    for _ in range(150):
        file.write_text(json.dumps(changed(before, draw)))
        sentence = str(file.parent)
        try:
            make_state(1).load(file.parent)
        except UserError as error:
            refused += 1
            sentence = str(error)
        assert str(file.parent) in sentence
    assert refused > 20


@pytest.mark.slow
def test_a_report_of_a_changed_run_holds_no_script(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(run: Path) -> None:
        if main(["report", str(run)]) != 0:
            raise UserError(capsys.readouterr().err.strip())
        assert "<script>alert" not in (run / "report.html").read_text()

    survive(made / "run", tmp_path, 3, 40, report)


def test_every_config_of_open_clip_passes() -> None:
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if "multimodal_cfg" not in config:
            check_model_cfg(config)


BIG = {
    "width": {"vision_cfg": {"width": 1 << 20, "head_width": 1 << 10}},
    "depth": {"text_cfg": {"layers": 10**9}},
    "words": {"text_cfg": {"vocab_size": 1 << 24, "width": 1 << 12}},
    "positions": {"text_cfg": {"context_length": 1 << 20}},
    "timm": {"vision_cfg": {"timm_model_name": "vit_giant_patch14_224", "image_size": 224}},
}
LIMITED = """
import resource, sys
from pathlib import Path
from diptych.configs.errors import UserError
from diptych.pretrain.model import load_model
from diptych.pretrain.model_check import check_model_cfg
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver
resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)
for folder in sys.argv[1:]:
    try:
        load_model(folder)
    except UserError as error:
        print(error)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had when it forked
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_a_config_larger_than_its_weights_costs_no_memory(made: Path, tmp_path: Path) -> None:
    for what, towers in BIG.items():
        folder = tmp_path / what
        shutil.copytree(made / "checkpoint", folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        for tower, keys in towers.items():
            config["model_cfg"][tower] |= keys
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", LIMITED, *(str(tmp_path / what) for what in BIG)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert not ended.stderr, ended.stderr
    *sentences, peak_kib = ended.stdout.splitlines()
    assert len(sentences) == len(BIG)
    for what, sentence in zip(BIG, sentences, strict=True):
        assert f"{tmp_path / what}/open_clip_" in sentence
    assert int(peak_kib) < 1 << 20  # 1 GiB, of which torch's own libraries are most


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_text_tower_is_never_offered_to_be_run(made: Path, tmp_path: Path, file: str) -> None:
    folder, ran = tmp_path / "checkpoint", tmp_path / "ran"
    shutil.copytree(made / "checkpoint", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "stranger/model", "hf_model_pretrained": False}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    own = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config", "AutoTokenizer": "evil.T"}}
    (folder / file).write_text(json.dumps(own))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UserError, match="auto_map"):
        load_model(folder)
    assert not ran.exists()


def test_no_name_of_a_head_leads_out_of_the_run(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    shutil.copytree(run / "heads" / "concat", tmp_path / "elsewhere")
    info = json.loads((run / "run.json").read_text())
    info |= {"best": "../../elsewhere", "heads": ["../../elsewhere"]}
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="no name of a head"):
        Predictor.load(run)


def bomb(start: str, line: str, times: int) -> str:
    return "\n".join([start, *(line.format(i=i, below=i - 1) for i in range(1, times))])


TEN = ", ".join(["*a{below}"] * 10)
YAML = {
    "aliases": bomb("a0: &a0 [" + "x, " * 10 + "]", "a{i}: &a{i} [" + TEN + "]", 12),
    "itself": "a: &a [*a]",
    "depth": "[" * 5000,
    "digits": "a: " + "9" * 10_000,
    "object": "a: !!python/object/apply:os.system ['touch HACKED']",
    "name": "a: !!python/name:os.system",
    "length": "a: " + "x" * (2 << 20),
    "null byte": "a: \0",
    "list as a key": "? [a]\n: b",
    "tab": "a:\n\t- b",
    "not UTF-8": "a: \udcff",
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_made_to_do_harm_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.yaml"
    file.write_bytes(YAML[what].encode("utf-8", "surrogateescape"))
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5
    assert not (tmp_path / "HACKED").exists()


def test_yaml_of_random_bytes_is_read_or_one_sentence(tmp_path: Path) -> None:
    draw, file = random.Random(0), tmp_path / "x.yaml"
    pieces = ["a: ", "&b ", "*b", "- ", "\n", "  ", "{", "}", "[", "]", "? ", ": ", "!!int ", "!x "]
    pieces += ["|\n", "<<: ", "base: ", "~", "1e9", "0x", ".nan", "%YAML 1.2\n", "---\n"]
    pieces += ["'", '"', "\x85", "\ufeff", "é"]
    refused = 0
    for _ in range(1500):
        file.write_text("".join(draw.choices(pieces, k=draw.randrange(1, 14))))
        try:
            read_yaml(file)
        except UserError:
            refused += 1
    assert 100 < refused < 1500
