"""Hugging Face text towers: run in groups of like lengths, and bundled into the checkpoint."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from diptych.configs.errors import UserError
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model, bundle_text, open_clip_config
from diptych.pretrain.packing import encode_text, supports_packing

transformers = pytest.importorskip("transformers", reason="pip install transformers")
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "house"]


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A tiny BERT: config, weights and tokenizer in a folder."""
    folder = tmp_path / "bert"
    folder.mkdir()
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(WORDS), intermediate_size=32, max_position_embeddings=12, **sizes
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def settings(bert: str) -> ModelConfig:
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "context_length": 12, "hf_proj_type": "linear"}
    return ModelConfig(embed_dim=8, vision_cfg=VISION, text_cfg=text)


def write_checkpoint(model: Any, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    bundle_text(model, folder)
    return folder


def test_captions_padded_to_the_longest_equal_captions_padded_to_the_context(bert: str) -> None:
    model = build_model(settings(bert)).eval()
    reason = supports_packing(model.text)
    assert reason is not None
    assert "HFTextEncoder" in reason
    token_ids = torch.tensor([2, 5, 6, 8, 3, 2, 9, 3], dtype=torch.int32)
    seq_lens = torch.tensor([5, 3], dtype=torch.int32)
    padded = torch.zeros(2, 12, dtype=torch.long)
    padded[0, :5], padded[1, :3] = token_ids[:5], token_ids[5:]
    features = ContrastiveModel(model).encode_text(token_ids, seq_lens)
    torch.testing.assert_close(features, model.encode_text(padded, normalize=True), atol=1e-6, rtol=0)


def test_captions_grouped_by_length_equal_one_padded_batch_in_features_and_gradients(bert: str) -> None:
    model = build_model(settings(bert)).double().eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 13, (40,), generator=generator)
    captions = [torch.randint(2, len(WORDS), (int(n),), generator=generator) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    calls: list[torch.Size] = []
    model.text.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    found = encode_text(model.text, torch.cat(captions).int(), lengths.int())
    assert len(calls) > 1
    assert sum(b * n for b, n in calls) < 0.8 * padded.numel()
    truth = model.text(padded)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)
    direction = torch.randn(truth.shape, dtype=truth.dtype, generator=generator)
    parameters = [p for p in model.text.parameters() if p.requires_grad]
    expected = torch.autograd.grad((truth * direction).sum(), parameters)
    gradients = torch.autograd.grad((found * direction).sum(), parameters)
    for value, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(value, exact, atol=1e-11, rtol=1e-11)


def test_a_checkpoint_carries_the_towers_config_and_tokenizer(bert: str, tmp_path: Path) -> None:
    model = build_model(settings(bert)).eval()
    folder = write_checkpoint(model, tmp_path / "checkpoint")
    theirs: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a red cat", "dog"])
    truth = model.encode_text(tokens)
    torch.testing.assert_close(theirs.encode_text(tokens), truth, atol=1e-6, rtol=0)

    Path(bert).rename(tmp_path / "gone")
    again = build_model(ModelConfig(pretrained=str(folder))).eval()
    torch.testing.assert_close(again.encode_text(tokens), truth, atol=1e-6, rtol=0)
    assert (write_checkpoint(again, tmp_path / "second") / "tokenizer.json").is_file()
    assert open_clip_config(again)["model_cfg"]["text_cfg"]["hf_model_name"] == bert


def test_an_unknown_hugging_face_model_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = {"hf_model_name": "/no/such/folder", "hf_tokenizer_name": "/no/such/folder"}
    with pytest.raises(UserError, match=r"hf_model_name: .* cannot be used"):
        build_model(ModelConfig(embed_dim=8, vision_cfg=VISION, text_cfg=text))
