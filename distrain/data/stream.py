"""Batches from shards, in the order that `distrain.data.order` defines.

1. A background thread reads the shards of a round, one per owned lane, and copies their samples to the round's buffers,
   one for each virtual rank, in training order: row by row, lane by lane. It reads `read_ahead` rounds ahead.
2. The samples of a virtual rank in a step are therefore consecutive in its buffer: a batch is a view, not a copy.

Buffers are reused, because the first access to fresh memory takes as long as reading. So a batch is valid only until
the next one is requested. On a GPU the copies from it may end later: when a round is done, an event is recorded behind
them, and the thread waits for it before it overwrites the buffers. There are no worker processes: nothing in /dev/shm,
and no process to be orphaned.

With a cache (`distrain.data.cache`) the thread puts shards there that it does not contain yet, and a round is a list of
indices: a batch is gathered from the cache. When nothing else is to be done, the thread reads the shards of later
rounds, in the order in which this process needs them.

Only `ready` waits for data, before a step that begins a round (`Order.begins_round`). All ranks wait there at the same
step, so all of them handle a stop request or a damaged shard at the same step.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data import shards
from distrain.data.cache import Cache
from distrain.data.cache import size as cache_size
from distrain.data.fetch import Remote
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order, augmentation_bits, evaluation_shards
from distrain.data.shards import Block
from distrain.environment import World
from distrain.errors import DataError

T = TypeVar("T")

_CLOSE_SECONDS = 5.0
"""Longest wait for the thread to end: a file system or a server that does not answer must not delay a stop."""

_GATHERED_SAMPLES = 256
"""Minimum number of samples that are gathered from a cache at once."""

_POLL_SECONDS = 0.001
"""Interval of the questions whether a GPU has copied a round."""

_LABEL_BYTES, _BITS_BYTES = 8, 16
"""Bytes of a sample's label and random bits, which are copied to a GPU, as its image is."""

_HOST_BYTES = 16
"""Bytes of a sample's id and position."""

_CPU = torch.device("cpu")


class Batch(NamedTuple):
    """The local batch of a virtual rank in a step.

    Images uint8 [n, H, W, C], labels int64 [n], ids int64 [n] as stored with the images, positions in the global batch
    int64 [n], and random bits for augmentation, int64 [n, 2] (empty unless requested).
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    random_bits: Tensor

    def take(self, rows: slice) -> Batch:
        """Return views of consecutive samples."""
        return Batch(self.images[rows], self.labels[rows], self.ids[rows], self.positions[rows], self.random_bits[rows])


@dataclass
class _Cached:
    """A round's samples of one virtual rank, in training order, by their index in a cache: int64 [n]."""

    cache: Cache
    index: Tensor
    positions: NDArray[np.int64]
    random_bits: Tensor
    _gathered: range = range(0)
    _batch: Batch | None = None

    def take(self, rows: slice) -> Batch:
        """Return consecutive samples: views of a copy that serves several small batches.

        A gather takes as long as the update of a small step.
        """
        if self._batch is None or rows.start < self._gathered.start or rows.stop > self._gathered.stop:
            stop = min(max(rows.stop, rows.start + _GATHERED_SAMPLES), len(self.index))
            self._gathered, some = range(rows.start, stop), slice(rows.start, stop)
            samples = self.cache.gather(self.index[some])
            self._batch = Batch(*samples, self.positions[some], self.random_bits[some])
        start = self._gathered.start
        return self._batch.take(slice(rows.start - start, rows.stop - start))


@dataclass
class _Round:
    """A round's samples of each virtual rank of this process.

    Attributes:
        number: of the round, over all epochs.
        parts: the samples of each virtual rank, in training order: flat over (row, owned lane).
        copied: for a GPU, recorded behind the last copy from the buffers; None if they are not reused.
    """

    number: int
    parts: Sequence[Batch | _Cached]
    copied: torch.cuda.Event | None


