"""A cache of the training set in memory: shards are read and checked once, later epochs gather batches from the cache.

It has room for the whole train split, because each epoch assigns other shards to a process.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain import machine
from distrain.data.fetch import Remote
from distrain.data.manifest import Dataset
from distrain.data.shards import Block
from distrain.errors import ConfigError

_VIEW_BYTES = 250
"""Bytes of a cached sample of an index, besides its image."""

_AUTO_DIVISOR = 4
"""`auto` uses at most one quarter of the free memory: the run needs the rest."""


class Samples(NamedTuple):
    """Samples: images uint8 [n, H, W, C] and labels int64 [n] on one device, ids int64 [n]."""

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]


class Cache:
    """Memory for all samples of the train split, in the order of its shards.

    One thread may put shards while another one gathers samples of shards that are complete.
    """

    def __init__(
        self, dataset: Dataset, device: torch.device, pin: bool = False, fill_before_steps: bool = False
    ) -> None:
        """Allocate the memory.

        Args:
            dataset: the data set whose train split is cached.
            device: where images and labels are stored.
            pin: gather batches into pinned memory, from which they are copied to a GPU.
            fill_before_steps: whether all shards that the run needs are read before its first step.
        """
        self.fill_before_steps = fill_before_steps
        sizes = dataset.split("train").sizes.tolist()
        self._starts = np.cumsum([0, *sizes])
        total = int(self._starts[-1])
        self._is_complete = np.zeros(len(sizes), dtype=bool)
        self._ids = np.empty(total, np.int64)
        shape = (total, *dataset.image_shape)
        self._pin = pin
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "cpu":
            # numpy asks for huge pages: the first access to fresh memory takes as long as reading the shards.
            self._images, self._labels = (
                torch.from_numpy(np.empty(size, kind)) for size, kind in ((shape, np.uint8), (total, np.int64))
            )
        else:
            self._images = torch.empty(shape, dtype=torch.uint8, device=device)
            self._labels = torch.empty(total, dtype=torch.int64, device=device)
        if self._stream is not None:  # the current stream may still use memory that was freed, and is allocated again
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def device(self) -> torch.device:
        """The device that stores images and labels."""
        return self._images.device

    def contains(self, shard: int) -> bool:
        """Whether all samples of a shard are in the cache."""
        return bool(self._is_complete[shard])

    @property
    def is_complete(self) -> bool:
        """Whether all shards are in the cache."""
        return bool(self._is_complete.all())

    def start(self, shard: int) -> int:
        """Index of a shard's first sample in the cache."""
        return int(self._starts[shard])

    def put(self, shard: int, blocks: list[Block]) -> None:
        """Store the samples of a shard."""
        start = self.start(shard)
        for block in blocks:
            rows = slice(start, start + len(block.ids))
            start = rows.stop
            self._ids[rows] = block.ids
            if self._stream is None:
                self._images.numpy()[rows], self._labels.numpy()[rows] = block.images, block.labels
                continue
            with torch.cuda.stream(self._stream):  # a separate stream, so that training steps do not wait
                self._images[rows].copy_(torch.from_numpy(block.images.copy()))
                self._labels[rows].copy_(torch.from_numpy(block.labels.copy()))
        if self._stream is not None:
            self._stream.synchronize()
        self._is_complete[shard] = True

    def gather(self, index: Tensor) -> Samples:
        """Return copies of the samples at int64 indices [n], on the cache's device."""
        device_index = index.to(self.device, non_blocking=True)
        images = self._select(self._images.flatten(1), device_index).unflatten(1, self._images.shape[1:])
        return Samples(images, self._select(self._labels, device_index), self.ids(index))

    def ids(self, index: Tensor) -> NDArray[np.int64]:
        """Return the ids of the samples at int64 indices [n]."""
        ids: NDArray[np.int64] = self._ids[index.numpy()]
        return ids

    def _select(self, values: Tensor, index: Tensor) -> Tensor:
        shape = (len(index), *values.shape[1:])
        out = torch.empty(shape, dtype=values.dtype, device=self.device, pin_memory=self._pin)
        return torch.index_select(values, 0, index, out=out)


def size(dataset: Dataset) -> int:
    """Bytes that a cache of the data set needs."""
    if dataset.is_index:
        split = dataset.indexed("train")
        return split.bytes + split.samples * _VIEW_BYTES
    return dataset.split("train").samples * (dataset.sample_bytes + 16)  # of label and id


def choose_device(setting: str, dataset: Dataset, device: torch.device, processes: int) -> torch.device | None:
    """Return the device that caches the train split, or None if it is read from the shards in every epoch.

    Args:
        setting: the value of `data.cache`: auto, off, ram or device.
        dataset: the data set.
        device: the device that this process trains on.
        processes: number of processes on this machine, which share its memory.

    Raises:
        ConfigError: the train split does not fit into the memory that `setting` names.
    """
    needed, on_gpu = size(dataset), device.type == "cuda"
    if setting == "device" and not on_gpu:
        raise ConfigError("data.cache=device needs a GPU; on the CPU use ram")
    auto: tuple[str, ...] = ("device", "ram")
    if dataset.is_index:  # of local files, the system caches what was read, for all processes together
        auto = ("ram",) if isinstance(dataset.tars, Remote) else ()
    for memory in {"auto": auto, "off": ()}.get(setting, (setting,)):
        if memory == "device" and not on_gpu:
            continue
        free = torch.cuda.mem_get_info(device)[0] if memory == "device" else machine.free_memory() // processes
        if needed <= (free // _AUTO_DIVISOR if setting == "auto" else free):
            return device if memory == "device" else torch.device("cpu")
        if setting != "auto":
            raise ConfigError(
                f"data.cache={setting}: the training set needs {needed / 2**20:,.0f} MiB in each process, but only"
                f" {free / 2**20:,.0f} MiB are free for it; use data.cache=auto or off"
            )
    return None
