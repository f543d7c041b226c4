"""What this machine has, as far as the processes here may use it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = ("distrain", "torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow")


def describe() -> dict[str, Any]:
    """System, processor, cores that this process may use, memory in GiB: for records of what was measured."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python and of what decides what is trained, and how fast."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


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


# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. By default a step's activations go back to the kernel and are touched anew in the
    next one: a quarter of the step, at hundreds of images. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)