class TrainingBatches:
    """Iterator over the local batches of the given steps, one for each virtual rank. Close it to end its thread.

    `ready` and `next` raise a ShardError if a shard cannot be read or does not match the manifest.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        ranks: Sequence[World],
        steps: range,
        read_ahead: int,
        with_random_bits: bool,
        device: torch.device = _CPU,
        cache: Cache | None = None,
    ) -> None:
        """Start to read.

        Args:
            dataset: the data set whose train split is read.
            order: the order of training.
            ranks: the virtual ranks of this process.
            steps: steps of the run, counted from 0 over all epochs.
            read_ahead: rounds to read before they are needed.
            with_random_bits: whether batches have the random bits of their samples.
            device: where batches are used; for a GPU they are in pinned memory, and copied by `copy_stream`.
            cache: where shards are kept in memory; None reads them in every epoch.
        """
        self._order, self._ranks, self._steps = order, ranks, iter(steps)
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """The stream that must copy the batches to a GPU: buffers are reused when its copies are done."""
        self._pin = self.copy_stream is not None
        ahead = max(read_ahead, order.rounds_per_step)
        closed = threading.Event()
        self.shards_read = 0
        """Number of shards read so far: it shows whether reading makes progress."""
        rounds = _rounds_of(order, steps)
        reader = _RoundReader(dataset, order, ranks, rounds, with_random_bits, self._pin, closed, self._count)
        items = reader.into_buffers(ahead + 1) if cache is None else reader.into_cache(cache)
        spare = reader.fill(cache) if cache is not None else ()
        gpu = self.copy_stream.device if self.copy_stream is not None else None
        self._background = Background(items, ahead, closed, gpu, spare)
        self._current: _Round | None = None

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

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        step = next(self._steps)
        self.ready(step, None)
        return self._batches(step)

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._background.close()

    def _batches(self, step: int) -> list[Batch]:
        """Return the local batch of each virtual rank in a step: consecutive samples of one round, or of several."""
        parts: list[list[Batch]] = [[] for _ in self._ranks]
        for number in self._order.rounds(step):
            assert self._current is not None
            if self._current.number < number:
                # The thread reuses the round's buffers, so what is still needed of them is copied.
                for of_rank, part in zip(parts, self._current.parts, strict=True):
                    if not isinstance(part, _Cached):
                        of_rank[-1] = _concatenate([of_rank[-1]], self._pin)
                self._next_round()
            for of_rank, part, world in zip(parts, self._current.parts, self._ranks, strict=True):
                of_rank.append(part.take(self._slice(step, number, world)))
        return [_join(of_rank, self._pin) for of_rank in parts]

    def _slice(self, step: int, number: int, world: World) -> slice:
        """Return which samples of a virtual rank in a round a step trains."""
        order = self._order
        epoch, in_epoch = divmod(step, order.steps_per_epoch)
        size = len(order.owned_lanes(world)) * order.samples_per_shard
        offset = (number - epoch * order.rounds_per_epoch) * size
        start, stop = (order.owned_before(each * order.global_batch_size, world) for each in (in_epoch, in_epoch + 1))
        return slice(max(start - offset, 0), min(stop - offset, size))

    def _next_round(self) -> None:
        if self._current is not None and self._current.copied is not None:
            self._current.copied.record(self.copy_stream)
        self._current = next(self._background)


class EvaluationBatches:
    """Iterator over batches of the shards in this rank's lanes. Close it to end its thread.

    Yields images uint8 [n, H, W, C], labels int64 [n] and ids int64 [n]. A batch is a fixed slice of a shard: batches,
    and so the logits, are the same for any number of processes. Each sample belongs to exactly one rank.
    """

    def __init__(self, dataset: Dataset, split_name: str, world: World, batch_size: int) -> None:
        split = dataset.split(split_name)
        indices = evaluation_shards(len(split.shards), split.lanes, world)
        owned = [split.shards[index] for index in indices]
        counts = [-(-shard.samples // batch_size) for shard in split.shards]
        ends = list(itertools.accumulate(counts))
        self.numbers = [number for index in indices for number in range(ends[index] - counts[index], ends[index])]
        """Numbers of this process's batches among those of the split."""
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


