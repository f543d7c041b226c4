"""Checks of what computes: the device, its memory, the compiler, and real steps of training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distrain.config import Config
from distrain.data import cache
from distrain.data.rounds import Batch
from distrain.distributed import devices
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment, World
from distrain.errors import UserError
from distrain.text import plural
from distrain.tools.doctor.finding import Finding, Level
from distrain.training import optimizer_state
from distrain.training.job import Job
from distrain.training.profiling import Profile
from distrain.training.setup import set_up
from distrain.training.step import TrainingStep

_STEPS = 2
"""Steps that are tried: the first one also prepares kernels and memory."""
_RESERVE = 0.1
"""Fraction of the free GPU memory that a step should not need: evaluation and NCCL need some, and it is fragmented."""
_GIB = 2**30


@dataclass(frozen=True)
class GpuFacts:
    """Facts on the GPU of a process; empty texts are unknown.

    Attributes:
        model: name of the GPU.
        driver: version of NVIDIA's driver.
        nccl: version of NCCL.
        compute_mode: Default, Exclusive_Process or Prohibited.
    """

    model: str
    driver: str = ""
    nccl: str = ""
    compute_mode: str = ""


# --- one process, on its node ---


def device(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the device that this process would use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    unusable = devices.unusable(Path("/dev"), os.environ)
    yield check_device(config.run.device, names, environment.local_world_size, unusable)


def check_device(requested: str, names: Sequence[str], processes: int, unusable: str | None) -> Finding:
    """Check whether each process has a device.

    Args:
        requested: `run.device`.
        names: name of each GPU that this process sees.
        processes: number of processes on this node.
        unusable: message on GPUs that are here and that torch does not see, if any.
    """
    cure = f"{devices.cure(torch.version.cuda)}; or set run.device=cpu"
    if requested == "cpu" or not (names or requested == "cuda" or unusable):
        return Finding("device", "ok", "CPU")
    if not names:
        return Finding("device", "bad", unusable or "run.device=cuda, but no GPU is seen", cure)
    # A process that sees one GPU may be the only one that sees it: if not, NCCL says so when the processes connect.
    if 1 < len(names) < processes:
        message = f"{plural(len(names), 'GPU')} for {plural(processes, 'process')}"
        return Finding("device", "bad", message, "start as many processes as there are GPUs")
    return Finding("device", "ok", f"{plural(len(names), 'GPU')}: {', '.join(sorted(set(names)))}")


def compiler(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check that the compiler that `train.compile` needs is installed; a step is compiled later."""
    if config.train.compile != "off":
        on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
        yield check_compiler(on_cpu, os.environ, Path(sysconfig.get_path("include")))


def check_compiler(on_cpu: bool, variables: Mapping[str, str], include: Path) -> Finding:
    """Check the compiler: inductor compiles C++ for CPUs, Triton compiles C to start its kernels on GPUs.

    Args:
        on_cpu: whether the run computes on the CPU.
        variables: the environment; its PATH is searched.
        include: folder of Python's header files.
    """
    variable, usual = ("CXX", ["g++"]) if on_cpu else ("CC", ["gcc", "clang"])
    names = [variables[variable]] if variables.get(variable) else usual
    paths = [path for name in names if (path := shutil.which(name, path=variables.get("PATH")))]
    cure = "install g++ and Python's header files (Debian: apt install g++ python3-dev), or set train.compile=off"
    if not paths:
        return Finding("compiler", "bad", f"train.compile is on, but no {' or '.join(names)} is installed", cure)
    if not (include / "Python.h").is_file():
        return Finding("compiler", "bad", f"{include} has no Python.h, which compiled code includes", cure)
    return Finding("compiler", "ok", paths[0])


# --- all processes ---


def gpus(rt: Runtime) -> Iterator[Finding]:
    """Compare the GPUs, drivers and NCCL of all processes."""
    facts = _gpu_facts(rt.device) if rt.device.type == "cuda" else None
    by_rank = [each for each in rt.collectives.from_all(facts) if each is not None]
    if by_rank:
        yield from compare_gpus(by_rank)


