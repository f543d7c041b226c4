"""One process that reads an epoch of the first rank's share, and says what it cost.

    python -m distrain.bench.reader DATA PROCESSES

Prints a line of JSON: images, seconds, and by how many MiB its resident memory grew at most.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch

from distrain import manifest
from distrain.bench.reading import read
from distrain.order import World


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
