"""Augmentation and normalisation of uint8 images, a whole batch at a time, on the device that holds it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.config import Augment
from distrain.training.erasing import erase
from distrain.training.user_functions import Augmentation


class Normalizer:
    """Computes (images / 255 - mean) / std, as one multiplication and addition, for images up to a width.

    Args:
        mean: [C], of the dtype to compute in, on the images' device.
        std: [C].
        width: largest width of the images.
    """

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        # Whole rows of pixels at once: broadcasting over three channels is slow.
        self._scale, self._offset = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)

    def __call__(self, images: Tensor) -> Tensor:
        """Return [N, C, H, W] for uint8 images [N, H, W, C].

        It is channels last in memory, as the images are: convolutions are faster so (`net` on CPUs by 15 %).
        """
        samples, height, width, channels = images.shape
        # `addcmul` would convert bytes itself, in one operation, but on CPUs it takes ten times as long.
        length = width * channels
        rows = images.reshape(samples, height, length).to(self._scale.dtype)
        torch.addcmul(self._offset[:length], rows, self._scale[:length], out=rows)
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
    images: Tensor,
    random_bits: Tensor,
    settings: Augment,
    fill: Tensor,
    also: Augmentation | None = None,
    compiled: Callable[..., Tensor] | None = None,
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
        compiled: `shift_and_cut`, compiled.

    Returns:
        uint8 [N, H, W, C].
    """
    flip, padding, cutout = settings.flip is not False, settings.crop_padding, settings.cutout
    if flip and not padding:  # with shifts, columns are mirrored by their index
        mask = (random_bits[:, 0] & 1).to(torch.uint8).neg_()  # 0 or 255
        images = _chosen(images.flip(2), images, mask[:, None, None, None])
    if padding or cutout:
        _, height, width, channels = images.shape
        tables = _tables(height, width, channels, flip, padding, cutout, images.device)
        images = (compiled or shift_and_cut)(images, random_bits, fill, tables)
    if settings.erasing:
        images = erase(images, random_bits, settings.erasing, fill)
    return images if also is None else also(images, random_bits)


class _Tables(NamedTuple):
    """Numbers that augmentation looks up for images of one size; what is not applied is None.

    They replace many small operations, whose number decides the time of a step on small images.

    Attributes:
        shifts: of random bits to the right, for the numbers down, right, row and column: int64 [2, 2].
        limits: number of values of each of them: int64 [2, 2].
        rows: source of each row, by the shift down: int64 [2·padding + 1, H].
        columns: source of each byte of a row, by the bit that flips and the shift right: int64 [2, 2·padding + 1, W·C].
        in_rows: all bits of the rows of a square, by the row of its centre: uint8 [H, H].
        in_columns: all bits of the bytes of a row that are in a square, by the column of its centre: uint8 [W, W·C].
    """

    shifts: Tensor
    limits: Tensor
    rows: Tensor | None
    columns: Tensor | None
    in_rows: Tensor | None
    in_columns: Tensor | None


@functools.lru_cache(maxsize=16)
def _tables(
    height: int, width: int, channels: int, flip: bool, padding: int, cutout: int, device: torch.device
) -> _Tables:
    # All are computed on the device: a copy would make the host wait.
    shifts = torch.stack([torch.arange(start, start + 21, 20, device=device) for start in (8, 0)])
    limits = torch.full((2, 2), 2 * padding + 1, device=device)
    limits[1, 0].fill_(height)
    limits[1, 1].fill_(width)
    rows = columns = in_rows = in_columns = None
    if padding:
        rows, windows = (_windows(size, padding, device) for size in (height, width))
        by_bit = torch.stack([windows, windows.flip(1) if flip else windows])
        columns = (by_bit[..., None] * channels + torch.arange(channels, device=device)).flatten(2)
    if cutout:
        in_rows, in_columns = (_squares(size, cutout, device) for size in (height, width))
        in_columns = in_columns.repeat_interleave(channels, 1)
    return _Tables(shifts, limits, rows, columns, in_rows, in_columns)


def _windows(size: int, padding: int, device: torch.device) -> Tensor:
    """Return the source of each pixel by the shift of an image with reflected edges: int64 [2·padding + 1, size]."""
    index = torch.arange(-padding, size + padding, device=device)
    return (size - 1 - (size - 1 - index.abs()).abs()).unfold(0, size, 1)


def _squares(size: int, side: int, device: torch.device) -> Tensor:
    """Return the pixels within a range of length `side` by its centre, as bytes of 0 or 255: uint8 [size, size]."""
    pixels = torch.arange(size, device=device)
    offset = pixels - pixels[:, None] + side // 2
    return ((offset >= 0) & (offset < side)).to(torch.uint8) * 255


def shift_and_cut(images: Tensor, random_bits: Tensor, fill: Tensor, tables: _Tables) -> Tensor:
    """Do what the tables are for: uint8 [N, H, W, C]."""
    samples, height, width, channels = images.shape
    rows = images.reshape(samples, height, width * channels)
    (down, right), (row, column) = _numbers(random_bits, tables)
    if tables.rows is not None and tables.columns is not None:
        # Whole rows are copied first, then bytes within them: on CPUs a tenth of the time of copying pixel by pixel.
        first = torch.arange(0, samples * height, height, device=images.device)
        source = (tables.rows[down] + first[:, None]).flatten()
        rows = rows.flatten(0, 1).index_select(0, source).reshape(rows.shape)
        rows = rows.gather(2, tables.columns[random_bits[:, 0] & 1, right][:, None].expand(rows.shape))
    if tables.in_rows is not None and tables.in_columns is not None:
        colour = fill.repeat(width)
        rows = _chosen(colour, rows, tables.in_columns[column][:, None], tables.in_rows[row][:, :, None])
    return rows.reshape(images.shape)


def _numbers(random_bits: Tensor, tables: _Tables) -> tuple[tuple[Tensor, ...], ...]:
    """Return the numbers down and right, and those of the centre, each from 0 to its limit, from 20 bits: int64 [N]."""
    numbers = ((random_bits[:, :, None] >> tables.shifts) & 0xFFFFF) * tables.limits >> 20
    return tuple(each.unbind(1) for each in numbers.unbind(1))


def _chosen(ones: Tensor, others: Tensor, *masks: Tensor) -> Tensor:
    """Return the bytes of `ones` where all masks are 255, and of `others` where one is 0.

    `torch.where` takes ten times as long for bytes on CPUs.
    """
    chosen = ones ^ others
    for mask in masks:
        chosen &= mask
    chosen ^= others
    return chosen


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
