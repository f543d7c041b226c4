"""Random erasing after Zhong et al., "Random Erasing Data Augmentation" (2017), a whole batch at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain.training.random_bits import mix, signed

_AREA = (0.02, 0.33)
"""Smallest and largest fraction of an image's area, as in torchvision's RandomErasing."""
_RATIO = (0.3, 3.3)
"""Smallest and largest aspect ratio, height / width; drawn uniformly on a logarithmic scale."""
_STREAM = signed(0xA54FF53A5F1D36F1)
"""Makes the random bits independent of those that are used otherwise."""


def erase(images: Tensor, random_bits: Tensor, probability: float, fill: Tensor) -> Tensor:
    """Set a random rectangle of each image to a colour, with a probability.

    torchvision's RandomErasing draws again if a rectangle is as high or wide as the image; here it is cut to the image.

    Args:
        images: uint8 [N, H, W, C].
        random_bits: int64 [N, 2], 128 random bits of each image.
        probability: that an image is changed.
        fill: uint8 [C], the colour.

    Returns:
        uint8 [N, H, W, C].
    """
    samples, height, width, channels = images.shape
    chance, area, ratio, down, right, _ = _uniform(random_bits).unbind(1)
    area = (_AREA[0] + area * (_AREA[1] - _AREA[0])) * (height * width)
    ratio = torch.exp(math.log(_RATIO[0]) + ratio * math.log(_RATIO[1] / _RATIO[0]))
    rows, columns = (area * ratio).sqrt().round().clamp(max=height), (area / ratio).sqrt().round().clamp(max=width)
    rows = rows * (chance < probability)
    in_rows = _inside(height, (down * (height - rows + 1)).floor(), rows)
    in_columns = _inside(width, (right * (width - columns + 1)).floor(), columns)
    # Whole rows of bytes at once, and no mask of booleans: `torch.where` takes 20 times as long on CPUs. Differences of
    # bytes wrap around, and back.
    pixels = images.reshape(samples, height, width * channels)
    inside = in_rows[:, :, None] * in_columns.repeat_interleave(channels, 1)[:, None, :]
    return torch.addcmul(pixels, inside, fill.repeat(width) - pixels).view(images.shape)


def _uniform(random_bits: Tensor) -> Tensor:
    """Return six numbers in 0 … 1, without 1, for each image: float64 [N, 6]."""
    shifts = torch.arange(0, 60, 20, device=random_bits.device)
    fields = mix(random_bits ^ _STREAM)[:, :, None] >> shifts & 0xFFFFF
    return fields.flatten(1).double() * 2.0**-20


def _inside(size: int, first: Tensor, length: Tensor) -> Tensor:
    """Return uint8 [N, size]: 1 for the `length` pixels from `first` on, else 0."""
    offset = torch.arange(size, device=first.device) - first[:, None]
    return ((offset >= 0) & (offset < length[:, None])).to(torch.uint8)
