"""From shards to batches, in the order's order.

1. a background thread reads the shards of a round, one per owned lane, and lays their samples into a round's buffer
   in the order in which they are trained: row by row, lane by lane. It stays `read_ahead` rounds ahead.
2. so a rank's samples of a step are a stretch of that buffer: a batch is a view, not a copy

Buffers are used again (touching fresh memory costs as much as reading): a batch is valid until the next one is asked
for. No worker processes: nothing in /dev/shm, nothing to orphan.

With a cache (`distrain.data.cache`) the thread puts the shards there that it does not hold yet, and a round is a list
of indices: a batch is gathered from the cache.

Data is waited for in one place, `ready`, before a step that begins a round (`Order.begins_round`): all ranks wait there
together, so a stop request or a damaged shard finds them all at the same step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data import cache, shards
from distrain.data.cache import Cache, Samples
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order, augmentation_bits, evaluation_shards
from distrain.data.shards import Block
from distrain.environment import World

T = TypeVar("T")

_CLOSE_SECONDS = 5.0
"""A process that was asked to stop does not wait for a file system or a server that does not answer."""


_GATHERED = 256
"""Samples gathered from a cache at once, at least."""


class Batch(NamedTuple):
    """A rank's share of a step: images uint8 [n, H, W, C], labels int64 [n], ids int64 [n] as read beside the
    images, words int64 [n, 2] (random bits of each sample; empty unless asked for).
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    words: Tensor


@dataclass
class _Laid:
    """Samples of one round in training order, flat over (row, owned lane)."""

    number: int
    samples: Samples

    def take(self, here: slice) -> Samples:
        """Views."""
        return Samples(self.samples.images[here], self.samples.labels[here], self.samples.ids[here])


@dataclass
class _Indexed:
    """The same as indices into a cache: int64, flat over (row, owned lane)."""

    number: int
    index: Tensor
    cache: Cache
    _gathered: range = range(0)
    _samples: Samples | None = None

    def take(self, here: slice) -> Samples:
        """Views of copies, which are made for many small batches at a time: a gather costs as much as a small step's
        update.
        """
        if self._samples is None or here.start < self._gathered.start or here.stop > self._gathered.stop:
            stop = min(max(here.stop, here.start + _GATHERED), len(self.index))
            self._gathered, self._samples = range(here.start, stop), self.cache.gather(self.index[here.start : stop])
        start = self._gathered.start
        there = slice(here.start - start, here.stop - start)
        return Samples(self._samples.images[there], self._samples.labels[there], self._samples.ids[there])


class TrainingBatches:
    """This rank's share of each of the run's steps. Close it to end its thread.

    Both ways to get on raise a ShardError where a shard cannot be read or is not what the manifest says.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        world: World,
        steps: range,
        read_ahead: int,
        with_random_bits: bool,
        pin: bool,
        held: Cache | None = None,
    ) -> None:
        self._order, self._world, self._steps = order, world, iter(steps)
        self._with_random_bits, self._pin = with_random_bits, pin
        ahead = max(read_ahead, order.rounds_per_step)
        closed = threading.Event()
        self.shards_read = 0
        """So many were read so far: whether reading gets on."""
        read = _Reading(dataset, order, world, closed, self._count)
        rounds: Iterator[_Laid | _Indexed] = (
            read.into_ring(steps, ahead + 1, pin) if held is None else read.into_cache(steps, held, pin)
        )
        self._background = Background(rounds, ahead, closed)
        self._current: _Laid | _Indexed | None = None

    def _count(self) -> None:
        self.shards_read += 1

    def ready(self, step: int, timeout: float | None) -> bool:
        """Whether the step's batch can be had at once; waits up to `timeout` seconds (None: until it can).

        Batches from before are no longer valid.
        """
        rounds = self._order.rounds(step)
        while self._current is None or self._current.number < rounds.start:
            if not self._background.wait(1, timeout):
                return False
            self._take()
        return self._background.wait(rounds.stop - 1 - self._current.number, timeout)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._steps)
        self.ready(step, None)
        return Batch(*self._share(step), self._words(step))

    def close(self) -> None:
        """End the thread, after the shard that it is at."""
        self._background.close()

    def _share(self, step: int) -> Samples:
        """This rank's samples of a step: a stretch of the current round, or of several."""
        order, world = self._order, self._world
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        size = len(order.owned_lanes(world)) * order.samples_per_shard
        start = order.owned_before(in_epoch * order.global_batch_size, world)
        stop = order.owned_before((in_epoch + 1) * order.global_batch_size, world)
        parts: list[Samples] = []
        for number in order.rounds(step):
            assert self._current is not None
            if self._current.number < number:
                # Its buffer will be filled again: what is still needed of it leaves now.
                parts = [Samples(images.clone(), labels.clone(), ids.copy()) for images, labels, ids in parts]
                self._take()
            offset = (number - epoch * order.rounds_per_epoch) * size
            here = slice(max(start - offset, 0), min(stop - offset, size))
            parts.append(self._current.take(here))
        parts = [part for part in parts if len(part.ids)] or parts[:1]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _take(self) -> None:
        if self._pin:
            torch.cuda.current_stream().synchronize()  # copies from the buffer that is given back
        self._current = next(self._background)

    def _words(self, step: int) -> Tensor:
        if not self._with_random_bits:
            return torch.empty(0, dtype=torch.int64)
        order = self._order
        drawn = augmentation_bits(order.seed, step, order.global_batch_size)
        own = drawn[order.places(step % order.steps_per_epoch, self._world)]
        return torch.from_numpy(np.ascontiguousarray(own).view(np.int64))


