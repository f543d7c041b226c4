"""CIFAR-10, downloaded and verified by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain import files
from distrain.errors import DataError
from distrain.text import printable


class Cifar10:
    """The official splits of CIFAR-10: 50,000 and 10,000 images of 32×32 pixels (Krizhevsky, 2009)."""

    image_shape = (32, 32, 3)

    def __init__(self, root: Path, work: Path) -> None:
        """Download the files to `root` if they are missing, and write the pixels to `work`, where all workers map them.

        Raises:
            DataError: the files cannot be downloaded, or their digests differ.
        """
        from torchvision.datasets import CIFAR10  # imports torch: seconds

        _check_files(root, CIFAR10)
        self.labels = {}
        self._files = {}
        for split in ("train", "test"):
            try:
                dataset = CIFAR10(str(root), train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"CIFAR-10 is not in {root} and cannot be downloaded ({error}); copy torchvision's"
                    f" cifar-10-python.tar.gz to a folder and give the folder with --root"
                ) from error
            self.classes = list(dataset.classes)
            self.labels[split] = np.array(dataset.targets, np.int64)
            self._files[split] = work / f"cifar10-{split}.npy"
            np.save(self._files[split], dataset.data, allow_pickle=False)

    def name(self, split: str, index: int) -> str:
        """Return split and index of a sample in torchvision's data set."""
        return f"CIFAR-10 {split} sample {index}"

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Return one image: uint8 [32, 32, 3]."""
        pixels = np.load(self._files[split], mmap_mode="r", allow_pickle=False)
        return np.asarray(pixels[index])


def _check_files(root: Path, dataset: Any) -> None:
    """Refuse files that torchvision would wait for, or read without end."""
    names = [*(name for name, _ in (*dataset.train_list, *dataset.test_list)), dataset.meta["filename"]]
    for path in (root / dataset.filename, *(root / dataset.base_folder / name for name in names)):
        try:
            files.open_regular(path).close()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{printable(path)}: {error.strerror}; remove it, or give another --root") from None
