"""Early fusion: one transformer over patch and word embeddings, before either tower has read anything."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from ...configs.errors import UserError
from ...pretrain.model import Encoders
from ..config import HeadConfig
from .attention import SelfBlock
from .head import Features, Head, Present, Standard

__all__ = ["Joint", "check_joint", "start_joint"]

SHAPE: tuple[str, ...] = ("width", "heads", "layers", "hidden", "quick")


class Joint(Head):
    """X = [cls; V + e_v; P_t T + e_t]; per layer X += SA(X), X += FFN(X); y = W LN(X_cls) (ViLT, Kim et al.
    2021, arXiv 2102.03334; VisualBERT, Li et al. 2019, arXiv 1908.03557).

    V [b, P, W] are patch embeddings and T [b, L, W'] word embeddings, both with their positions, as the
    towers' first blocks read them (``image_inputs``, ``text_inputs``); they stay as pretrained, so they can
    be cached. cls, the blocks and LN start as the image tower's (``start_joint``): without words it is that
    tower. A missing modality has no tokens; of one without inputs the embedding is its only token; e_k is
    the bias of P_k.

    The layers' sizes are the tower's. A head has none until ``start_joint`` or a state dict gives them.
    """

    reads_tokens: ClassVar[bool] = True
    reads_inputs: ClassVar[bool] = True
    shape: Tensor

    def __init__(self, modalities: tuple[str, ...], outputs: int, config: HeadConfig) -> None:
        super().__init__({})
        self.modalities = modalities
        self.outputs, self.dropout, self.most = outputs, config.dropout or 0.0, config.layers
        self.register_buffer("shape", torch.zeros(len(SHAPE), dtype=torch.int64))
        self.project, self.blocks = nn.ModuleDict(), nn.ModuleList()
        self.register_load_state_dict_pre_hook(_grow_first)

    def grow(self, shape: Mapping[str, int], widths: Mapping[str, int]) -> None:
        """Make the layers. ``shape``: the numbers of ``SHAPE``; ``widths``: of the tokens of every modality
        but the image."""
        self.shape.copy_(torch.tensor([shape[name] for name in SHAPE]))
        width, act = shape["width"], QuickGELU if shape["quick"] else nn.GELU
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        if "image" in self.modalities:
            self.kind = nn.Parameter(torch.zeros(width))
        self.standard = nn.ModuleDict({k: Standard(w) for k, w in widths.items()})
        self.project = nn.ModuleDict({k: nn.Linear(w, width) for k, w in widths.items()})
        self.blocks = nn.ModuleList(
            [
                SelfBlock(width, shape["heads"], self.dropout, hidden=shape["hidden"], act=act)
                for _ in range(shape["layers"])
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, self.outputs)
        self.to(self.shape.device).train(self.training)

    def read(self, features: Features, k: str) -> tuple[Tensor, Tensor]:
        """Tokens [b, L, W] and bool [b, L], True for real ones."""
        tokens = features.get(f"{k}_inputs")
        if tokens is None:
            return features[k][:, None], torch.ones_like(features[k][:, :1], dtype=torch.bool)
        mask = features.get(f"{k}_mask")
        return tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales of all but the patches from the training rows."""
        for k, standard in self.standard.items():
            tokens, mask = self.read(features, k)
            assert isinstance(standard, Standard)
            standard.fit(tokens[mask & present[k][:, None]].to(standard.mean.dtype))

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        rows = len(present[self.modalities[0]])
        parts, masks = [self.cls.expand(rows, 1, -1)], [present[self.modalities[0]].new_ones(rows, 1)]
        for k in self.modalities:
            tokens, mask = self.read(features, k)
            mask = mask & present[k][:, None]
            x = tokens.to(self.cls.dtype)
            x = torch.where(mask[..., None], x if k == "image" else self.standard[k](x), 0.0)
            parts.append(x + self.kind if k == "image" else self.project[k](x))
            masks.append(mask)
        x, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, mask, read=1 if i == last else None)
        return self.classify(self.norm(x[:, 0]))


def _grow_first(head: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: a head without layers gets those of the state."""
    assert isinstance(head, Joint)
    if not len(head.blocks) and f"{prefix}shape" in state:
        shape = dict(zip(SHAPE, state[f"{prefix}shape"].tolist(), strict=True))
        names = [k for k in head.modalities if k != "image"]
        head.grow(shape, {k: state[f"{prefix}project.{k}.weight"].shape[1] for k in names})


def check_joint(model: Encoders) -> None:
    """Raise UserError if a joint head cannot start from a model's towers."""
    visual, text = model.clip.visual, model.clip.text
    ours = isinstance(visual, VisionTransformer) and all(
        isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks
    )
    if not ours or not isinstance(text, TextTransformer) or text.cls_emb is not None:
        raise UserError(
            "joint starts from the blocks of open_clip's own ViT and reads its own text transformer's "
            f"embeddings; these towers are {type(visual).__name__} and {type(text).__name__}: remove it"
        )


@torch.no_grad()
def start_joint(module: nn.Module, model: Encoders) -> None:
    """Give every joint head in ``module`` the image tower's blocks; other heads are left alone."""
    for head in module.modules():
        if not isinstance(head, Joint):
            continue
        check_joint(model)
        visual: Any = model.clip.visual
        blocks = list(visual.transformer.resblocks)[: head.most]
        first = blocks[0]
        shape = {
            "width": first.ln_1.normalized_shape[0],
            "heads": first.attn.num_heads,
            "layers": len(blocks),
            "hidden": first.mlp.c_fc.out_features,
            "quick": int(isinstance(first.mlp.gelu, QuickGELU)),
        }
        text: Any = model.clip.text
        others = {k: model.widths[k] for k in head.modalities if k not in ("image", "text")}
        words = {"text": int(text.token_embedding.weight.shape[1])} if "text" in head.modalities else {}
        head.grow(shape, words | others)
        head.cls.copy_(visual.ln_pre(visual.class_embedding + visual.positional_embedding[0]))
        head.norm.load_state_dict(visual.ln_post.state_dict())
        for own, block in zip(head.blocks, blocks, strict=True):
            assert isinstance(own, SelfBlock)
            _copy_block(own, block)


def _copy_block(own: SelfBlock, block: Any) -> None:
    """open_clip's block in our layers, its layer scales folded into the maps before them."""
    width = block.attn.embed_dim
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    own.itself.query.load_state_dict({"weight": weight[:width], "bias": bias[:width]})
    own.itself.key_value.load_state_dict({"weight": weight[width:], "bias": bias[width:]})
    for norm, theirs in zip(own.norms, (block.ln_1, block.ln_2), strict=True):
        norm.load_state_dict(theirs.state_dict())
    own.feed[0].load_state_dict(block.mlp.c_fc.state_dict())
    for mine, theirs, scale in (
        (own.itself.out, block.attn.out_proj, block.ls_1),
        (own.feed[2], block.mlp.c_proj, block.ls_2),
    ):
        gamma = getattr(scale, "gamma", torch.ones_like(theirs.bias))
        mine.load_state_dict({"weight": theirs.weight * gamma[:, None], "bias": theirs.bias * gamma})
