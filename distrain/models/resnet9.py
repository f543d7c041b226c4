"""`resnet9`: a nine-layer residual network that trains fast on small images.

After Page, "How to train your ResNet" (2018), https://myrtle.ai/learn/how-to-train-your-resnet/.
"""

from __future__ import annotations

from torch import Tensor, nn

from distrain.errors import ConfigError

_LOGIT_SCALE = 0.125
"""Page's factor, which keeps the first logits small."""


class ResNet9(nn.Module):
    """Residual network: 6,573,120 parameters for RGB images of any size and 10 classes."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 16:
            raise ConfigError(f"model.name=resnet9 needs images of at least 16 pixels, these have {height}×{width}")
        self.features = nn.Sequential(
            _convolution(channels, 64),
            _convolution(64, 128, pool=True),
            _Residual(128),
            _convolution(128, 256, pool=True),
            _convolution(256, 512, pool=True),
            _Residual(512),
        )
        self.head = nn.Linear(512, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, C, H, W]."""
        # Not AdaptiveMaxPool2d: on GPUs its gradient has no deterministic form.
        logits: Tensor = self.head(self.features(x).amax((2, 3))) * _LOGIT_SCALE
        return logits


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def _convolution(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
