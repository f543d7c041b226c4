"""Batches for an evaluation of one's own: each sample of a split once over all processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distrain import config as configuration
from distrain.api.arguments import text_of
from distrain.api.group import check_process, check_same, collectives_for, local_processes, world_of
from distrain.api.loader import Batches
from distrain.config import Config
from distrain.data.manifest import Dataset
from distrain.data.stream import EvaluationBatches
from distrain.distributed.collectives import Collectives
from distrain.environment import World
from distrain.errors import DataError
from distrain.training import inputs


class EvaluationBatch(NamedTuple):
    """Some samples of a split: images uint8 [n, H, W, C], labels int64 [n], ids int64 [n] as stored with the images."""

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]


def evaluation_batches(
    data_dir: str | os.PathLike[str],
    split: str = "test",
    *,
    batch_size: int = 512,
    rank: int | None = None,
    world_size: int | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    decode_threads: int | None = None,
    tars: str | None = None,
    skip_bad: int = 0,
) -> Batches[EvaluationBatch]:
    """Iterate over this process's samples of a split: over all processes, each sample comes once.

    Add up counts and losses over the samples of all processes; a mean of means would weight samples unequally. Numbers
    of batches differ between processes, and one can have none: run no collective for each batch. A batch has the same
    samples on any number of processes. It stays valid.

    If torch.distributed is initialised, all its processes must call this function, and iterate to the end, where they
    have collectives: a problem of one process is then raised by all of them (the exceptions are those of `batches`).

    Args:
        data_dir: folder or address of the data set, as `data.dir`.
        split: train, val or test.
        batch_size: maximum number of samples of a batch.
        rank: of this process, and the number of processes; the defaults are those of `batches`.
        world_size: number of processes.
        image_size: height and width of the images that an index is trained with, as `batches` has it.
        resize: of an index, length of the shorter side before the crop; None: that of the crop.
        crop: height and width of the crop at the centre; None: `image_size`. If all are None, nothing is resized.
        decode_threads: threads that decode the images of an index; None: the cores, divided among the machine's
            processes (LOCAL_WORLD_SIZE).
        tars: folder or address of the tar files of an index; None: where they were when it was made.
        skip_bad: number of images of an index that may turn out to be unreadable; they are in no batch.

    Raises:
        ConfigError: an argument cannot be used; when the function is called.
        DataError: the data set cannot be read, or has no such split, when the function is called; or a shard; with
            several processes at the end.
        UnreadableImagesError: more images than `skip_bad` cannot be decoded; at the end.
    """
    check_process("distrain.evaluation_batches")
    tree = {
        "data": {
            "dir": text_of("data_dir", data_dir), "tars": tars, "image_size": image_size,
            "decode_threads": decode_threads, "skip_bad": skip_bad,
        },
        "eval": {"batch_size": batch_size, "resize": resize, "crop": crop},
    }  # fmt: skip
    collectives = collectives_for(world_size)
    config, dataset, world = collectives.all_or_none(lambda: _open(tree, split, world_of(rank, world_size)))
    inputs.check_same_data(collectives, dataset, [split])
    same = {"split": split, "world_size": world.size, "image_size": image_size, **config.eval.model_dump()}
    check_same(collectives, "distrain.evaluation_batches", world, same)
    preprocessing = inputs.preprocessing(config, dataset, local_processes())
    reader = collectives.all_or_none(lambda: EvaluationBatches(dataset, split, world, batch_size, preprocessing))

    def close() -> None:
        reader.close()
        if preprocessing is not None:
            preprocessing.decoder.close()

    return Batches(_items(reader, dataset, split, skip_bad, collectives), close)


def _open(tree: dict[str, object], split: str, world: World) -> tuple[Config, Dataset, World]:
    config = configuration.from_tree(tree)
    dataset = inputs.read_data(config, split)
    inputs.check(config, dataset)
    return config, dataset, world


def _items(
    reader: EvaluationBatches, dataset: Dataset, split: str, skip_bad: int, collectives: Collectives
) -> Iterator[EvaluationBatch]:
    error: DataError | None = None
    try:
        for images, labels, ids in reader:
            yield EvaluationBatch(images, labels, ids.numpy())
    except DataError as caught:
        error = caught
    agreed = collectives.from_all((error, reader.bad))
    for error, _ in agreed:
        if error is not None:
            raise error
    bad = [each for _, of_rank in agreed for each in of_rank]
    if bad:
        inputs.check_bad(inputs.describe_bad(dataset, split, bad), skip_bad)
