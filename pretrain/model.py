"""The dual encoder as it is trained and as it is used.

``ContrastiveModel`` is the root that DDP wraps: a packed batch in, normalised features out. ``load_model``
opens any checkpoint for inference. Towers and weights are open_clip's (``towers``, ``weights``).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.errors import UserError
from . import weights
from .blocks import lean
from .cpu_linear import quick_linears
from .lean_timm import lean_last_block
from .lean_vision import configured_dropout, encode_image, patch_size, takes_side
from .masks import kept_patches
from .packing import encode_text, pad_text, supports_packing
from .patches import patch_grid
from .sync_batchnorm import synchronise_batchnorm
from .towers import ModelConfig, build_model, bundle_text, image_size, open_clip_config

if TYPE_CHECKING:
    from ..data.text import Tokenizer

__all__ = [
    "ContrastiveModel",
    "Encoders",
    "LoadedModel",
    "ModelConfig",
    "Root",
    "build_model",
    "bundle_text",
    "check_name",
    "clamp_logit_scale",
    "image_size",
    "load_model",
    "open_clip_config",
    "takes_size",
]
log = logging.getLogger(__name__)


class ContrastiveModel(nn.Module):
    """Images and packed captions to normalised features; state lives in ``clip``, an open_clip model.

    Built inside a process group, its batch norms take the statistics of the global batch.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, clip: CustomTextCLIP, *, pad_id: int | None = None, seed: int = 0) -> None:
        """``pad_id`` is the tokenizer's padding id, used only by text towers that cannot be packed; ``seed``
        decides which patches are dropped."""
        super().__init__()
        self.clip = clip
        self.pad_id = pad_id
        self.seed = seed
        lean(clip)
        quick_linears(clip)
        lean_last_block(getattr(clip.visual, "trunk", nn.Identity()))
        self._patch_dropout = configured_dropout(clip.visual)
        if self._patch_dropout and patch_size(clip.visual) is None:
            self._patch_dropout = 0.0
            log.warning("this image tower drops patches by its own generator, another way on every topology")
        synchronise_batchnorm(clip)
        self.channels_last = wants_channels_last(clip.visual)
        dtype = next(clip.parameters()).dtype
        for name, value in pixel_statistics(cast(dict[str, Any], clip.visual.preprocess_cfg)).items():
            self.register_buffer(name, value.to(dtype), persistent=False)  # the config carries them
        if reason := supports_packing(clip.text):
            log.warning("captions run padded, which is slower: %s", reason)

    @property
    def patch_dropout(self) -> float:
        """Share of every image's patches left out in training mode (FLIP, arXiv 2212.00794); settable between
        steps. Starts at what the tower's config says.

        Raises UserError for a tower that cannot do it.
        """
        return self._patch_dropout

    @patch_dropout.setter
    def patch_dropout(self, share: float) -> None:
        assert 0 <= share < 1, share
        if share and patch_size(self.clip.visual) is None:
            raise UserError("patch dropout needs a ViT of open_clip or timm as image tower; set it to 0")
        self._patch_dropout = share

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of one local batch.

        batch: ``image`` uint8 [b, 3, S, S] (or normalised floats), S any side that the tower takes (see
        ``takes_size``), ``token_ids`` int32 [sum], ``seq_lens`` int32 [b]. With patch dropout, the patches
        that stay depend on the model's seed, ``epoch`` (int, default 0), ``source`` int16 [b] (default 0) and
        ``sample_id`` int64 [b] (default: the row).

        Returns ``image_features`` and ``text_features`` [b, D], L2-normalised in fp32 at least,
        ``logit_scale`` (exponentiated, scalar) and, where the model has one, ``logit_bias``.
        """
        out = {
            "image_features": self.encode_image(batch["image"], self._kept(batch)),
            "text_features": self.encode_text(batch["token_ids"], batch["seq_lens"]),
            "logit_scale": self.clip.logit_scale.exp(),
        }
        if self.clip.logit_bias is not None:
            out["logit_bias"] = self.clip.logit_bias
        return out

    def _kept(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Patches that stay, int64 [b, n] on the model's device; None for all."""
        size = patch_size(self.clip.visual)
        if not self.training or not self.patch_dropout or size is None:
            return None
        image, device = batch["image"], self.image_mean.device
        rows, columns = patch_grid(image, size)
        ids = batch.get("sample_id")
        ids = torch.arange(len(image), device=device) if ids is None else ids.to(device, non_blocking=True)
        epoch, source = int(batch.get("epoch", 0)), batch.get("source")
        return kept_patches(
            ids, rows * columns, self.patch_dropout, seed=self.seed, epoch=epoch, source=source
        )

    def encode_image(self, image: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised features [b, D] of uint8 pixels or already normalised floats, [b, 3, S, S]; of the kept
        patches alone (int64 [b, n]) where these are given."""
        return _normalise(encode_image(self.clip.visual, self.pixels(image), kept))

    def encode_text(self, token_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Normalised features [b, D] of packed captions."""
        return _normalise(encode_text(self.clip.text, token_ids, seq_lens, pad_id=self.pad_id))

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 pixels as normalised floats on the model's device; floats pass unchanged."""
        return normalise_pixels(image, self.image_mean, self.image_std, channels_last=self.channels_last)


def wants_channels_last(visual: nn.Module) -> bool:
    """Whether pixels are laid out channels last for an image tower.

    Activations follow them: 1.2 to 1.9 times faster for mobile nets on a CPU. Weights stay contiguous:
    torch's fused AdamW on a CPU is silently wrong where the strides of a weight and of its state differ, as
    after a resume.
    """
    return not isinstance(visual, VisionTransformer) and _has_convolutions(visual)


def pixel_statistics(preprocess: Mapping[str, Any]) -> dict[str, Tensor]:
    """``image_mean`` and ``image_std`` float64 [1, 3, 1, 1] in units of uint8 pixels."""
    return {
        f"image_{name}": 255 * torch.tensor(preprocess[name], dtype=torch.float64).view(1, 3, 1, 1)
        for name in ("mean", "std")
    }


def normalise_pixels(image: Tensor, mean: Tensor, std: Tensor, *, channels_last: bool) -> Tensor:
    """uint8 pixels [b, 3, H, W] as normalised floats of the statistics' type and device; floats pass
    unchanged."""
    image = image.to(mean.device, non_blocking=True)
    if image.dtype == torch.uint8:
        # a third of the time that a CPU takes for (image - mean) / std, to the same values
        image = image.to(mean.dtype).sub_(mean).div_(std)
    return image.contiguous(memory_format=torch.channels_last) if channels_last else image


def takes_size(clip: nn.Module, side: int) -> str | None:
    """None if the image tower takes square images of ``side`` pixels, else the reason why not."""
    visual: Any = clip.visual
    if reason := takes_side(visual, side):
        return f"this image tower cannot take images of {side} pixels: {reason}"
    return None


def _normalise(features: Tensor) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(dtype), dim=-1)


