"""`distrain doctor`: what would end a job, or make it slow, found in seconds and before it starts.

Each process looks at its own node, then all meet, and look at what they share. Nothing is left on disk.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from distrain import files, machine, models, plugins, signals
from distrain.config import Config
from distrain.data import shards
from distrain.data.stream import memory
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment, World
from distrain.errors import AgainError, ConfigError, DataError, UserError
from distrain.runs.trackers import check_tensorboard
from distrain.training.checkpointing import os_error_of
from distrain.training.setup import (
    build_model,
    check_same_data,
    make_order,
    read_data,
    start_runtime,
    start_watchdog,
)

_PROBE_BYTES = 16 * 2**20
_BASE_BYTES = 2**30
"""A process with torch in it, before it has any data."""
_SHM = Path("/dev/shm")  # noqa: S108 - only its size is asked for
_SHM_BYTES = 64 * 2**20
"""Of a process that talks NCCL; a container has that much unless it is told otherwise."""

Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    subject: str
    level: Level
    told: str
    cure: str = ""

    @property
    def line(self) -> str:
        """For people."""
        cure = f"\n{'':20}→ {self.cure}" if self.cure and self.level != "ok" else ""
        return f"  {self.level:4}  {self.subject:11} {self.told}{cure}"


def examine(config: Config, environment: Environment) -> None:
    """Look at everything, under any launcher, and print it.

    Raises:
        ConfigError: on all processes, where something would end a job.
    """
    own = look_here(config, environment)
    if environment.is_main or (environment.local_rank == 0 and _bad(own)):
        _print(f"{socket.gethostname()}:", own)  # before the others are waited for: they may never come
    with signals.recorded(), closing(start_watchdog(config, environment)) as watchdog:
        try:
            with start_runtime(config, environment, watchdog) as rt:
                watchdog.enter("train")
                shared = _look_together(config, rt)
                every = rt.collectives.from_all(own)
        except AgainError as error:
            raise ConfigError(
                f"doctor: the processes cannot meet: {error}\n  → see that all nodes were started, reach the first"
                " one's port, and have the same --nodes and --nproc"
            ) from error
        if rt.is_main:
            _print("all processes:", shared)
            told = set(own)
            for rank, findings in enumerate(every):
                _print(f"rank {rank}:", [each for each in findings if each.level != "ok" and each not in told])
                told.update(findings)
    wrong = len({each for findings in [*every, shared] for each in findings if each.level == "bad"})
    if wrong:
        raise ConfigError(f"doctor: {wrong} found wrong; see above")
    if rt.is_main:
        print("nothing was found that would end a job", flush=True)


def look_here(config: Config, environment: Environment) -> list[Finding]:
    """What one process sees on its node."""
    return [finding for look in _LOCAL for finding in look(config, environment)]


def _bad(findings: list[Finding]) -> int:
    return sum(finding.level == "bad" for finding in findings)


def _print(title: str, findings: list[Finding]) -> None:
    if findings:
        print("\n".join([title, *(finding.line for finding in findings)]), flush=True)


# --- one process, on its node ---


def versions(config: Config, environment: Environment) -> Iterator[Finding]:
    """What is installed."""
    names = ("torch", "torchvision", "accelerate", "webdataset")
    found = ", ".join(f"{name} {version(name)}" for name in names)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {found}")


def extras(config: Config, environment: Environment) -> Iterator[Finding]:
    """What the configuration needs beside the package itself."""
    if config.log.tensorboard:
        try:
            check_tensorboard()
        except ConfigError as error:
            yield Finding("extras", "bad", str(error))
        else:
            yield Finding("extras", "ok", f"tensorboard {version('tensorboard')}")


def device(config: Config, environment: Environment) -> Iterator[Finding]:
    """What this process would compute on."""
    processes = environment.local_world_size
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.run.device == "cuda" and not count:
        yield Finding("device", "bad", "run.device=cuda, but no GPU is seen", "mend the driver, or give run.device=cpu")
    elif config.run.device == "cpu" or not count:
        yield Finding("device", "ok", "CPU")
    elif count < processes:
        yield Finding(
            "device", "bad", f"{count} GPUs for {processes} processes", "start as many processes as there are GPUs"
        )
    else:
        names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
        yield Finding("device", "ok", f"{count} GPUs: {names}")


def cores(config: Config, environment: Environment) -> Iterator[Finding]:
    """Cores that this node's processes may use."""
    own = machine.cores()
    wanted = environment.local_world_size * config.run.cpu_threads
    level: Level = "ok" if own >= wanted else "note"
    yield Finding(
        "cores", level, f"{own} for {wanted} threads", "ask for more (--cpus-per-task, requests.cpu) or use fewer"
    )


