"""Errors of a GPU: which of CUDA's and NCCL's exceptions mean what, what the user can do, and the exit code.

Decided by the exception's type, and by CUDA's error code. Texts are compared only of the types that torch raises for
NCCL, never of others: an error of a model may speak of memory or GPUs too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from distrain.errors import ConfigError, GpuError

_OUT_OF_MEMORY = 2
# Numbers of cudaError_t, in CUDA's driver_types.h; ROCm's hipError_t has the same ones.
_FAILED = {
    46: "cudaErrorDevicesUnavailable",
    53: "cudaErrorPriorLaunchFailure",
    214: "cudaErrorECCUncorrectable",
    220: "cudaErrorNvlinkUncorrectable",
    226: "cudaErrorContained",
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    714: "cudaErrorHardwareStackError",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    718: "cudaErrorInvalidPc",
    719: "cudaErrorLaunchFailure",
    802: "cudaErrorSystemNotReady",
    999: "cudaErrorUnknown",
}
"""The GPU failed, or what ran on it. Not cudaErrorAssert: a kernel refused its input, which is a fault."""

_DRIVER = "update the NVIDIA driver, or install a build of torch for its CUDA version"
_NO_KERNEL = "this build of torch has no code for this GPU: install another one (see torch.cuda.get_arch_list())"
_CURES = {
    35: _DRIVER,  # cudaErrorInsufficientDriver
    100: "CUDA finds no GPU: start the container with --gpus, request GPUs, or set run.device=cpu",  # cudaErrorNoDevice
    101: "there are fewer GPUs than processes here: lower --nproc, or correct CUDA_VISIBLE_DEVICES",  # …InvalidDevice
    209: _NO_KERNEL,  # cudaErrorNoKernelImageForDevice
    222: _DRIVER,  # cudaErrorUnsupportedPtxVersion
    803: _DRIVER,  # cudaErrorSystemDriverMismatch
    804: _DRIVER,  # cudaErrorCompatNotSupportedOnDevice
}
"""Cures of what the user can correct, by code."""

_ONE_GPU_EACH = (
    "two processes use one GPU (or slices of one): start one process for each GPU, and let CUDA_VISIBLE_DEVICES name"
    " each GPU for one job only"
)
_SHARED_MEMORY = (
    "shared memory is full: remove what earlier jobs left in /dev/shm, or give the container more (--shm-size, or an"
    " emptyDir in memory)"
)
_NCCL_CURES = {
    r"Duplicate GPU detected": _ONE_GPU_EACH,
    r"(shared memory|/dev/shm).*No space left on device|failed to extend /dev/shm": _SHARED_MEMORY,
    r"Insufficient driver": _DRIVER,
}
"""Texts of NCCL's errors, as patterns."""
_NCCL_LOST = re.compile(r"GPU is lost|fallen off the bus")
_NCCL_CUDA = re.compile(r"Cuda failure (?:(\d+) )?'([^']*)'")
_CODE_OF_TEXT = {
    "out of memory": _OUT_OF_MEMORY,
    "invalid device ordinal": 101,
    "no CUDA-capable device is detected": 100,
    "CUDA driver version is insufficient for CUDA runtime version": 35,
    "no kernel image is available for execution on the device": 209,
    "CUDA-capable device(s) is/are busy or unavailable": 46,
    "uncorrectable ECC error encountered": 214,
    "an illegal memory access was encountered": 700,
    "unspecified launch failure": 719,
    "unknown error": 999,
}
"""CUDA's codes of errors that NCCL reports without a number."""

_LESS_MEMORY = {
    "evaluate": "lower eval.batch_size",
    "predict": "use --device cpu",
}
_LESS_MEMORY_IN_TRAINING = "lower train.micro_batch_size (null is the whole local batch), or set data.cache=ram or off"

_SIZES = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_CONTEXT_BYTES = 2**30
"""About what CUDA's context, its kernels and NCCL need in a process, besides torch's tensors."""


