"""torchvision's classification models by name, with a first layer that suits small images, and their weights."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from distrain.errors import ConfigError
from distrain.models import downloads, weight_files
from distrain.models.weight_files import WeightFile
from distrain.text import printable

_SMALL = 64
"""Images whose shorter side is below this keep their resolution in the first layer.

The models are designed for 224 pixels: of 32 pixels, the first layers would discard most before the first block.
"""

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""Models that have further heads, which are not built here. Their weights expect pixels in -1 … 1."""
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""Old form of names in the files of densenets, which torchvision converts too: norm.1.weight is norm1.weight now."""


def names() -> list[str]:
    """Names of all models that `build` can build."""
    import torchvision

    return sorted(torchvision.models.list_models(module=torchvision.models))


def build(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a model with new weights for images [N, C, H, W] of the given shape (C, H, W)."""
    import torchvision

    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in _WITH_AUXILIARY_HEADS else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if _has_other_stem(image_shape):
        _replace_stem(model, image_shape[0], small=min(image_shape[1:]) < _SMALL)
    return model


def fetch(name: str, model: str) -> Path:
    """Return the file of a model's weights in torch.hub's cache; fetch it if it is not there.

    Args:
        name: member of the model's enum of weights, such as `IMAGENET1K_V2` or `DEFAULT`.
        model: name of the model.

    Raises:
        ConfigError: there are no such weights, or they cannot be fetched.
    """
    return downloads.fetch(_subject(name), _weights(name, model).url)


def read(name: str, model: str, image_shape: tuple[int, int, int]) -> WeightFile:
    """Read a model's weights, which are fetched if necessary: see `distrain.models.pretrained`."""
    weights = _weights(name, model)
    if _has_other_stem(image_shape):
        channels, height, width = image_shape
        raise ConfigError(
            f"{_subject(name)}: these weights are for images of 3 channels and at least {_SMALL} pixels, not"
            f" {height}×{width}×{channels}, for which model.name={model} has another first layer; prepare larger images"
        )
    path, preprocessing = fetch(name, model), weights.transforms()
    try:
        file = weight_files.read(path)
    except ConfigError as error:
        for remark in downloads.remarks(path):
            raise ConfigError(f"{_subject(name)}: {remark}") from error
        raise
    tensors = {_DENSENET.sub(r"\1\2", key): value for key, value in file.weights.items()}
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    if model in _WITH_AUXILIARY_HEADS:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(_AUXILIARY_HEADS)}
        mean, std = [0.5] * 3, [0.5] * 3
    notes = [*downloads.remarks(path), *file.notes]
    return replace(file, weights=tensors, classes=weights.meta["categories"], notes=notes, mean=mean, std=std)


def _subject(name: str) -> str:
    return f"model.init=torchvision:{printable(name)}"


def _weights(name: str, model: str) -> Any:
    """Return the member of an enum of torchvision that describes weights: url, transforms and meta.

    Raises:
        ConfigError: there is none of this name, or no such model.
    """
    import torchvision

    if model not in names():
        raise ConfigError(f"{_subject(name)}: model.name={model} is not a model of torchvision; set model.name too")
    kind = torchvision.models.get_model_weights(model)
    known = list(kind.__members__)
    given = name.removeprefix(f"{kind.__name__}.")  # as torchvision's own pages name them
    if given not in known:
        close = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"{_subject(name)}: unknown; {hint}{model} has the weights {', '.join(known)}")
    return kind[given]


def _has_other_stem(image_shape: tuple[int, int, int]) -> bool:
    """Whether models for images of a shape (C, H, W) have another first layer than torchvision's."""
    channels, height, width = image_shape
    return min(height, width) < _SMALL or channels != 3


def _replace_stem(model: nn.Module, channels: int, small: bool) -> None:
    """Replace the first convolution by one with another number of input channels.

    For small images it also gets a stride of 1 and a 3×3 kernel, and pooling before the second convolution is removed.
    """
    convolutions = 0
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            convolutions += 1
            if convolutions == 2:
                return
            model.set_submodule(path, _first_convolution(layer, channels, small))
        elif small and isinstance(layer, nn.MaxPool2d):
            model.set_submodule(path, nn.Identity())


def _first_convolution(layer: nn.Conv2d, channels: int, small: bool) -> nn.Conv2d:
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    if small:
        kernel, stride, padding = (3, 3), (1, 1), (1, 1)
    new = nn.Conv2d(channels, layer.out_channels, kernel, stride, padding, bias=layer.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new
