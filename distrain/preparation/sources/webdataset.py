"""Tar files of encoded images and labels, whose samples were listed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.data import index
from distrain.data.fetch import FetchOptions, Remote, locate
from distrain.data.images import decode, read_image
from distrain.data.manifest import Tar
from distrain.data.pillow import Decoding
from distrain.preparation.labels import to_classes
from distrain.preparation.tars import Contents
from distrain.text import printable


class WebDataset:
    """The samples of tar files, in their order.

    Attributes:
        classes: names of the classes.
        labels: class of each sample, int64 [N], for each split.
        samples: entries of the index, with id and label, for each split.
        tars: names of the tar files, for each split.
        starts: first sample of each tar file, and the number of samples: int64 [T + 1].
        common_shape: (H, W, 3) of all images; None: they differ.
        image_shape: (H, W, 3) of every image that `load` returns; to be set if images differ.
        dropped: one line for each sample that cannot be read.
    """

    def __init__(
        self,
        location: str,
        fetching: FetchOptions,
        tars: Mapping[str, Sequence[str]],
        contents: Mapping[str, Sequence[Contents]],
        names: Sequence[str] | None,
        decoding: Decoding,
    ) -> None:
        """Number the samples and their classes; `names` are those of the classes, None: from the labels.

        Raises:
            DataError: a label is not a class.
        """
        self._location, self._fetching, self._decoding = location, fetching, decoding
        self._opened: tuple[int, Path | Remote] | None = None
        self.contents = contents
        self.tars = tars
        self.starts = {
            split: np.cumsum([0, *(len(each.samples) for each in of_split)]) for split, of_split in contents.items()
        }
        self.samples = {
            split: np.concatenate([each.samples for each in of_split]) for split, of_split in contents.items()
        }
        labels = {split: [label for each in of_split for label in each.labels] for split, of_split in contents.items()}
        self.labels: Mapping[str, NDArray[np.int64]]
        self.classes, self.labels = to_classes(labels, names, self.name)
        for split, samples in self.samples.items():
            samples["id"], samples["label"] = np.arange(len(samples)), self.labels[split]
        self.common_shape = self._common_shape()
        self.image_shape = self.common_shape or (0, 0, 3)
        self.dropped = [
            f"{printable(f'{tar}, {key}')}: {reason}"
            for split, of_split in contents.items()
            for tar, each in zip(tars[split], of_split, strict=True)
            for key, reason in each.unreadable
        ]

    def _common_shape(self) -> tuple[int, int, int] | None:
        sizes = np.concatenate([np.unique(samples[["height", "width"]]) for samples in self.samples.values()])
        sizes = np.unique(sizes)
        return (int(sizes[0]["height"]), int(sizes[0]["width"]), 3) if len(sizes) == 1 else None

    def tar_of(self, split: str, number: int) -> int:
        """Return the number of the tar file that has a sample."""
        return int(np.searchsorted(self.starts[split], number, side="right")) - 1

    def name(self, split: str, index: int) -> str:
        """Return the tar file of a sample, and where its image is."""
        tar = self.tars[split][self.tar_of(split, index)]
        return f"{tar}, the image at byte {self.samples[split][index]['offset']:,}"

    def encoded(self, split: str, number: int) -> bytes:
        """Read the encoded image of a sample.

        Raises:
            ShardError: the tar file cannot be read, or has changed.
        """
        tar_number = self.tar_of(split, number)
        name, contents = self.tars[split][tar_number], self.contents[split][tar_number]
        tar = Tar(name=name, bytes=contents.bytes, sha256=contents.sha256, samples=len(contents.samples))
        return index.read_image(self._root(), tar, self.samples[split][number : number + 1])

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Decode one image: uint8 [H, W, 3], resized and cropped to the centre.

        Raises:
            UnreadableError: it is damaged.
        """
        return read_image(self.encoded(split, index), self.image_shape, self._decoding)

    def decode(self, split: str, number: int) -> NDArray[np.uint8]:
        """Decode one image in its size: uint8 [H, W, 3]. The errors are those of `load`."""
        return decode(self.encoded(split, number), self._decoding).numpy()

    def _root(self) -> Path | Remote:
        """Open their location: once in each process, as connections cannot be used in a forked one."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), locate(self._location, self._fetching)
        return self._opened[1]
