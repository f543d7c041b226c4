"""CIFAR-10 as torchvision downloads and verifies it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import DataError


class Cifar10:
    """The official splits: 50,000 and 10,000 images of 32×32 pixels (Krizhevsky, 2009)."""

    image_shape = (32, 32, 3)

    def __init__(self, root: Path, work: Path) -> None:
        """Download to `root` unless it is there; lay the pixels in `work`, where all workers map them.

        Raises:
            DataError: the files are neither there nor to be had, or their digests differ.
        """
        from torchvision.datasets import CIFAR10  # imports torch: seconds

        self.labels = {}
        self._files = {}
        for split in ("train", "test"):
            try:
                found = CIFAR10(str(root), train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"CIFAR-10 is not under {root} and cannot be downloaded ({error}); put torchvision's"
                    f" cifar-10-python.tar.gz there and name the folder with --root"
                ) from error
            self.classes = list(found.classes)
            self.labels[split] = np.array(found.targets, np.int64)
            self._files[split] = work / f"cifar10-{split}.npy"
            np.save(self._files[split], found.data, allow_pickle=False)

    def name(self, split: str, index: int) -> str:
        """The sample's place in torchvision's data set."""
        return f"CIFAR-10 {split} sample {index}"

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """One image: uint8 [32, 32, 3]."""
        pixels = np.load(self._files[split], mmap_mode="r", allow_pickle=False)
        return np.asarray(pixels[index])
