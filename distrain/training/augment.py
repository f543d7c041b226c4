"""Augmentation and normalisation of uint8 images, a whole batch at a time, on the device that holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.config import Augment
from distrain.training.erasing import erase
from distrain.training.user_functions import Augmentation


class Normalizer:
    """Computes (images / 255 - mean) / std, for images up to a width.

    Args:
        mean: [C], of the dtype to compute in, on the images' device.
        std: [C].
        width: largest width of the images.
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        # Whole rows of pixels at once: broadcasting over three channels is slow.
        self._mean, self._std = (mean * 255).repeat(width), (std * 255).repeat(width)

    def __call__(self, images: Tensor) -> Tensor:
        """Return [N, C, H, W] for uint8 images [N, H, W, C].

        It is channels last in memory, as the images are: convolutions are faster so (`net` on CPUs by 15 %).
        """
        samples, height, width, channels = images.shape
        length = width * channels
        rows = images.reshape(samples, height, length).to(self._mean.dtype)
        rows.sub_(self._mean[:length]).div_(self._std[:length])
        return rows.reshape(samples, height, width, channels).permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise one batch of images, as a `Normalizer` does."""
    return Normalizer(mean, std, images.shape[2])(images)


def needs_random_bits(settings: Augment) -> bool:
    """Whether `augment` uses random bits: drawing them takes time."""
    return (
        settings.flip is not False
        or settings.crop_padding > 0
        or settings.cutout > 0
        or settings.erasing > 0
        or settings.crop_scale is not None
        or settings.also is not None
    )


def augment(
    images: Tensor, random_bits: Tensor, settings: Augment, fill: Tensor, also: Augmentation | None = None
) -> Tensor:
    """Flip, shift, cut out and erase each image as its random bits determine; `step` mixes the results.

    Args:
        images: uint8 [N, H, W, C].
        random_bits: int64 [N, 2], 128 random bits a sample: in the first integer, bit 0 flips, bits 8–27 and 28–47
            shift down and right by up to `crop_padding`; in the second, bits 0–19 and 20–39 give the centre of the
            square of `cutout`, which may extend over the edge (DeVries and Taylor, "Cutout", 2017). Random erasing
            makes others from them.
        settings: what to apply.
        fill: uint8 [C], colour of the square of cutout, and of the rectangle of random erasing.
        also: the user's function, called last.

    Returns:
        uint8 [N, H, W, C].
    """
    _, height, width, _ = images.shape
    crop_padding, cutout = settings.crop_padding, settings.cutout
    if crop_padding:
        shifts = 2 * crop_padding + 1
        down = _below(shifts, random_bits[:, 0] >> 8) - crop_padding
        right = _below(shifts, random_bits[:, 0] >> 28) - crop_padding
        rows = _reflect(torch.arange(height, device=images.device) + down[:, None], height)
        columns = _reflect(torch.arange(width, device=images.device) + right[:, None], width)
        samples = torch.arange(len(images), device=images.device)
        images = images[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    if settings.flip:
        mirrored = images.flip(2)
        chosen = (random_bits[:, 0] & 1).to(torch.uint8)[:, None, None, None]
        # As `torch.where`, which takes twice as long for bytes on CPUs. Differences of bytes wrap around, and back.
        images = torch.addcmul(images, chosen, mirrored.sub_(images))
    if cutout:
        in_rows = _inside(height, _below(height, random_bits[:, 1]), cutout)
        in_columns = _inside(width, _below(width, random_bits[:, 1] >> 20), cutout)
        images = torch.where((in_rows[:, :, None] & in_columns[:, None, :])[..., None], fill, images)
    if settings.erasing:
        images = erase(images, random_bits, settings.erasing, fill)
    return images if also is None else also(images, random_bits)


def mixup_partners(samples: int, lanes: int, device: torch.device) -> Tensor:
    """Return, for each sample of a local batch, the index of its partner in mixup and CutMix: int64 [n].

    The partner is the next sample of the same lane, and so of the same rank; for the last sample of a lane it is the
    first. A sample that is alone in its lane is its own partner.

    Args:
        samples: of the local batch, row by row, lane by lane.
        lanes: number of lanes of its rank.
        device: where the indices are computed, so that no copy waits for the host.
    """
    index = torch.arange(samples, device=device)
    return torch.where(index + lanes < samples, index + lanes, index % lanes)


def _below(limit: int, random_bits: Tensor) -> Tensor:
    """Return integers from 0 to limit - 1, from the lowest 20 bits."""
    return (random_bits & 0xFFFFF) * limit >> 20


def _inside(size: int, centre: Tensor, side: int) -> Tensor:
    """Return bool [N, size]: whether a pixel is within a range of length `side` around the centre."""
    offset = torch.arange(size, device=centre.device) - centre[:, None] + side // 2
    return (offset >= 0) & (offset < side)


def _reflect(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index.abs()).abs()
