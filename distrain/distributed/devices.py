"""The device of a process: GPU or CPU, and which GPU."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from distrain import machine
from distrain.errors import ConfigError


def on_cpu(device: str, variables: Mapping[str, str], key: str, folder: Path = Path("/dev")) -> bool:
    """Decide whether to compute on the CPU.

    Args:
        device: auto, cpu or cuda.
        variables: the environment.
        key: what sets `device`, as `run.device=` or `--device `, for messages.
        folder: where the device files of GPUs are.

    Raises:
        ConfigError: there is no GPU for `cuda`; or, with `auto`, this machine has GPUs that torch cannot use.
    """
    if device == "cpu":
        return True
    if torch.cuda.is_available():
        return False
    if device == "cuda":
        raise ConfigError(f"{key}cuda: this process sees no GPU; use {key}cpu, or: {cure(torch.version.cuda)}")
    problem = unusable(folder, variables)
    if problem is not None:
        raise ConfigError(f"{problem}; {cure(torch.version.cuda)}; or use the CPU: {key}cpu")
    return True


def unusable(folder: Path, variables: Mapping[str, str]) -> str | None:
    """Return a message if GPUs are here that a process without any was not asked to ignore; else None.

    An empty CUDA_VISIBLE_DEVICES is such a request, or one that CUDA reads as empty (`machine.listed_gpus`).
    """
    files = machine.nvidia_gpus(folder)
    if not files or machine.listed_gpus(variables) == 0:
        return None
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    of_variable = f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
    return f"this machine has GPUs ({', '.join(map(str, files[:8]))}), but torch sees none{of_variable}"


def cure(cuda: str | None) -> str:
    """Return what makes GPUs visible to torch.

    Args:
        cuda: version of CUDA that torch was built for; None: it was built without.
    """
    if cuda is None:
        return "this torch is a build for CPUs: install one for GPUs"
    return (
        f"see that `nvidia-smi` works here, that the driver is new enough for CUDA {cuda} (that of this torch), that a"
        " container was started with --gpus, and that CUDA_VISIBLE_DEVICES names GPUs that exist"
    )


def index(local_rank: int, count: int) -> int:
    """Return the index of a process's GPU.

    Some launchers let each process see its own GPU alone (SLURM's --gpus-per-task): there its index is 0.

    Args:
        local_rank: rank of the process on its node.
        count: number of GPUs that it sees, at least 1.

    Raises:
        ConfigError: there is none for it.
    """
    if local_rank < count:
        return local_rank
    if count == 1:
        return 0
    raise ConfigError(
        f"local rank {local_rank} has no GPU: this process sees {count}; start as many processes as GPUs on each node"
        " (--nproc), correct CUDA_VISIBLE_DEVICES, or set run.device=cpu"
    )


def describe(device: torch.device | int) -> str:
    """Return a device and this host, for messages about failures. Call it while the GPU works.

    An index alone does not name a GPU in a container, or with CUDA_VISIBLE_DEVICES: its UUID does.
    """
    host = socket.gethostname()
    if isinstance(device, int):
        return f"GPU {device} on {host}"
    if device.type != "cuda":
        return f"{device.type} on {host}"
    properties = torch.cuda.get_device_properties(device)
    return f"GPU {torch.cuda.current_device()} ({properties.name}, {properties.uuid}) on {host}"
