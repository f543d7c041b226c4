"""Batches of an index: encoded images are read as blocks are (`distrain.data.stream`), and decoded in time.

A second thread takes the encoded images of each step from the rounds, and has them decoded by the threads of a
`Decoder`, a few steps ahead: as many as a limit of memory allows. Buffers are reused as those of rounds are.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distrain.data import encoded
from distrain.data.background import Background
from distrain.data.cache import size as cache_size
from distrain.data.decoding import Bad, Preprocessing
from distrain.data.encoded import Encoded, EncodedCache, Stretches
from distrain.data.index import Samples
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.rounds import Batch, RoundReader, buffer_bytes, rounds_of
from distrain.data.shards import Block
from distrain.data.steps import StepParts
from distrain.environment import World
from distrain.errors import DataError

_CPU = torch.device("cpu")

_DECODED_BYTES = 2**25
"""Bytes of images that are decoded before they are needed; at least one step."""


class _Started(NamedTuple):
    """The batches of a step that are being decoded: for each virtual rank its samples, its buffer and the tasks."""

    samples: list[Encoded]
    buffers: list[Batch]
    tasks: list[list[Future[list[Bad]]]]
    copied: torch.cuda.Event | None


class EncodedBatches:
    """Iterator over the samples of the given steps of an index, not decoded yet: those of each virtual rank.

    Args:
        dataset: the index whose train split is read.
        order: the order of training.
        ranks: the virtual ranks of this process.
        steps: steps of the run, counted from 0 over all epochs.
        read_ahead: rounds to read before they are needed.
        cache: where encoded images are kept in memory; None reads them in every epoch.
        closed: set by `close`.
    """

    decodes = False

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        ranks: Sequence[World],
        steps: range,
        read_ahead: int,
        cache: EncodedCache | None = None,
        closed: threading.Event | None = None,
    ) -> None:
        closed = closed or threading.Event()
        self._steps = iter(steps)
        rounds, stretches = rounds_of(order, steps), Stretches(dataset, "train", closed)
        self._reader = reader = RoundReader(dataset, order, ranks, rounds, True, False, closed, stretches)
        spare = reader.fill(cache) if cache is not None else ()
        ahead = max(read_ahead, order.rounds_per_step)
        self._rounds = StepParts(order, ranks, Background(reader.encoded(cache), ahead, closed, None, spare), None)

    @property
    def shards_read(self) -> int:
        """Number of shards read so far: it shows whether reading makes progress."""
        return self._reader.shards_read

    def ready(self, step: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for all rounds of a step; return whether they are ready.

        Raises:
            ShardError: a virtual shard cannot be read.
        """
        return self._rounds.ready(step, timeout)

    def __iter__(self) -> Iterator[list[Encoded]]:
        return self

    def __next__(self) -> list[Encoded]:
        step = next(self._steps)
        self.ready(step, None)
        return [encoded.join(of_rank) for of_rank in self._rounds.parts(step)]

    def close(self) -> None:
        """End the thread after the shard that it reads."""
        self._rounds.close()


