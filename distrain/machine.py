"""Properties of this machine: processor, memory and software versions."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import re
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_CPU_LIMITS = {
    "/sys/fs/cgroup": ["cpu.max"],
    "/sys/fs/cgroup/cpu": ["cpu.cfs_quota_us", "cpu.cfs_period_us"],
}
"""Files of a control group, of version 2 and 1, with the time that it may use and the period in microseconds."""
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""NVIDIA's variable, which ROCm reads too, and ROCm's."""
_IS_GPU = re.compile(r"\d|GPU-|MIG-")
"""The beginning of a GPU's number, or of the UUID of a GPU or of a slice of one."""
_LIBRARIES = ("distrain", "torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow")


def describe() -> dict[str, Any]:
    """Return system, processor, usable cores and memory in GiB, to be recorded with results."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def cores() -> int:
    """Number of CPU cores that this process may use: those that it may run on, or fewer if its time is limited."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        for root, names in _CPU_LIMITS.items():
            with contextlib.suppress(OSError, ValueError):
                quota, period = " ".join(Path(root, group, name).read_text(encoding="ascii") for name in names).split()
                if int(quota) > 0 and int(period) > 0:
                    count = min(count, max(1, int(quota) // int(period)))
    return count


def _control_groups(controller: str) -> list[str]:
    """Return the paths of this process's control groups: version 2's, and version 1's of a controller."""
    groups = [""]  # a container sees its own group as the root
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()]
        groups += [path.strip("/") for _, names, path in lines if not names or controller in names.split(",")]
    return groups


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that influence the results and the speed of training."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def processor() -> str:
    """Name of the processor."""
    return _cpuinfo("model name") or platform.processor()


def vector_instructions() -> list[str]:
    """Sets of vector instructions of the processor, by which libraries choose their kernels."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "fma", "amx", "asimd", "sve", "bf16")))


def _cpuinfo(name: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def free_memory() -> int:
    """Bytes of memory that are free: on the machine, or in the control group if that has less."""
    free = psutil.virtual_memory().available
    for group in _control_groups("memory"):
        for root, limit, used in (
            ("/sys/fs/cgroup", "memory.max", "memory.current"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                numbers = [int(Path(root, group, name).read_text(encoding="ascii")) for name in (limit, used)]
                free = min(free, numbers[0] - numbers[1])
    return int(free)


def peak_memory() -> int:
    """Bytes of memory that this process has had resident at most, since it began."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    # Not the same on Linux: a process starts with the peak of the one that started it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def nvidia_gpus(folder: Path = Path("/dev")) -> list[Path]:
    """Device files of NVIDIA's GPUs, in the folder of device files."""
    return sorted(folder.glob("nvidia[0-9]*"))


def listed_gpus(variables: Mapping[str, str]) -> int | None:
    """Number of GPUs to which the environment limits a process; None: it does not limit them.

    A list ends at the first name that is none of a GPU: -1, or SLURM's NoDevFiles, make it empty. Of several slices of
    GPUs (MIG), CUDA uses the first one.
    """
    numbers = []
    for name in _VISIBLE_GPUS:
        if name in variables:
            names = [each.strip() for each in variables[name].split(",")]
            listed = list(itertools.takewhile(_IS_GPU.match, names))
            numbers.append(1 if listed and listed[0].startswith("MIG-") else len(listed))
    return min(numbers, default=None)


def gpus(variables: Mapping[str, str], folder: Path = Path("/dev")) -> int:
    """Largest number of GPUs that a process here may see, without asking torch, which takes seconds."""
    # A processor's own graphics has these files too, but only torch for ROCm uses AMD's GPUs.
    has_amd = (folder / "kfd").exists() and "+rocm" in metadata.version("torch")
    amd = list(folder.glob("dri/renderD*")) if has_amd else []
    number, listed = len(nvidia_gpus(folder) or amd), listed_gpus(variables)
    return number if listed is None else min(number, listed)


# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process. Other C libraries have no such setting.

    By default the memory of a step's activations returns to the kernel, and the next step pays for first accesses
    again: a quarter of the step's time with hundreds of images.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum that glibc accepts
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)
