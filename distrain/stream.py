"""From shards to batches, in the order's order.

1. a background thread reads the shards of a round, one per owned lane, and lays their samples into a round's buffer
   in the order in which they are trained: row by row, lane by lane. It stays `read_ahead` rounds ahead.
2. so a rank's samples of a step are a stretch of that buffer: a batch is a view, not a copy

Buffers are used again (touching fresh memory costs as much as reading): a batch is valid until the next one is asked
for. No worker processes: nothing in /dev/shm, nothing to orphan.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain import shards
from distrain.manifest import Dataset, Shard
from distrain.order import Order, World, augmentation_words
from distrain.shards import Block

T = TypeVar("T")


class Batch(NamedTuple):
    """A rank's share of a step: images uint8 [n, H, W, C], labels int64 [n], ids int64 [n] as read beside the
    images, words int64 [n] (random bits of each sample; empty unless asked for).
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    words: Tensor


@dataclass
class _Round:
    """Samples of one round in training order, flat over (row, owned lane)."""

    number: int
    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]


def training_batches(
    dataset: Dataset, order: Order, world: World, steps: range, read_ahead: int, with_words: bool, pin: bool
) -> Iterator[Batch]:
    """This rank's share of each of the run's steps. Close the iterator to end its thread.

    Raises:
        ShardError: a shard cannot be read or is not what the manifest says.
    """
    closed = threading.Event()
    background = Background(_read_rounds(dataset, order, world, steps, read_ahead + 1, pin, closed), read_ahead, closed)
    size = len(order.owned_lanes(world)) * order.samples_per_shard
    batch_size = order.global_batch_size
    current: _Round | None = None
    no_words = torch.empty(0, dtype=torch.int64)
    try:
        for step in steps:
            epoch, in_epoch = divmod(step, order.steps_per_epoch)
            start = order.owned_before(in_epoch * batch_size, world)
            stop = order.owned_before((in_epoch + 1) * batch_size, world)
            parts: list[tuple[Tensor, Tensor, NDArray[np.int64]]] = []
            while start < stop or not parts:
                number = epoch * order.rounds_per_epoch + min(start // size, order.rounds_per_epoch - 1)
                while current is None or current.number < number:
                    # Its buffer will be filled again: what is still needed of it leaves now.
                    parts = [(images.clone(), labels.clone(), ids.copy()) for images, labels, ids in parts]
                    if pin:
                        torch.cuda.current_stream().synchronize()
                    current = next(background)
                offset = number % order.rounds_per_epoch * size
                here = slice(start - offset, min(stop - offset, size))
                parts.append((current.images[here], current.labels[here], current.ids[here]))
                start = min(stop, offset + size)
            images, labels, ids = parts[0] if len(parts) == 1 else _join(parts)
            words = no_words
            if with_words:
                drawn = augmentation_words(order.seed, step, batch_size)[order.places(in_epoch, world)]
                words = torch.from_numpy(drawn.view(np.int64))
            yield Batch(images, labels, ids, words)
    finally:
        background.close()


def evaluation_batches(
    dataset: Dataset, split_name: str, world: World, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [n, H, W, C] and labels int64 [n] of the shards in this rank's lanes, in fixed slices of a shard:
    the same batches, and so the same logits, whatever the number of processes. Every sample has one owner.
    """
    split = dataset.split(split_name)
    closed = threading.Event()
    owned = [shard for index, shard in enumerate(split.shards) if index % split.lanes % world.size == world.rank]

    def blocks() -> Iterator[Block]:
        for shard in owned:
            parts = _read(dataset, shard, closed)
            yield Block(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    background = Background(blocks(), 1, closed)
    try:
        for block in background:
            images, labels = torch.from_numpy(block.images), torch.from_numpy(block.labels)
            for start in range(0, len(labels), batch_size):
                yield images[start : start + batch_size], labels[start : start + batch_size]
    finally:
        background.close()


def memory(dataset: Dataset, order: Order, world: World, read_ahead: int) -> int:
    """Bytes of the round buffers of one rank."""
    samples = len(order.owned_lanes(world)) * order.samples_per_shard
    return (1 + read_ahead) * samples * (dataset.manifest.sample_bytes + 16)


def _read(dataset: Dataset, shard: Shard, stop: threading.Event) -> list[Block]:
    found = dataset.manifest
    return shards.read(dataset.root, shard, found.image_shape, len(found.classes), stop=stop)


def _join(parts: list[tuple[Tensor, Tensor, NDArray[np.int64]]]) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    images, labels, ids = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels), np.concatenate(ids)


def _read_rounds(
    dataset: Dataset, order: Order, world: World, steps: range, buffers: int, pin: bool, closed: threading.Event
) -> Iterator[_Round]:
    """The rounds that the steps reach into. Every `buffers`-th round lies in the same memory."""
    lanes = order.owned_lanes(world)
    rows = order.samples_per_shard
    entries = dataset.split("train").shards

    def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows * len(lanes), *shape), dtype=dtype, pin_memory=pin)

    ring = [
        _Round(
            -1,
            allocate(*dataset.manifest.image_shape, dtype=torch.uint8),
            allocate(dtype=torch.int64),
            np.empty(rows * len(lanes), np.int64),
        )
        for _ in range(buffers)
    ]
    if not steps:
        return
    first_epoch, first_step = divmod(steps.start, order.steps_per_epoch)
    first = first_epoch * order.rounds_per_epoch + first_step * order.global_batch_size // (rows * order.lanes)
    last_epoch = (steps.stop - 1) // order.steps_per_epoch
    for number in range(first, (last_epoch + 1) * order.rounds_per_epoch):
        epoch, round_ = divmod(number, order.rounds_per_epoch)
        epoch_shards = order.epoch_shards(epoch)[round_]
        into = ring[number % buffers]
        into.number = number
        for column, lane in enumerate(lanes):
            index = int(epoch_shards[lane])
            taken = order.shard_samples(epoch, index, entries[index].samples)
            _lay(_read(dataset, entries[index], closed), taken, into, column, len(lanes))
        yield into


def _lay(blocks: list[Block], taken: NDArray[np.int64], into: _Round, column: int, columns: int) -> None:
    """Copy the samples `taken` of a shard to rows 0, 1, 2 … of one column of a round's buffer."""
    row_of = np.full(sum(len(block.ids) for block in blocks), -1)
    row_of[taken] = np.arange(len(taken))
    images, labels = into.images.numpy(), into.labels.numpy()
    start = 0
    for block in blocks:
        rows = row_of[start : start + len(block.ids)]
        start += len(block.ids)
        used: Any = rows >= 0
        if used.all():
            used = slice(None)  # a view, where the mask would copy
        places = rows[used] * columns + column
        images[places], labels[places], into.ids[places] = (
            block.images[used],
            block.labels[used],
            block.ids[used],
        )


@dataclass
class _Failure:
    error: BaseException


class Background(Generic[T]):
    """Runs an iterator in a thread, at most `ahead` items before the one in use.

    Asking for an item says that the one before is no longer needed; the thread may then reuse what it was made of.
    `closed` is set when the items are no longer wanted: an iterator that waits for the network must not be waited for.
    """

    _END = object()

    def __init__(self, items: Iterator[T], ahead: int, closed: threading.Event | None = None) -> None:
        self._items = items
        self._queue: queue.Queue[object] = queue.Queue()
        self._permits = threading.Semaphore(ahead + 1)
        self._in_use = False
        self._closed = closed or threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-read", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._permits.acquire()
                if self._closed.is_set():
                    return
                item = next(self._items, self._END)
                self._queue.put(item)
                if item is self._END:
                    return
        except BaseException as error:
            self._queue.put(_Failure(error))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._in_use:
            self._permits.release()
        self._in_use = True
        item = self._queue.get()
        if item is self._END:
            self._queue.put(item)
            raise StopIteration
        if isinstance(item, _Failure):
            self._queue.put(item)
            raise item.error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread, after the item that it is at."""
        self._closed.set()
        self._permits.release()
        self._thread.join(timeout=60)
