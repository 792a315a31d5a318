"""Locked towers against open_clip's own lock."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.configs.errors import UserError
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.locking import LockConfig, lock
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 3}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "timm_resnet": {"timm_model_name": "test_resnet", "image_size": 32},
    "timm_efficientnet": {"timm_model_name": "test_efficientnet", "image_size": 32},
    "timm_vit": {"timm_model_name": "test_vit", "image_size": 160},
    "resnet": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
}


def build(vision: str, text: dict[str, Any] = TEXT) -> Any:
    torch.manual_seed(0)
    return build_model(ModelConfig(embed_dim=8, vision_cfg=VISION[vision], text_cfg=text))


def trainable(clip: nn.Module) -> set[str]:
    return {name for name, p in clip.named_parameters() if p.requires_grad}


@pytest.fixture
def roberta(tmp_path: Path) -> dict[str, Any]:
    """A text_cfg with a tiny RoBERTa."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    folder = tmp_path / "roberta"
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    name = str(folder)
    return {"hf_model_name": name, "hf_tokenizer_name": name, "context_length": 12, "hf_proj_type": "linear"}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_the_image_tower_trains_what_open_clip_lets_train(vision: str, groups: int) -> None:
    ours, theirs = build(vision), build(vision)
    config = LockConfig(image=True, image_unlocked_groups=groups)
    if vision == "resnet" and groups:
        with pytest.raises(UserError, match="locked as a whole"):
            lock(ours, config)
        return
    lock(ours, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it imports from timm by an old name
        theirs.lock_image_tower(unlocked_groups=groups)
    assert trainable(ours) == trainable(theirs)
    assert any(name.startswith("text.") for name in trainable(ours))


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
def test_the_text_tower_trains_what_open_clip_lets_train(groups: int) -> None:
    ours, theirs = build("vit"), build("vit")
    lock(ours, LockConfig(text=True, text_unlocked_groups=groups))
    theirs.lock_text_tower(unlocked_layers=groups)
    assert trainable(ours) == trainable(theirs)


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_a_hugging_face_tower_trains_what_open_clip_lets_train(
    roberta: dict[str, Any], groups: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = build("vit", roberta), build("vit", roberta)
    lock(ours, LockConfig(text=True, text_unlocked_groups=groups))
    assert not capsys.readouterr().out, "a command's output is its own"
    theirs.lock_text_tower(unlocked_layers=groups)
    assert trainable(ours) == trainable(theirs)


def test_unlocked_groups_want_a_lock_that_leaves_something_locked() -> None:
    with pytest.raises(UserError, match=r"lock\.text_unlocked_groups: set lock\.text"):
        lock(build("vit"), LockConfig(text_unlocked_groups=1))
    with pytest.raises(UserError, match=r"lock\.image_unlocked_groups: with 9 nothing"):
        lock(build("vit"), LockConfig(image=True, image_unlocked_groups=9))


def batch(side: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (4, 3, side, side), generator=generator, dtype=torch.uint8),
        "token_ids": torch.tensor([1, 2, 49, 3, 49, 4, 5, 49, 6, 49], dtype=torch.int32),
        "seq_lens": torch.tensor([3, 2, 3, 2], dtype=torch.int32),
    }


@pytest.mark.parametrize("vision", ["timm_resnet", "timm_efficientnet"])
@pytest.mark.parametrize("groups", [0, 2])
def test_statistics_of_locked_batch_norms_stay_through_train(vision: str, groups: int) -> None:
    clip = build(vision)
    lock(clip, LockConfig(image=True, image_unlocked_groups=groups))
    before = copy.deepcopy(clip.state_dict())
    model = ContrastiveModel(clip).train()
    contrastive_loss(**model(batch(32))).backward()
    learns = trainable(clip)
    for name, value in clip.state_dict().items():
        if "running" in name:
            weight = f"{name.rpartition('.')[0]}.weight"
            assert value.equal(before[name]) != (weight in learns), name
    if not groups:
        model.eval()
        quiet = model.encode_image(batch(32)["image"])
        torch.testing.assert_close(model.train().encode_image(batch(32)["image"]), quiet)


@pytest.mark.parametrize("vision", ["vit", "timm_vit"])
def test_a_locked_tower_has_no_backward(vision: str) -> None:
    clip = build(vision)
    lock(clip, LockConfig(image=True))
    if vision == "timm_vit":  # open_clip leaves the projection after a timm trunk to train
        clip.visual.head.requires_grad_(False)
    model = ContrastiveModel(clip).train()
    side = VISION[vision]["image_size"]
    out = model(batch(side))
    assert not out["image_features"].requires_grad
    contrastive_loss(**out).backward()
    for name, p in clip.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
