"""Small encoders of pictures and of texts, made on the spot, and runs that start from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diptych.finetune.config.source import SourceConfig
from diptych.finetune.encoders.unimodal import open_source
from diptych.pretrain.model import Encoders

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "square",
    "red",
    "green",
    "blue",
    "yellow",
    "black",
    "white",
]
MORE = ["purple", "orange", "cyan", "gray", "pink", "brown", "with", "of", "large", "small"]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, transformers.BertModel, {}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {"pad_token_id": 0}),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel, {"embedding_size": 12}),
    "distilbert": (
        transformers.DistilBertConfig,
        transformers.DistilBertModel,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
}


def hf_folder(folder: Path, kind: str = "bert", *, limit: int = 12) -> Path:
    """A tiny Hugging Face model with random weights and a tokenizer of a few words."""
    torch.manual_seed(3)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS + MORE)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue] # stub
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue] # stub
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=limit, **names)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config, model, own = KINDS[kind]
    sizes = own if kind == "distilbert" else sizes | own
    made = model(config(vocab_size=len(WORDS + MORE), max_position_embeddings=limit + 4, **sizes))
    for parameter in made.parameters():  # far from the start, where all texts look alike
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    made.save_pretrained(folder)
    return folder


def source(**model: Any) -> Encoders:
    """Encoders from the keys of ``model``."""
    return open_source(SourceConfig.model_validate(model))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, smooth enough that resizing does not turn it grey."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)
