"""Sizes of training images that grow during a run ("progressive resizing"): a function of the step.

Howard trained ImageNet so for DAWNBench ("Training Imagenet in 3 hours for $25", fast.ai, 2018); FFCV's recipes do too
(Leclerc et al., 2022). Most steps are cheaper, and the network is trained at the full size at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_STEP = 32
"""Difference of two sizes in pixels: networks halve the resolution up to five times."""


def smaller_sizes(start: int, full: int) -> range:
    """Return the sizes from `start` on that are smaller than `full`."""
    return range(start, full, _STEP)


class Stage(NamedTuple):
    """Steps of a run whose images have a height and width of `size`."""

    size: int
    steps: range


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of training images in a run.

    Attributes:
        smaller: the stages before images have their full size, from the first step on; empty if they always have it.
    """

    smaller: Sequence[Stage] = ()

    @classmethod
    def growing(cls, start: int, full: int, total_steps: int, growth: Sequence[float]) -> ImageSizes:
        """Return sizes that grow from `start` to `full`, at equal distances between two fractions of the steps."""
        sizes = smaller_sizes(start, full)
        begin, end = (int(fraction * total_steps) for fraction in growth)
        ends = [begin + (number + 1) * (end - begin) // len(sizes) for number in range(len(sizes))]
        return cls([Stage(*each) for each in zip(sizes, map(range, [0, *ends], ends), strict=True)])

    def at(self, step: int) -> int | None:
        """Return height and width of the images of a step; None for the full size."""
        return next((size for size, steps in self.smaller if step in steps), None)


FULL_SIZE = ImageSizes()
"""All images of a run have its full size."""
