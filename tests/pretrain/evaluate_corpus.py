"""A corpus of coloured squares in the demo corpus's layout, and a tiny checkpoint that open_clip loads
too."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from diptych.data.shards import ShardWriter
from diptych.pretrain.manifest import seal
from diptych.pretrain.model import ModelConfig, build_model, open_clip_config

SIZE = 16
NAMES = ["red", "green", "blue", "yellow", "pink", "grey", "brown", "teal", "gold", "navy", "lime", "plum"]


def square(name: str, shade: int) -> bytes:
    digest = hashlib.sha256(name.encode()).digest()
    image = Image.new("RGB", (SIZE, SIZE), (digest[0], digest[1], digest[2]))
    for x in range(4, 12):
        for y in range(4, 12):
            image.putpixel((x, y), (digest[3], digest[4], (digest[5] + shade) % 256))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_split(folder: Path, vendors: list[str], names: list[str]) -> list[str]:
    keys: list[str] = []
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for v, vendor in enumerate(vendors):
            for i, name in enumerate(names):
                meta: dict[str, Any] = {"vendor": vendor, "emoji": f"1F{i:03X}"}
                meta |= {"group": "warm" if i % 2 else "cold", "subgroup": f"sub-{i % 3}"}
                keys.append(f"{vendor}-{name}")
                writer.write(keys[-1], square(name, 40 * v), "png", f"{name} square", meta)
    return keys


def make_corpus(root: Path) -> Path:
    write_split(root / "train", ["noto", "twemoji", "fluent"], NAMES[:10])
    keys = write_split(root / "test_vendor", ["openmoji", "other"], NAMES)
    galleries = {
        "openmoji": {"split": "test_vendor", "keys": [k for k in keys if k.startswith("openmoji")][::-1]},
        "both": {"split": "test_vendor", "keys": keys},
    }
    (root / "galleries.json").write_text(json.dumps(galleries))
    return root


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIZE}
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    model = build_model(ModelConfig(embed_dim=24, vision_cfg=vision, text_cfg=text))
    folder.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    return folder


def make_run(folder: Path, corpus: Path) -> Path:
    checkpoint = make_checkpoint(folder / "checkpoints" / "step_00000010")
    seal(checkpoint, {"step": 10}, {})
    (folder / "config.yaml").write_text(f"name: tiny\ndata: {{train: {corpus / 'train'}}}\n")
    return folder


def open_clip_features(checkpoint: Path, names: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of squares and of all distinct captions, by open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{checkpoint}")
    # a transform
    pictures = [preprocess(Image.open(io.BytesIO(square(n, 40 * v)))) for n, v in names]  # type: ignore[operator]
    captions = [f"{n} square" for n in dict.fromkeys(n for n, _ in names)]
    with torch.no_grad():
        images = model.encode_image(torch.stack(pictures), normalize=True)
        texts = model.encode_text(tokenizer(captions), normalize=True)
    return images, texts
