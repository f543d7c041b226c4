"""The part of an image that is trained: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distrain.data.order import RandomBits, mix_bits

_ATTEMPTS = 10
_STREAM = np.uint64(0xA0761D6478BD642F)
"""Separates these draws from others that use the same random bits."""

Boxes = NDArray[np.int64]
"""Top, left, height and width of a part of each image, in pixels: int64 [n, 4]."""


def random_boxes(
    sizes: NDArray[np.int64], random_bits: RandomBits, scale: Sequence[float], ratio: Sequence[float]
) -> Boxes:
    """Return a random part of each image (Szegedy et al., "Going deeper with convolutions", 2014).

    As torchvision's RandomResizedCrop: area and aspect ratio are drawn up to ten times until the part fits into the
    image; if it never does, the part is the centre of the image with the nearest ratio.

    Args:
        sizes: height and width of each image: int64 [n, 2].
        random_bits: 64 random bits for each image: uint64 [n].
        scale: smallest and largest fraction of the image's area.
        ratio: smallest and largest aspect ratio, width / height; drawn uniformly on a logarithmic scale.
    """
    heights, widths = sizes[:, 0], sizes[:, 1]
    boxes = _central(heights, widths, ratio)
    pending = np.arange(len(sizes))
    for attempt in range(_ATTEMPTS):
        height, width = heights[pending], widths[pending]
        area, aspect, down, right = _uniform(random_bits[pending], attempt)
        area = (scale[0] + area * (scale[1] - scale[0])) * height * width
        aspect = np.exp(math.log(ratio[0]) + aspect * (math.log(ratio[1]) - math.log(ratio[0])))
        rows, columns = (np.rint(np.sqrt(each)).astype(np.int64) for each in (area / aspect, area * aspect))
        fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
        top, left = (down * (height - rows + 1)).astype(np.int64), (right * (width - columns + 1)).astype(np.int64)
        boxes[pending[fits]] = np.stack([top, left, rows, columns], axis=1)[fits]
        pending = pending[~fits]
        if not len(pending):
            break
    return boxes


def covering_boxes(sizes: NDArray[np.int64], height: int, width: int) -> Boxes:
    """Return the largest part of each image that has the aspect ratio of `height` × `width`.

    It is at the centre, as torchvision's CenterCrop places it, and its sides are whole pixels.
    """
    scale = np.minimum(sizes[:, 0] / height, sizes[:, 1] / width)
    rows, columns = (
        np.clip(np.rint(scale * side).astype(np.int64), 1, sizes[:, axis]) for axis, side in enumerate((height, width))
    )
    top, left = (np.rint(rest / 2).astype(np.int64) for rest in (sizes[:, 0] - rows, sizes[:, 1] - columns))
    return np.stack([top, left, rows, columns], axis=1)


def _central(heights: NDArray[np.int64], widths: NDArray[np.int64], ratio: Sequence[float]) -> Boxes:
    """Return the largest part of each image, at its centre, whose aspect ratio is within the limits."""
    rows = np.where(widths < heights * ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    columns = np.where(widths > heights * ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    rows, columns = np.clip(rows, 1, heights), np.clip(columns, 1, widths)
    return np.stack([(heights - rows) // 2, (widths - columns) // 2, rows, columns], axis=1)


def _uniform(random_bits: RandomBits, attempt: int) -> NDArray[np.float64]:
    """Return four numbers in 0 … 1, without 1, for each image: float64 [4, n]."""
    counters = np.uint64(4 * attempt) + np.arange(4, dtype=np.uint64)
    outputs = mix_bits((random_bits ^ _STREAM)[None, :] + mix_bits(counters)[:, None])
    return (outputs >> np.uint64(11)).astype(np.float64) * 2.0**-53
