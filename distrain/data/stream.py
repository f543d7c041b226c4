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

Only `ready` waits for data that is read, before a step that begins a round (`Order.begins_round`). All ranks wait there
at the same step, so all of them handle a stop request or a damaged shard at the same step.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distrain.data import decoded
from distrain.data.background import Background
from distrain.data.cache import Cache
from distrain.data.decoding import Bad, Preprocessing
from distrain.data.encoded import Stretches
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order, evaluation_shards
from distrain.data.rounds import Batch, RoundReader, join, read_shard, rounds_of
from distrain.data.shards import Block
from distrain.data.steps import StepParts
from distrain.environment import World

_CPU = torch.device("cpu")


class TrainingBatches:
    """Iterator over the local batches of the given steps, one for each virtual rank. Close it to end its threads.

    `ready` and `next` raise a ShardError if a shard cannot be read or does not match the manifest.

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

    decodes = False
    """Whether `ready` may have to wait before any step, for images to be decoded."""

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
        self._steps = iter(steps)
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """The stream that must copy the batches to a GPU: buffers are reused when its copies are done."""
        self._pin = self.copy_stream is not None
        ahead = max(read_ahead, order.rounds_per_step)
        closed = threading.Event()
        self.bad: list[Bad] = []
        rounds = rounds_of(order, steps)
        self._reader = reader = RoundReader(dataset, order, ranks, rounds, with_random_bits, self._pin, closed)
        items = reader.into_buffers(ahead + 1) if cache is None else reader.into_cache(cache)
        spare = reader.fill(cache) if cache is not None else ()
        gpu = self.copy_stream.device if self.copy_stream is not None else None
        self._rounds = StepParts(order, ranks, Background(items, ahead, closed, gpu, spare), self.copy_stream)

    @property
    def shards_read(self) -> int:
        """Number of shards read so far: it shows whether reading makes progress."""
        return self._reader.shards_read

    def ready(self, step: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for a step's batch; return whether it is ready.

        Earlier batches are no longer valid.
        """
        return self._rounds.ready(step, timeout)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        step = next(self._steps)
        self.ready(step, None)
        return [join(of_rank, self._pin) for of_rank in self._rounds.parts(step)]

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._rounds.close()


class EvaluationBatches:
    """Iterator over batches of the shards in this rank's lanes. Close it to end its thread.

    Yields images uint8 [n, H, W, C], labels int64 [n] and ids int64 [n]. A batch is a fixed slice of a shard: batches,
    and so the logits, are the same for any number of processes. Each sample belongs to exactly one rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        split_name: str,
        world: World,
        batch_size: int,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        split = dataset.split(split_name)
        numbers = evaluation_shards(len(split.sizes), split.lanes, world)
        counts = (-(-split.sizes // batch_size)).tolist()
        ends = list(itertools.accumulate(counts))
        self.numbers = [batch for shard in numbers for batch in range(ends[shard] - counts[shard], ends[shard])]
        """Numbers of this process's batches among those of the split; without those that turned out to be empty."""
        self.bad: list[Bad] = []
        """Samples so far that could not be decoded: they are in no batch."""
        closed = threading.Event()
        if preprocessing is None:
            blocks = _read_whole(dataset, [dataset.blocks(split_name).shards[shard] for shard in numbers], closed)
        else:
            stretches = Stretches(dataset, split_name, closed)
            blocks = decoded.decode(stretches, numbers, batch_size, preprocessing, self.bad)
        self._background = Background(blocks, 1, closed)
        self._size = batch_size
        self._block: Block | None = None
        self._start = 0
        self._batches = 0

    def ready(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds for the next batch or the end; return whether it is ready."""
        while not self._left():
            if not self._background.wait(1, timeout):
                return False
            if not self._take_block():
                return True
        return True

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor, Tensor]:
        while not self._left():
            if not self._take_block():
                raise StopIteration
        assert self._block is not None
        self._batches += 1
        part = slice(self._start, self._start + self._size)
        self._start += self._size
        images, labels, ids = (torch.from_numpy(array[part]) for array in self._block)
        return images, labels, ids

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._background.close()

    def _take_block(self) -> bool:
        """Wait for the next block of samples; return False at the end."""
        block = next(self._background, None)
        if block is None:
            return False
        self._block, self._start = block, 0
        if not len(block.labels):
            del self.numbers[self._batches]  # none of its images can be decoded
        return True

    def _left(self) -> bool:
        return self._block is not None and self._start < len(self._block.labels)


def _read_whole(dataset: Dataset, owned: list[Shard], closed: threading.Event) -> Iterator[Block]:
    for shard in owned:
        yield Block(*(np.concatenate(arrays) for arrays in zip(*read_shard(dataset, shard, closed), strict=True)))
