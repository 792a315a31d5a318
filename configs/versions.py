"""Versions that a result depends on, decoders and tokenizers among them."""

import platform
from importlib import metadata

__all__ = ["versions"]

PACKAGES = (
    "diptych",
    "torch",
    "open_clip_torch",
    "timm",
    "accelerate",
    "numpy",
    "pillow",
    "simplejpeg",
    "transformers",
    "safetensors",
    "scikit-learn",
    "webdataset",
    "wandb",
)


def versions() -> dict[str, str]:
    """Python, the system, and the packages that are installed, by name."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