class EvaluationBatches:
    """Images uint8 [n, H, W, C], labels int64 [n] and ids int64 [n] of the shards in this rank's lanes, in fixed slices
    of a shard: the same batches, and so the same logits, whatever the number of processes. Every sample has one owner.
    """

    def __init__(self, dataset: Dataset, split_name: str, world: World, batch_size: int) -> None:
        split = dataset.split(split_name)
        owned = [split.shards[index] for index in evaluation_shards(len(split.shards), split.lanes, world)]
        closed = threading.Event()
        self._background = Background(_read_whole(dataset, owned, closed), 1, closed)
        self._size = batch_size
        self._block: Block | None = None
        self._start = 0

    def ready(self, timeout: float | None) -> bool:
        """Whether the next batch, or the end, can be had at once; waits up to `timeout` seconds for it."""
        return self._left() or self._background.wait(1, timeout)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        while not self._left():
            self._block, self._start = next(self._background), 0
        assert self._block is not None
        here = slice(self._start, self._start + self._size)
        self._start += self._size
        images, labels, ids = (torch.from_numpy(array[here]) for array in self._block)
        return images, labels, ids

    def close(self) -> None:
        """End the thread, after the shard that it is at."""
        self._background.close()

    def _left(self) -> bool:
        return self._block is not None and self._start < len(self._block.labels)


def memory(dataset: Dataset, order: Order, world: World, read_ahead: int, cached: bool = False) -> int:
    """Bytes that one rank reads train into: the cache, or the round buffers."""
    if cached:
        return cache.size(dataset)
    samples = len(order.owned_lanes(world)) * order.samples_per_shard
    return (1 + max(read_ahead, order.rounds_per_step)) * samples * cache.sample_size(dataset)


def _read(dataset: Dataset, shard: Shard, stop: threading.Event) -> list[Block]:
    found = dataset.manifest
    return shards.read(dataset.root, shard, found.image_shape, len(found.classes), stop=stop)


def _read_whole(dataset: Dataset, owned: list[Shard], closed: threading.Event) -> Iterator[Block]:
    for shard in owned:
        yield Block(*(np.concatenate(arrays) for arrays in zip(*_read(dataset, shard, closed), strict=True)))


def _join(parts: list[Samples]) -> Samples:
    images, labels, ids = zip(*parts, strict=True)
    return Samples(torch.cat(images), torch.cat(labels), np.concatenate(ids))


