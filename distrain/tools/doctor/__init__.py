"""`distrain doctor`: find the problems that would end a job or make it slow, before it is started.

Each process checks its own node; then all join a process group, check what they share, and train two steps. No file is
left on disk, but what torch caches of a model that it compiles.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from distrain import address, console, files, machine, models, plugins, signals
from distrain.config import Config
from distrain.data import fetch
from distrain.data.encoded import Stretches
from distrain.data.manifest import Dataset
from distrain.data.rounds import read_shard
from distrain.distributed.numerics import seed_cpu, unlike_ranks
from distrain.distributed.runtime import Runtime
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment, World
from distrain.errors import AgainError, ConfigError, DataError, GpuError, PeerLostError, Stopped, UserError
from distrain.models.batch_norm import Buffers
from distrain.models.repeatable import check_repeatable
from distrain.runs.mirror import open_mirror
from distrain.runs.trackers import check_installed
from distrain.text import plural
from distrain.tools.doctor import computing
from distrain.tools.doctor.finding import Finding, Level
from distrain.training import initial_weights, inputs, optim, optimizer_state, parameter_groups
from distrain.training.checkpointing import os_error_of
from distrain.training.model_setup import build_model
from distrain.training.setup import start_runtime, start_watchdog
from distrain.worker_status import StatusWriter, WorkerStatus, read_status

_PROBE_BYTES = 16 * 2**20
_NAME_LENGTH = 128
"""Length of the longest names of a run's files: those of TensorBoard contain the name of the host."""
_BASE_BYTES = 2**30
"""Memory of a process that has imported torch, without data."""
_COMPILE_SECONDS = 600
"""Longest wait for the first step, which may be compiled."""
_SHM = Path("/dev/shm")  # noqa: S108 - only its size is read
_SHM_BYTES = 64 * 2**20
"""Shared memory that NCCL needs in each process; a container has this much in all by default."""


def examine(config: Config, environment: Environment) -> None:
    """Run all checks, under any launcher, and print the findings.

    Raises:
        ConfigError: on all processes, if there is a problem that would end a job.
    """
    local = check_node(config, environment)
    has_problem = any(finding.level == "bad" for finding in local)
    if environment.is_main or (environment.local_rank == 0 and has_problem):
        # Printed before the process waits for the others, which may never come.
        _print(f"{socket.gethostname()}:", local)
    with (
        signals.recorded(),
        closing(start_watchdog(_patient(config), environment)) as watchdog,
        _join(config, environment, watchdog) as rt,
    ):
        try:
            problems = _examine_group(config, rt, local)
        except PeerLostError as error:
            raise ConfigError(
                f"doctor: {error}\n  → if the system has killed that process, it lacked memory: request more, or lower"
                " train.micro_batch_size"
            ) from error
    if problems:
        raise ConfigError(f"doctor: number of problems: {problems}; see above")
    if rt.is_main:
        console.show("no problem found that would end a job")


def _join(config: Config, environment: Environment, watchdog: Watchdog) -> Runtime:
    try:
        return start_runtime(config, environment, watchdog)
    except (GpuError, Stopped):
        raise
    except AgainError as error:
        raise ConfigError(
            f"doctor: the rendezvous failed: {error}\n  → check that all nodes were started, can connect to the first"
            " node's port, and have the same --nodes and --nproc"
        ) from error


def _examine_group(config: Config, rt: Runtime, local: list[Finding]) -> int:
    """Check what the processes share and, if nothing is wrong, train steps; return the number of problems."""
    rt.watchdog.enter("train")
    problems = _report(rt, _check_group(config, rt), rt.collectives.from_all(local))
    if not problems:
        rt.watchdog.enter("first step")
        if rt.is_main:
            console.show("trying two steps of training at the real sizes …")
        tried = rt.collectives.from_all(list(computing.steps(config, rt)))
        problems = _report(rt, tried[0], tried)
    return problems


def _patient(config: Config) -> Config:
    """Return the configuration with enough time for the watchdog to compile a model."""
    seconds = max(config.timeouts.start_seconds, _COMPILE_SECONDS)
    timeouts = config.timeouts.model_copy(update={"start_seconds": seconds})
    return config.model_copy(update={"timeouts": timeouts})


def _report(rt: Runtime, shared: list[Finding], by_rank: list[list[Finding]]) -> int:
    """Print, on rank 0, what is shared and what other ranks report beyond it; return the number of problems."""
    if rt.is_main:
        _print("all processes:", shared)
        printed = set(by_rank[0])
        for rank, findings in enumerate(by_rank):
            _print(f"rank {rank}:", [each for each in findings if each.level != "ok" and each not in printed])
            printed.update(findings)
    return len({each for findings in [*by_rank, shared] for each in findings if each.level == "bad"})


