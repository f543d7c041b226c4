"""Errors of a GPU: a table of torch's and NCCL's exceptions, and runs that end with some of them."""

from __future__ import annotations

import json
import os
import socket
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Job, arguments, small_run
from models_for_ends import accelerator_error

from distrain import cli
from distrain.distributed import devices, gpu_errors, losses, nccl_variables, rendezvous, runtime
from distrain.environment import Environment, World
from distrain.errors import ConfigError, GpuError

HERE, HOST = "GPU 3 (NVIDIA H100, 5b7c) on node7", socket.gethostname()


def out_of_memory(tried: str, total: str, free: str, allocated: str, process: str) -> torch.OutOfMemoryError:
    """Build torch's error when its allocator gets no memory; `process` is one that uses the GPU."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {tried}. GPU 0 has a total capacity of {total} of which {free} is free."
        f" {process} memory in use. Of the allocated memory {allocated} is allocated by PyTorch, and 120.54 MiB is"
        " reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting …"
    )


def of_nccl(kind: str, last_error: str) -> dist.DistBackendError:
    """Build torch's error for an error of NCCL."""
    return dist.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled error (run with NCCL_DEBUG=INFO for details), NCCL version"
        f" 2.30.7\n{kind}: This usually reflects an error.\nLast error:\n{last_error}"
    )


MEMORY = out_of_memory("1.25 GiB", "93.02 GiB", "1.18 GiB", "90.63 GiB", "this process has 91.82 GiB")
# In a container the process itself is listed by a process ID that it does not know.
IN_CONTAINER = out_of_memory("1.25 GiB", "93.02 GiB", "1.18 GiB", "90.63 GiB", "Process 27 has 91.82 GiB")
TOO_LARGE = out_of_memory("80.00 GiB", "79.10 GiB", "38.00 GiB", "2.00 GiB", "Process 9 has 37.00 GiB")
OF_OTHERS = out_of_memory("512.00 MiB", "79.10 GiB", "7.00 MiB", "900.00 MiB", "Process 9 has 77.00 GiB")
SHARED_MEMORY = (
    "Error while creating shared memory segment /dev/shm/nccl-VPyhzw (size 21823872), error: No space left on device"
    " (28)"
)