@dataclass
class _Reading:
    """How the thread reads: the rounds that the steps reach into, one after another."""

    dataset: Dataset
    order: Order
    world: World
    closed: threading.Event
    count: Callable[[], None]
    """Called after every shard."""

    def into_ring(self, steps: range, buffers: int, pin: bool) -> Iterator[_Laid]:
        """Every `buffers`-th round lies in the same memory."""
        lanes = len(self.order.owned_lanes(self.world))
        samples = lanes * self.order.samples_per_shard

        def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((samples, *shape), dtype=dtype, pin_memory=pin)

        shape = self.dataset.manifest.image_shape
        ring = [
            Samples(allocate(*shape, dtype=torch.uint8), allocate(dtype=torch.int64), np.empty(samples, dtype=np.int64))
            for _ in range(buffers)
        ]
        for place, number in enumerate(_rounds_of(self.order, steps)):
            into = ring[place % buffers]
            for column, shard, taken in self._parts(number):
                _lay(self._read(shard), taken, into, column, lanes)
                self.count()
            yield _Laid(number, into)

    def into_cache(self, steps: range, held: Cache, pin: bool) -> Iterator[_Indexed]:
        """Shards that the cache does not hold are read into it."""
        lanes = len(self.order.owned_lanes(self.world))
        for number in _rounds_of(self.order, steps):
            index = torch.empty((self.order.samples_per_shard, lanes), dtype=torch.int64, pin_memory=pin)
            for column, shard, taken in self._parts(number):
                if not held.holds(shard):
                    held.put(shard, self._read(shard))
                index[:, column] = torch.from_numpy(taken + held.start(shard))
                self.count()
            yield _Indexed(number, index.flatten(), held)

    def _parts(self, number: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """(column, shard, its samples in their order) of each owned lane in a round."""
        epoch, round_ = divmod(number, self.order.rounds_per_epoch)
        of_round = self.order.epoch_shards(epoch)[round_]
        entries = self.dataset.split("train").shards
        for column, lane in enumerate(self.order.owned_lanes(self.world)):
            shard = int(of_round[lane])
            yield column, shard, self.order.shard_samples(epoch, shard, entries[shard].samples)

    def _read(self, shard: int) -> list[Block]:
        return _read(self.dataset, self.dataset.split("train").shards[shard], self.closed)


def _rounds_of(order: Order, steps: range) -> Iterator[int]:
    """The rounds that the steps reach into, each once; an epoch's dropped end may hold some that none does."""
    reached = -1
    for step in steps:
        for number in order.rounds(step):
            if number > reached:
                reached = number
                yield number


def _lay(blocks: list[Block], taken: NDArray[np.int64], into: Samples, column: int, columns: int) -> None:
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


class Background(Generic[T]):
    """Runs an iterator in a thread, at most `ahead` items before the one in use.

    Asking for an item says that the one before is no longer needed; the thread may then reuse what it was made of.
    `closed` is set when the items are no longer wanted: an iterator that waits for the network must not be waited for.
    """

    def __init__(self, items: Iterator[T], ahead: int, closed: threading.Event | None = None) -> None:
        self._items = items
        self._made: deque[T] = deque()
        self._changed = threading.Condition()
        self._permits = threading.Semaphore(ahead + 1)
        self._in_use = self._ended = False
        self._error: BaseException | None = None
        self._closed = closed or threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-read", daemon=True)
        self._thread.start()

    def wait(self, count: int, timeout: float | None) -> bool:
        """Whether so many items, or all that are left, are made within `timeout` seconds (None: however long).

        Raises:
            Exception: the iterator's, where it ended the items before there were so many.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._made) >= count or self._ended, timeout):
                return False
            if len(self._made) < count and self._error is not None:
                raise self._error
            return True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._in_use:
            self._permits.release()
            self._in_use = False
        self.wait(1, None)
        with self._changed:
            if not self._made:
                raise StopIteration
            self._in_use = True
            return self._made.popleft()

    def close(self) -> None:
        """End the thread, after the item that it is at; one that is stuck in it is left behind."""
        self._closed.set()
        self._permits.release()
        self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            while True:
                self._permits.acquire()
                if self._closed.is_set():
                    break
                item = next(self._items)
                with self._changed:
                    self._made.append(item)
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
