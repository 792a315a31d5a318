"""Towers that stay as they are: locked-image tuning (LiT: Zhai et al., 2022, arXiv 2111.07991) and its kin.

Which parameters are locked is open_clip's own choice, for every kind of tower. A tower that is locked from
its input on costs no backward pass up to its first trainable layer.
"""

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from pydantic import Field
from torch import nn

# torch has no public base
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ..configs.errors import UserError
from ..configs.load import StrictModel
from .layer_decay import layer_numbers

__all__ = ["LockConfig", "lock"]


class LockConfig(StrictModel):
    """Which towers keep their pretrained weights. Batch norms of locked layers keep their running statistics
    and normalise by them."""

    image: bool = False
    """Lock the image tower."""
    image_unlocked_groups: int = Field(default=0, ge=0)
    """Only for a locked image tower: train its last so many groups (a ViT's are: projection, last block with
    the final norm, each block before it, embeddings)."""
    text: bool = False
    """Lock the text tower."""
    text_unlocked_groups: int = Field(default=0, ge=0)
    """The same for the text tower."""


def lock(clip: CustomTextCLIP, config: LockConfig) -> None:
    """Lock the towers in place; before the optimizer is built and before the model is wrapped.

    Raises UserError for unlocked groups without a lock, for groups of a tower that has none, and where so
    many groups are unlocked that nothing stays locked.
    """
    for kind, tower, asked, groups in (
        ("image", clip.visual, config.image, config.image_unlocked_groups),
        ("text", clip.text, config.text, config.text_unlocked_groups),
    ):
        if not asked:
            if groups:
                raise UserError(f"lock.{kind}_unlocked_groups: set lock.{kind}: true for it, or leave it out")
            continue
        if groups and isinstance(tower, ModifiedResNet):
            raise UserError(
                f"lock.{kind}_unlocked_groups: open_clip's ResNet can only be locked as a whole; set it to 0"
            )
        if isinstance(tower, TimmModel) or (isinstance(tower, HFTextEncoder) and groups):
            # as their own lock, which imports by a name that timm has deprecated, and does not know BERT
            numbers = layer_numbers(tower)
            for name, parameter in tower.named_parameters():
                parameter.requires_grad_(numbers[name] >= max(numbers.values()) - groups)
        else:
            tower.lock(groups)  # pyright: ignore[reportCallIssue] # all of open_clip's have it
        if all(p.requires_grad for p in tower.parameters()):
            raise UserError(
                f"lock.{kind}_unlocked_groups: with {groups} nothing of the tower stays locked; lower it"
            )
        _freeze_statistics(tower)


def _freeze_statistics(tower: nn.Module) -> None:
    """Keep batch norms in eval mode whose weights are locked, or all that have none in a wholly locked
    tower."""
    whole = not any(p.requires_grad for p in tower.parameters())
    for module in tower.modules():
        if isinstance(module, _BatchNorm):
            own = list(module.parameters())
            if not any(p.requires_grad for p in own) and (own or whole):
                module.register_forward_pre_hook(_stay_in_eval)


def _stay_in_eval(module: nn.Module, _: object) -> None:
    """``model.train()`` sets the mode of every layer; this one takes it back."""
    module.eval()
