"""The samples of a round as encoded images, in the order of training; a cache of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data import index
from distrain.data.fetch import Remote
from distrain.data.index import Samples, Stretch
from distrain.data.manifest import Dataset
from distrain.data.order import RandomBits


@dataclass(frozen=True)
class Encoded:
    """Samples of one virtual rank, not decoded yet, in training order.

    Attributes:
        stretches: the virtual shards that they are in.
        origin: stretch of each, and its number there: int64 [n, 2].
        samples: their entries in the index.
        positions: in the global batch: int64 [n].
        random_bits: uint64 [n, 2].
    """

    stretches: Sequence[Stretch]
    origin: NDArray[np.int64]
    samples: Samples
    positions: NDArray[np.int64]
    random_bits: RandomBits

    def take(self, rows: slice) -> Encoded:
        """Return consecutive samples."""
        return Encoded(
            self.stretches, self.origin[rows], self.samples[rows], self.positions[rows], self.random_bits[rows]
        )

    def without_images(self) -> Encoded:
        """Return the samples without the encoded images of their virtual shards."""
        return replace(self, stretches=())


Columns: TypeAlias = Sequence[tuple[Stretch, NDArray[np.int64]]]
"""A virtual shard for each lane, and the numbers of its samples in training order: int64 [m]."""


def entries(columns: Columns) -> Samples:
    """Return the entries of a round's samples in the index, row by row, lane by lane: [n]."""
    return np.stack([stretch.samples[used] for stretch, used in columns], axis=1).reshape(-1)


def interleave(columns: Columns, samples: Samples, positions: NDArray[np.int64], random_bits: RandomBits) -> Encoded:
    """Return the samples of a round, row by row, lane by lane.

    Args:
        columns: where they are.
        samples: their `entries`.
        positions: of the samples in their global batches: int64 [n].
        random_bits: uint64 [n, 2].
    """
    numbers = np.stack([used for _, used in columns], axis=1)
    origin = np.stack([np.broadcast_to(np.arange(len(columns)), numbers.shape), numbers], axis=-1).reshape(-1, 2)
    return Encoded([stretch for stretch, _ in columns], origin, samples, positions, random_bits)


def join(parts: Sequence[Encoded]) -> Encoded:
    """Return the samples of all parts, in their order."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.stretches) for part in parts)])
    return Encoded(
        [stretch for part in parts for stretch in part.stretches],
        np.concatenate([part.origin + np.array([start, 0]) for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.samples for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.random_bits for part in parts]),
    )


class Stretches:
    """The virtual shards of a split, read one at a time; one that is still in use is not read again.

    So a set that is smaller than the rounds in memory is in memory once.

    Args:
        dataset: an index.
        split_name: the split.
        closed: ends waits for remote files when it is set.
    """

    def __init__(self, dataset: Dataset, split_name: str, closed: threading.Event) -> None:
        self.samples = index.load(dataset, split_name)
        self._dataset, self._split_name, self.closed = dataset, split_name, closed
        self._in_use: weakref.WeakValueDictionary[int, Stretch] = weakref.WeakValueDictionary()

    def read(self, number: int, retry: bool = True) -> Stretch:
        """Read a virtual shard.

        Raises:
            ShardError: its tar files cannot be read, or have changed.
        """
        stretch = self._in_use.get(number)
        if stretch is None:
            stretch = self._in_use[number] = self._read(number, retry)
        return stretch

    def _read(self, number: int, retry: bool) -> Stretch:
        dataset = self._dataset
        if not retry and isinstance(dataset.tars, Remote):
            dataset = replace(dataset, tars=dataset.tars.without_retries())
        return index.read(dataset, self._split_name, self.samples, number, self.closed)


class EncodedCache:
    """A cache of encoded images in memory: tar files are read once, later epochs decode from the cache."""

    device = torch.device("cpu")

    def __init__(self, shards: int) -> None:
        self._stretches: list[Stretch | None] = [None] * shards
        self._missing = shards

    @property
    def is_complete(self) -> bool:
        """Whether all virtual shards are in the cache."""
        return self._missing == 0

    def contains(self, shard: int) -> bool:
        """Whether a virtual shard is in the cache."""
        return self._stretches[shard] is not None

    def put(self, shard: int, stretch: Stretch) -> None:
        """Store a virtual shard."""
        self._stretches[shard] = stretch
        self._missing -= 1

    def get(self, shard: int) -> Stretch:
        """Return a virtual shard that the cache contains."""
        stretch = self._stretches[shard]
        assert stretch is not None
        return stretch


def slices(stretch: Stretch, size: int) -> Iterator[Encoded]:
    """Yield the samples of a virtual shard, `size` at a time, without random bits."""
    total = len(stretch.samples)
    for start in range(0, total, size):
        numbers = np.arange(start, min(start + size, total))
        origin = np.stack([np.zeros_like(numbers), numbers], axis=1)
        yield Encoded([stretch], origin, stretch.samples[numbers], numbers, np.zeros((len(numbers), 2), np.uint64))
