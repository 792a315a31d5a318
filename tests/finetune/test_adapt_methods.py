"""Every way to train the encoders: that it learns, what it moves, and what it leaves as it was."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.configs.errors import UserError
from diptych.data.text import tokenizer_for
from diptych.finetune.adapt.class_contrast import ClassContrast, ClassTexts
from diptych.finetune.adapt.encoders import (
    check_methods,
    class_texts,
    encoder_groups,
    norms_and_biases,
    open_encoders,
)
from diptych.finetune.adapt.fit import Fitted, logits_of
from diptych.finetune.adapt.retention import mean_retention, retention
from diptych.finetune.config import AdaptConfig, FinetuneConfig, StoppingConfig
from diptych.finetune.tasks.task import Task, metric_value
from diptych.pretrain.model import LoadedModel, ModelConfig, build_model, load_model, open_clip_config

from .corners import PROMPTS, TASK, checkpoint, corners, frozen, train
from .labelled import live_rows

METHODS: dict[str, dict[str, Any]] = {
    "lp_ft": {"method": "lp_ft"},
    "full": {"method": "full"},
    "norm_bias": {"method": "norm_bias", "encoder_lr": 1e-2},
    "lora": {"method": "lora", "lora_rank": 4, "encoder_lr": 1e-2},
    "lora, all layers": {"method": "lora", "lora_targets": "all", "encoder_lr": 1e-2},
    "contrastive": {"method": "contrastive", "class_prompts": PROMPTS},
}


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(checkpoint(tmp_path / "checkpoint"))


def inner_auroc(fitted: Fitted, model: LoadedModel) -> float:
    inner = corners(model, 80, 2)
    p = TASK.probabilities(logits_of(fitted.head, inner.rows))
    return metric_value("auroc", inner.targets.numpy(), p)


@pytest.fixture(scope="module")
def frozen_auroc(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What a head reaches on the checkpoint's own features."""
    model = load_model(checkpoint(tmp_path_factory.mktemp("frozen") / "checkpoint"))
    return inner_auroc(train(model, method="linear_probe")[0], model)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_what_frozen_features_do_not_tell(
    name: str, model: LoadedModel, frozen_auroc: float
) -> None:
    pretrained = copy.deepcopy(model.clip.state_dict())
    fitted, log = train(model, **METHODS[name])
    after = inner_auroc(fitted, model)
    assert after > frozen_auroc + 0.04
    assert after == pytest.approx(max(row["inner_auroc"] for row in log if "phase" not in row), abs=1e-3)
    assert [row["epoch"] for row in log] == list(range(len(log)))
    assert fitted.model is model
    assert model.clip.state_dict().keys() == pretrained.keys()  # plain weights, whatever the method
    numbers = sum(p.numel() for p in model.clip.parameters())
    assert 0 < fitted.trained < numbers
    text = {k for k, v in model.clip.text.state_dict().items() if not v.equal(pretrained[f"text.{k}"])}
    assert bool(text) == (name == "contrastive")  # the head reads pictures; texts of classes read texts


def test_the_head_is_alone_before_the_encoders_join_but_in_full(model: LoadedModel) -> None:
    for method, first in (("lp_ft", 6), ("norm_bias", 6), ("lora", 6), ("full", 0)):
        _, log = train(model, method=method, encoder_epochs=1)
        assert len(log) == first + 1
        assert log[-1]["samples_seen"] == 160 * (first + 1)


NORMS = {
    *(f"visual.{k}.{end}" for k in ("ln_pre", "ln_post") for end in ("weight", "bias")),
    *(f"text.ln_final.{end}" for end in ("weight", "bias")),
    *(
        f"{tower}.transformer.resblocks.0.{k}"
        for tower in ("visual", "text")
        for k in (
            "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "attn.in_proj_bias",
            "attn.out_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias",
        )
    ),
}  # fmt: skip


