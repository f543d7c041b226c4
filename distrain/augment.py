"""From uint8 images to a model's input, a whole batch at a time, on whatever device holds it."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std.

    Args:
        images: uint8 [N, H, W, C].
        mean: [C], of the dtype to compute in.
        std: [C].

    Returns:
        [N, C, H, W] of mean's dtype.
    """
    x = images.permute(0, 3, 1, 2).to(mean.dtype, memory_format=torch.contiguous_format)
    return x.sub_(mean[:, None, None] * 255).div_(std[:, None, None] * 255)


def augment(images: Tensor, words: Tensor, flip: bool, crop_padding: int) -> Tensor:
    """Mirror and shift each image as its random word says.

    Args:
        images: uint8 [N, H, W, C].
        words: int64 [N], 64 random bits a sample: bit 0 mirrors, bits 8–27 and 28–47 shift down and right.
        flip: whether to mirror.
        crop_padding: largest shift in pixels; what comes in from outside is the reflected edge.

    Returns:
        uint8 [N, H, W, C].
    """
    if not flip and not crop_padding:
        return images
    _, height, width, _ = images.shape
    shifts = 2 * crop_padding + 1
    down = (((words >> 8) & 0xFFFFF) * shifts >> 20) - crop_padding
    right = (((words >> 28) & 0xFFFFF) * shifts >> 20) - crop_padding
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if flip:
        columns = torch.where((words & 1).bool()[:, None], width - 1 - columns, columns)
    columns = columns + right[:, None]
    samples = torch.arange(len(images), device=images.device)
    return images[samples[:, None, None], _reflect(rows, height)[:, :, None], _reflect(columns, width)[:, None, :]]


def _reflect(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index.abs()).abs()
