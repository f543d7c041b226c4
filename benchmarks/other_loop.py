"""Reading as another training loop does it, or as the trainer does it; a program, so that the process is fresh.

    python -m benchmarks.other_loop trainer|batches|plain DATA BATCH SIDE EPOCHS

Reads whole epochs of a data set of blocks (SIDE 0), or random parts of the images of an index, to batches with random
bits, with one torch thread; `plain` without `distrain.keep_freed_memory`. The time contains opening the data set, not
the imports. Prints a JSON object: `images_per_second`, and `cpu_ms` for each image, of all threads.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

import distrain
from distrain import config
from distrain.data.decoded import DecodedBatches
from distrain.data.stream import TrainingBatches
from distrain.environment import World
from distrain.training import inputs
from distrain.training.feed import Feed

_CPU = torch.device("cpu")
_SCALE = (0.08, 1.0)


def by_trainer(data: str, batch: int, side: int, epochs: int) -> Iterator[int]:
    """Read as `distrain train` does; yield the number of images of each batch."""
    tree: dict[str, Any] = {"data": {"dir": data}, "train": {"global_batch_size": batch}}
    if side:
        tree["data"]["image_size"], tree["augment"] = side, {"crop_scale": _SCALE}
    settings = config.from_tree(tree)
    dataset = inputs.read_data(settings, "train", "test")
    order = inputs.make_order(settings, dataset, 1)
    steps = range(epochs * order.steps_per_epoch)
    what = (dataset, order, (World(),), steps, settings.data.read_ahead)
    preprocessing = inputs.preprocessing(settings, dataset, 1, _CPU)
    reader: TrainingBatches | DecodedBatches
    if preprocessing is not None:
        reader = DecodedBatches(*what, preprocessing)
    else:
        reader = TrainingBatches(*what, with_random_bits=True)
    with closing(reader):

        def wait(step: int) -> None:
            reader.ready(step, None)

        feed = Feed(reader, order, _CPU, wait)
        for step in steps:
            yield sum(len(each.labels) for each in feed.take(step))


def by_batches(data: str, batch: int, side: int, epochs: int) -> Iterator[int]:
    """Read with `distrain.batches`; yield the number of images of each batch."""
    steps = distrain.open_data(data).steps(range(epochs), batch)
    size, scale = (side, _SCALE) if side else (None, None)
    for each in distrain.batches(data, global_batch_size=batch, steps=steps, image_size=size, crop_scale=scale):
        yield len(each.labels)


def main() -> None:
    """Read, and print the result."""
    torch.set_num_threads(1)
    name, data, *numbers = sys.argv[1:]
    batch, side, epochs = map(int, numbers)
    read = by_trainer if name == "trainer" else by_batches
    if name != "plain":
        distrain.keep_freed_memory()
    _ = distrain.batches, distrain.open_data  # imported here
    started, cpu = time.perf_counter(), time.process_time()
    images = sum(read(data, batch, side, epochs))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"images_per_second": images / seconds, "cpu_ms": 1000 * cpu / images}))


if __name__ == "__main__":
    main()
