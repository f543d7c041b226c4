"""TrivialAugmentWide (Müller and Hutter, "TrivialAugment", 2021): one random operation of random strength on an image.

The operations are torchvision's, with the strengths of its `TrivialAugmentWide`, and bilinear interpolation, as in its
training script. They are drawn from the random bits of the sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distrain.data.order import RandomBits, mix_bits

_STREAM = np.uint64(0xBB67AE8584CAA73B)
"""Makes the random bits independent of those that are used otherwise."""
_STRENGTHS = 31
"""Number of strengths of an operation."""


class Operation(NamedTuple):
    """An operation on images.

    Attributes:
        apply: changes an image uint8 [C, H, W] with a strength.
        strengths: 31 numbers; empty: it has no strength.
        is_signed: whether the strength gets a random sign.
    """

    apply: Callable[[Tensor, float], Tensor]
    strengths: Sequence[float] = ()
    is_signed: bool = False


def trivial_augment(pixels: Tensor, random_bits: RandomBits) -> None:
    """Change an image in place.

    Args:
        pixels: uint8 [H, W, C].
        random_bits: uint64 [2].
    """
    planes = pixels.permute(2, 0, 1)
    operation, strength = draw(random_bits)
    planes.copy_(operation.apply(planes.contiguous(), strength))


def draw(random_bits: RandomBits) -> tuple[Operation, float]:
    """Return the operation and its strength for the random bits uint64 [2] of an image."""
    bits = int(mix_bits(random_bits[1:] ^ _STREAM)[0])
    all_operations = tuple(operations().values())
    operation = all_operations[(bits & 0xFFFFF) * len(all_operations) >> 20]
    if not operation.strengths:
        return operation, 0.0
    strength = operation.strengths[(bits >> 20 & 0xFFFFF) * _STRENGTHS >> 20]
    return operation, -strength if operation.is_signed and bits >> 40 & 1 else strength


@functools.cache
def operations() -> dict[str, Operation]:
    """Return the operations by torchvision's names."""
    from torchvision.transforms import InterpolationMode  # takes two seconds, so only if it is needed
    from torchvision.transforms.v2 import functional as F

    def move(image: Tensor, right: int = 0, down: int = 0) -> Tensor:
        moved: Tensor = F.affine(image, 0.0, [right, down], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)
        return moved

    def shear(image: Tensor, right: float = 0.0, down: float = 0.0) -> Tensor:
        degrees = [math.degrees(math.atan(each)) for each in (right, down)]
        sheared: Tensor = F.affine(image, 0.0, [0, 0], 1.0, degrees, InterpolationMode.BILINEAR, center=[0, 0])
        return sheared

    def linear(first: float, last: float) -> list[float]:
        return torch.linspace(first, last, _STRENGTHS).tolist()

    bits_of_colours = [round(8 - number / ((_STRENGTHS - 1) / 6)) for number in range(_STRENGTHS)]
    return {
        "Identity": Operation(lambda image, _: image),
        "ShearX": Operation(lambda image, by: shear(image, right=by), linear(0.0, 0.99), True),
        "ShearY": Operation(lambda image, by: shear(image, down=by), linear(0.0, 0.99), True),
        "TranslateX": Operation(lambda image, by: move(image, right=int(by)), linear(0.0, 32.0), True),
        "TranslateY": Operation(lambda image, by: move(image, down=int(by)), linear(0.0, 32.0), True),
        "Rotate": Operation(
            lambda image, by: F.rotate(image, by, InterpolationMode.BILINEAR), linear(0.0, 135.0), True
        ),
        "Brightness": Operation(lambda image, by: F.adjust_brightness(image, 1 + by), linear(0.0, 0.99), True),
        "Color": Operation(lambda image, by: F.adjust_saturation(image, 1 + by), linear(0.0, 0.99), True),
        "Contrast": Operation(lambda image, by: F.adjust_contrast(image, 1 + by), linear(0.0, 0.99), True),
        "Sharpness": Operation(lambda image, by: F.adjust_sharpness(image, 1 + by), linear(0.0, 0.99), True),
        "Posterize": Operation(lambda image, bits: F.posterize(image, int(bits)), bits_of_colours),
        "Solarize": Operation(lambda image, limit: F.solarize(image, 255 * limit), linear(1.0, 0.0)),
        "AutoContrast": Operation(lambda image, _: F.autocontrast(image)),
        "Equalize": Operation(lambda image, _: F.equalize(image)),
    }
