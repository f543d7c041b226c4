"""Batches from shards, in the order that `distrain.data.order` defines.

1. A background thread reads the shards of a round, one per owned lane, and copies their samples to the round's buffer
   in training order: row by row, lane by lane. It reads `read_ahead` rounds ahead.
2. A rank's samples of a step are therefore consecutive in that buffer: a batch is a view, not a copy.

Buffers are reused, because the first access to fresh memory takes as long as reading. So a batch is valid only until
the next one is requested. There are no worker processes: nothing in /dev/shm, and no process to be orphaned.

With a cache (`distrain.data.cache`) the thread puts shards there that it does not contain yet, and a round is a list of
indices: a batch is gathered from the cache.

Only `ready` waits for data, before a step that begins a round (`Order.begins_round`). All ranks wait there at the same
step, so all of them handle a stop request or a damaged shard at the same step.
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

from distrain.data import shards
from distrain.data.cache import Cache, Samples, sample_size
from distrain.data.cache import size as cache_size
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order, augmentation_bits, evaluation_shards
from distrain.data.shards import Block
from distrain.environment import World

T = TypeVar("T")

_CLOSE_SECONDS = 5.0
"""Longest wait for the thread to end: a file system or a server that does not answer must not delay a stop."""

_GATHERED_SAMPLES = 256
"""Minimum number of samples that are gathered from a cache at once."""


class Batch(NamedTuple):
    """A rank's local batch of a step.

    Images uint8 [n, H, W, C], labels int64 [n], ids int64 [n] as stored with the images, and random bits for
    augmentation, int64 [n, 2] (empty unless requested).
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    random_bits: Tensor


@dataclass
class _BufferedRound:
    """A round's samples of the owned lanes, in training order: flat over (row, owned lane)."""

    number: int
    samples: Samples

    def take(self, part: slice) -> Samples:
        """Return views of consecutive samples."""
        return _slice(self.samples, part)


@dataclass
class _CachedRound:
    """A round's samples of the owned lanes as indices into a cache: int64, flat over (row, owned lane)."""

    number: int
    index: Tensor
    cache: Cache
    _gathered: range = range(0)
    _samples: Samples | None = None

    def take(self, part: slice) -> Samples:
        """Return consecutive samples: views of a copy that serves several small batches.

        A gather takes as long as the update of a small step.
        """
        if self._samples is None or part.start < self._gathered.start or part.stop > self._gathered.stop:
            stop = min(max(part.stop, part.start + _GATHERED_SAMPLES), len(self.index))
            self._gathered, self._samples = range(part.start, stop), self.cache.gather(self.index[part.start : stop])
        start = self._gathered.start
        return _slice(self._samples, slice(part.start - start, part.stop - start))


def _slice(samples: Samples, part: slice) -> Samples:
    return Samples(samples.images[part], samples.labels[part], samples.ids[part])


