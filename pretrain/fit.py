"""What of a config can be told to be wrong, or inexact, only once its model is built."""

from collections.abc import Iterator

from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from timm.layers.drop import DropPath
from torch import nn

from ..configs.errors import UserError
from .config import PretrainConfig
from .gradcache import inexact, trains_batchnorm
from .lean_vision import configured_dropout, patch_size
from .model import takes_size

__all__ = ["check_fit", "check_length", "notes"]


def check_fit(config: PretrainConfig, clip: CustomTextCLIP) -> None:
    """Raise UserError where loss, stages, locks or checkpointing do not fit the model."""
    if config.loss.kind == "siglip" and clip.logit_bias is None:
        raise UserError(
            "loss.kind: siglip needs a bias on its logits; set model.init_logit_bias (SigLIP: -10) and "
            "model.init_logit_scale (2.3, its ln 10)"
        )
    if config.train.grad_checkpointing and isinstance(clip.visual, ModifiedResNet):
        raise UserError("train.grad_checkpointing: open_clip's ResNet has none; set it to false")
    weights = config.model.pretrained
    for kind, locked in (("image", config.lock.image), ("text", config.lock.text)):
        own = config.model.pretrained_image if kind == "image" else text_weights(config)
        if locked and not weights and not own:
            mend = "model.pretrained" + (" or model.pretrained_image" if kind == "image" else "")
            raise UserError(f"lock.{kind}: the tower has no pretrained weights to keep; set {mend}")
    patch = patch_size(clip.visual)
    for number, stage in enumerate(config.stages):
        where = f"stages.{number}"
        if stage.patch_dropout and patch is None:
            raise UserError(
                f"{where}.patch_dropout: only ViTs of open_clip and timm drop patches; set it to 0"
            )
        if (side := stage.image_size) is None:
            continue
        if reason := takes_size(clip, side):
            raise UserError(f"{where}.image_size: {side}: {reason}")
        if patch is not None and (rest := side % max(patch)):
            raise UserError(
                f"{where}.image_size: {side} is no multiple of the patches' {max(patch)} pixels, so "
                f"pictures would be cut off; take {side - rest} or {side - rest + max(patch)}"
            )


def text_weights(config: PretrainConfig) -> bool:
    """Whether the text tower alone comes with weights, as Hugging Face's do."""
    text = config.model.text_cfg
    return bool(text.get("hf_model_name")) and bool(text.get("hf_model_pretrained", True))


def check_length(config: PretrainConfig, total_samples: int) -> None:
    """Raise UserError for stages that a run of so many samples never reaches."""
    for number, stage in enumerate(config.stages[:-1]):
        assert stage.until_samples is not None
        if stage.until_samples >= total_samples:
            raise UserError(
                f"stages.{number}.until_samples: {stage.until_samples} is not before the run's end at "
                f"{total_samples} samples, so stage {number + 1} never comes; lower it or train longer"
            )


def notes(config: PretrainConfig, clip: CustomTextCLIP, world_size: int) -> Iterator[str]:
    """Lines that a user should know before training: what is not equal to one process with the whole batch
    beyond rounding, and what comes with the weights unasked."""
    if config.train.micro_batches(world_size) > 1 and (reason := inexact(clip)):
        yield f"not exact: train.micro_batch_size: {reason}"
    if config.data.max_bad_fraction and trains_batchnorm(clip):
        yield (
            "not exact: data.max_bad_fraction: where a sample is damaged, batch norms count the blank in its "
            "place; the loss does not"
        )
    if drops(clip):
        yield "not exact: dropout draws other numbers on another number of processes"
    if (share := configured_dropout(clip.visual)) and "patch_dropout" not in config.model.vision_cfg:
        yield (
            f"{share:.0%} of the patches are dropped in training, as the weights' config says; "
            "model.vision_cfg.patch_dropout=0 takes all"
        )


def drops(clip: nn.Module) -> bool:
    """Whether a tower in training draws random numbers of the process's own (dropout, drop path)."""
    towers = [
        tower for tower in clip.children() if any(parameter.requires_grad for parameter in tower.parameters())
    ]
    layers = [module for tower in towers for module in tower.modules()]
    return any(
        (isinstance(layer, nn.Dropout) and layer.p > 0)
        or (isinstance(layer, DropPath) and bool(layer.drop_prob))
        for layer in layers
    )