TABLE = {
    "memory": (MEMORY, 78, "lower train.micro_batch_size"),
    "memory, in a container": (IN_CONTAINER, 78, "lower train.micro_batch_size"),
    "more memory than there is": (TOO_LARGE, 78, "GPU 0 has a total capacity of 79.10 GiB"),
    "memory that others use": (OF_OTHERS, 75, "other processes use about 77.1 GiB"),
    "memory outside torch": (accelerator_error(2, "out of memory"), 78, "lower train.micro_batch_size"),
    "memory of NCCL": (of_nccl("ncclUnhandledCudaError", "Cuda failure 2 'out of memory'"), 78, "lower train.micro"),
    "memory of an older NCCL": (of_nccl("ncclUnhandledCudaError", "Cuda failure 'out of memory'"), 78, "lower train"),
    "ordinal": (accelerator_error(101, "invalid device ordinal"), 78, "lower --nproc"),
    "no device": (accelerator_error(100, "no CUDA-capable device is detected"), 78, "--gpus"),
    "driver": (accelerator_error(35, "CUDA driver version is insufficient"), 78, "update the NVIDIA driver"),
    "driver, by NCCL": (of_nccl("ncclSystemError", "Insufficient driver: 11040 < 12000"), 78, "update the"),
    "no kernels": (accelerator_error(209, "no kernel image is available"), 78, "no code for this GPU"),
    "duplicate": (
        of_nccl("ncclInvalidUsage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        78, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000; two processes use one GPU",
    ),
    "shared memory": (of_nccl("ncclSystemError", SHARED_MEMORY), 78, "--shm-size"),
    "shared memory of an older NCCL": (
        of_nccl("ncclSystemError", "Error: failed to extend /dev/shm/nccl-UbzKZ9 to 9637892 bytes"), 78, "--shm-size"
    ),
    "ECC": (accelerator_error(214, "uncorrectable ECC error encountered"), 75, "cudaErrorECCUncorrectable"),
    "NVLink": (accelerator_error(220, "uncorrectable NVLink error detected"), 75, "cudaErrorNvlinkUncorrectable"),
    "illegal access": (accelerator_error(700, "an illegal memory access was encountered"), 75, "illegal memory access"),
    "launch": (accelerator_error(719, "unspecified launch failure"), 75, "unspecified launch failure"),
    "unavailable": (accelerator_error(46, "CUDA-capable device(s) is/are busy or unavailable"), 75, "unavailable"),
    "unknown": (accelerator_error(999, "unknown error"), 75, "cudaErrorUnknown"),
    "illegal access, by NCCL": (
        of_nccl("ncclUnhandledCudaError", "Cuda failure 700 'an illegal memory access was encountered'"),
        75, "cudaErrorIllegalAddress",
    ),
    "lost": (of_nccl("ncclSystemError", "nvmlDeviceGetHandleByPciBusId() failed: GPU is lost"), 75, "GPU is lost"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_an_error_of_a_gpu_has_an_exit_code_and_a_cure(name: str) -> None:
    error, code, message = TABLE[name]
    meaning = gpu_errors.explain(error, HERE, "train")
    assert isinstance(meaning, ConfigError | GpuError)
    assert meaning.exit_code == code
    assert str(meaning).startswith(HERE)
    assert message in str(meaning)
    assert "\n" not in str(meaning)


@pytest.mark.parametrize(
    ("phase", "cure"),
    [("train", "train.micro_batch_size"), ("evaluate", "eval.batch_size"), ("predict", "--device cpu")],
)
def test_the_cure_for_too_little_memory_depends_on_the_phase(phase: str, cure: str) -> None:
    assert f"lower {cure}" in str(meaning := gpu_errors.explain(MEMORY, HERE, phase)) or f"use {cure}" in str(meaning)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA out of memory"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("Duplicate GPU detected"),
        MemoryError("out of memory"),
        accelerator_error(710, "device-side assert triggered"),  # a label that is no class: a fault of the program
        accelerator_error(1, "invalid argument"),
        torch.AcceleratorError("CUDA error: out of memory"),  # without a code: not raised by torch
        dist.DistStoreError("Duplicate GPU detected"),
        of_nccl("ncclRemoteError", "socketProgress: Connection closed by remote peer node7<51159>"),
        of_nccl("ncclSystemError", "Error while attaching to shared memory segment /dev/shm/nccl-V: No such file (2)"),
    ],
)
def test_another_error_is_none_of_a_gpu_whatever_it_says(error: Exception) -> None:
    assert gpu_errors.explain(error, HERE, "train") is None


def test_an_error_of_the_own_gpu_is_not_the_loss_of_a_peer() -> None:
    in_torch: dict[str, Any] = {"__name__": "torch.distributed.distributed_c10d"}
    exec("def all_reduce(error): raise error", in_torch)

    def raised(error: Exception) -> Exception:
        with pytest.raises(type(error)) as caught:
            in_torch["all_reduce"](error)
        return caught.value

    remote = of_nccl("ncclRemoteError", "socketProgress: Connection closed by remote peer node7<51159>")
    assert losses.raised_by_collective(raised(remote))
    for name, (error, *_) in TABLE.items():
        assert not losses.raised_by_collective(raised(error)), name


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        (
            "memory",
            78,
            f"distrain: error: cpu on {HOST}: CUDA out of memory. Tried to allocate 20.00 MiB",
        ),
        (
            "ecc",
            75,
            f"distrain: cpu on {HOST} failed (cudaErrorECCUncorrectable, phase train): CUDA error: uncorr",
        ),
        ("text", 1, "ValueError: CUDA out of memory"),
    ],
)
def test_a_run_ends_with_one_message(
    kind: str,
    code: int,
    message: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAULT", f"forward-{kind}:0:8")
    monkeypatch.setattr(runtime, "_broken", [])
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"}, run={"device": "cpu"})
    assert cli.main(["train", *arguments(tree)]) == code
    output = capsys.readouterr().err
    assert message in output
    assert ("Traceback" in output) == (code == 1)
    if kind == "memory":
        assert "lower train.micro_batch_size" in output


@pytest.mark.ranks
def test_a_failed_gpu_of_one_process_ends_all_and_is_named(data: Path, tmp_path: Path) -> None:
    tree = small_run(data, tmp_path / "run", model={"name": "models_for_ends:Ending"}, run={"device": "cpu"})
    job = Job(tree, tmp_path, environ={"FAULT": "forward-ecc:1:8"})
    assert job.launcher.wait(60) == 75, job.output
    assert "distrain: rank 1 failed first" in job.output
    assert "Traceback" not in job.output
    record = json.loads((tmp_path / "run/exit.json").read_text())
    assert record["code"] == 75
    assert record["reason"].startswith(f"cpu on {HOST} failed (cudaErrorECCUncorrectable, phase train)")


def test_nothing_of_nccl_may_abort_a_process() -> None:
    settings, overridden = nccl_variables.choose({"NCCL_DEBUG": "INFO", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}, False)
    assert overridden == []
    assert set(settings.values()) == {"0"}
    assert {"TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"} <= set(
        settings
    )
    assert "TORCH_NCCL_TRACE_BUFFER_SIZE" not in settings


@pytest.mark.parametrize(
    ("value", "is_overridden"),
    [("1", True), ("TRUE", True), ("3", True), ("0", False), ("no", False), ("False", False), ("", False)],
)
def test_variables_of_nccl_that_are_overridden_are_named(value: str, is_overridden: bool) -> None:
    variables = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": value, "TORCH_NCCL_NAN_CHECK": "1"}
    _, overridden = nccl_variables.choose(variables, False)
    expected = f"TORCH_NCCL_ASYNC_ERROR_HANDLING={value} (NCCL's watchdog would abort the process after an error of a"
    assert [line.startswith(expected) for line in overridden] == [True] * is_overridden


def test_what_torchrun_has_set_is_not_reported() -> None:
    variables = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_NCCL_BLOCKING_WAIT": "1"}
    settings, overridden = nccl_variables.choose(variables, True)
    assert settings["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert [line.partition("=")[0] for line in overridden] == ["TORCH_NCCL_BLOCKING_WAIT"]


def test_variables_and_device_are_set_before_the_group_is_created(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The part of `rendezvous.join` for NCCL, on a recording stub of `torch.cuda`."""
    selected: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in nccl_variables.choose({}, False)[0]:
        monkeypatch.setenv(name, "")  # and so removed after this test
    for rank in (0, 3):
        monkeypatch.setenv("TORCH_NCCL_RETHROW_CUDA_ERRORS", "1")
        rendezvous._prepare_nccl(Environment(World(rank, 4), local_rank=rank, local_world_size=4))
        assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert selected == [0, 3]
    (record,) = caplog.records  # of rank 0
    assert record.getMessage().startswith("set to 0, so that errors are reported: TORCH_NCCL_RETHROW_CUDA_ERRORS=1 (")


def test_a_gpu_is_named_by_its_uuid_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="NVIDIA H100", uuid="5b7c")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert devices.describe(torch.device("cuda", 3)) == f"GPU 3 (NVIDIA H100, 5b7c) on {HOST}"
    assert devices.describe(torch.device("cpu")) == f"cpu on {HOST}"
    assert devices.describe(3) == f"GPU 3 on {HOST}"


def test_only_errors_of_a_gpu_are_explained() -> None:
    with pytest.raises(GpuError, match="cudaErrorECCUncorrectable"), gpu_errors.explained(HERE, "predict"):
        raise TABLE["ECC"][0]
    with pytest.raises(ValueError, match="^CUDA out of memory$"), gpu_errors.explained(HERE, "predict"):
        raise ValueError("CUDA out of memory")