def open_files(config: Config, environment: Environment) -> Iterator[Finding]:
    """Connections to all others, shards, libraries."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + 4 * environment.world.size
    level: Level = "ok" if limit >= wanted or limit == resource.RLIM_INFINITY else "bad"
    yield Finding("open files", level, f"{limit} allowed, {wanted} wanted", f"raise the limit: ulimit -n {wanted}")


def shared_memory(config: Config, environment: Environment) -> Iterator[Finding]:
    """NCCL uses it; processes on CPUs do not."""
    if not _SHM.is_dir():
        return
    free = shutil.disk_usage(_SHM).free
    wanted = _SHM_BYTES * environment.local_world_size
    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    level: Level = "ok" if free >= wanted else "note" if on_cpu else "bad"
    yield Finding(
        str(_SHM),
        level,
        f"{free / 2**20:,.0f} MiB free, {wanted / 2**20:,.0f} wanted by NCCL",
        "give the container more: --shm-size, or an emptyDir in memory",
    )


def data(config: Config, environment: Environment) -> Iterator[Finding]:
    """The data set as this node sees it, how fast it is read, and what reading takes."""
    try:
        dataset = read_data(config, "train", "test")
    except (UserError, AgainError) as error:
        yield Finding("data", "bad", str(error), "give data.dir a folder that all nodes see")
        return
    shard = dataset.split("train").shards[0]
    start = time.monotonic()
    try:
        found = dataset.manifest
        for _ in shards.read(dataset.root, shard, found.image_shape, len(found.classes)):
            pass
    except (UserError, AgainError) as error:
        yield Finding("data", "bad", str(error), "`distrain verify` checks all shards")
        return
    rate = shard.bytes / max(time.monotonic() - start, 1e-6) / 2**20
    yield Finding("data", "ok", f"{dataset.root}: {found.splits['train'].samples:,} samples, {rate:,.0f} MiB/s")
    size, local = environment.world.size, environment.local_world_size
    try:
        order = make_order(config, dataset, size)
    except UserError as error:
        yield Finding("processes", "bad", str(error))
        return
    cached = config.data.cache == "ram"  # auto takes what is left over
    wanted = local * (_BASE_BYTES + memory(dataset, order, World(0, size), config.data.read_ahead, cached))
    free = machine.free_memory()
    level: Level = "ok" if wanted <= free else "bad"
    yield Finding(
        "memory",
        level,
        f"{free / 2**30:,.1f} GiB, {wanted / 2**30:,.1f} wanted by {local} processes here",
        "lower data.read_ahead, set data.cache=auto, prepare with more --shards, or ask for more memory",
    )


def model_and_run_folder(config: Config, environment: Environment) -> Iterator[Finding]:
    """The model, tried on black pictures; what a checkpoint needs; how long a save takes against the grace."""
    if environment.local_rank:
        return  # one process of a run writes checkpoints: more at once would be slower
    module = None
    with contextlib.suppress(DataError):  # it was told already
        try:
            module = _tried_model(config)
        except (ConfigError, AgainError) as error:
            yield Finding("model", "bad", str(error))
        else:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            yield Finding("model", "ok", f"{config.model.name}: {parameters:,} parameters, all with a gradient")
    speed = yield from _run_folder(config)
    if module is not None and speed is not None:
        yield _grace(config, module, speed)


def _tried_model(config: Config) -> nn.Module:
    data = read_data(config).manifest
    height, width, channels = data.image_shape
    module = build_model(config, data, torch.float32)
    with plugins.user_code(f"model.name={config.model.name}: fails in training"):
        module.train()(torch.zeros(2, channels, height, width)).sum().backward()
    models.check_gradients(config.model.name, module)
    return module


def _run_folder(config: Config) -> Generator[Finding, None, float | None]:
    """Write, sync, rename, link; bytes a second, or None where it cannot be written."""
    folder = _nearest(Path(config.run.dir))
    start = time.monotonic()
    try:
        with _probe(folder) as path:
            files.write(path, os.urandom(_PROBE_BYTES))
            seconds = time.monotonic() - start
            os.link(path, path.with_suffix(".link"))  # a lease is taken by a link
            path.with_suffix(".link").unlink()
            path.rename(path.with_suffix(".renamed"))
    except OSError as error:
        yield Finding(
            "run folder",
            "bad",
            f"{folder}: cannot be written: {error.strerror}",
            "choose a run.dir that this user may write, on a file system that knows rename and link",
        )
        return None
    speed = _PROBE_BYTES / max(seconds, 1e-6)
    yield Finding("run folder", "ok", f"{folder}: write, sync, rename, link; {speed / 2**20:,.0f} MiB/s")
    return speed


def _grace(config: Config, module: nn.Module, speed: float) -> Finding:
    tensors = [*module.parameters(), *module.buffers()]
    states = 1 if config.train.optimizer == "sgd" else 2
    states += config.train.ema_decay is not None
    size = (1 + states) * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    seconds, grace = size / speed, config.launch.grace_seconds
    return Finding(
        "grace",
        "ok" if 2 * seconds <= grace else "bad",
        f"{grace} s after a stop request; a checkpoint of {size / 2**20:,.0f} MiB takes {seconds:.1f} s",
        "raise launch.grace_seconds, and the scheduler's own (--signal, terminationGracePeriodSeconds) above it",
    )


_LOCAL: list[Callable[[Config, Environment], Iterator[Finding]]] = [
    versions,
    extras,
    device,
    cores,
    open_files,
    shared_memory,
    data,
    model_and_run_folder,
]


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: nothing is made for a look."""
    folder = folder.absolute()
    while not folder.is_dir() and folder.parent != folder and not folder.exists():
        folder = folder.parent
    return folder


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    path = folder / f".distrain-doctor-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        for left in folder.glob(f"{path.name}*") if folder.is_dir() else ():
            left.unlink(missing_ok=True)


