"""Augmentation and normalisation of the images of a batch, as `distrain train` does them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrain.config import Augment
from distrain.errors import ConfigError
from distrain.training import augment as augmentation


def normalize(
    images: Tensor, mean: Tensor | Sequence[float], std: Tensor | Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return (images / 255 - mean) / std for uint8 images [N, H, W, C]: [N, C, H, W], channels last in memory.

    Args:
        images: uint8 [N, H, W, C], on any device.
        mean: [C]. For images on a GPU give a tensor there: a list is copied in each call.
        std: [C].
        dtype: of the result, and of the computation.

    Raises:
        ConfigError: an argument has another shape or type.
    """
    _check_images(images)
    mean, std = (torch.as_tensor(each, dtype=dtype, device=images.device) for each in (mean, std))
    for name, each in (("mean", mean), ("std", std)):
        if each.shape != images.shape[3:]:
            raise ConfigError(
                f"{name}: should have one value for each of the {images.shape[3]} channels of images "
                f"{list(images.shape)}, which are [N, H, W, C]; got {list(each.shape)}"
            )
    return augmentation.normalize(images, mean, std)


def augment(
    images: Tensor,
    random_bits: Tensor,
    *,
    flip: bool = False,
    crop_padding: int = 0,
    cutout: int = 0,
    erasing: float = 0.0,
    fill: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Flip, shift, cut out and erase each image as its random bits determine; the result is that of `distrain train`.

    mixup and CutMix need the labels too and are not done here; `trivial_augment` is an argument of `batches`.

    The random bits of a batch depend on the seed, the step and the position in the global batch alone, and so does what
    is done to each sample: not on the number of processes.

    Args:
        images: uint8 [N, H, W, C], on any device.
        random_bits: int64 [N, 2], those of the batch, on the same device.
        flip: mirror images horizontally with probability 0.5 (`augment.flip`).
        crop_padding: shift images by up to this many pixels in each direction, with reflected edges.
        cutout: side in pixels of a random square that gets the colour `fill`; 0: none.
        erasing: probability of a random rectangle that gets the colour `fill` (`augment.erasing`).
        fill: uint8 [C], colour of these; None: black. `distrain train` takes the mean of the train split.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ConfigError: the images are too small, or an argument has another shape or type.
    """
    _check_images(images)
    if random_bits.dtype != torch.int64 or random_bits.shape != (len(images), 2):
        raise ConfigError(
            f"random_bits: should be int64 [{len(images)}, 2], those of the same batch as the images; "
            f"got {_described(random_bits)}"
        )
    if flip not in (True, False):
        raise ConfigError(
            f"flip={flip!r}: should be True or False; with distrain.batches(…, alternating_flip=True), True mirrors"
            " each image in every second epoch"
        )
    smallest = min(images.shape[1:3])
    if not 0 <= crop_padding < smallest or not 0 <= cutout <= smallest:
        raise ConfigError(f"crop_padding={crop_padding}, cutout={cutout}: too large for images of {smallest} pixels")
    if not 0 <= erasing <= 1:
        raise ConfigError(f"erasing={erasing}: should be a probability, from 0 to 1")
    colour = torch.as_tensor([0] * images.shape[3] if fill is None else fill, dtype=torch.uint8, device=images.device)
    settings = Augment(flip=flip, crop_padding=crop_padding, cutout=cutout, erasing=erasing)
    return augmentation.augment(images, random_bits, settings, colour)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ConfigError(
            f"images: should be uint8 [N, H, W, C], as those of `distrain.batches`; got {_described(images)}"
        )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
