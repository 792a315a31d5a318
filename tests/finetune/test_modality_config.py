"""What a config may say of modalities, and what every mistake is told with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.configs.load import load_config, to_yaml
from diptych.finetune.adapt.training import Training
from diptych.finetune.config import AdaptConfig, FinetuneConfig, HeadConfig, StoppingConfig
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.tasks.task import Task

from .modal import CONFIG, MODALITIES


def load(folder: Path, *words: str) -> FinetuneConfig:
    text = CONFIG.format(folder=folder, heads="[gated]", modalities=MODALITIES, epochs=1)
    (folder / "finetune.yaml").write_text(text, encoding="utf-8")
    return load_config(FinetuneConfig, folder / "finetune.yaml", list(words))


def test_every_modality_is_a_baseline_and_the_config_runs_again(tmp_path: Path) -> None:
    config = load(tmp_path, "heads={wide: {op: tabular, width: 8}, late: {op: late}}")
    assert list(config.all_heads()) == ["image", "text", "tabular", "audio", "concat", "wide", "late"]
    assert config.singles() == ["image", "text", "tabular", "audio", "wide"]
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(FinetuneConfig, tmp_path / "again.yaml", []) == config


def test_modalities_without_encoders_stay_linear_probes_where_others_are_tuned(tmp_path: Path) -> None:
    config = load(tmp_path, "adapt={method: lora, lora_rank: 2}")
    methods = {name: config.adapt_of(name).method for name in config.all_heads()}
    assert methods == {
        "image": "lora", "text": "lora", "tabular": "linear_probe", "audio": "linear_probe", "concat": "lora",
        "gated": "lora",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.modalities.audio={column: sound}", "is called image or text; rename it"),
        ("data.modalities.concat={embedding: sound}", "'concat' cannot name a modality"),
        ("data.modalities.group={embedding: sound}", "'group' cannot name a modality"),
        ("data.modalities.image_tokens={embedding: sound}", "'image_tokens' cannot name a modality"),
        ("data.modalities.items={embedding: sound}", "'items' cannot name a modality"),
        ("data.modalities.a-b={embedding: sound}", "use letters, digits and _"),
        ("data.modalities.audio={}", "give one of them"),
        ("data.modalities.audio={embedding: sound, numeric: [price]}", "give one of them"),
        ("data.modalities.tabular={numeric: [price, price]}", "'price' stands twice"),
        ("data.modalities.tabular={numeric: [target]}", "'target' is what task.target asks"),
        ("data.modalities.text={column: text, pool: mean}", "pool is for pictures"),
        ("data.modalities.image={column: image, separator: '|'}", "set pool: mean or attention"),
        ("data.modalities.image={embedding: sound}", "image: it is read by the checkpoint's tower"),
        ("heads={joint: {op: joint}}", "joint reads image and text alone, not tabular"),
        ("heads={tabular: {op: concat}}", "'tabular' is the name of the baseline"),
        ("heads={t: {op: tabular, rank: 3}}", "rank is no option of a modality alone, as tabular"),
        ("heads={t: {op: tabluar}}", "data.modalities has no tabluar; did you mean 'tabular'?"),
        ("heads={t: {op: tabular, adapt: {method: lora}}}", "none is read by this head"),
    ],
)
def test_mistakes_are_told_in_one_sentence(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, words)
    assert said in str(error.value)


def test_dropout_of_three_modalities_hides_any_of_them_together_but_never_all() -> None:
    names = ("image", "text", "tabular")
    head = build_head(HeadConfig(op="concat"), dict.fromkeys(names, 4), 1)
    adapt = AdaptConfig(modality_dropout=0.4)
    training = Training(head, Task("binary", ("0", "1")), adapt, StoppingConfig(), 0, lambda row: None)
    seen: list[tuple[bool, ...]] = []
    original = head.parts

    def watch(features: Any, present: dict[str, torch.Tensor]) -> Any:
        seen.extend(zip(*(present[k].tolist() for k in names), strict=True))
        return original(features, present)

    head.parts = watch
    n = 4000
    given = {k: torch.ones(n, dtype=torch.bool) for k in names}
    given["image"][: n // 2] = False
    torch.manual_seed(0)
    training.loss({k: torch.randn(n, 4) for k in names}, given, torch.zeros(n, dtype=torch.long))
    assert set(seen[n // 2 :]) == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if a or b or c
    }
    whole = sum(all(row) for row in seen[n // 2 :]) / (n // 2)
    assert abs(whole - 0.6) < 0.04
    assert set(seen[: n // 2]) == {(False, True, True), (False, True, False), (False, False, True)}