def memory(
    dataset: Dataset, order: Order, ranks: Sequence[World], read_ahead: int, cached: bool = False, pinned: bool = False
) -> int:
    """Bytes that a process needs for the samples of its virtual ranks: those of the cache, or of the buffers.

    Args:
        dataset: the data set whose train split is read.
        order: the order of training.
        ranks: the virtual ranks of the process.
        read_ahead: rounds to read before they are needed.
        cached: whether the train split is cached.
        pinned: whether the buffers are in pinned memory, for a GPU. torch makes each tensor there a power of two long.
    """
    if cached:
        return cache_size(dataset)
    buffers = 1 + max(read_ahead, order.rounds_per_step)
    samples = [len(order.owned_lanes(world)) * order.samples_per_shard for world in ranks]
    copied = [each * size for each in samples for size in (dataset.manifest.sample_bytes, _LABEL_BYTES, _BITS_BYTES)]
    if pinned:
        copied = [1 << (size - 1).bit_length() for size in copied]
    return buffers * (sum(copied) + sum(samples) * _HOST_BYTES)


def _read(dataset: Dataset, shard: Shard, stop: threading.Event) -> list[Block]:
    manifest = dataset.manifest
    return shards.read(dataset.root, shard, manifest.image_shape, len(manifest.classes), stop=stop)


def _read_whole(dataset: Dataset, owned: list[Shard], closed: threading.Event) -> Iterator[Block]:
    for shard in owned:
        yield Block(*(np.concatenate(arrays) for arrays in zip(*_read(dataset, shard, closed), strict=True)))


def _join(parts: list[Batch], pin: bool) -> Batch:
    """Return one batch of the samples of all parts; without a copy if only one part has any."""
    with_samples = [part for part in parts if len(part.ids)] or parts[:1]
    return with_samples[0] if len(with_samples) == 1 else _concatenate(with_samples, pin)


def _concatenate(parts: list[Batch], pin: bool) -> Batch:
    """Return a copy of the samples of all parts."""
    images, labels, ids, positions, random_bits = zip(*parts, strict=True)
    return Batch(
        _concatenate_tensors(images, pin),
        _concatenate_tensors(labels, pin),
        np.concatenate(ids),
        np.concatenate(positions),
        _concatenate_tensors(random_bits, pin),
    )


def _concatenate_tensors(tensors: tuple[Tensor, ...], pin: bool) -> Tensor:
    first = tensors[0]
    shape = (sum(map(len, tensors)), *first.shape[1:])
    pin = pin and first.device.type == "cpu"  # the samples of a cache may be on the GPU already
    return torch.cat(tensors, out=torch.empty(shape, dtype=first.dtype, device=first.device, pin_memory=pin))


