"""Reading: images/s of one process with one torch thread, from files in the page cache to batches of 512 images.

All images of train, to uint8 batches:

- distrain, first epoch: a new `TrainingBatches` over the shards; every digest is checked
- distrain, with a cache: the first epoch, which allocates and fills a new `Cache`, and later epochs from it
- the limit: `torch.index_select` of shuffled batches from one tensor in memory; drawing the permutation is included
- stock webdataset over the same shards, without digests: the blocks' samples are separated, shuffled in a buffer of
  1,000 and collated to batches; or whole blocks, where each decoded block is a batch and samples are not shuffled

The first images of train, to batches of normalised floats:

- webdataset's usual pipeline over one PNG, JPEG or npy file per image, shuffled in a buffer of 1,000
- torchvision: a map-style data set of arrays in memory, ToTensor and Normalize, a DataLoader without workers
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.context import Context, images_per_second, load, take_turns
from benchmarks.image_files import write_tars
from benchmarks.reader import BATCH, read_epoch
from benchmarks.table import Table, ratio
from distrain.data.cache import Cache

_SHUFFLE_BUFFER = 1000
_TO_FLOATS = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
_FIRST, _LIMIT, _PNG = "distrain, first epoch", "limit: gather in memory", "webdataset, PNG"
_BLOCKS, _WHOLE_BLOCKS = "webdataset, block shards", "webdataset, block shards, whole blocks"


def measure(context: Context) -> Table:
    """Measure the images/s of all contestants."""
    dataset, train = context.dataset, context.dataset.blocks("train")
    subset = min(train.samples, 2_000 if context.quick else 10_000)
    images, labels = load(dataset, "train")
    blocks = [str(dataset.root / shard.name) for shard in train.shards]
    tars = {kind: write_tars(dataset, context.work / "tars" / kind, kind, subset) for kind in ("png", "jpg", "npy")}
    cache: Cache | None = None

    def fill_cache() -> int:
        nonlocal cache
        cache = Cache(dataset, torch.device("cpu"))
        return read_epoch(dataset, 0, cache)

    readers: dict[str, Callable[[], int]] = {
        _FIRST: lambda: read_epoch(dataset),
        "distrain, first epoch, filling the cache": fill_cache,
        "distrain, later epochs, from the cache": lambda: read_epoch(dataset, 1, cache),
        _LIMIT: lambda: gather(images, labels),
        _BLOCKS: lambda: read_blocks(blocks),
        _WHOLE_BLOCKS: lambda: read_whole_blocks(blocks),
        _PNG: lambda: read_files(tars["png"], "png"),
        "webdataset, JPEG": lambda: read_files(tars["jpg"], "jpg"),
        "webdataset, npy": lambda: read_files(tars["npy"], "npy"),
        "torchvision, arrays in memory": lambda: read_arrays(images[:subset], labels[:subset]),
    }
    contestants = {name: partial(images_per_second, reader) for name, reader in readers.items()}
    rows = take_turns("reading", "images/s", contestants, context.repeats)
    of_distrain = [row for name, row in rows.items() if name.startswith("distrain")]
    pairs = [(row, rows[name]) for name in (_PNG, _LIMIT) for row in of_distrain]
    pairs += [(rows[_FIRST], rows[name]) for name in (_BLOCKS, _WHOLE_BLOCKS)]
    pairs += [(rows[name], rows[_PNG]) for name in (_BLOCKS, _WHOLE_BLOCKS)]
    return Table(
        f"Reading, one process, batches of {BATCH}",
        list(rows.values()),
        [ratio(*pair) for pair in pairs],
        [
            f"distrain, the limit and block shards: {train.samples:,} images to uint8; "
            f"the others: {subset:,} images to floats",
            "only distrain checks digests; only PNG and JPEG files need an image decoder",
            f"whole blocks are batches of at most {int(train.sizes.max()):,} images here",
        ],
    )


def gather(images: Tensor, labels: Tensor) -> int:
    """Gather shuffled batches from tensors in memory, and return the number of images."""
    rows = images.flatten(1)
    count = 0
    for index in torch.randperm(len(rows)).split(BATCH):
        torch.index_select(rows, 0, index)
        count += len(labels.index_select(0, index))
    return count


def _block_pipeline(paths: list[str]) -> Any:
    return wds.WebDataset(paths, shardshuffle=len(paths)).decode().to_tuple("images.npy", "labels.npy")


def read_blocks(paths: list[str]) -> int:
    """Read shuffled batches from distrain's shards with webdataset, and return the number of images."""
    pipeline = _block_pipeline(paths).unbatched().shuffle(_SHUFFLE_BUFFER).batched(BATCH)
    return sum(len(labels) for _, labels in pipeline)


def read_whole_blocks(paths: list[str]) -> int:
    """Read the blocks of distrain's shards as they are with webdataset, and return the number of images."""
    return sum(len(labels) for _, labels in _block_pipeline(paths))


def read_files(paths: list[str], kind: str) -> int:
    """Read batches from one file per image with webdataset, and return the number of images."""
    pipeline = (
        wds.WebDataset(paths, shardshuffle=len(paths))
        .shuffle(_SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple(kind, "cls")
        .map_tuple(_TO_FLOATS, lambda label: label)
        .batched(BATCH)
    )
    return sum(len(labels) for _, labels in pipeline)


class _Arrays(torch.utils.data.Dataset[Any]):
    """Images as torchvision's CIFAR10 stores them, but without its conversion to PIL images."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.numpy(), labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _TO_FLOATS(self._images[index]), self._labels[index]


def read_arrays(images: Tensor, labels: Tensor) -> int:
    """Read batches with a DataLoader, and return the number of images."""
    return sum(len(batch) for _, batch in DataLoader(_Arrays(images, labels), BATCH, shuffle=True))