class DecodedBatches:
    """Iterator over local batches as `TrainingBatches`, of an index.

    Args:
        dataset: the index whose train split is read.
        order: the order of training.
        ranks: the virtual ranks of this process.
        steps: steps of the run, counted from 0 over all epochs.
        read_ahead: rounds to read before they are needed.
        preprocessing: decodes images.
        device: where batches are used.
        cache: where encoded images are kept in memory; None reads them in every epoch.
    """

    decodes = True

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        ranks: Sequence[World],
        steps: range,
        read_ahead: int,
        preprocessing: Preprocessing,
        device: torch.device = _CPU,
        cache: EncodedCache | None = None,
    ) -> None:
        self._steps, self._preprocessing = steps, preprocessing
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bad: list[Bad] = []
        """Samples of the batches so far that could not be decoded."""
        self._order, self._closed = order, threading.Event()
        self._encoded = EncodedBatches(dataset, order, ranks, steps, read_ahead, cache, self._closed)
        sizes = [order.largest_local_batch(world) for world in ranks]
        self._shape = dataset.image_shape
        steps_ahead = decoded_steps(sum(sizes) * dataset.sample_bytes)
        # One more than are ready, in use or made: the next step is started before the one that is made has ended.
        self._ring = [
            ([self._allocate(size) for size in sizes], torch.cuda.Event() if self.copy_stream is not None else None)
            for _ in range(steps_ahead + 2)
        ]
        gpu = self.copy_stream.device if self.copy_stream is not None else None
        self._background = Background(self._decode(), steps_ahead, self._closed, gpu)
        self._current: _Started | None = None

    @property
    def shards_read(self) -> int:
        """Number of shards read so far: it shows whether reading makes progress."""
        return self._encoded.shards_read

    def ready(self, step: int, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: without limit) for the next batch; return whether it is ready."""
        return self._background.wait(1, timeout)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._current is not None and self._current.copied is not None:
            # Images that were decoded on the GPU are not copied: what is computed with them has been enqueued by now.
            on_gpu = self._preprocessing.decoder.device.type == "cuda"
            self._current.copied.record(torch.cuda.current_stream() if on_gpu else self.copy_stream)
        self._current = next(self._background)
        batches = []
        for samples, buffer, tasks in zip(*self._current[:3], strict=True):
            bad = _bad(tasks)
            batches.append(_batch(samples, buffer, bad))
            self.bad += [each._replace(substitute=None) for each in bad]
        return batches

    def close(self) -> None:
        """End the threads after the shard and the images that they work on."""
        self._encoded.close()
        self._background.close()

    def _decode(self) -> Iterator[_Started]:
        started: deque[_Started] = deque()
        for number, step in enumerate(self._steps):
            if self._order.begins_round(step) or not self._is_read(step):
                while started:  # they must not wait for a round, nor be in memory while the next one is read
                    yield _finished(started.popleft())
                self._encoded.ready(step, None)
            if self._closed.is_set():
                return
            buffers, copied = self._ring[number % len(self._ring)]
            while copied is not None and not copied.query():
                if self._closed.wait(0.001):
                    return
            started.append(self._start(step, buffers, copied))
            if len(started) > 1:
                yield _finished(started.popleft())
        while started:
            yield _finished(started.popleft())

    def _start(self, step: int, buffers: list[Batch], copied: torch.cuda.Event | None) -> _Started:
        samples, transform = next(self._encoded), self._preprocessing.training_at(step)
        buffers = [_of_size(buffer, transform.height, transform.width) for buffer in buffers]
        tasks = [
            self._preprocessing.decoder.start(part, transform, buffer.images, self._closed)
            for part, buffer in zip(samples, buffers, strict=True)
        ]
        return _Started(samples, buffers, tasks, copied)

    def _is_read(self, step: int) -> bool:
        try:
            return self._encoded.ready(step, 0)
        except DataError:
            return False  # raised again after the steps before this one

    def _allocate(self, samples: int) -> Batch:
        pin, device = self.copy_stream is not None, self._preprocessing.decoder.device
        on_cpu = device.type == "cpu"
        return Batch(
            torch.empty((samples, *self._shape), dtype=torch.uint8, pin_memory=pin and on_cpu, device=device),
            torch.empty(samples, dtype=torch.int64, pin_memory=pin),
            np.empty(samples, np.int64),
            np.empty(samples, np.int64),
            torch.empty((samples, 2), dtype=torch.int64, pin_memory=pin),
        )


def _of_size(buffer: Batch, height: int, width: int) -> Batch:
    """Return a batch of images of this size, or smaller ones, in the memory of a buffer."""
    samples, channels = len(buffer.images), buffer.images.shape[3]
    pixels = buffer.images.view(-1)[: samples * height * width * channels]
    return buffer._replace(images=pixels.view(samples, height, width, channels))


def decoded_steps(step_bytes: int) -> int:
    """Return how many steps are decoded before they are needed."""
    return max(1, _DECODED_BYTES // step_bytes)


def memory(
    dataset: Dataset, order: Order, ranks: Sequence[World], read_ahead: int, cached: bool, pinned: bool = False
) -> int:
    """Bytes that a process needs for the samples of its virtual ranks: the index, encoded images, and decoded ones.

    Args:
        dataset: the index whose train split is read.
        order: the order of training.
        ranks: the virtual ranks of the process.
        read_ahead: rounds to read before they are needed.
        cached: whether the encoded images of the train split are cached.
        pinned: whether batches are in pinned memory, for a GPU.
    """
    split = dataset.indexed("train")
    encoded_bytes = cache_size(dataset)
    if not cached:
        lanes = sum(len(order.owned_lanes(world)) for world in ranks)
        rounds = 1 + order.rounds_per_step + max(read_ahead, order.rounds_per_step)  # of a step, and ahead of it
        encoded_bytes = min(encoded_bytes, rounds * lanes * encoded_bytes // split.shards)
    sizes = [order.largest_local_batch(world) for world in ranks]
    steps = decoded_steps(sum(sizes) * dataset.sample_bytes) + 2
    decoded_bytes = steps * sum(buffer_bytes(size, dataset.sample_bytes, pinned) for size in sizes)
    return split.index.bytes + encoded_bytes + decoded_bytes


def _finished(step: _Started) -> _Started:
    """Wait until the images of a step are decoded; return it without the encoded ones, so that their memory is free."""
    for of_rank in step.tasks:
        for task in of_rank:
            task.result()
    return step._replace(samples=[samples.without_images() for samples in step.samples])


def _bad(tasks: Sequence[Future[list[Bad]]]) -> list[Bad]:
    return [bad for task in tasks for bad in task.result()]


def _batch(samples: Encoded, buffer: Batch, bad: Sequence[Bad]) -> Batch:
    """Return the batch in a buffer whose images are decoded: the rest is written to it."""
    entries = _substituted(samples, bad)
    batch = buffer.take(slice(0, len(entries)))
    batch.labels.numpy()[:] = entries["label"]
    batch.ids[:], batch.positions[:] = entries["id"], samples.positions
    batch.random_bits.numpy().view(np.uint64)[:] = samples.random_bits
    return batch


def _substituted(samples: Encoded, bad: Sequence[Bad]) -> Samples:
    """Return the entries of the samples that are in a batch."""
    if not bad:
        return samples.samples
    entries = samples.samples.copy()
    for each in bad:
        if each.substitute is not None:
            entries[each.row] = each.substitute
    return entries


def decode(
    stretches: Stretches, numbers: Sequence[int], batch_size: int, preprocessing: Preprocessing, bad: list[Bad]
) -> Iterator[Block]:
    """Yield the batches of virtual shards; the next one is started before one is complete."""
    transform = preprocessing.evaluation
    shape = (transform.height, transform.width, 3)
    parts = (part for number in numbers for part in encoded.slices(stretches.read(number), batch_size))
    started: deque[tuple[Encoded, Tensor, list[Future[list[Bad]]]]] = deque()
    for part in itertools.chain(parts, [None]):
        if part is not None:
            images = torch.empty((len(part.samples), *shape), dtype=torch.uint8)
            started.append((part, images, preprocessing.decoder.start(part, transform, images, stretches.closed)))
        while started and (part is None or len(started) > 1):
            yield _block_of(*started.popleft(), bad)


def _block_of(samples: Encoded, images: Tensor, tasks: Sequence[Future[list[Bad]]], bad: list[Bad]) -> Block:
    """Return the samples of a decoded batch that could be decoded; add the others to `bad`."""
    here = _bad(tasks)
    bad += [each._replace(substitute=None) for each in here]
    entries = samples.samples
    good = np.setdiff1d(np.arange(len(entries)), [each.row for each in here])
    return Block(
        images.numpy()[good] if here else images.numpy(), entries["label"][good].astype(np.int64), entries["id"][good]
    )
