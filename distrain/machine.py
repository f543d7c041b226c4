"""What this machine has, as far as the processes here may use it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil


def free_memory() -> int:
    """Bytes that the processes here may still use: the machine's, or what is left to their control group."""
    free = psutil.virtual_memory().available
    groups = [""]  # a container sees its own group as the root
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        groups += [line.split(":", 2)[2].strip("/") for line in lines if line.split(":")[1] in ("", "memory")]
    for group in groups:
        for root, limit, used in (
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                numbers = [int(Path(root, group, name).read_text(encoding="ascii")) for name in (limit, used)]
                free = min(free, numbers[0] - numbers[1])
    return int(free)


def processes_here() -> int:
    """Processes of the run on this machine, as the launcher says; 1 where there is none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
