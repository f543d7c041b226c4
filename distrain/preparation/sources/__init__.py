"""Sources of images for `distrain prepare`. Each module has one class that implements `Source`.

Each source has a command in `distrain.cli`. The user's own classes need none: see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distrain.data.pillow import UnreadableError as UnreadableError


class Source(Protocol):
    """Labelled images in splits: `train`, and optionally `val` and `test`. Must be picklable for worker processes.

    Warnings (`warnings.warn`) that `load` issues are counted and shown once, with the names of the first samples.
    """

    classes: list[str]
    image_shape: tuple[int, int, int]
    """(H, W, C) of every image."""
    labels: Mapping[str, NDArray[np.int64]]
    """The class of each sample, int64 [N], for each split. A sample's index in it is its id."""

    def name(self, split: str, index: int) -> str:
        """Return a sample's name for messages, such as its path."""
        ...

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Return one image: uint8 [H, W, C].

        Raises:
            UnreadableError: the sample is damaged or not an image.
        """
        ...
