"""Read one epoch through distrain; as a program, read the first rank's part in a fresh process.

    python -m benchmarks.reader DATA PROCESSES

Prints a JSON object: images, seconds, and the growth of the peak resident memory in MiB.
"""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from distrain.data import manifest
from distrain.data.cache import Cache
from distrain.data.decoded import DecodedBatches
from distrain.data.decoding import Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.images import Decoding
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.stream import TrainingBatches
from distrain.environment import World

BATCH = 512


def training_order(dataset: Dataset, batch: int) -> Order:
    """Return the order in which a run with this global batch size trains."""
    split = dataset.split("train")
    return Order(len(split.sizes), split.lanes, int(split.sizes.min()), batch, seed=0)


def read_epoch(dataset: Dataset, epoch: int = 0, cache: Cache | None = None, world: World | None = None) -> int:
    """Read the batches of one epoch, and return the number of images."""
    order = training_order(dataset, BATCH)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = TrainingBatches(
        dataset, order, (world or World(),), steps, read_ahead=1, with_random_bits=False, cache=cache
    )
    with closing(batches):
        return sum(len(batch.labels) for (batch,) in batches)


def decoded_batches(dataset: Dataset, batch: int, steps: range, threads: int) -> DecodedBatches:
    """Return the batches of these steps from an index: random parts of its images, decoded by so many threads."""
    height, width, _ = dataset.image_shape
    preprocessing = Preprocessing(
        Decoder(threads, Decoding()),
        TrainingTransform(height, width, (0.08, 1), (3 / 4, 4 / 3)),
        EvaluationTransform(height, width, None),
    )
    return DecodedBatches(dataset, training_order(dataset, batch), (World(),), steps, 1, preprocessing)


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB.

    `getrusage` would be wrong: on Linux `ru_maxrss` survives exec, so a small process may show its parent's peak.
    """
    peak = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert peak is not None
    return int(peak[1]) / 1024


def main() -> None:
    """Read, and print the result."""
    torch.set_num_threads(1)
    dataset = manifest.read(sys.argv[1])
    memory, started = peak_memory(), time.perf_counter()
    images = read_epoch(dataset, world=World(0, int(sys.argv[2])))
    seconds = time.perf_counter() - started
    print(json.dumps({"images": images, "seconds": seconds, "grown_mib": peak_memory() - memory}))


if __name__ == "__main__":
    main()
