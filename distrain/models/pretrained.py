"""Pretrained weights by name, `torchvision:NAME` and `timm:NAME`: of these libraries, through their own caches."""

from __future__ import annotations

from pathlib import Path

from distrain.models import from_timm, from_torchvision
from distrain.models.weight_files import WeightFile

_LIBRARIES = {"torchvision": from_torchvision, "timm": from_timm}


def is_name(init: str) -> bool:
    """Whether a value of `model.init` names pretrained weights; else it is a path."""
    library, colon, _ = init.partition(":")
    return bool(colon) and library in _LIBRARIES


def fetch(init: str, model: str) -> Path:
    """Return the file of weights in the cache of its library; fetch it if it is not there.

    Args:
        init: the name of the weights, such as `torchvision:IMAGENET1K_V2`.
        model: `model.name`, which must be one of the same library.

    Raises:
        ConfigError: there are no such weights, or they cannot be fetched.
    """
    library, _, name = init.partition(":")
    path: Path = _LIBRARIES[library].fetch(name, model)
    return path


def read(init: str, model: str, image_shape: tuple[int, int, int]) -> WeightFile:
    """Read pretrained weights; fetch them if they are not in the cache.

    Args:
        init: as for `fetch`.
        model: as for `fetch`.
        image_shape: (C, H, W) of the images that the model is built for.

    Raises:
        ConfigError: as `fetch` does; or the weights do not suit such images.
    """
    library, _, name = init.partition(":")
    file: WeightFile = _LIBRARIES[library].read(name, model, image_shape)
    return file
