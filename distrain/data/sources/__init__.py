"""Where `prepare` gets images from: one module a source, each with a class that fits `Source`, and a
command in `distrain.cli`. A source of the user's own needs neither: see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class UnreadableError(Exception):
    """One sample cannot be read; the message says why."""


class Source(Protocol):
    """Labelled images in splits (`train`, perhaps `val` and `test`). Sent to worker processes, so it pickles."""

    classes: list[str]
    image_shape: tuple[int, int, int]
    """(H, W, C) of every image."""
    labels: Mapping[str, NDArray[np.int64]]
    """For each split the class of every sample, int64 [N]; a sample's index here is its id."""

    def name(self, split: str, index: int) -> str:
        """What to call a sample in a message."""
        ...

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """One image: uint8 [H, W, C].

        Raises:
            UnreadableError: the sample is damaged or no image.
        """
        ...
