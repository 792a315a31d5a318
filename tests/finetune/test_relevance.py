"""Relevance points at the one patch and the one word that an answer can come from; what cannot be told is
said."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.text import build_tokenizer
from diptych.finetune.config import HeadConfig
from diptych.finetune.config.modality import ModalityConfig
from diptych.finetune.explain.relevance import Member, Relevance, relevance_of
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.predictor import Predictor
from diptych.finetune.runs.saved import SavedHead, write_encoder
from diptych.finetune.tables.cells import Picture
from diptych.finetune.tables.manifest import Rows
from diptych.finetune.tasks.task import Task
from diptych.pretrain.model import LoadedModel, ModelConfig, build_model

SIDE, PATCH = 32, 8
BINARY = Task("binary", ("0", "1"))


def blind(vision: dict[str, Any] | None = None, layers: int = 1) -> LoadedModel:
    """Towers in which a grey patch and any word but 'red' are zeros, and so have no value to attend to."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": layers, "width": 16, "head_width": 8, "patch_size": PATCH}
    image = sizes | {"image_size": SIDE, "no_ln_pre": True} | (vision or {})
    text = {"context_length": 12, "width": 16, "heads": 2, "layers": layers}
    clip = build_model(ModelConfig(embed_dim=12, vision_cfg=image, text_cfg=text))
    tokenizer = build_tokenizer(None, 12)
    red = int(tokenizer.pack(["red"])[0][1])
    visual: Any = clip.visual
    with torch.no_grad():
        words: Any = clip.text
        kept = words.token_embedding.weight[[red, 49407]].clone() + 1
        words.token_embedding.weight.zero_()
        words.token_embedding.weight[[red, 49407]] = kept
        words.positional_embedding.zero_()
        if hasattr(visual, "positional_embedding"):
            visual.positional_embedding.zero_()
    visual.preprocess_cfg = {**visual.preprocess_cfg, "mean": (0.4, 0.4, 0.4), "std": (1.0, 1.0, 1.0)}
    return LoadedModel(clip, tokenizer)


