"""torchvision's classification models by name, with a first layer that suits small images."""

from __future__ import annotations

from typing import Any

from torch import nn

_SMALL = 64
"""Images whose shorter side is below this keep their resolution in the first layer.

The models are designed for 224 pixels: of 32 pixels, the first layers would discard most before the first block.
"""

_WITHOUT_AUXILIARY_HEADS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def names() -> list[str]:
    """Names of all models that `build` can build."""
    import torchvision

    return sorted(torchvision.models.list_models(module=torchvision.models))


def build(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a model with new weights for images [N, C, H, W] of the given shape (C, H, W)."""
    import torchvision

    options: dict[str, Any] = _WITHOUT_AUXILIARY_HEADS.get(name, {})
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    channels, height, width = image_shape
    small = min(height, width) < _SMALL
    if small or channels != 3:
        _replace_stem(model, channels, small)
    return model


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
