"""Reading alone, in one process with one thread for tensors: from files in the page cache to batches of 512.

- distrain, first epoch: a fresh TrainingBatches over the shards, every digest checked, to uint8 batches
- the same into a fresh Cache, its allocation included; then later epochs, gathered from it
- the limit: `torch.index_select` of batches from one tensor in memory, in shuffled order; the shuffle is included
- webdataset as its documentation reads one image a member (PNG, JPEG, npy): shuffled in a buffer of 1,000, to floats
- torchvision: a map-style data set of arrays in memory, ToTensor and Normalize, a DataLoader without workers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from distrain.data.cache import Cache
from distrain.data.manifest import Dataset
from distrain.tools.bench.context import Context, load, rate, take_turns
from distrain.tools.bench.members import write_tars
from distrain.tools.bench.reader import BATCH, read
from distrain.tools.bench.table import Row, Table, ratio

_TO_FLOATS = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])


def measure(context: Context) -> Table:
    """Images/s of all contestants."""
    dataset = context.dataset
    whole = dataset.split("train").samples
    some = min(whole, 2_000 if context.quick else 10_000)
    images, labels = load(dataset, "train")
    contestants: dict[str, Callable[[], float]] = {
        "distrain, first epoch": lambda: rate(lambda: read(dataset, 0, None)),
        **cached(dataset),
        "limit: gather in memory": lambda: rate(lambda: gather(images, labels)),
        **webdatasets(context, some),
        "torchvision, arrays in memory": lambda: rate(lambda: map_style(images[:some], labels[:some])),
    }
    found = take_turns("reading", contestants, context.repeats)
    rows = {name: Row(name, "images/s", samples) for name, samples in found.items()}
    ours = [row for name, row in rows.items() if name.startswith("distrain")]
    below = [rows["webdataset, PNG"], rows["limit: gather in memory"]]
    return Table(
        f"Reading, one process, batches of {BATCH}",
        list(rows.values()),
        [ratio(row, other) for other in below for row in ours],
        [
            f"distrain and the limit: {whole:,} images to uint8; the others: {some:,} images to floats",
            "npy members and the arrays in memory decode no image",
        ],
    )


def cached(dataset: Dataset) -> dict[str, Callable[[], float]]:
    """The first epoch with a cache, and a later one with what that left in it."""
    caches: list[Cache] = []

    def first() -> int:
        caches[:] = [Cache(dataset, torch.device("cpu"))]
        return read(dataset, 0, caches[0])

    return {
        "distrain, first epoch, filling the cache": lambda: rate(first),
        "distrain, later epochs, from the cache": lambda: rate(lambda: read(dataset, 1, caches[0])),
    }


def gather(images: Tensor, labels: Tensor) -> int:
    """Images in shuffled batches of rows of one tensor."""
    rows = images.flatten(1)
    count = 0
    for index in torch.randperm(len(rows)).split(BATCH):
        torch.index_select(rows, 0, index)
        count += len(labels.index_select(0, index))
    return count


def webdatasets(context: Context, most: int) -> dict[str, Callable[[], float]]:
    """The usual pipelines over the first images."""

    def contestant(kind: str) -> Callable[[], float]:
        paths = write_tars(context.dataset, context.work / "tars" / kind, kind, most)
        return lambda: rate(lambda: read_members(paths, kind))

    return {f"webdataset, {name}": contestant(kind) for name, kind in (("PNG", "png"), ("JPEG", "jpg"), ("npy", "npy"))}


def read_members(paths: Sequence[str], kind: str) -> int:
    """Images in the batches of the usual webdataset pipeline."""
    pipeline = (
        wds.WebDataset(list(paths), shardshuffle=len(paths))
        .shuffle(1000)
        .decode("pil")
        .to_tuple(kind, "cls")
        .map_tuple(_TO_FLOATS, lambda label: label)
        .batched(BATCH)
    )
    return sum(len(labels) for _, labels in pipeline)


class _Arrays(torch.utils.data.Dataset[Any]):
    """As torchvision's CIFAR10 holds its images, without the way through PIL."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _TO_FLOATS(self._images[index]), self._labels[index]


def map_style(images: Tensor, labels: Tensor) -> int:
    """Images in the batches of a DataLoader."""
    return sum(len(found) for _, found in DataLoader(_Arrays(images, labels), BATCH, shuffle=True))