class TrainingBatches:
    """Iterator over this rank's local batches of the given steps. Close it to end its thread.

    `ready` and `next` raise a ShardError if a shard cannot be read or does not match the manifest.
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
        cache: Cache | None = None,
    ) -> None:
        """Start to read.

        Args:
            dataset: the data set whose train split is read.
            order: the order of training.
            world: this rank and the number of ranks.
            steps: steps of the run, counted from 0 over all epochs.
            read_ahead: rounds to read before they are needed.
            with_random_bits: whether batches have the random bits of their samples.
            pin: use pinned memory, from which batches are copied to a GPU.
            cache: where shards are kept in memory; None reads them in every epoch.
        """
        self._order, self._world, self._steps = order, world, iter(steps)
        self._with_random_bits, self._pin = with_random_bits, pin
        ahead = max(read_ahead, order.rounds_per_step)
        closed = threading.Event()
        self.shards_read = 0
        """Number of shards read so far: it shows whether reading makes progress."""
        reader = _RoundReader(dataset, order, world, closed, self._count)
        rounds: Iterator[_BufferedRound | _CachedRound] = (
            reader.into_buffers(steps, ahead + 1, pin) if cache is None else reader.into_cache(steps, cache, pin)
        )
        self._background = Background(rounds, ahead, closed)
        self._current: _BufferedRound | _CachedRound | None = None

    def _count(self) -> None:
        self.shards_read += 1

    def ready(self, step: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for a step's batch; return whether it is ready.

        Earlier batches are no longer valid.
        """
        rounds = self._order.rounds(step)
        while self._current is None or self._current.number < rounds.start:
            if not self._background.wait(1, timeout):
                return False
            self._next_round()
        return self._background.wait(rounds.stop - 1 - self._current.number, timeout)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        step = next(self._steps)
        self.ready(step, None)
        return Batch(*self._local_batch(step), self._random_bits(step))

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._background.close()

    def _local_batch(self, step: int) -> Samples:
        """Return this rank's samples of a step: consecutive samples of the current round, or of several rounds."""
        order, world = self._order, self._world
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        size = len(order.owned_lanes(world)) * order.samples_per_shard
        start = order.owned_before(in_epoch * order.global_batch_size, world)
        stop = order.owned_before((in_epoch + 1) * order.global_batch_size, world)
        parts: list[Samples] = []
        for number in order.rounds(step):
            assert self._current is not None
            if self._current.number < number:
                # The thread reuses the round's buffer, so what is still needed of it is copied.
                parts = [Samples(images.clone(), labels.clone(), ids.copy()) for images, labels, ids in parts]
                self._next_round()
            offset = (number - epoch * order.rounds_per_epoch) * size
            parts.append(self._current.take(slice(max(start - offset, 0), min(stop - offset, size))))
        parts = [part for part in parts if len(part.ids)] or parts[:1]
        return parts[0] if len(parts) == 1 else _join(parts)

    def _next_round(self) -> None:
        if self._pin:
            torch.cuda.current_stream().synchronize()  # host-to-device copies from the buffer that is reused
        self._current = next(self._background)

    def _random_bits(self, step: int) -> Tensor:
        if not self._with_random_bits:
            return torch.empty(0, dtype=torch.int64)
        order = self._order
        of_global_batch = augmentation_bits(order.seed, step, order.global_batch_size)
        of_local_batch = of_global_batch[order.positions(step % order.steps_per_epoch, self._world)]
        return torch.from_numpy(np.ascontiguousarray(of_local_batch).view(np.int64))


class EvaluationBatches:
    """Iterator over batches of the shards in this rank's lanes. Close it to end its thread.

    Yields images uint8 [n, H, W, C], labels int64 [n] and ids int64 [n]. A batch is a fixed slice of a shard: batches,
    and so the logits, are the same for any number of processes. Each sample belongs to exactly one rank.
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
        """Wait up to `timeout` seconds for the next batch or the end; return whether it is ready."""
        return self._left() or self._background.wait(1, timeout)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        while not self._left():
            self._block, self._start = next(self._background), 0
        assert self._block is not None
        part = slice(self._start, self._start + self._size)
        self._start += self._size
        images, labels, ids = (torch.from_numpy(array[part]) for array in self._block)
        return images, labels, ids

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._background.close()

    def _left(self) -> bool:
        return self._block is not None and self._start < len(self._block.labels)


def memory(dataset: Dataset, order: Order, world: World, read_ahead: int, cached: bool = False) -> int:
    """Bytes that one rank needs for the samples that it reads: those of the cache, or of the buffers."""
    if cached:
        return cache_size(dataset)
    samples = len(order.owned_lanes(world)) * order.samples_per_shard
    return (1 + max(read_ahead, order.rounds_per_step)) * samples * sample_size(dataset)


def _read(dataset: Dataset, shard: Shard, stop: threading.Event) -> list[Block]:
    manifest = dataset.manifest
    return shards.read(dataset.root, shard, manifest.image_shape, len(manifest.classes), stop=stop)


def _read_whole(dataset: Dataset, owned: list[Shard], closed: threading.Event) -> Iterator[Block]:
    for shard in owned:
        yield Block(*(np.concatenate(arrays) for arrays in zip(*_read(dataset, shard, closed), strict=True)))


def _join(parts: list[Samples]) -> Samples:
    images, labels, ids = zip(*parts, strict=True)
    return Samples(torch.cat(images), torch.cat(labels), np.concatenate(ids))


@dataclass
class _RoundReader:
    """Reads the rounds that steps use, one after another. Used by the background thread."""

    dataset: Dataset
    order: Order
    world: World
    closed: threading.Event
    count: Callable[[], None]
    """Called after every shard."""

    def into_buffers(self, steps: range, buffers: int, pin: bool) -> Iterator[_BufferedRound]:
        """Read rounds into buffers, which are used in turn: every `buffers`-th round overwrites the same one."""
        lanes = len(self.order.owned_lanes(self.world))
        samples = lanes * self.order.samples_per_shard

        def allocate(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((samples, *shape), dtype=dtype, pin_memory=pin)

        shape = self.dataset.manifest.image_shape
        ring = [
            Samples(allocate(*shape, dtype=torch.uint8), allocate(dtype=torch.int64), np.empty(samples, dtype=np.int64))
            for _ in range(buffers)
        ]
        for count, number in enumerate(_rounds_of(self.order, steps)):
            buffer = ring[count % buffers]
            for column, shard, samples_used in self._parts(number):
                _copy_to_column(self._read(shard), samples_used, buffer, column, lanes)
                self.count()
            yield _BufferedRound(number, buffer)

    def into_cache(self, steps: range, cache: Cache, pin: bool) -> Iterator[_CachedRound]:
        """Read the shards that the cache does not contain into it."""
        lanes = len(self.order.owned_lanes(self.world))
        for number in _rounds_of(self.order, steps):
            index = torch.empty((self.order.samples_per_shard, lanes), dtype=torch.int64, pin_memory=pin)
            for column, shard, samples_used in self._parts(number):
                if not cache.contains(shard):
                    cache.put(shard, self._read(shard))
                index[:, column] = torch.from_numpy(samples_used + cache.start(shard))
                self.count()
            yield _CachedRound(number, index.flatten(), cache)

    def _parts(self, number: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield (column, shard, indices of the samples used of it in training order) for each owned lane of a round."""
        epoch, round_ = divmod(number, self.order.rounds_per_epoch)
        shard_of_lane = self.order.epoch_shards(epoch)[round_]
        entries = self.dataset.split("train").shards
        for column, lane in enumerate(self.order.owned_lanes(self.world)):
            shard = int(shard_of_lane[lane])
            yield column, shard, self.order.shard_samples(epoch, shard, entries[shard].samples)

    def _read(self, shard: int) -> list[Block]:
        return _read(self.dataset, self.dataset.split("train").shards[shard], self.closed)