def test_norm_bias_moves_norms_and_biases_and_nothing_else(model: LoadedModel) -> None:
    before = copy.deepcopy(model.clip.state_dict())
    fitted, _ = train(model, method="norm_bias", op="concat", epochs=2, encoder_lr=1e-2, encoder_epochs=2)
    moved = {name for name, value in model.clip.state_dict().items() if not value.equal(before[name])}
    assert moved == NORMS
    assert fitted.trained == sum(before[name].numel() for name in NORMS)


def test_norms_of_timms_towers_are_norms_too() -> None:
    import timm

    convolutions = timm.create_model("test_efficientnet", num_classes=0)
    chosen = norms_and_biases(convolutions)
    assert {"bn1.weight", "bn1.bias"} < chosen
    assert not any("conv" in name and name.endswith("weight") for name in chosen)
    squeeze = [name for name, _ in convolutions.named_parameters() if "se." in name]
    assert chosen.issuperset(name for name in squeeze if name.endswith("bias"))


def test_lora_moves_the_weights_it_names_by_a_matrix_of_its_rank(model: LoadedModel) -> None:
    before = copy.deepcopy(model.clip.state_dict())
    train(model, method="lora", op="bilinear", lora_rank=2, encoder_epochs=2)
    moved = {
        name: value - before[name]
        for name, value in model.clip.state_dict().items()
        if not value.equal(before[name])
    }
    attention = ("attn.in_proj_weight", "attn.out_proj.weight")
    assert set(moved) == {f"{t}.transformer.resblocks.0.{k}" for t in ("visual", "text") for k in attention}
    for name, change in moved.items():
        for part in change.double().chunk(3 if "in_proj" in name else 1):
            singular = torch.linalg.svdvals(part)
            assert singular[1] > 1e-5
            assert singular[2:].max() < 1e-6


@pytest.mark.parametrize("method", ["lp_ft", "full", "lora", "contrastive"])
def test_a_layer_of_the_encoders_without_gradient_is_found_at_once(method: str, model: LoadedModel) -> None:
    model.clip.visual.attention_of_no_use = nn.Linear(24, 24)
    with pytest.raises(AssertionError, match=r"attention_of_no_use\S* gets no gradient"):
        train(model, method=method, class_prompts=PROMPTS)


def test_the_rates_of_the_encoders_fall_from_layer_to_layer(model: LoadedModel) -> None:
    for method in ("lp_ft", "lora"):
        # one of the literals
        adapt = AdaptConfig(method=method, lr=1e-2, encoder_lr=1e-4, encoder_layer_decay=0.5)  # type: ignore[arg-type]
        open_encoders(model, ["image", "text"], adapt)
        names = {parameter: name for name, parameter in model.clip.named_parameters()}
        rates = {
            names[p]: 1e-2 * group["lr_scale"]
            for group in encoder_groups(model, adapt)
            for p in group["params"]
        }
        assert rates.keys() == {n for n, p in model.clip.named_parameters() if p.requires_grad}
        for name, rate in rates.items():
            # tiny towers have embeddings (0), one block (1), whose group the last norm shares, projection (2)
            layer = 1 if "resblocks" in name or "ln_post" in name or "ln_final" in name else 0
            layer = 2 if name in ("visual.proj", "text.text_projection") else layer
            assert rate == pytest.approx(1e-4 * 0.5 ** (2 - layer)), name


def test_layer_decay_keeps_early_layers_where_they_were(tmp_path: Path) -> None:
    def moved(decay: float) -> float:
        model = load_model(checkpoint(tmp_path / "checkpoint"))
        before = copy.deepcopy(model.clip.state_dict())
        train(model, method="full", encoder_epochs=1, encoder_layer_decay=decay)
        after = model.clip.state_dict()
        early, late = (
            float((after[k] - before[k]).abs().mean()) for k in ("visual.conv1.weight", "visual.proj")
        )
        return early / late

    assert moved(0.1) < 0.05 * moved(1.0)


