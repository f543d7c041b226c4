"""The kernels with which a process computes, and what decides the last bits of their results."""

from __future__ import annotations

import functools
import operator
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from distrain import machine

NEED_GPU = ("fp16", "tf32")
"""Values of `train.precision` that need a GPU."""

_INSTRUCTIONS = "vector instructions"


def set_numerics(precision: str, deterministic: bool) -> None:
    """Set how GPUs compute. fp32 is fp32: cuDNN's own default is TF32, with 10 bits of mantissa."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    set_deterministic(deterministic)


def set_deterministic(deterministic: bool) -> None:
    """Set whether operations have to give the same bits each time."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it; read at its first use
    torch.use_deterministic_algorithms(deterministic)
    # It would also fill each new tensor with NaN, which takes time, and only helps to find faults of operations.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # kernels chosen by timing differ from run to run


@contextmanager
def numerics_restored() -> Iterator[None]:
    """Restore, after the block, what `set_numerics` sets in this process."""
    settings = [
        (torch.backends.cuda.matmul, _tf32_setting(torch.backends.cuda.matmul)),
        (torch.backends.cudnn, _tf32_setting(torch.backends.cudnn)),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ]
    before = [getattr(owner, name) for owner, name in settings]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _tf32_setting(backend: Any) -> str:
    """Return the name of the setting of TF32 that can be read: torch has an old and a new one, and refuses both."""
    try:
        _ = backend.allow_tf32
    except RuntimeError:
        return "fp32_precision"
    return "allow_tf32"


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run the block with torch's defaults, whatever the caller has set: they would change the result, or prevent it.

    After it the settings of the process, its number of CPU threads and its random generators are as before.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(numerics_restored())
        stack.enter_context(_generators_restored())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Restore, after the block, the generators of the CPU that `seed_cpu` seeds."""
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass in mixed precision, as accelerate makes it; without effect for others."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, low, enabled=low is not None)


def layer_seed(seed: int, step: int, rank: int) -> int:
    """Seed for layers that draw random numbers in a step, so that they draw the same after a resume.

    Args:
        seed: of the run.
        step: of the run.
        rank: virtual rank, or process.
    """
    # Odd factors: no two steps or ranks of a run have the same seed. torch's CPU generator takes the low 32 bits.
    return (seed + step * 2654435761 + rank * 40503) % 2**63


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the device's generator. `torch.manual_seed` would keep a stack trace for CUDA at every call."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed the generators of the CPU: torch's, Python's and numpy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def seed_all(device: torch.device, seed: int) -> None:
    """Seed every generator that a model may draw from: the device's and those of the CPU."""
    seed_device(device, seed)
    seed_cpu(seed)


def what_decides_bits(device: torch.device) -> dict[str, str]:
    """Return what decides the last bits of a result, besides the configuration: software, processor or GPU, threads."""
    libraries = torch.__config__.show()
    deciding = {
        "torch": torch.__version__,
        "oneDNN": _version(libraries, r"MKL-DNN v(\S+)"),
        "MKL": _version(libraries, r"Math Kernel Library Version (\S+)"),
        "processor": machine.processor(),
        _INSTRUCTIONS: " ".join(machine.vector_instructions()),
        "torch's CPU kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        deciding |= {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return deciding


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return the name and both values of what differs between two results of `what_decides_bits`, for messages."""
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return [(name, _lacking(one, other, name), _lacking(other, one, name)) for name in names]


def unlike_ranks(by_rank: Sequence[Mapping[str, str]]) -> dict[int, str]:
    """Return the ranks where something else than on rank 0 decides the bits, with what differs, as text."""
    first, *others = by_rank
    changes = {rank: differences(first, other) for rank, other in enumerate(others, 1)}
    return {
        rank: "; ".join(f"{name} {theirs}, on rank 0 {ours}" for name, ours, theirs in of_rank)
        for rank, of_rank in changes.items()
        if of_rank
    }


def sum_in_order(values: Iterable[float]) -> float:
    """Add numbers from the first to the last. `sum` adds in another way from Python 3.12 on."""
    return functools.reduce(operator.add, values)


def _lacking(of: Mapping[str, str], other: Mapping[str, str], name: str) -> str:
    """Return a value; of the list of instructions only those that the other one lacks."""
    value, theirs = of.get(name, ""), other.get(name, "").split()
    if name == _INSTRUCTIONS:
        value = " ".join(each for each in value.split() if each not in theirs)
    return value or "none"


def _version(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else "none"
