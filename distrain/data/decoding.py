"""Encoded images become batches: threads decode, crop and resize them, each to its row of a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data import crops, images, pillow
from distrain.data.crops import Boxes
from distrain.data.encoded import Encoded
from distrain.data.image_sizes import FULL_SIZE, ImageSizes
from distrain.data.images import Box, Decoding, UnreadableError
from distrain.data.index import Stretch
from distrain.data.order import RandomBits
from distrain.data.trivial_augment import trivial_augment

_TASK = 4
"""Images of a task for a thread: fewer cost more for the queue, more leave threads idle at the end of a batch."""


class Transform(Protocol):
    """A step from the pixels of an image to those of a batch."""

    def boxes(self, sizes: NDArray[np.int64], random_bits: RandomBits) -> Boxes:
        """Return the part of each image that is used, from heights and widths [n, 2] and random bits [n, 2]."""
        ...

    def apply(self, pixels: Tensor, box: Box, random_bits: RandomBits, out: Tensor) -> None:
        """Write an image, pixels uint8 [H, W, C] and random bits [2], to its row of a batch: uint8 [h, w, C]."""
        ...


@dataclass(frozen=True)
class TrainingTransform:
    """A random part of an image (`augment.crop_scale`), or the largest centred one, resized to the run's size.

    Attributes:
        height: of the images of a batch.
        width: of the images of a batch.
        crop_scale: smallest and largest fraction of an image's area; None: the largest part, at the centre.
        crop_ratio: smallest and largest aspect ratio of a random part.
        with_operations: whether each image gets a random operation (`augment.trivial_augment`).
    """

    height: int
    width: int
    crop_scale: Sequence[float] | None
    crop_ratio: Sequence[float]
    with_operations: bool = False

    def boxes(self, sizes: NDArray[np.int64], random_bits: RandomBits) -> Boxes:
        """Return the part of each image that is used."""
        if self.crop_scale is None:
            return crops.covering_boxes(sizes, self.height, self.width)
        return crops.random_boxes(sizes, random_bits[:, 1], self.crop_scale, self.crop_ratio)

    def apply(self, pixels: Tensor, box: Box, random_bits: RandomBits, out: Tensor) -> None:
        """Write an image to its row of a batch."""
        images.resize(pixels, box, (self.height, self.width), out)
        if self.with_operations:
            trivial_augment(out, random_bits)


@dataclass(frozen=True)
class EvaluationTransform:
    """An image resized as a whole, and cropped at its centre, as torchvision's Resize and CenterCrop do.

    Attributes:
        height: of the images of a batch.
        width: of the images of a batch.
        resize: length of the shorter side before the crop; None: images are not resized.
    """

    height: int
    width: int
    resize: int | None

    def boxes(self, sizes: NDArray[np.int64], random_bits: RandomBits) -> Boxes:
        """Return whole images."""
        return np.concatenate([np.zeros_like(sizes), sizes], axis=1)

    def apply(self, pixels: Tensor, box: Box, random_bits: RandomBits, out: Tensor) -> None:
        """Write an image to its row of a batch."""
        size = (self.height, self.width)
        if self.resize is None:
            images.resize(pixels, box, size, out)
        else:
            images.resize_and_crop(pixels, self.resize, size, out)


class Bad(NamedTuple):
    """A sample that cannot be decoded.

    Attributes:
        row: of its batch.
        number: in its split.
        id: of the sample.
        offset: of its image in the tar file.
        reason: why.
        substitute: entry of the sample that is in its row now; None: the row is black.
    """

    row: int
    number: int
    id: int
    offset: int
    reason: str
    substitute: np.void | None


class Decoder:
    """Decodes batches in threads.

    Args:
        threads: their number; pixels do not depend on it.
        decoding: how image files become pixels.
    """

    device = torch.device("cpu")
    """The device to which training images are decoded."""

    def __init__(self, threads: int, decoding: Decoding) -> None:
        self.threads, self.decoding = threads, decoding
        pillow.ignore_warnings()  # there would be one for each image of 16 bits, in each epoch
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="distrain-decode")

    def start(
        self, batch: Encoded, transform: Transform, out: Tensor, stop: threading.Event
    ) -> list[Future[list[Bad]]]:
        """Start to decode a batch to the rows of `out`, uint8 [n, H, W, C]; the tasks return what was bad.

        When `stop` is set, tasks that have not begun do nothing: Python does not exit before all tasks are done.
        """
        boxes = self.boxes(batch, transform)

        def work(rows: range) -> list[Bad]:
            if stop.is_set():
                return []
            reports = (self.decode_row(batch, row, transform, boxes[row], out[row]) for row in rows)
            return [bad for bad in reports if bad is not None]

        size = len(batch.samples)
        return [self._pool.submit(work, range(row, min(row + _TASK, size))) for row in range(0, size, _TASK)]

    def close(self) -> None:
        """End the threads after the images that they work on."""
        self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def boxes(batch: Encoded, transform: Transform) -> Boxes:
        """Return the part of each image of a batch that is used."""
        return transform.boxes(_sizes(batch.samples), batch.random_bits)

    def decode_row(
        self, batch: Encoded, row: int, transform: Transform, box: NDArray[np.int64], out: Tensor
    ) -> Bad | None:
        """Decode a sample. If it is bad, the next one of its virtual shard that can be decoded takes its row.

        The rule does not depend on the number of processes: each holds whole virtual shards.
        """
        which, number = batch.origin[row].tolist()
        stretch, random_bits = batch.stretches[which], batch.random_bits[row]
        try:
            self._write(stretch, number, transform, box, random_bits, out)
        except UnreadableError as error:
            reason = str(error)
        else:
            return None
        entry, size = stretch.samples[number], len(stretch.samples)
        bad = Bad(row, stretch.first + number, int(entry["id"]), int(entry["offset"]), reason, None)
        for other in ((number + step) % size for step in range(1, size)):
            substitute = stretch.samples[other : other + 1]
            (other_box,) = transform.boxes(_sizes(substitute), batch.random_bits[row : row + 1])
            try:
                self._write(stretch, other, transform, other_box, random_bits, out)
            except UnreadableError:
                continue
            return bad._replace(substitute=substitute[0])
        out.zero_()
        return bad

    def _write(
        self,
        stretch: Stretch,
        number: int,
        transform: Transform,
        box: NDArray[np.int64],
        random_bits: RandomBits,
        out: Tensor,
    ) -> None:
        entry, pixels = stretch.samples[number], images.decode(stretch.images[number], self.decoding)
        if pixels.shape[:2] != (entry["height"], entry["width"]):
            raise UnreadableError(f"is {pixels.shape[0]}×{pixels.shape[1]}, not as its header says")
        transform.apply(pixels, Box(*box.tolist()), random_bits, out)


def _sizes(samples: NDArray[np.void]) -> NDArray[np.int64]:
    return np.stack([samples["height"], samples["width"]], axis=1).astype(np.int64)


@dataclass(frozen=True)
class Preprocessing:
    """The way from the encoded images of an index to the pixels of batches.

    Attributes:
        decoder: the threads.
        training: transform of training images, of the run's size.
        evaluation: transform of images that are scored.
        sizes: smaller sizes of training images, in the first steps.
    """

    decoder: Decoder
    training: TrainingTransform
    evaluation: EvaluationTransform
    sizes: ImageSizes = FULL_SIZE

    def training_at(self, step: int) -> TrainingTransform:
        """Return the transform of the training images of a step of the run."""
        size = self.sizes.at(step)
        return self.training if size is None else replace(self.training, height=size, width=size)