def test_the_contrastive_loss_is_infonce_with_every_row_of_a_class_a_match(model: LoadedModel) -> None:
    adapt = AdaptConfig(method="contrastive", class_prompts=PROMPTS)
    texts = ClassTexts(model, class_texts(adapt, ("0", "1")), ("image", "text"), 1)
    training = ClassContrast(texts, TASK, adapt, StoppingConfig(), 0, lambda row: None)
    part = corners(model, 12, 3)
    features, present = part.rows.batch(torch.arange(12))
    present["text"] = torch.arange(12) < 7
    torch.manual_seed(5)
    loss = training.loss(features, present, part.targets)
    torch.manual_seed(5)
    drawn = texts.draw(part.targets)
    assert {texts.texts[i] for i in drawn.tolist()} == {"red corner", "a red one", "blue corner"}
    anchors = model.encode_captions([texts.texts[i] for i in drawn]).double()
    expected: list[Tensor] = []
    for k in ("image", "text"):
        rows = present[k]
        logits = model.logit_scale * features[k][rows].double() @ anchors[rows].T
        same = (part.targets[rows][:, None] == part.targets[rows]).double()
        q = same / same.sum(1, keepdim=True)
        expected.append(
            -((q * logits.log_softmax(1)).sum(1) + (q * logits.T.log_softmax(1)).sum(1)).mean() / 2
        )
    assert loss.item() == pytest.approx(float(torch.stack(expected).mean().detach()), rel=1e-5)


def test_zero_shot_answers_are_softmaxes_of_cosines_with_the_classes_texts(model: LoadedModel) -> None:
    prompts = {"a": ["red square", "a red one"], "b": ["blue square"], "c": ["gold"]}
    part = corners(model, 6, 3)
    features, present = (dict(given) for given in part.rows.batch(torch.arange(6)))
    present["text"] = torch.tensor([True, False] * 3)
    features["text"] = features["text"] * present["text"][:, None]
    classes = torch.stack([F.normalize(model.encode_captions(t).mean(0), dim=0) for t in prompts.values()])
    z = torch.stack(
        [
            (features["image"][i] + features["text"][i]) / 2 if present["text"][i] else features["image"][i]
            for i in range(6)
        ]
    )
    truth = (model.logit_scale * z @ classes.T).detach()
    head = ClassTexts(model, prompts, ("image", "text"), 3).eval()
    with torch.no_grad():
        torch.testing.assert_close(head(features, present), truth, atol=1e-5, rtol=1e-5)
        two = ClassTexts(model, dict(list(prompts.items())[:2]), ("image", "text"), 1).eval()
        torch.testing.assert_close(
            two(features, present)[:, 0], truth[:, 1] - truth[:, 0], atol=1e-5, rtol=1e-5
        )


def test_contrastive_that_does_not_help_leaves_head_and_encoders_as_they_were(model: LoadedModel) -> None:
    before = copy.deepcopy(model.clip.state_dict())
    prompts = {"0": "red square", "1": "red square"}  # nothing can be learnt from these
    fitted, log = train(model, method="contrastive", class_prompts=prompts, encoder_lr=10.0, epochs=2)
    probe, probe_log = train(load_model_again(model, before), method="linear_probe", epochs=2)
    assert fitted.facts["alpha"] == 0
    assert fitted.best_epoch == probe.best_epoch
    assert log[:2] == probe_log
    assert all(torch.equal(v, before[k]) for k, v in model.clip.state_dict().items())
    for name, value in probe.head.state_dict().items():
        assert torch.equal(value, fitted.head.state_dict()[name])


def load_model_again(model: LoadedModel, state: dict[str, Tensor]) -> LoadedModel:
    model.clip.load_state_dict(state)
    return model


