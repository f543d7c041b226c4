"""The samples of a round, read from its shards into buffers or into a cache, in the order of training.

A round has one shard of each lane (`distrain.data.order`). Its samples lie in its buffers, one for each virtual rank,
row by row and lane by lane: those that a virtual rank trains in a step are consecutive. Those of an index are encoded
(`distrain.data.encoded`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data import encoded, shards
from distrain.data.cache import Cache
from distrain.data.cache import size as cache_size
from distrain.data.encoded import Encoded, EncodedCache, Stretches
from distrain.data.fetch import Remote
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order
from distrain.data.shards import Block
from distrain.environment import World
from distrain.errors import DataError

_GATHERED_SAMPLES = 256
"""Minimum number of samples that are gathered from a cache at once."""

_POLL_SECONDS = 0.001
"""Interval of the questions whether a GPU has copied a round."""

_LABEL_BYTES, _BITS_BYTES = 8, 16
"""Bytes of a sample's label and random bits, which are copied to a GPU, as its image is."""

_HOST_BYTES = 16
"""Bytes of a sample's id and position."""


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
class Cached:
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
class Round:
    """A round's samples of each virtual rank of this process.

    Attributes:
        number: of the round, over all epochs.
        parts: the samples of each virtual rank, in training order: flat over (row, owned lane).
        copied: for a GPU, recorded behind the last copy from the buffers; None if they are not reused.
    """

    number: int
    parts: Sequence[Batch | Cached | Encoded]
    copied: torch.cuda.Event | None


