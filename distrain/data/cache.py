"""The train split in memory, once its shards were read and checked: later epochs gather from there.

All or nothing: another epoch deals a process other shards, so in time it comes by all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain import machine
from distrain.data.manifest import Dataset
from distrain.data.shards import Block
from distrain.errors import ConfigError

_LEAVE = 4
"""`auto` takes a quarter of what is free, at most: the run needs the rest."""


class Samples(NamedTuple):
    """images uint8 [n, H, W, C] and labels int64 [n] on one device, ids int64 [n]."""

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]


class Cache:
    """All samples of the train split, shard behind shard. One thread puts, another gathers what was put."""

    def __init__(self, dataset: Dataset, device: torch.device, pin: bool = False) -> None:
        """`pin`: batches are gathered into pinned memory, to be copied to a GPU."""
        sizes = [shard.samples for shard in dataset.split("train").shards]
        self._starts = np.cumsum([0, *sizes])
        total = int(self._starts[-1])
        self._held = np.zeros(len(sizes), dtype=bool)
        self._ids = np.empty(total, np.int64)
        shape = (total, *dataset.manifest.image_shape)
        self._pin = pin
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cpu":
            # numpy asks for huge pages: touching fresh memory costs as much as the reading.
            self._images, self._labels = (
                torch.from_numpy(np.empty(size, kind)) for size, kind in ((shape, np.uint8), (total, np.int64))
            )
        else:
            self._images = torch.empty(shape, dtype=torch.uint8, device=device)
            self._labels = torch.empty(total, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """Where images and labels lie."""
        return self._images.device

    def holds(self, shard: int) -> bool:
        """Whether a shard's samples are here."""
        return bool(self._held[shard])

    def start(self, shard: int) -> int:
        """Index of a shard's first sample among all."""
        return int(self._starts[shard])

    def put(self, shard: int, blocks: list[Block]) -> None:
        """Keep the samples of a shard that was read."""
        start = self.start(shard)
        for block in blocks:
            here = slice(start, start + len(block.ids))
            start = here.stop
            self._ids[here] = block.ids
            if self._stream is None:
                self._images.numpy()[here], self._labels.numpy()[here] = block.images, block.labels
                continue
            with torch.cuda.stream(self._stream):  # of its own: the step's is not held up
                self._images[here].copy_(torch.from_numpy(block.images.copy()))
                self._labels[here].copy_(torch.from_numpy(block.labels.copy()))
        if self._stream is not None:
            self._stream.synchronize()
        self._held[shard] = True

    def gather(self, index: Tensor) -> Samples:
        """The samples at int64 indices [n], on the cache's device."""
        there = index.to(self.device, non_blocking=True)
        rows = self._images.flatten(1)
        into = torch.empty((len(index), rows.shape[1]), dtype=torch.uint8, device=self.device, pin_memory=self._pin)
        images = torch.index_select(rows, 0, there, out=into).unflatten(1, self._images.shape[1:])
        return Samples(images, self._labels.index_select(0, there), self._ids[index.numpy()])


def size(dataset: Dataset) -> int:
    """Bytes of a cache."""
    return dataset.split("train").samples * sample_size(dataset)


def sample_size(dataset: Dataset) -> int:
    """Bytes of a sample in memory: image, label, id."""
    return dataset.manifest.sample_bytes + 16


def choose(asked: str, dataset: Dataset, device: torch.device, processes: int) -> torch.device | None:
    """Where `data.cache` lets the train split lie; None: it is read anew in every epoch.

    Args:
        asked: auto, off, ram or device.
        dataset: what is trained on.
        device: that of this process.
        processes: number of processes on this machine, which share its memory.

    Raises:
        ConfigError: it does not fit where it was asked for.
    """
    wanted, on_gpu = size(dataset), device.type == "cuda"
    if asked == "device" and not on_gpu:
        raise ConfigError("data.cache=device needs a GPU; on the CPU use ram")
    for place in {"auto": ("device", "ram"), "off": ()}.get(asked, (asked,)):
        if place == "device" and not on_gpu:
            continue
        free = torch.cuda.mem_get_info(device)[0] if place == "device" else machine.free_memory() // processes
        if wanted <= (free // _LEAVE if asked == "auto" else free):
            return device if place == "device" else torch.device("cpu")
        if asked != "auto":
            raise ConfigError(
                f"data.cache={asked}: {wanted / 2**20:,.0f} MiB do not fit into the {free / 2**20:,.0f} MiB that are"
                " free for each process; use data.cache=auto or off"
            )
    return None
