"""torchvision's classification models by name, with a stem for small images."""

from __future__ import annotations

from typing import Any

from torch import nn

_SMALL = 64
"""Images with a shorter side keep their resolution in the first layer: made for 224 pixels, these models would
otherwise throw most of 32 pixels away before the first block.
"""

_WITHOUT_AUXILIARY_HEADS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def names() -> list[str]:
    """All that `build` knows."""
    import torchvision

    return sorted(torchvision.models.list_models(module=torchvision.models))


def build(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model with new weights; for images [N, C, H, W] of that shape (C, H, W)."""
    import torchvision

    more: dict[str, Any] = _WITHOUT_AUXILIARY_HEADS.get(name, {})
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more)
    channels, height, width = image_shape
    small = min(height, width) < _SMALL
    if small or channels != 3:
        _replace_stem(model, channels, small)
    return model


def _replace_stem(model: nn.Module, channels: int, small: bool) -> None:
    """Another number of input channels; for small images a stride of 1, 3×3 for larger kernels, and no pooling before
    the second convolution.
    """
    convolutions = 0
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            convolutions += 1
            if convolutions == 2:
                return
            model.set_submodule(path, _first(layer, channels, small))
        elif small and isinstance(layer, nn.MaxPool2d):
            model.set_submodule(path, nn.Identity())


def _first(layer: nn.Conv2d, channels: int, small: bool) -> nn.Conv2d:
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    if small:
        kernel, stride, padding = (3, 3), (1, 1), (1, 1)
    new = nn.Conv2d(channels, layer.out_channels, kernel, stride, padding, bias=layer.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new