def _rounds_of(order: Order, steps: range) -> Iterator[int]:
    """Yield the rounds used by these steps, each once. An epoch's last rounds may be unused."""
    last = -1
    for step in steps:
        for number in order.rounds(step):
            if number > last:
                last = number
                yield number


def _copy_to_column(
    blocks: list[Block], samples_used: NDArray[np.int64], buffer: Samples, column: int, columns: int
) -> None:
    """Copy the used samples of a shard, in training order, to rows 0, 1, 2 … of one column of a round's buffer."""
    row_of = np.full(sum(len(block.ids) for block in blocks), -1)
    row_of[samples_used] = np.arange(len(samples_used))
    images, labels = buffer.images.numpy(), buffer.labels.numpy()
    start = 0
    for block in blocks:
        rows = row_of[start : start + len(block.ids)]
        start += len(block.ids)
        used: Any = rows >= 0
        if used.all():
            used = slice(None)  # gives views; the mask would copy
        targets = rows[used] * columns + column
        images[targets], labels[targets], buffer.ids[targets] = (
            block.images[used],
            block.labels[used],
            block.ids[used],
        )


class Background(Generic[T]):
    """Iterator that runs another iterator in a thread, up to `ahead` items before the item in use.

    A request for the next item releases the previous one: the thread may then reuse its memory. `close` sets `closed`,
    so that an iterator that waits for the network can end at once.
    """

    def __init__(self, items: Iterator[T], ahead: int, closed: threading.Event | None = None) -> None:
        self._items = items
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._permits = threading.Semaphore(ahead + 1)
        self._in_use = self._ended = False
        self._error: BaseException | None = None
        self._closed = closed or threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-read", daemon=True)
        self._thread.start()

    def wait(self, count: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for `count` items, or for all remaining ones.

        Returns:
            Whether they are ready.

        Raises:
            Exception: the iterator raised it before there were `count` items.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._ready) >= count or self._ended, timeout):
                return False
            if len(self._ready) < count and self._error is not None:
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
            if not self._ready:
                raise StopIteration
            self._in_use = True
            return self._ready.popleft()

    def close(self) -> None:
        """End the thread after its current item; a thread that does not return from it is abandoned."""
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
                    self._ready.append(item)
                    self._changed.notify_all()
        except StopIteration:
            pass
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