# --- all processes ---


def _look_together(config: Config, rt: Runtime) -> list[Finding]:
    findings = [
        Finding(
            "processes", "ok", f"{rt.world.size} on {len(set(rt.collectives.from_all(socket.gethostname())))} nodes"
        ),
        _same_versions(rt),
        *_reduce(rt),
        *_same_folder(config, rt),
    ]
    with contextlib.suppress(UserError, AgainError):  # a node that cannot read it has said so
        dataset = rt.collectives.all_or_none(lambda: read_data(config, "train", "test"))
        try:
            check_same_data(rt, dataset, list(dataset.manifest.splits))
        except DataError as error:
            findings.append(Finding("data", "bad", str(error), "let all nodes see one folder, and verify it"))
    return findings


def _same_versions(rt: Runtime) -> Finding:
    found = rt.collectives.from_all((version("torch"), version("distrain")))
    others = [
        f"rank {rank} has torch {torch_}, distrain {own}"
        for rank, (torch_, own) in enumerate(found)
        if (torch_, own) != found[0]
    ]
    if others:
        return Finding("versions", "bad", "; ".join(others[:4]), "install the same everywhere, or run one image")
    return Finding("versions", "ok", "the same everywhere")


def _reduce(rt: Runtime) -> Iterator[Finding]:
    """Sums over all processes: right, and how fast."""
    size = rt.world.size
    if size == 1:
        return
    right = torch.full((1,), float(rt.world.rank + 1), device=rt.device)
    rt.collectives.sum(right)
    if right.item() != size * (size + 1) / 2:
        yield Finding("all-reduce", "bad", f"the sum over {size} ranks is {right.item()}", "look at the interconnect")
        return
    buffer = torch.ones(_PROBE_BYTES // 4, device=rt.device)
    rt.collectives.sum(buffer)
    start = time.monotonic()
    rt.collectives.sum(buffer)
    buffer[0].item()  # the device is done
    seconds = time.monotonic() - start
    yield Finding("all-reduce", "ok", f"right; {_PROBE_BYTES / 2**20:.0f} MiB in {1000 * seconds:,.1f} ms")


def _same_folder(config: Config, rt: Runtime) -> Iterator[Finding]:
    """Whether what the main process writes is seen by all."""
    folder, name = _nearest(Path(config.run.dir)), f".distrain-doctor-{uuid.uuid4().hex}"
    name = str(rt.collectives.from_main(name))
    path = folder / name
    problem = os_error_of(lambda: path.write_text("here", encoding="ascii")) if rt.is_main else None
    if rt.collectives.from_main(problem) is not None:
        return  # told as what the main process found
    try:
        blind = [str(rank) for rank, seen in enumerate(rt.collectives.from_all(_seen(path))) if not seen]
    finally:
        if rt.is_main:
            path.unlink(missing_ok=True)
    if blind:
        yield Finding(
            "run folder",
            "bad",
            f"{folder}: rank {', '.join(blind[:8])} does not see what rank 0 writes",
            "choose a run.dir on a file system that all nodes share: every process reads checkpoints from it",
        )
    else:
        yield Finding("run folder", "ok", "seen by all")


def _seen(path: Path) -> bool:
    """A network file system may show a new file late."""
    deadline = time.monotonic() + 3
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
