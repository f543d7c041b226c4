"""An epoch read through distrain; as a program, a process that reads the first rank's share and says what it cost.

    python -m distrain.tools.bench.reader DATA PROCESSES

Prints a line of JSON: images, seconds, and by how many MiB its resident memory grew at most.
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
from distrain.data.manifest import Dataset
from distrain.data.order import Order, World
from distrain.data.stream import TrainingBatches

BATCH = 512


def order_of(dataset: Dataset, batch: int) -> Order:
    """The order of training on a data set."""
    split = dataset.split("train")
    return Order(len(split.shards), split.lanes, min(shard.samples for shard in split.shards), batch, seed=0)


def read(dataset: Dataset, epoch: int, held: Cache | None, world: World | None = None) -> int:
    """Images in the batches of one epoch."""
    order = order_of(dataset, BATCH)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = TrainingBatches(
        dataset, order, world or World(), steps, read_ahead=1, with_random_bits=False, pin=False, cache=held
    )
    with closing(batches):
        return sum(len(batch.labels) for batch in batches)


def peak() -> float:
    """Most MiB that were resident since this program began.

    Not `getrusage`: on Linux `ru_maxrss` outlives exec, so a small process of a large parent shows its parent's.
    """
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    """Read, and print."""
    torch.set_num_threads(1)
    dataset = manifest.read(sys.argv[1])
    before, started = peak(), time.perf_counter()
    images = read(dataset, 0, None, World(0, int(sys.argv[2])))
    print(json.dumps({"images": images, "seconds": time.perf_counter() - started, "grown_mib": peak() - before}))


if __name__ == "__main__":
    main()
