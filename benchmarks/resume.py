"""`distrain.batches` from the middle of an epoch; a program, so that the process is fresh.

    python -m benchmarks.resume DATA BATCH SIDE

DATA is an index, or has blocks (SIDE 0). Its files are removed from the page cache before, as far as the system does
that. Prints a JSON object: seconds from the call to the first batch, the mebibytes that were read until then, and the
growth of the peak resident memory in MiB.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import torch

import distrain
from benchmarks.reader import peak_memory
from distrain.data import manifest
from distrain.data.manifest import Split


def main() -> None:
    """Read the first batch, and print the result."""
    torch.set_num_threads(1)
    root, batch, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole_epoch = distrain.open_data(root).steps(range(1), batch)
    steps = whole_epoch[len(whole_epoch) // 2 :]
    size, scale = (side, (0.08, 1)) if side else (None, None)
    read_batches = distrain.batches  # imported here
    _drop_from_page_cache(root)
    memory, before, started = peak_memory(), _bytes_read(), time.perf_counter()
    with read_batches(root, global_batch_size=batch, steps=steps, image_size=size, crop_scale=scale) as batches:
        next(batches)
        seconds, read = time.perf_counter() - started, _bytes_read() - before
    print(json.dumps({"seconds": seconds, "read_mib": read / 2**20, "grown_mib": peak_memory() - memory}))


def _drop_from_page_cache(root: Path) -> None:
    dataset = manifest.read(root)
    split = dataset.split("train")
    shards = split.shards if isinstance(split, Split) else split.tars
    paths = [Path(dataset.tars) / shard.name for shard in shards]  # type: ignore[arg-type]
    for path in [*paths, *filter(Path.is_file, root.iterdir())]:
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