def explain(error: BaseException, gpu: str, phase: str) -> ConfigError | GpuError | None:
    """Return what an error of a GPU means for the user, or None if it is none. CUDA is not asked: it may hang.

    Args:
        error: any exception.
        gpu: the GPU of this process and its host, for the message.
        phase: what this process did (`worker_status.PHASES`, or predict).

    Returns:
        A `GpuError` (exit code 75) if the GPU failed, or lacks memory that other processes use; a `ConfigError` (78)
        with its cure if the same command would fail again.
    """
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return _memory(text, gpu, phase)
    code = _cuda_code(error)
    if code == _OUT_OF_MEMORY:
        return _memory(text, gpu, phase)
    if code in _CURES:
        return ConfigError(f"{gpu}: {_nccl_reason(text)}; {_CURES[code]}")
    if code in _FAILED or (isinstance(error, dist.DistBackendError) and _NCCL_LOST.search(text)):
        name = f"{_FAILED[code]}, " if code in _FAILED else ""
        return GpuError(
            f"{gpu} failed ({name}phase {phase}): {_nccl_reason(text)}; run it again; if it fails there again, take"
            " this GPU out of service (dmesg has its Xid errors), or look for an error in kernels of your own"
        )
    if isinstance(error, dist.DistBackendError):
        for pattern, cure in _NCCL_CURES.items():
            if re.search(pattern, text):
                return ConfigError(f"{gpu}: {_nccl_reason(text)}; {cure}")
    return None


def is_one(error: BaseException) -> bool:
    """Whether an exception is an error of this process's GPU, not of another process."""
    return explain(error, "", "") is not None


@contextlib.contextmanager
def explained(gpu: str, phase: str) -> Iterator[None]:
    """Run the block; raise what `explain` makes of its error, if anything."""
    try:
        yield
    except Exception as error:
        meaning = explain(error, gpu, phase)
        if meaning is None:
            raise
        raise meaning from error


def _cuda_code(error: BaseException) -> int | None:
    """Return CUDA's code of an exception: torch's own, or the one that NCCL quotes."""
    if isinstance(error, torch.AcceleratorError):
        code = getattr(error, "error_code", None)  # torch sets it where it raises the exception
        return int(code) if code is not None else None
    quoted = _NCCL_CUDA.search(str(error)) if isinstance(error, dist.DistBackendError) else None
    if quoted is None:
        return None
    return int(quoted[1]) if quoted[1] else _CODE_OF_TEXT.get(quoted[2])


def _memory(text: str, gpu: str, phase: str) -> ConfigError | GpuError:
    line = _nccl_reason(text).partition(" Of the allocated memory")[0].rstrip(".")
    others = _used_by_others(text)
    if others is not None:
        return GpuError(
            f"{gpu}: other processes use about {others / 2**30:.1f} GiB of its memory (nvidia-smi lists them), and"
            f" without them it would suffice: {line}; run it again when they have ended"
        )
    cure = _LESS_MEMORY.get(phase, _LESS_MEMORY_IN_TRAINING)
    return ConfigError(f"{gpu}: {line}; {cure}, or end other programs on this GPU (phase {phase})")


def _used_by_others(text: str) -> int | None:
    """Return the bytes that other processes use, if a failed allocation would have succeeded without them.

    From the numbers in torch's message. It may list processes too, but in a container by other process IDs: there even
    this one appears as another.
    """
    number = r"([\d.]+) (bytes|KiB|MiB|GiB)"
    patterns = (
        rf"Tried to allocate {number}",
        rf"total capacity of {number}",
        rf"of which {number} is free",
        rf"memory {number} is allocated by PyTorch",
        rf"and {number} is reserved by PyTorch but unallocated",
    )
    matches = [re.search(pattern, text) for pattern in patterns]
    if not all(matches):
        return None
    needed, total, free, allocated, reserved = (float(m[1]) * _SIZES[m[2]] for m in matches if m)
    others = int(total - free - allocated - reserved - _CONTEXT_BYTES)
    return others if others > _CONTEXT_BYTES and needed <= free + others else None


def _nccl_reason(text: str) -> str:
    """Return the line in which NCCL says what happened; of other errors the first line."""
    return _first_line(text.partition("Last error:")[2].strip() or text)


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:500]