def test_retention_is_the_mean_recall_of_a_brute_force_count(model: LoadedModel) -> None:
    part = corners(model, 40, 4)
    rows: Any = part.rows
    images, texts = rows.rows.cells["image"], rows.rows.cells["text"]
    images[3] = texts[5] = None
    got = retention(rows, part.targets, TASK, AdaptConfig())
    pairs = [i for i in range(40) if part.targets[i] == 1 and images[i] and texts[i]]
    features = rows.batch(torch.tensor(pairs))[0]
    said = [texts[i] for i in pairs]
    captions = sorted(set(said))
    c = model.encode_captions(captions)
    hits: list[float] = []
    similar = (features["image"].detach() @ c.T).numpy()
    for k in (1, 5, 10):
        hits.append(
            np.mean(
                [said[i] in [captions[j] for j in np.argsort(-similar[i])[:k]] for i in range(len(pairs))]
            )
        )
        hits.append(
            np.mean(
                [
                    captions[j] in [said[i] for i in np.argsort(-similar[:, j])[:k]]
                    for j in range(len(captions))
                ]
            )
        )
    assert got is not None
    assert got["n"] == len(pairs)
    assert got["value"] == pytest.approx(np.mean(hits))


def test_retention_without_pairs_is_zero_shot_accuracy_or_nothing(model: LoadedModel) -> None:
    part = corners(model, 10, 4)
    rows: Any = part.rows
    alone = live_rows(model, image=[cell[0] for cell in rows.rows.cells["image"]])
    assert retention(alone, part.targets, TASK, AdaptConfig()) is None
    task = Task("multiclass", ("red_square", "blue-square"))
    got = retention(alone, part.targets, task, AdaptConfig())
    # of this kind here
    images = frozen(type(part)(alone, part.targets)).rows.batch(torch.arange(10))[0]["image"]  # type: ignore[attr-defined]
    said = (images @ model.encode_captions(["red square", "blue square"]).T).argmax(1)
    assert got == {
        "measure": "zero-shot accuracy",
        "n": 10,
        "value": float((said == part.targets).double().mean()),
    }
    assert mean_retention([{}, {}]) is None


def test_what_a_method_cannot_do_with_an_encoder_is_told_before_training() -> None:
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    vision = {"timm_model_name": "test_efficientnet", "image_size": 32}
    clip = build_model(ModelConfig(embed_dim=12, vision_cfg=vision, text_cfg=text))
    model = LoadedModel(clip, tokenizer_for(open_clip_config(clip)["model_cfg"]["text_cfg"]))

    def check(head: dict[str, Any], adapt: dict[str, Any]) -> None:
        config = FinetuneConfig.model_validate(
            {
                "task": {"type": "binary"},
                "data": {"manifest": "t.csv"},
                "model": {"checkpoint": "c"},
                "heads": {"own": head | {"adapt": adapt}},
            }
        )
        check_methods(config, model, ("0", "1"))

    with pytest.raises(UserError, match="lora finds no attention in TimmModel"):
        check({"op": "concat"}, {"method": "lora"})
    check({"op": "concat"}, {"method": "lora", "lora_targets": "all"})
    check({"op": "text"}, {"method": "lora"})  # the picture's encoder is not trained
    with pytest.raises(UserError, match="class '1' has no text"):
        check({"op": "concat"}, {"method": "contrastive", "class_prompts": {"0": "no"}})
    with pytest.raises(UserError, match="class '0' has no text"):  # retention measures with them
        check({"op": "image"}, {"method": "lp_ft", "class_prompts": {"1": "yes"}})
    with pytest.raises(UserError, match=r"'1.' is no class of the task; did you mean '1'\?"):
        check({"op": "image"}, {"method": "lp_ft", "class_prompts": {"0": "no", "1": "yes", "1.": "yes"}})
    check({"op": "image"}, {"method": "linear_probe", "class_prompts": {"1": "yes"}})
    model.clip.visual = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match="the layers of Sequential are unknown"):
        check({"op": "concat"}, {"method": "lp_ft", "encoder_layer_decay": 0.9})