def compare_gpus(by_rank: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Compare the facts on the GPU of each rank with those of rank 0."""
    first = by_rank[0]
    compared: tuple[tuple[str, Level, str], ...] = (
        ("model", "note", "all wait for the slowest, and the last bits depend on the GPU; use equal nodes"),
        ("driver", "note", "install the same driver on all nodes"),
        ("nccl", "bad", "install the same torch on all nodes, or use one container image: NCCL refuses to connect"),
    )
    differs = False
    for name, level, cure in compared:
        here = getattr(first, name)
        others = {rank: value for rank, each in enumerate(by_rank) if (value := getattr(each, name)) != here}
        if others:
            differs = True
            lines = "; ".join(f"rank {rank} has {value or 'unknown'}" for rank, value in list(others.items())[:4])
            yield Finding("GPUs", level, f"{name} {here or 'unknown'} on rank 0, but {lines}", cure)
    for rank, each in enumerate(by_rank):
        if each.compute_mode == "Prohibited":
            cure = "`nvidia-smi --compute-mode=DEFAULT` (root), or another GPU"
            yield Finding("GPUs", "bad", f"rank {rank}: compute mode Prohibited: no process may use this GPU", cure)
    modes = {each.compute_mode for each in by_rank}
    if "Exclusive_Process" in modes:
        cure = "see that only one process of one job is started for each GPU; NVIDIA's default mode is DEFAULT"
        yield Finding("GPUs", "note", "compute mode Exclusive_Process: a GPU refuses a second process", cure)
    if not differs:
        names = [f"{len(by_rank)} × {first.model}", first.driver and f"driver {first.driver}", f"NCCL {first.nccl}"]
        yield Finding("GPUs", "ok", ", ".join(filter(None, names)))


def _gpu_facts(device: torch.device) -> GpuFacts:
    properties = torch.cuda.get_device_properties(device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    query = "--query-gpu=driver_version,compute_mode"
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", query, "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        driver, mode = output.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):  # ROCm, a slice of a GPU, or no nvidia-smi here
        driver = mode = ""
    return GpuFacts(properties.name, driver, nccl, mode)


def steps(config: Config, rt: Runtime) -> Iterator[Finding]:
    """Set up the run as `train` does, and train steps at the real sizes on random pixels; no run is written.

    With `train.compile` they are compiled.

    Raises:
        UserError, GpuError: this process cannot; the others wait for it, and get the reason when it ends.
    """
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() if rt.device.type == "cuda" else 0
    try:
        job = set_up(config, time.monotonic(), rt)
    except UserError as error:
        if rt.world.size > 1 and rt.collectives.needs_record(error):
            raise
        yield Finding("steps", "bad", str(error))
        return
    step, batches = TrainingStep(job, Profile(rt.device)), [_batch(job, rank) for rank in job.virtual_ranks]
    for _ in range(_STEPS):
        started = time.monotonic()
        step(0, batches).sums.tolist()  # waits for the device
        rt.watchdog.heartbeat()
    seconds = time.monotonic() - started
    images = sum(len(batch.labels) for batch in batches)
    number = plural(job.accumulation_steps * len(batches), "pass")
    compiled = f", compiled ({config.train.compile})" if config.train.compile != "off" else ""
    message = f"{images} images in {number} a process: {1000 * seconds:,.0f} ms{compiled}"
    yield Finding("steps", "ok", message)
    if rt.device.type == "cuda":
        yield check_gpu_memory(free, torch.cuda.max_memory_reserved(), memory_use(job))


def _batch(job: Job, rank: World) -> Batch:
    """Return a local batch of step 0 with random pixels, as large as the real one."""
    size, device = job.order.owned_before(job.order.global_batch_size, rank), job.runtime.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, *job.dataset.image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(job.dataset.manifest.classes), (size,), generator=generator)
    bits = torch.randint(2**62, (size, 2), generator=generator)
    numbers = torch.arange(size).numpy()
    return Batch(images.to(device), labels.to(device), numbers, numbers, bits.to(device))


def memory_use(job: Job) -> dict[str, int]:
    """Return the bytes on the device of each part of a run that has trained a step, without activations."""
    model = job.model
    parameters = list(model.module.parameters())
    ema = [] if model.ema is None else [*model.ema.module.parameters(), *model.ema.module.buffers()]
    on_device = job.cache is not None and job.cache.device.type == "cuda"
    return {
        "weights": _bytes([*parameters, *model.module.buffers()]),
        "gradients": _bytes([parameter for parameter in parameters if parameter.requires_grad]),
        "optimizer": optimizer_state.bytes_on(model.optimizer, job.runtime.device),
        "EMA": _bytes(ema),
        "cache": cache.size(job.dataset) if on_device else 0,
    }


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_gpu_memory(free: int, peak: int, parts: Mapping[str, int]) -> Finding:
    """Compare the GPU memory that steps needed with what was free before.

    Args:
        free: bytes that were free, with those that this process had reserved.
        peak: most bytes that torch reserved.
        parts: bytes of each part of the run; the rest of `peak` is for activations.
    """
    rest = max(peak - sum(parts.values()), 0)
    named = ", ".join(f"{name} {size / _GIB:,.2f}" for name, size in {**parts, "activations": rest}.items() if size)
    return Finding(
        "GPU memory",
        "ok" if peak <= (1 - _RESERVE) * free else "note",
        f"{free / _GIB:,.1f} GiB free, {peak / _GIB:,.2f} needed: {named}",
        "lower train.micro_batch_size, set data.cache=ram, or end other programs on this GPU",
    )
