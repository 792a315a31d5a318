"""Every recipe that ships is valid for its class, says what it is, and can be written and read again."""

from pathlib import Path

import pytest

from diptych.configs.load import StrictModel, load_config, to_yaml
from diptych.finetune.config import FinetuneConfig
from diptych.pretrain.config import PretrainConfig

from .repository import ROOT, tracked

RECIPES = [path for path in tracked() if path.parts[0] == "configs" and path.suffix in (".yaml", ".yml")]


def config_class(path: Path) -> type[StrictModel]:
    """``configs/demo/finetune_match.yaml`` and ``configs/finetune/any.yaml`` alike: the last word that says
    what runs it."""
    words = path.with_suffix("").as_posix()
    return FinetuneConfig if "finetune" in words else PretrainConfig


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_is_valid_and_says_what_it_is(path: Path, tmp_path: Path) -> None:
    cls = config_class(path)
    config = load_config(cls, ROOT / path)
    assert (ROOT / path).read_text(encoding="utf-8").startswith("# "), "a recipe begins with what it is"
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(cls, tmp_path / "again.yaml") == config


def test_the_recipes_of_the_demo_are_there() -> None:
    names = {str(path) for path in RECIPES}
    assert {"configs/demo/pretrain.yaml", "configs/demo/finetune_match.yaml"} <= names