@dataclass
class _RoundReader:
    """Reads rounds, one after another. Used by the background thread."""

    dataset: Dataset
    order: Order
    ranks: Sequence[World]
    rounds: range
    with_random_bits: bool
    pin: bool
    closed: threading.Event
    count: Callable[[], None]
    """Called after every shard."""

    def into_buffers(self, buffers: int) -> Iterator[_Round]:
        """Read rounds into buffers, which are used in turn: every `buffers`-th round overwrites the same one."""
        ring = [
            ([self._allocate(world) for world in self.ranks], torch.cuda.Event() if self.pin else None)
            for _ in range(buffers)
        ]
        for count, number in enumerate(self.rounds):
            parts, copied = ring[count % buffers]
            if copied is not None and not self._wait_for(copied):
                return
            for buffer, world in zip(parts, self.ranks, strict=True):
                lanes = len(self.order.owned_lanes(world))
                for column, shard, samples_used in self._parts(number, world):
                    _copy_to_column(self._read(shard), samples_used, buffer, column, lanes)
                    self.count()
                positions, random_bits = self._draw(number, world)
                buffer.positions[:] = positions
                buffer.random_bits.copy_(random_bits)
            yield _Round(number, parts, copied)

    def into_cache(self, cache: Cache) -> Iterator[_Round]:
        """Read the shards that the cache does not contain into it."""
        for number in self.rounds:
            parts = []
            for world in self.ranks:
                lanes = len(self.order.owned_lanes(world))
                index = self._empty((self.order.samples_per_shard, lanes), torch.int64)
                for column, shard, samples_used in self._parts(number, world):
                    if not cache.contains(shard):
                        cache.put(shard, self._read(shard))
                    index[:, column] = torch.from_numpy(samples_used + cache.start(shard))
                    self.count()
                positions, random_bits = self._draw(number, world)
                pinned = self._empty(random_bits.shape, torch.int64).copy_(random_bits)
                parts.append(_Cached(cache, index.flatten(), positions, pinned))
            yield _Round(number, parts, None)

    def fill(self, cache: Cache) -> Iterator[bool]:
        """Read the shards of all rounds into a cache, one at a time, in the order in which they are needed.

        A round may wait for the shard that is being read, so a remote one is fetched without retries.

        Yields:
            Whether to continue before the next round: not after a shard that cannot be read. Such a shard is not read
            early again; the error is raised when it is needed, where all processes stop together.
        """
        failed: set[int] = set()
        for number in self.rounds:
            for shard in itertools.chain.from_iterable(self._shards(number, world) for world in self.ranks):
                if cache.contains(shard) or shard in failed:
                    continue
                try:
                    cache.put(shard, self._read(shard, retry=False))
                except DataError:
                    failed.add(shard)
                else:
                    self.count()
                yield shard not in failed
            if cache.is_complete:
                return
            yield True

    def _wait_for(self, copied: torch.cuda.Event) -> bool:
        """Wait until a GPU has copied what is in a buffer; return False if the reader is closed before."""
        while not copied.query():  # `synchronize` cannot be interrupted
            if self.closed.wait(_POLL_SECONDS):
                return False
        return True

    def _allocate(self, world: World) -> Batch:
        samples = len(self.order.owned_lanes(world)) * self.order.samples_per_shard
        return Batch(
            self._empty((samples, *self.dataset.manifest.image_shape), torch.uint8),
            self._empty((samples,), torch.int64),
            np.empty(samples, np.int64),
            np.empty(samples, np.int64),
            self._empty((samples if self.with_random_bits else 0, 2), torch.int64),
        )

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin)

    def _draw(self, number: int, world: World) -> tuple[NDArray[np.int64], Tensor]:
        """Return the positions in their global batches, and the random bits, of a virtual rank's samples in a round."""
        steps, positions = self.order.positions(number, world)
        if not self.with_random_bits:
            return positions, torch.empty((0, 2), dtype=torch.int64)
        return positions, torch.from_numpy(augmentation_bits(self.order.seed, steps, positions).view(np.int64))

    def _parts(self, number: int, world: World) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield (column, shard, indices of its samples in training order) for each lane of a virtual rank."""
        epoch, entries = number // self.order.rounds_per_epoch, self.dataset.split("train").shards
        for column, shard in enumerate(self._shards(number, world)):
            yield column, shard, self.order.shard_samples(epoch, shard, entries[shard].samples)

    def _shards(self, number: int, world: World) -> list[int]:
        """Return the shard of each lane of a virtual rank in a round."""
        epoch, round_ = divmod(number, self.order.rounds_per_epoch)
        shards_of_lanes: list[int] = self.order.epoch_shards(epoch)[round_, world.rank :: world.size].tolist()
        return shards_of_lanes

    def _read(self, shard: int, retry: bool = True) -> list[Block]:
        dataset = self.dataset
        if not retry and isinstance(dataset.root, Remote):
            dataset = replace(dataset, root=dataset.root.without_retries())
        return _read(dataset, dataset.split("train").shards[shard], self.closed)


def _rounds_of(order: Order, steps: range) -> range:
    """Return the rounds that steps use."""
    return range(order.rounds(steps[0]).start, order.rounds(steps[-1]).stop) if steps else range(0)


def _copy_to_column(
    blocks: list[Block], samples_used: NDArray[np.int64], buffer: Batch, column: int, columns: int
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

    Args:
        items: the iterator.
        ahead: number of items.
        closed: set by `close`.
        gpu: the GPU that `items` use.
        spare: work in small steps for the time in which the thread may make no further item; it yields whether to
            continue before the next item.
    """

    def __init__(
        self,
        items: Iterator[T],
        ahead: int,
        closed: threading.Event | None = None,
        gpu: torch.device | None = None,
        spare: Iterable[bool] = (),
    ) -> None:
        self._items, self._gpu, self._spare = items, gpu, iter(spare)
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
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # GPU 0 in a new thread: every process would use memory there
            while True:
                self._wait_for_permit()
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

    def _wait_for_permit(self) -> None:
        """Wait until an item may be made; use the time."""
        while not self._permits.acquire(blocking=False):
            if not next(self._spare, False):
                self._permits.acquire()
                return