def check_node(config: Config, environment: Environment) -> list[Finding]:
    """Run the checks of one process, which concern its node."""
    return [finding for check in _NODE_CHECKS for finding in check(config, environment)]


def _print(title: str, findings: list[Finding]) -> None:
    if findings:
        console.show("\n".join([title, *(finding.line for finding in findings)]))


# --- one process, on its node ---


def versions(config: Config, environment: Environment) -> Iterator[Finding]:
    """Report the versions of Python and of the main packages."""
    names = ("torch", "torchvision", "accelerate", "webdataset")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {packages}")


def extras(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the optional packages that the configuration needs."""
    names = [*(["tensorboard"] if config.log.tensorboard else []), *config.log.trackers]
    if names:
        try:
            check_installed(config.log)
        except ConfigError as error:
            yield Finding("extras", "bad", str(error))
        else:
            yield Finding("extras", "ok", ", ".join(names))


def cores(config: Config, environment: Environment) -> Iterator[Finding]:
    """Compare the cores that this node's processes may use with their threads."""
    available = machine.cores()
    processes, threads = environment.local_world_size, config.run.cpu_threads
    needed = processes * threads
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    level: Level = "ok"
    cure = ""
    if available < needed:
        level, cure = "note", "request more cores (--cpus-per-task, requests.cpu), or use fewer threads"
    elif on_cpu and available >= 2 * needed:
        level, cure = "note", "use the others too: start more processes (--nproc), or set run.cpu_threads"
    message = f"{available} usable, {needed} used: {processes} × run.cpu_threads={threads}"
    yield Finding("cores", level, message, cure)


def temporary_folder(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the folder of temporary files, where `distrain launch` maps the status of its workers."""
    try:
        with tempfile.TemporaryDirectory(prefix="distrain-doctor-") as folder:
            StatusWriter(Path(folder), 0).write(WorkerStatus(step=1))
            works = read_status(Path(folder), 0).step == 1
            message = f"{tempfile.gettempdir()}: {'write, map' if works else 'files cannot be written or mapped'}"
    except OSError as error:
        works, message = False, str(error.strerror)
    cure = "make room there, or set TMPDIR to another folder of this node; `distrain launch` needs it"
    yield Finding("temporary", "ok" if works else "note", message, cure)


def cache_folder(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the folder that caches the shards of a remote data set; without it they are fetched at every use."""
    locations = (config.data.dir, config.data.tars or "")
    if not any(map(address.scheme, locations)) or not config.data.cache_gib:
        return
    try:
        folder = _nearest(fetch.cache_folder(config.data.cache_dir))
        with _probe(folder) as probe:
            files.write(probe / "file", b"text")
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        yield Finding("cache", "note", f"shards cannot be cached: {reason}", "set data.cache_dir to another folder")
        return
    free, limit = shutil.disk_usage(folder).free / 2**30, config.data.cache_gib
    cure = "lower data.cache_gib, or set data.cache_dir to a folder with more space"
    level: Level = "ok" if free >= limit else "note"
    yield Finding("cache", level, f"{folder}: {free:,.1f} GiB free, data.cache_gib={limit:g}", cure)


def open_files(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the limit of open files: connections to all other processes, shards, libraries."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 6 * environment.world.size
    level: Level = "ok" if limit >= needed or limit == resource.RLIM_INFINITY else "bad"
    yield Finding("open files", level, f"{limit} allowed, {needed} needed", f"raise the limit: ulimit -n {needed}")


def shared_memory(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the free shared memory, which NCCL uses; processes on CPUs do not."""
    if not _SHM.is_dir():
        return
    free = shutil.disk_usage(_SHM).free
    needed = _SHM_BYTES * environment.local_world_size
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    level: Level = "ok" if free >= needed else "note" if on_cpu else "bad"
    yield Finding(
        str(_SHM),
        level,
        f"{free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} needed by NCCL",
        "give the container more: --shm-size, or an emptyDir in memory",
    )


def data(config: Config, environment: Environment) -> Iterator[Finding]:
    """Check the data set as this node sees it, the speed of reading, and the memory that reading needs."""
    try:
        dataset = inputs.read_data(config, "train", "test")
    except (UserError, AgainError) as error:
        yield Finding("data", "bad", str(error), "set data.dir to a folder that all nodes see")
        return
    start, manifest = time.monotonic(), dataset.manifest
    try:
        size = _read_a_shard(dataset)
    except (UserError, AgainError) as error:
        yield Finding("data", "bad", str(error), "`distrain verify` checks all shards")
        return
    rate = size / max(time.monotonic() - start, 1e-6) / 2**20
    yield Finding("data", "ok", f"{dataset.root}: {manifest.splits['train'].samples:,} samples, {rate:,.0f} MiB/s")
    size, local = environment.world.size, environment.local_world_size
    try:
        order = inputs.make_order(config, dataset, size)
    except UserError as error:
        yield Finding("processes", "bad", str(error))
        return
    cached = config.data.cache == "ram"  # auto uses only memory that is free
    needed = local * (
        _BASE_BYTES
        + max(
            inputs.memory(
                config,
                dataset,
                order,
                World(rank, size).virtual_ranks(config.train.virtual_ranks),
                cached,
                pinned=config.run.device != "cpu" and torch.cuda.is_available(),
            )
            for rank in (0, size - 1)
        )
    )
    free = machine.free_memory()
    level: Level = "ok" if needed <= free else "bad"
    yield Finding(
        "memory",
        level,
        f"{free / 2**30:,.1f} GiB, {needed / 2**30:,.1f} needed by {plural(local, 'process')} here",
        "lower data.read_ahead, set data.cache=auto, prepare with more --shards, or request more memory",
    )


def model_and_run_folder(config: Config, environment: Environment) -> Iterator[Finding]:
    """Try the model on black images, write to the run's folder, and compare the time of a checkpoint with the grace."""
    if environment.local_rank:
        return  # only one process of a run writes checkpoints: more at a time would be slower
    if environment.is_main:
        yield from _mirror(config)
    size = None
    with contextlib.suppress(DataError):  # `data` has reported it
        try:
            module = _try_model(config)
        except (ConfigError, AgainError) as error:
            yield Finding("model", "bad", str(error))
        else:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            yield Finding("model", "ok", f"{config.model.name}: {parameters:,} parameters, all with a gradient")
            size = yield from _checkpoint_size(config, module)
    speed = yield from _run_folder(config)
    if size is not None and speed is not None:
        yield _space(config, size)
        yield _grace(config, size, speed)


def _read_a_shard(dataset: Dataset) -> int:
    """Read the first shard of train; return its bytes."""
    if dataset.is_index:
        stretch = Stretches(dataset, "train", threading.Event()).read(0)
        return sum(map(len, stretch.images))
    shard = dataset.blocks("train").shards[0]
    read_shard(dataset, shard, threading.Event())
    return shard.bytes


def _try_model(config: Config) -> nn.Module:
    dataset = inputs.read_data(config)
    height, width, channels = dataset.image_shape
    module = build_model(config, dataset, torch.float32)
    parameter_groups.check(module, config.train.lr_scale, len(dataset.manifest.classes))
    parameter_groups.freeze(module, config.train.lr_scale)
    mean, std = inputs.normalization(config, dataset)
    initial_weights.load(config.model, module, dataset.manifest.classes, dataset.image_shape, mean, std)
    virtual = config.train.virtual_ranks is not None
    buffers, images = Buffers(module) if virtual else None, torch.zeros(2, channels, height, width)
    with plugins.user_code(f"model.name={config.model.name}: fails in training"):
        module(images).sum().backward()
    models.check_gradients(config.model.name, module)
    if buffers is not None:
        buffers.observe(1)
        check_repeatable(module, module, buffers, images, lambda: seed_cpu(0))
    return module


def _run_folder(config: Config) -> Generator[Finding, None, float | None]:
    """Try all that a run does in its folder; return bytes per second, or None if something fails."""
    folder = _nearest(Path(config.run.dir))
    action = "make a folder"
    try:
        with _probe(folder) as probe:
            action, start = "write and sync a file", time.monotonic()
            content = os.urandom(_PROBE_BYTES)
            files.write(probe / "file", content)
            seconds = time.monotonic() - start
            action = "read what was written"
            if files.read(probe / "file", _PROBE_BYTES) != content:
                raise OSError(errno.EIO, "it has changed")
            for action, attempt in _ACTIONS.items():  # noqa: B007 - the failed action is named below
                attempt(probe)
            action = "sync a folder"
            syncs = files.sync(probe)
            action = "remove a folder"
    except OSError as error:
        yield Finding(
            "run folder",
            "bad",
            f"{folder}: cannot {action}: {error.strerror}",
            "choose a run.dir that this user may write to, on a file system that supports rename and link",
        )
        return None
    speed = _PROBE_BYTES / max(seconds, 1e-6)
    yield Finding("run folder", "ok", f"{folder}: all that a run does works; {speed / 2**20:,.0f} MiB/s")
    if not syncs:
        yield Finding(
            "run folder",
            "note",
            f"{folder}: its file system cannot sync folders, which is passed over",
            "if the machine itself fails, the newest checkpoint may be lost; another file system is safer",
        )
    return speed


def _mirror(config: Config) -> Iterator[Finding]:
    """Check that a test object can be created in the run's mirror once, listed, read and deleted."""
    try:
        mirror = open_mirror(config, threading.Event())
        if mirror is not None:
            mirror.try_out()
            yield Finding("mirror", "ok", f"{mirror}: conditional writes, lists, reads and deletes work")
    except (UserError, AgainError) as error:
        yield Finding("mirror", "bad", str(error))


def _replace_file(probe: Path) -> None:
    files.replace(probe / "replaced", "old")
    files.replace(probe / "replaced", "new")


def _rename_folder(probe: Path) -> None:
    (probe / ".partial-step").mkdir()
    files.write(probe / ".partial-step/file", b"text")
    (probe / ".partial-step").rename(probe / "step")


def _append_and_cut(probe: Path) -> None:
    descriptor = os.open(probe / "file", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, b"text")
        os.ftruncate(descriptor, 1)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ACTIONS: dict[str, Callable[[Path], object]] = {
    "replace a file by a rename": _replace_file,
    "rename a folder": _rename_folder,  # a checkpoint
    "link a file": lambda probe: os.link(probe / "file", probe / "link"),  # a lease
    "append to a file and cut it": _append_and_cut,  # metrics
    f"write a file whose name has {_NAME_LENGTH} bytes": lambda probe: files.write(probe / ("x" * _NAME_LENGTH), b""),
}
"""Actions of a run in its folder, besides writing and syncing files; each is tried in a test folder."""


def _checkpoint_size(config: Config, module: nn.Module) -> Generator[Finding, None, int | None]:
    """Return the bytes of a checkpoint, or None if the optimizer fails: a step shows what state it has.

    Args:
        config: the configuration.
        module: the model, with gradients.
    """
    try:
        optimizer = optim.build(config.train, module)
        with plugins.user_code(f"train.optimizer={config.train.optimizer}: fails in a step"):
            optimizer.step()
    except ConfigError as error:
        yield Finding("optimizer", "bad", str(error))
        return None
    weights = [*module.parameters(), *module.buffers()] * (1 if config.train.ema_decay is None else 2)
    tensors = [*weights, *optimizer_state.state_tensors(optimizer, module).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _space(config: Config, size: int) -> Finding:
    """Compare the free space with the checkpoints that are kept, and the one that is written beside them."""
    folder = _nearest(Path(config.run.dir))
    free, count = shutil.disk_usage(folder).free, (config.checkpoint.keep or 1) + 2
    return Finding(
        "disk space",
        "bad" if free < size else "note" if free < count * size else "ok",
        f"{free / 2**20:,.0f} MiB free; {count} checkpoints need {count * size / 2**20:,.0f} MiB",
        "make room, choose another run.dir, or lower checkpoint.keep",
    )


def _grace(config: Config, size: int, speed: float) -> Finding:
    """Compare the time that a checkpoint takes with the time that a stop request leaves for it."""
    seconds, grace = size / speed, config.launch.grace_seconds
    return Finding(
        "grace",
        "ok" if 2 * seconds <= grace else "bad",
        f"{grace} s after a stop request; a checkpoint of {size / 2**20:,.0f} MiB takes {seconds:.1f} s",
        "raise launch.grace_seconds, and the scheduler's own (--signal, terminationGracePeriodSeconds) above it",
    )


_NODE_CHECKS: list[Callable[[Config, Environment], Iterator[Finding]]] = [
    versions,
    extras,
    computing.device,
    computing.compiler,
    cores,
    open_files,
    shared_memory,
    temporary_folder,
    cache_folder,
    data,
    model_and_run_folder,
]


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest parent that exists: a check creates no folders."""
    folder = folder.absolute()
    while not folder.is_dir() and folder.parent != folder and not folder.exists():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """Make a test folder, which is removed at the end.

    Raises:
        OSError: it cannot be made or removed.
    """
    path = folder / f".distrain-doctor-{uuid.uuid4().hex}"
    path.mkdir()
    try:
        yield path
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    shutil.rmtree(path)


# --- all processes ---


def _check_group(config: Config, rt: Runtime) -> list[Finding]:
    findings = [
        Finding(
            "processes",
            "ok",
            f"{rt.world.size} on {plural(len(set(rt.collectives.from_all(socket.gethostname()))), 'node')}",
        ),
        _same_versions(rt),
        *_same_bits(rt),
        *computing.gpus(rt),
        *_all_reduce(rt),
        *(_same_folder(config, rt) if config.run.mirror is None else ()),  # with a mirror, only rank 0 needs it
    ]
    with contextlib.suppress(UserError, AgainError):  # the process that cannot read it has reported that
        dataset = rt.collectives.all_or_none(lambda: inputs.read_data(config, "train", "test"))
        try:
            inputs.check_same_data(rt.collectives, dataset, list(dataset.manifest.splits))
        except DataError as error:
            findings.append(Finding("data", "bad", str(error), "use one folder that all nodes see, and verify it"))
    return findings


def _same_versions(rt: Runtime) -> Finding:
    by_rank = rt.collectives.from_all((version("torch"), version("distrain")))
    others = [
        f"rank {rank} has torch {torch_}, distrain {distrain_}"
        for rank, (torch_, distrain_) in enumerate(by_rank)
        if (torch_, distrain_) != by_rank[0]
    ]
    if others:
        return Finding(
            "versions",
            "bad",
            "; ".join(others[:4]),
            "install the same versions on all nodes, or use one container image",
        )
    return Finding("versions", "ok", "the same on all processes")


def _same_bits(rt: Runtime) -> Iterator[Finding]:
    """Compare what decides the last bits of the weights, over the processes."""
    by_rank = rt.collectives.from_all(rt.what_decides_bits)
    unlike = unlike_ranks(by_rank)
    for rank, names in list(unlike.items())[:4]:
        cure = (
            "even with train.virtual_ranks, the last bits of the weights depend on where a pass runs; use equal nodes"
        )
        yield Finding("bits", "note", f"rank {rank} has {names}", cure)
    if not unlike:
        yield Finding(
            "bits", "ok", ", ".join(f"{name} {value}" for name, value in by_rank[0].items() if value != "none")
        )


def _all_reduce(rt: Runtime) -> Iterator[Finding]:
    """Check the result of an all-reduce over all processes, and measure its time."""
    size = rt.world.size
    if size == 1:
        return
    total = torch.full((1,), float(rt.world.rank + 1), device=rt.device)
    rt.collectives.sum(total)
    expected = size * (size + 1) / 2
    if total.item() != expected:
        message = f"the sum over {size} ranks is {total.item()}, not {expected}"
        yield Finding("all-reduce", "bad", message, "check the interconnect")
        return
    buffer = torch.ones(_PROBE_BYTES // 4, device=rt.device)
    rt.collectives.sum(buffer)
    start = time.monotonic()
    rt.collectives.sum(buffer)
    buffer[0].item()  # waits for the device
    seconds = time.monotonic() - start
    yield Finding("all-reduce", "ok", f"correct; {_PROBE_BYTES / 2**20:.0f} MiB in {1000 * seconds:,.1f} ms")


def _same_folder(config: Config, rt: Runtime) -> Iterator[Finding]:
    """Check that all processes see a file that the main process writes in the run's folder."""
    folder, name = _nearest(Path(config.run.dir)), f".distrain-doctor-{uuid.uuid4().hex}"
    name = str(rt.collectives.from_main(name))
    path = folder / name
    problem = os_error_of(lambda: path.write_text("here", encoding="ascii")) if rt.is_main else None
    if rt.collectives.from_main(problem) is not None:
        return  # the main process has reported it in its own checks
    try:
        without = [str(rank) for rank, seen in enumerate(rt.collectives.from_all(_seen(path))) if not seen]
    finally:
        if rt.is_main:
            path.unlink(missing_ok=True)
    if without:
        yield Finding(
            "run folder",
            "bad",
            f"{folder}: rank {', '.join(without[:8])} does not see what rank 0 writes",
            "choose a run.dir on a file system that all nodes share: every process reads checkpoints from it",
        )
    else:
        yield Finding("run folder", "ok", "seen by all")


def _seen(path: Path) -> bool:
    """Wait up to 3 seconds for a file: a network file system may show a new one late."""
    deadline = time.monotonic() + 3
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
