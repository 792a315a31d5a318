"""A checkpoint open for inference: features, tokens, and what cannot be opened."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.configs.errors import UserError
from diptych.pretrain.model import LoadedModel, build_model, load_model

from .test_model import config, write_checkpoint

CAPTIONS = ["red apple", "a house with a garden and a very long name that does not fit", "cat", "cat"]


class Tokenizer:
    """open_clip's tokenizer in packed form."""

    context_length = 12

    def pack(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        padded = self.padded(captions)
        return padded[padded != 0].int(), (padded != 0).sum(1).int()

    def padded(self, captions: Sequence[str]) -> Tensor:
        return open_clip.SimpleTokenizer(context_length=12)(list(captions))


def loaded(vision: str = "vit") -> LoadedModel:
    torch.manual_seed(0)
    tokenizer: Any = Tokenizer()
    return LoadedModel(build_model(config(vision)), tokenizer)


@pytest.mark.parametrize("vision", ["vit", "conv", "conv with its own head"])
def test_features_are_open_clips_for_any_batch_size(vision: str) -> None:
    model = loaded(vision)
    pixels = torch.randint(0, 256, (5, 3, model.image_size, model.image_size), dtype=torch.uint8)
    with torch.no_grad():
        image = model.clip.encode_image(model.model.pixels(pixels), normalize=True)
        text = model.clip.encode_text(Tokenizer().padded(CAPTIONS), normalize=True)
    for size in (1, 2, 100):
        torch.testing.assert_close(model.encode_images(pixels, batch_size=size), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_captions(CAPTIONS, batch_size=size), text, atol=1e-5, rtol=0)
    assert model.encode_images(pixels[:0]).shape == model.encode_captions([]).shape == (0, model.embed_dim)


def test_image_tokens_of_a_vit_pool_to_its_class_feature_space() -> None:
    model = loaded()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        every = model.clip.visual.transformer(model.clip.visual._embeds(model.model.pixels(pixels)))
        expected = model.clip.visual.ln_post(every)[:, 1:]
    torch.testing.assert_close(model.image_tokens(pixels), expected, atol=1e-5, rtol=0)


def test_image_tokens_of_a_conv_tower_average_to_its_pooled_feature() -> None:
    model = loaded("conv")
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    tokens = model.image_tokens(pixels)
    with torch.no_grad():
        pooled = model.clip.visual.head(tokens.mean(1))
    features = model.encode_images(pixels)
    torch.testing.assert_close(F.normalize(pooled, dim=-1), features, atol=1e-5, rtol=0)


def test_text_tokens_hold_the_feature_at_each_captions_end() -> None:
    model = loaded()
    tokens, mask = model.text_tokens(CAPTIONS)
    _, lengths = Tokenizer().pack(CAPTIONS)
    assert mask.sum(1).tolist() == lengths.tolist()
    assert tokens.shape[:2] == mask.shape == (4, int(lengths.max()))
    last = tokens[torch.arange(4), lengths.long() - 1]
    features = F.normalize(last @ model.clip.text.text_projection, dim=-1)
    torch.testing.assert_close(features.detach(), model.encode_captions(CAPTIONS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["checkpoint", "local-dir", "run", "file"])
def test_a_checkpoint_opens_in_every_form(form: str, tmp_path: Path) -> None:
    clip = build_model(config())
    folder = write_checkpoint(clip, tmp_path / "run" / "checkpoints" / "step_00000001")
    names = {"checkpoint": folder, "local-dir": f"local-dir:{folder}", "run": tmp_path / "run"}
    model = load_model(names.get(form, folder / "open_clip_model.safetensors"))
    assert (model.image_size, model.embed_dim, model.tokenizer.context_length) == (32, 8, 12)
    with torch.no_grad():
        truth = clip.eval().encode_text(Tokenizer().padded(CAPTIONS), normalize=True)
    torch.testing.assert_close(model.encode_captions(CAPTIONS), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "ARCH:TAG"),
        ("ViT-B-32:laion", "laion2b_s34b_b79k"),
        ("bare.safetensors", "open_clip_config"),
    ],
)
def test_what_cannot_be_opened_says_what_can(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith("safetensors"):
        Path(name).write_bytes(b"")
    with pytest.raises(UserError, match=words):
        load_model(name)