def grey_but(row: int, column: int) -> Picture:
    pixels = np.full((SIDE, SIDE, 3), 102, dtype=np.uint8)  # 0.4
    y, x = row * PATCH, column * PATCH
    pixels[y : y + PATCH, x : x + PATCH] = np.random.default_rng(0).integers(0, 255, (PATCH, PATCH, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Picture(data=buffer.getvalue())


def rows_of(pictures: list[Picture | None], texts: list[str | None]) -> Rows:
    declared = {"image": ModalityConfig(column="i"), "text": ModalityConfig(column="t")}
    cells: dict[str, list[Any]] = {"image": [p and (p,) for p in pictures], "text": list(texts)}
    return Rows("t", [str(i) for i in range(len(texts))], declared, cells)


def told(model: LoadedModel, rows: Rows, op: str = "concat", task: Task = BINARY) -> list[list[Relevance]]:
    """Relevance for both signs of the answer."""
    torch.manual_seed(1)
    config = HeadConfig.model_validate({"op": op} | ({"width": 8, "heads": 2} if op == "merged" else {}))
    widths = {"image": 12, "text": 12}
    head = build_head(config, widths, task.outputs, widths, task.link).eval()
    member = Member(SavedHead(head, 1.0, 0.0, None), model)
    signs = [np.full(len(rows), c) for c in range(len(task.classes))]
    return [relevance_of([member], task, rows, sign, max_pixels=10**6) for sign in signs]


@pytest.mark.parametrize("op", ["concat", "gated", "bilinear", "late"])
def test_the_one_patch_and_the_one_word_with_a_value_have_all_of_it(op: str) -> None:
    places = [(0, 0), (1, 3), (3, 2)]
    texts = ["a red square", "the big round red", "red"]
    found = told(blind(), rows_of([grey_but(*place) for place in places], list(texts)), op)
    for i, (place, text) in enumerate(zip(places, texts, strict=True)):
        images = [sign[i].image for sign in found]
        assert all(image is not None and image.shape == (4, 4) for image in images)
        both = np.sum(images, axis=0)
        assert both[place] > 0
        both[place] = 0
        assert np.abs(both).max() == 0
        words = [dict(sign[i].text or []) for sign in found]
        assert list(words[0]) == text.split()
        assert words[0]["red"] + words[1]["red"] > 0
        assert all(r == 0 for sign in words for word, r in sign.items() if word != "red")


# any array
def by_hand(model: LoadedModel, picture: Picture, head: Any, text: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """Relevance of the patches for class 1 from the weights of open_clip's ViT, layer by layer."""
    visual: Any = model.clip.visual
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(picture.data or b""))))
    image = (pixels.permute(2, 0, 1)[None] / 255 - 0.4).float()
    x, maps = visual._embeds(image)[0], []
    for block in visual.transformer.resblocks:
        y = block.ln_1(x)
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        q, k, v = (y @ w.T + b for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
        a = torch.stack([(q[:, s] @ k[:, s].T / 8**0.5).softmax(1) for s in (slice(0, 8), slice(8, 16))])
        a.retain_grad()
        maps.append(a)
        out = torch.cat([a[0] @ v[:, :8], a[1] @ v[:, 8:]], dim=1)
        x = x + out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
        x = x + block.mlp(block.ln_2(x))
    z = torch.nn.functional.normalize(visual.ln_post(x)[:1] @ visual.proj, dim=1)
    head({"image": z, "text": text}, {k: torch.tensor([True]) for k in ("image", "text")}).backward()
    r = torch.eye(17)
    for a in maps:
        assert a.grad is not None
        r = r + (a.grad * a).clamp_min(0).mean(0) @ r
    return r[0, 1:].detach().numpy().reshape(4, 4)


def test_relevance_of_several_layers_is_that_of_a_forward_by_hand() -> None:
    model, picture = blind(layers=3), grey_but(2, 1)
    torch.manual_seed(1)
    head = build_head(HeadConfig(op="concat"), {"image": 12, "text": 12}, 1).eval()
    member = Member(SavedHead(head, 1.0, 0.5, None), model)
    rows = rows_of([picture, grey_but(0, 0)], ["so very red it is", "a hat"])
    got = relevance_of([member, member], BINARY, rows, np.array([1, 1]), max_pixels=10**6)[0].image
    want = by_hand(model, picture, head, model.encode_captions(["so very red it is"]).clone())
    assert got is not None
    assert np.allclose(got, want, rtol=1e-3, atol=1e-7)
    assert got.max() > 0


def test_heads_on_tokens_look_through_the_towers() -> None:
    found = told(blind(), rows_of([grey_but(2, 1)], ["so very red it is"]), "merged")
    for one in (sign[0] for sign in found):
        assert one.image is not None
        assert (one.image >= 0).all()
        assert [word for word, _ in one.text or []] == ["so", "very", "red", "it", "is"]
    assert np.sum([sign[0].image for sign in found]) > 0


def test_what_is_missing_or_cannot_be_told() -> None:
    broken = Picture(data=b"no picture")
    rows = rows_of([None, grey_but(0, 0), broken], ["red", None, "red"])
    one = told(blind(), rows)[1]
    assert [(r.image is None, r.text is None) for r in one] == [(True, False), (False, True), (True, False)]
    only = told(blind(), rows_of([None], ["red"]))[1][0]
    assert (only.image, only.without) == (None, {})
    torch.manual_seed(0)
    vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "patch_size": None}
    resnet = build_model(
        ModelConfig(
            embed_dim=12,
            vision_cfg={k: v for k, v in vision.items() if v is not None},
            text_cfg={"context_length": 12, "width": 16, "heads": 2, "layers": 1},
        )
    )
    model = LoadedModel(resnet, build_tokenizer(None, 12))
    got = told(model, rows_of([grey_but(0, 0)], ["a red"]))[1][0]
    assert got.image is None
    assert got.text is not None
    assert got.without == {"image": "its image tower, ModifiedResNet, has no attention over all patches"}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timms_vits_are_looked_at_however_they_pool(pool: str) -> None:
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_vit", "timm_pool": pool, "timm_proj": "linear", "image_size": 160}
    text = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
    clip = build_model(ModelConfig(embed_dim=12, vision_cfg=vision, text_cfg=text))
    model = LoadedModel(clip, build_tokenizer(None, 12))
    image = told(model, rows_of([grey_but(0, 0)], ["a red"]))[1][0].image
    assert image is not None
    assert image.shape == (10, 10)
    assert (image >= 0).all()
    assert image.max() > 0


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "ordinal", "regression"])
def test_every_task_has_a_value(kind: str) -> None:
    classes = () if kind == "regression" else ("a", "b", "c")
    task = Task(kind, classes)  # type: ignore[arg-type]  one of the literals
    rows = rows_of([grey_but(0, 0)], ["red"])
    if kind == "regression":
        torch.manual_seed(1)
        head = build_head(HeadConfig(op="concat"), {"image": 12, "text": 12}, 1, None, task.link).eval()
        member = Member(SavedHead(head, 2.0, 1.0, None), blind())
        found = relevance_of([member], task, rows, None, max_pixels=10**6)
    else:
        found = [sign[0] for sign in told(blind(), rows, task=task)]
    assert all(one.image is not None and np.isfinite(one.image).all() for one in found)
    assert any(one.image is not None and one.image.max() > 0 for one in found) or kind == "regression"


def test_a_predictor_tells_it_for_rows_as_they_come(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "encoder").mkdir()
    write_encoder(blind(), tmp_path / "encoder")
    head = build_head(HeadConfig(op="gated"), {"image": 12, "text": 12}, 1).eval()
    info: dict[str, Any] = {"task": "binary", "classes": ["0", "1"], "id": None, "max_pixels": 10**6}
    info |= {"modalities": {"image": "photo", "text": "title"}}
    (tmp_path / "heads" / "gated").mkdir(parents=True)
    (tmp_path / "heads" / "gated" / "head.json").write_text("{}")
    saved = [SavedHead(head, 1.0, 0.0, None)] * 2
    predictor = Predictor(tmp_path, info, "gated", saved, torch.device("cpu"))
    data = grey_but(3, 3).data
    rows = [{"photo": data, "title": "my red hat"}, {"title": "red"}]
    for name in ("0", "1"):
        first, second = predictor.relevance(rows, of=name)
        assert first.image is not None
        assert first.image.sum() == first.image[3, 3]
        assert [word for word, _ in first.text or []] == ["my", "red", "hat"]
        assert second.image is None
    assert predictor.relevance(rows)[0].text is not None


def test_words_of_tokenizers() -> None:
    clip = build_tokenizer(None, 12)
    ids = clip.pack(["Größe! an uncopyrightable"])[0].tolist()
    words = clip.words(ids)
    assert [word for word, _ in words][:2] == ["größe", "!"]
    assert [i for _, places in words for i in places] == list(range(1, 11))  # cut: no room for the rest