@dataclass
class RoundReader:
    """Reads rounds, one after another. Used by the background thread."""

    dataset: Dataset
    order: Order
    ranks: Sequence[World]
    rounds: range
    with_random_bits: bool
    pin: bool
    closed: threading.Event
    stretches: Stretches | None = None
    """Reads the virtual shards of an index."""
    shards_read: int = 0
    """Number of shards read so far: it shows whether reading makes progress."""

    def into_buffers(self, buffers: int) -> Iterator[Round]:
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
                    self.shards_read += 1
                positions, random_bits = self._draw(number, world, buffer.ids)
                buffer.positions[:] = positions
                buffer.random_bits.copy_(random_bits)
            yield Round(number, parts, copied)

    def into_cache(self, cache: Cache) -> Iterator[Round]:
        """Read the shards that the cache does not contain into it."""
        if cache.fill_before_steps:
            for shard in itertools.chain.from_iterable(map(self._shards_of_round, self.rounds)):
                if self.closed.is_set():
                    return
                if cache.is_complete:
                    break
                self._put(cache, shard)
        for number in self.rounds:
            parts = []
            for world in self.ranks:
                lanes = len(self.order.owned_lanes(world))
                index = self._empty((self.order.samples_per_shard, lanes), torch.int64)
                for column, shard, samples_used in self._parts(number, world):
                    self._put(cache, shard)
                    index[:, column] = torch.from_numpy(samples_used + cache.start(shard))
                positions, random_bits = self._draw(number, world, cache.ids(index.flatten()))
                pinned = self._empty(random_bits.shape, torch.int64).copy_(random_bits)
                parts.append(Cached(cache, index.flatten(), positions, pinned))
            yield Round(number, parts, None)

    def _put(self, cache: Cache, shard: int) -> None:
        """Read a shard into the cache, unless it contains it."""
        if not cache.contains(shard):
            cache.put(shard, self._read(shard))
            self.shards_read += 1

    def encoded(self, cache: EncodedCache | None) -> Iterator[Round]:
        """Read the virtual shards of an index; with a cache, those that it does not contain."""
        for number in self.rounds:
            parts = []
            for world in self.ranks:
                columns = []
                for _, shard, samples_used in self._parts(number, world):
                    if cache is not None and not cache.contains(shard):
                        cache.put(shard, self._read(shard))
                    columns.append((self._read(shard) if cache is None else cache.get(shard), samples_used))
                    self.shards_read += 1
                samples = encoded.entries(columns)
                positions, random_bits = self._draw(number, world, samples["id"])
                bits = random_bits.numpy().view(np.uint64)
                parts.append(encoded.interleave(columns, samples, positions, bits))
            yield Round(number, parts, None)

    def fill(self, cache: Cache | EncodedCache) -> Iterator[bool]:
        """Read the shards of all rounds into a cache, one at a time, in the order in which they are needed.

        A round may wait for the shard that is being read, so a remote one is fetched without retries.

        Yields:
            Whether to continue before the next round: not after a shard that cannot be read. Such a shard is not read
            early again; the error is raised when it is needed, where all processes stop together.
        """
        failed: set[int] = set()
        for number in self.rounds:
            for shard in self._shards_of_round(number):
                if cache.contains(shard) or shard in failed:
                    continue
                try:
                    cache.put(shard, self._read(shard, retry=False))
                except DataError:
                    failed.add(shard)
                else:
                    self.shards_read += 1
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
            self._empty((samples, *self.dataset.image_shape), torch.uint8),
            self._empty((samples,), torch.int64),
            np.empty(samples, np.int64),
            np.empty(samples, np.int64),
            self._empty((samples if self.with_random_bits else 0, 2), torch.int64),
        )

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin)

    def _draw(self, number: int, world: World, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        """Return the positions in their global batches, and the random bits, of a virtual rank's samples in a round."""
        steps, positions = self.order.positions(number, world)
        if not self.with_random_bits:
            return positions, torch.empty((0, 2), dtype=torch.int64)
        return positions, torch.from_numpy(self.order.random_bits(steps, positions, ids).view(np.int64))

    def _parts(self, number: int, world: World) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield (column, shard, indices of its samples in training order) for each lane of a virtual rank."""
        epoch, sizes = number // self.order.rounds_per_epoch, self.dataset.split("train").sizes
        for column, shard in enumerate(self._shards(number, world)):
            yield column, shard, self.order.shard_samples(epoch, shard, int(sizes[shard]))

    def _shards_of_round(self, number: int) -> Iterator[int]:
        """Yield the shards of all virtual ranks of this process in a round."""
        return itertools.chain.from_iterable(self._shards(number, world) for world in self.ranks)

    def _shards(self, number: int, world: World) -> list[int]:
        """Return the shard of each lane of a virtual rank in a round."""
        epoch, round_ = divmod(number, self.order.rounds_per_epoch)
        shards_of_lanes: list[int] = self.order.epoch_shards(epoch)[round_, world.rank :: world.size].tolist()
        return shards_of_lanes

    def _read(self, shard: int, retry: bool = True) -> Any:
        """Return the content of a shard: blocks, or the stretch of an index."""
        if self.stretches is not None:
            return self.stretches.read(shard, retry)
        dataset = self.dataset
        if not retry and isinstance(dataset.root, Remote):
            dataset = replace(dataset, root=dataset.root.without_retries())
        return read_shard(dataset, dataset.blocks("train").shards[shard], self.closed)


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


def join(parts: Sequence[Batch], pin: bool) -> Batch:
    """Return one batch of the samples of all parts; without a copy if only one part has any."""
    with_samples = [part for part in parts if len(part.ids)] or parts[:1]
    return with_samples[0] if len(with_samples) == 1 else concatenate(with_samples, pin)


def concatenate(parts: Sequence[Batch], pin: bool) -> Batch:
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


def read_shard(dataset: Dataset, shard: Shard, stop: threading.Event) -> list[Block]:
    """Return the blocks of a shard; with `stop`, a fetch ends early.

    Raises:
        ShardError: it cannot be read, or does not match the manifest.
    """
    return shards.read(dataset.root, shard, dataset.image_shape, len(dataset.manifest.classes), stop=stop)


def rounds_of(order: Order, steps: range) -> range:
    """Return the rounds that steps use."""
    return range(order.rounds(steps[0]).start, order.rounds(steps[-1]).stop) if steps else range(0)


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
        pinned: whether the buffers are in pinned memory, for a GPU.
    """
    if cached:
        return cache_size(dataset)
    buffers = 1 + max(read_ahead, order.rounds_per_step)
    samples = [len(order.owned_lanes(world)) * order.samples_per_shard for world in ranks]
    return buffers * sum(buffer_bytes(each, dataset.sample_bytes, pinned) for each in samples)


def buffer_bytes(samples: int, sample_bytes: int, pinned: bool) -> int:
    """Bytes of the buffer of so many samples; torch makes each tensor in pinned memory a power of two long."""
    copied = [samples * size for size in (sample_bytes, _LABEL_BYTES, _BITS_BYTES)]
    if pinned:
        copied = [1 << (size - 1).bit_length() for size in copied]
    return sum(copied) + samples * _HOST_BYTES
