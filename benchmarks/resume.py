"""A reader that starts in the middle of an epoch of an index; a program, so that the process is fresh.

    python -m benchmarks.resume INDEX BATCH SIDE

The tar files are removed from the page cache before, as far as the system does that. Prints a JSON object: seconds from
opening the index to the first batch, the mebibytes that were read until then, from the index and from tar files, and
the growth of the peak resident memory in MiB.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.reader import decoded_batches, peak_memory, training_order
from distrain import machine
from distrain.data import manifest


def main() -> None:
    """Read the first batch, and print the result."""
    torch.set_num_threads(1)
    root, batch, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _drop_from_page_cache(root)
    memory, before, started = peak_memory(), _bytes_read(), time.perf_counter()
    dataset = manifest.read(root).with_image_size(side)
    order = training_order(dataset, batch)
    steps = range(order.steps_per_epoch // 2, order.steps_per_epoch)
    with closing(decoded_batches(dataset, batch, steps, machine.cores())) as batches:
        next(batches)
        seconds, read = time.perf_counter() - started, _bytes_read() - before
    print(json.dumps({"seconds": seconds, "read_mib": read / 2**20, "grown_mib": peak_memory() - memory}))


def _drop_from_page_cache(root: Path) -> None:
    dataset = manifest.read(root)
    tars = [Path(dataset.tars) / tar.name for tar in dataset.indexed("train").tars]  # type: ignore[arg-type]
    for path in [*tars, *root.iterdir()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    """Return the bytes that this process has read from files, from the page cache too."""
    read = re.search(r"^rchar: (\d+)$", Path("/proc/self/io").read_text(encoding="ascii"), re.MULTILINE)
    assert read is not None
    return int(read[1])


if __name__ == "__main__":
    main()