def _has_convolutions(module: nn.Module) -> bool:
    """Whether convolutions are more than a patch embedding."""
    return sum(isinstance(m, nn.Conv2d) for m in module.modules()) > 1


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> Tensor:
    """Keep logit_scale in [0, ln 100] (CLIP, section 2.5); call after every optimizer step.

    Returns whether that changed it, a bool [] on its device.
    """
    bound = torch.zeros((), dtype=torch.bool)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "logit_scale":
            bound = ((parameter < 0) | (parameter > math.log(100))).any()
            parameter.clamp_(0, math.log(100))
    return bound


class Root(Protocol):
    """How pictures and texts are encoded with gradients; ``ContrastiveModel`` is one."""

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 pixels as normalised floats on the encoders' device."""
        ...

    def encode_image(self, image: Tensor) -> Tensor:
        """Features [b, D] of uint8 pixels [b, 3, S, S]."""
        ...

    def encode_text(self, token_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Features [b, D] of packed captions."""
        ...


class Encoders:
    """Encoders of pictures, of texts or of both, open for inference, in eval mode and fp32. All methods work
    without gradients."""

    clip: Any
    """Holds the image encoder as ``visual`` and the text encoder as ``text``."""
    model: Root
    device: torch.device
    config: dict[str, Any]
    """What they were built from, as JSON takes it; ``preprocess_cfg`` says how pictures are prepared."""
    widths: dict[str, int]
    """Width D of the features per modality: ``image``, ``text`` or both."""
    normalized: frozenset[str]
    """The modalities whose features have length 1."""
    image_size: int

    def __init__(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> "Tokenizer":
        """What cuts texts into tokens."""
        assert self._tokenizer is not None, "these encoders read no text"
        return self._tokenizer

    @torch.inference_mode()
    def encode_images(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Features float32 [n, D], on the CPU, of uint8 [n, 3, S, S]."""
        parts = [self.model.encode_image(part).float().cpu() for part in images.split(batch_size)]
        return torch.cat(parts) if parts else torch.zeros(0, self.widths["image"])

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str], batch_size: int = 1024) -> Tensor:
        """Features float32 [n, D] of texts, on the CPU."""
        parts: list[Tensor] = []
        for start in range(0, len(captions), batch_size):
            token_ids, seq_lens = self.tokenizer.pack(captions[start : start + batch_size])
            parts.append(self.model.encode_text(token_ids, seq_lens).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.widths["text"])

    @torch.inference_mode()
    def image_tokens(self, images: Tensor) -> Tensor:
        """Last layer's patch tokens float32 [n, P, W], normalised by the tower's final norm; for conv towers
        the cells of the last feature map, row by row."""
        return self.patch_tokens(self.model.pixels(images))

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """``image_tokens`` of normalised pixels float32 [n, 3, S, S], with their gradient."""
        visual = self.clip.visual
        if isinstance(visual, VisionTransformer):
            out = visual.forward_intermediates(
                pixels,
                indices=1,
                normalize_intermediates=visual.attn_pool is None,
                intermediates_only=True,
                output_fmt="NLC",
            )
            return out["image_intermediates"][-1].float()
        trunk: Any = getattr(visual, "trunk", None)
        if trunk is None:  # open_clip's ResNet
            out = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)
            return out["image_intermediates"][-1].flatten(2).transpose(1, 2).float()
        tokens = trunk.forward_features(pixels)
        if tokens.ndim == 4:
            last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"  # timm's Swin and kin
            tokens = tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
        else:
            tokens = tokens[:, getattr(trunk, "num_prefix_tokens", 0) :]
        return tokens.float()

    @torch.inference_mode()
    def text_tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last layer's tokens float32 [n, L, W] after the final norm, L the longest caption's length, and
        bool [n, L], True for real tokens."""
        token_ids, seq_lens = self.tokenizer.pack(captions)
        longest = int(seq_lens.max())
        padded = pad_text(self.clip.text, token_ids, seq_lens).to(self.device)
        real = torch.arange(longest, device=self.device) < seq_lens.to(self.device)[:, None]
        return self.word_tokens(padded)[:, :longest], real

    def word_tokens(self, padded: Tensor) -> Tensor:
        """Last layer's tokens float32 [n, L, W] after the final norm, of padded ids int64 [n, L], with their
        gradient."""
        text = self.clip.text
        if isinstance(text, TextTransformer):
            out = text.forward_intermediates(
                padded, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
            )
            return out["text_intermediates"][-1].float()
        assert isinstance(text, HFTextEncoder)
        mask = (padded != cast(Any, text.config).pad_token_id).long()
        return text.transformer(input_ids=padded, attention_mask=mask).last_hidden_state.float()


class LoadedModel(Encoders):
    """A dual encoder: features of length 1 in one space."""

    clip: CustomTextCLIP
    file: Path | None = None
    """Where its weights were read from, if from a file."""

    def __init__(
        self, clip: CustomTextCLIP, tokenizer: "Tokenizer", device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(tokenizer)
        self.clip = clip.to(device).eval()
        self.model = ContrastiveModel(self.clip, pad_id=getattr(tokenizer, "pad_id", None)).to(device).eval()
        self.device = torch.device(device)
        self.config = open_clip_config(clip)
        self.embed_dim = int(self.config["model_cfg"]["embed_dim"])
        self.widths = {"image": self.embed_dim, "text": self.embed_dim}
        self.normalized = frozenset(self.widths)
        self.image_size = image_size(clip)
        self.logit_scale = float(clip.logit_scale.detach().exp())


def check_name(path_or_name: str | Path) -> ModelConfig:
    """What ``load_model`` would open, without opening it; UserError if there is no such thing."""
    name = str(path_or_name)
    path = Path(name.removeprefix("local-dir:"))
    arch, colon, tag = name.partition(":")
    if path.exists() or name.startswith(weights.HUB):
        return ModelConfig(pretrained=name)
    if colon and arch in open_clip.list_models():
        return ModelConfig(arch=arch, pretrained=tag)
    raise UserError(
        f"no checkpoint, run or file {path}; or give an open_clip model as ARCH:TAG or hf-hub:ORG/NAME"
    )


def load_model(path_or_name: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Open a model for inference.

    ``path_or_name``: a run folder (its newest finished checkpoint), a checkpoint folder (``local-dir:`` may
    stand before it), a weight file with its open_clip_config.json beside it, or open_clip's ``ARCH:TAG`` or
    ``hf-hub:ORG/NAME`` (downloaded). Raises UserError with the reason if it cannot be opened.
    """
    config = check_name(path_or_name)
    path = Path(str(path_or_name).removeprefix("local-dir:"))
    source = weights.resolve(str(config.pretrained), config.arch)
    if path.is_file() and source.model_cfg is None:
        raise UserError(f"{path} has no {weights.CONFIG_NAME} beside it, so its towers are unknown")
    clip = build_model(config, source=source)
    text_cfg = open_clip_config(clip)["model_cfg"]["text_cfg"]
    from ..data.text import tokenizer_for

    model = LoadedModel(clip, tokenizer_for(text_cfg, source.text_folder), device)
    model.file = source.file
    return model
