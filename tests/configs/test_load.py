"""Configs from YAML: what is read, what is refused, and in which words."""

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from diptych.configs.errors import UserError
from diptych.configs.load import StrictModel, load_config, read_yaml, to_yaml


class Optim(StrictModel):
    lr: float = 1e-3
    warmup_steps: int | None = None
    kind: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, ...] = (0.9, 0.98)


class Config(StrictModel):
    optim: Optim = Optim()
    out: str | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    flag: bool = False


def load(text: str, tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(Config, path, overrides)


def test_numbers_and_booleans_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    got = load("{optim: {lr: 5e-4, betas: [.5, 1]}, out: no, flag: true}", tmp_path)
    assert got == Config(optim=Optim(lr=5e-4, betas=(0.5, 1.0)), out="no", flag=True)


def test_bases_lie_under_the_file_and_overrides_above_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{optim: {lr: 1, warmup_steps: 2}, out: a}")
    (tmp_path / "b.yaml").write_text("{optim: {lr: 3}}")
    got = load("{base: [a.yaml, b.yaml], out: c}", tmp_path, "optim.kind=linear", "weights.x=2")
    assert got == Config(optim=Optim(lr=3, warmup_steps=2, kind="linear"), out="c", weights={"x": 2})


@given(
    st.builds(
        Config,
        optim=st.builds(
            Optim,
            lr=st.floats(allow_nan=False, allow_infinity=False),
            warmup_steps=st.none() | st.integers(),
        ),
        out=st.none()
        | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]))
        | st.sampled_from(["no", "5e-4", "1", "null", "12:30", "2020-01-01", "~", "0x1", " a", "a: b", ".5"]),
        weights=st.dictionaries(st.sampled_from(["a", "yes", "1", "x y"]), st.floats(-1e9, 1e9)),
        flag=st.booleans(),
    )
)
def test_a_written_config_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Config, path) == config


MISTAKES: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("{optim: {warmup_step: 1}}", ["optim.warmup_step", "did you mean 'warmup_steps'?"]),
    "unknown section": ("{optm: {}}", ["optm", "did you mean 'optim'?"]),
    "nothing near": ("{zzz: 1}", ["zzz", "known here: flag, optim, out, weights"]),
    "wrong type": ("{optim: {lr: ten}}", ["optim.lr", '"ten"']),
    "no silent conversion": ("{optim: {warmup_steps: 1.5}}", ["optim.warmup_steps", "1.5"]),
    "typo in a value": ("{optim: {kind: cosin}}", ["optim.kind", "did you mean cosine?"]),
    "two at once": ("{optim: {lr: ten}, outt: x}", ["optim.lr", "outt"]),
    "a key twice": ("out: a\nout: b\n", ["out", "twice"]),
    "a list": ("[1, 2]", ["keys and values", "list"]),
    "not YAML": ("{a: [", ["is not YAML"]),
    "a base that is not there": ("{base: gone.yaml}", ["gone.yaml", "no such file"]),
    "its own base": ("{base: config.yaml}", ["config.yaml", "includes itself"]),
    "an odd base": ("{base: 3}", ["base", "list of YAML files"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_its_key_and_the_mend(name: str, tmp_path: Path) -> None:
    text, words = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        load(text, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "config.yaml" in message or "gone.yaml" in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=1", "optim.lr=[", "optim.lrr=1"])
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"lr|key=value"):
        load_config(Config, None, [override])


def test_a_missing_file_and_a_binary_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_yaml(tmp_path / "binary.yaml")


def test_nothing_is_executed_by_a_config(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"out: !!python/object/apply:os.system ['touch {canary}']"
    with pytest.raises(UserError, match="is not YAML"):
        load(text, tmp_path)
    assert not canary.exists()


def test_an_override_of_a_scalar_by_a_mapping_keeps_the_file_as_it_was() -> None:
    data: Any = {"optim": {"lr": 1.0}}
    first = load_config(Config, None, ["optim={lr: 2}", "optim.kind=linear"])
    assert first.optim == Optim(lr=2.0, kind="linear")
    assert data == {"optim": {"lr": 1.0}}
