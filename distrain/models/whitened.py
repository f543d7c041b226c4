"""`whitened`: a small network that trains very fast on small images, behind a convolution that whitens its input.

After Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv 2404.00498, 2024), and Page, "How to train your
ResNet" (2018): the network of airbench94.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.errors import ConfigError

_WIDTHS = (64, 256, 256)
_EPSILON = 5e-4
"""Added to the variances of patches: rare patterns, mostly noise, would be amplified otherwise."""


class Whitened(nn.Module):
    """Network of seven convolutions: 1,971,352 trained parameters for RGB images of any size and 10 classes.

    The first convolution has 2×2 kernels that are not trained. They give uncorrelated channels of equal variance, each
    with both signs: `initialize_from_images` computes them.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 9:
            raise ConfigError(f"model.name=whitened needs images of at least 9 pixels, these have {height}×{width}")
        patterns = 2 * 4 * channels
        self.whitening = nn.Conv2d(channels, patterns, 2)
        self.whitening.weight.requires_grad_(False)
        inputs = (patterns, *_WIDTHS)
        self.blocks = nn.Sequential(*(_block(*pair) for pair in zip(inputs, _WIDTHS, strict=False)))
        self.head = nn.Linear(_WIDTHS[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / _WIDTHS[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, C, H, W]."""
        x = self.blocks(F.gelu(self.whitening(x)))
        # Not AdaptiveMaxPool2d: on GPUs its gradient has no deterministic form.
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits

    @torch.no_grad()
    def initialize_from_images(self, images: Tensor) -> None:
        """Set the kernels of the whitening convolution to the principal components of 2×2 patches of images.

        Args:
            images: normalised, [n, C, H, W].
        """
        weight = self.whitening.weight
        patches = F.unfold(images.double(), 2).transpose(1, 2).flatten(0, 1)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernels = (components / (variances + _EPSILON).sqrt()).T
        largest = kernels.gather(1, kernels.abs().argmax(1, keepdim=True))
        kernels *= largest.sign()  # another version of LAPACK may return other signs
        weight.copy_(torch.cat([kernels, -kernels]).view_as(weight))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        _convolution(inputs, outputs), nn.MaxPool2d(2), _norm(outputs), nn.GELU(),
        _convolution(outputs, outputs), _norm(outputs), nn.GELU(),
    )  # fmt: skip


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution that begins by passing its input on (Dirac initialisation)."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:inputs])
    return layer


def _norm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm whose scale stays 1: the convolution before it has none that matters."""
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer
