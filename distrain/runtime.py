"""The process among its peers: devices, precision, collectives, agreements. The only module that knows accelerate.

accelerate prepares the model and the optimizer, never the loader or the scheduler: prepared loaders split again what
is already split, and prepared schedulers step once per process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

from distrain import signals
from distrain.errors import AgainError, ConfigError, PeerLostError, Stopped
from distrain.order import World
from distrain.topology import STORE_SOCKET
from distrain.watch import Watch

MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}
"""What accelerate calls our precisions."""


POLL_SECONDS = 0.25
"""About how often the processes ask each other whether to stop."""


class StopAgreed(Exception):  # noqa: N818 - what was asked for, not an error
    """All processes know, at the same place, that one was asked to stop."""

    @property
    def by(self) -> str:
        """For messages: ` by SIGTERM`."""
        name = signals.requested()
        return f" by {name}" if name else " by a signal to another process"


class Agreed(NamedTuple):
    """What all processes know after they met: `stop`: one was asked to; `flags`: how many raised each flag; `main`:
    the main process's number.
    """

    stop: bool
    flags: tuple[int, ...]
    main: int


@dataclass
class Runtime:
    """One process of a run, and how it talks to the others."""

    _accelerator: Accelerator
    world: World
    dtype: torch.dtype
    owns_group: bool
    watch: Watch
    _control: Any
    """Group for words between processes, on CPUs: it neither waits for the device nor holds it up."""
    _broken: bool = False

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self._accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.world.rank == 0

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """The model under DDP and autocast, and the optimizer with fp16's scaler; both on the device."""
        with self._meeting():  # DDP compares and sends parameters
            prepared: tuple[nn.Module, AcceleratedOptimizer] = self._accelerator.prepare(module, optimizer)
        return prepared

    def prepare_scoring(self, module: nn.Module) -> nn.Module:
        """The model on the device and under autocast, without DDP."""
        prepared: nn.Module = self._accelerator.prepare_model(module, evaluation_mode=True)
        return prepared

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are reduced with the last one of a step alone."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, and reduce them unless `accumulating`."""
        with self._meeting():
            self._accelerator.backward(loss)

    def clip(self, model: nn.Module, norm: float) -> None:
        """Bound the norm of the whole gradient."""
        self._accelerator.clip_grad_norm_(model.parameters(), norm)

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the main one's buffers: BatchNorm's statistics are each process's own."""
        with self._meeting():
            for buffer in module.buffers() if self.world.size > 1 else ():
                dist.broadcast(buffer, src=0)

    @property
    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's scaler, to save; None for other precisions."""
        return self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """The reverse of `scaler_state`."""
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them; the tensor itself is overwritten."""
        with self._meeting():
            if self.world.size > 1:
                dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process's value, on each of them (pickled between processes of one job)."""
        box = [value]
        with self._meeting():
            if self.world.size > 1:
                dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """Every process's value, on each of them (pickled between processes of one job)."""
        found = [value]
        with self._meeting():
            if self.world.size > 1:
                found = [None] * self.world.size
                dist.all_gather_object(found, value, group=self._control)
        return found

    def agree(self, *flags: bool, main: int = 0) -> Agreed:
        """Meet, and know the same: whether one was asked to stop, how many raised each flag, the main one's number."""
        told = [signals.requested() is not None, *flags, main if self.is_main else 0]
        words = torch.tensor(told, dtype=torch.int64)
        with self._meeting():
            if self.world.size > 1:
                dist.all_reduce(words, group=self._control)
        stop, *raised, number = words.tolist()
        return Agreed(stop > 0, tuple(raised), number)

    def leave_if_asked(self) -> None:
        """A place where nothing has to be saved yet.

        Raises:
            Stopped: on all processes, if one was asked to stop.
        """
        if self.agree().stop:
            raise Stopped(f"stopped{StopAgreed().by} while it started; nothing had to be saved")

    def first_of_all(self, problem: Exception | None) -> Exception:
        """The first problem of any process, on each of them (pickled between processes of one job)."""
        found: list[Exception | None] = self.from_all(problem)
        return next(each for each in found if each is not None)

    @contextlib.contextmanager
    def peers(self) -> Iterator[None]:
        """Around what may fail because another process is gone: that is told as such."""
        try:
            with _loss_told("another process is gone") if self.world.size > 1 else contextlib.nullcontext():
                yield
        except PeerLostError:
            self._broken = True
            raise

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around a collective: waiting for the others is known as waiting, their loss as loss."""
        with self.peers(), self.watch.meeting():
            yield

    def seed(self, seed: int) -> None:
        """Seed the device's generator. `torch.manual_seed` would keep a stack trace for CUDA at every call."""
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        """One step of the prepared optimizer; with fp16's scaler, one that may be skipped. Clears the gradients."""
        # The wrapper looks for a package on disk twice a step (0.1 ms): it is only asked where its scaler is needed.
        direct = optimizer if self._accelerator.scaler is not None else optimizer.optimizer
        direct.step()
        direct.zero_grad()

    def abandon(self) -> None:
        """The other processes are somewhere else: leaving must not wait for them."""
        self._broken = self.world.size > 1

    def close(self) -> None:
        """Leave the group, so that another run can start in this process."""
        if not self._broken:  # a broken group may wait for the lost
            self._accelerator.free_memory()
            if self.owns_group and dist.is_initialized():
                dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def start(device: str, precision: str, cpu_threads: int, start_seconds: float, watch: Watch) -> Runtime:
    """Join the group that the launcher's environment describes; one process alone where there is none.

    Raises:
        ConfigError: a device, precision or number of processes that cannot be had, or that accelerate's own
            configuration contradicts.
        PeerLostError: a process did not come within `start_seconds`.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("run.device=cuda: this process sees no GPU; use run.device=cpu, or mend the driver")
    on_cpu = device == "cpu" or not cuda
    if on_cpu and precision == "fp16":
        raise ConfigError("train.precision=fp16 needs a GPU; on the CPU use bf16 or fp32")
    conflicts = accelerate_conflicts(os.environ, precision, on_cpu)
    if conflicts:
        raise ConfigError("accelerate's configuration contradicts distrain's:\n" + "\n".join(conflicts))
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    owns_group = not dist.is_initialized()
    if owns_group and asked > 1:
        _join(asked, on_cpu, start_seconds, watch)
    accelerator = Accelerator(
        # Without cpu=True each CPU process that torchrun started believes that it is alone.
        cpu=on_cpu,
        mixed_precision=MIXED[precision],
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    torch.set_num_threads(cpu_threads)  # after accelerate, which sets its own number on CPUs
    world = World(accelerator.process_index, accelerator.num_processes)
    if owns_group and world.size != asked:
        raise ConfigError(f"{asked} processes were asked for, this one finds itself among {world.size}")
    if accelerator.device.type != ("cpu" if on_cpu else "cuda"):
        raise ConfigError(f"run.device={device}, but this process got {accelerator.device}")
    control = None
    if world.size > 1:
        if not owns_group:
            watch.connect(dist.distributed_c10d._get_default_store())
        with _loss_told("another process is gone"):
            control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=_BEYOND)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return Runtime(accelerator, world, dtype, owns_group, watch, control)


_STARTS = itertools.count()

_BEYOND = timedelta(hours=24)
"""Time-out of collectives themselves: `Watch` knows the phase and who is behind, so it is the one that ends a wait."""

_STOP_SECONDS = 5.0
"""After a stop request, how long to wait for processes that have not come: with them, all leave together."""

_LINGER_SECONDS = 2.0


def _join(size: int, on_cpu: bool, seconds: float, watch: Watch) -> None:
    """Meet the other processes at the store, and make the group of all."""
    watch.beat()  # its own deadline, which can name who is missing, comes before the watch's
    deadline = time.monotonic() + seconds
    rank = int(os.environ["RANK"])
    backend = "gloo" if on_cpu else "nccl"
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    with _loss_told(f"the processes could not meet at {where}"):
        # Under torchrun the store outlives a run: another run of the same processes finds nothing of this one.
        store = PrefixStore(f"distrain/{next(_STARTS)}", _store(rank, size, seconds))
        watch.connect(store)
        _wait_for_all(store, rank, size, backend, deadline, watch)
        if not on_cpu:
            # The watch ends waits, and says why; NCCL's own would abort the process without a word of ours.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_BEYOND)


def _store(rank: int, size: int, seconds: float) -> Any:
    timeout = timedelta(seconds=seconds)
    socket_number = os.environ.get(STORE_SOCKET)
    if socket_number is None:
        return next(rendezvous("env://", rank, size, timeout=timeout))[0]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=int(socket_number))


def _wait_for_all(store: Any, rank: int, size: int, backend: str, deadline: float, watch: Watch) -> None:
    """Every process has come, and expects as many as this one does, on the same kind of device."""
    own = f"{size} processes with {backend}"
    expected = store.compare_set("distrain/size", "", own).decode()
    if expected != own:
        store.set("distrain/unequal", "1")
    store.set(f"distrain/here/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if store.add("distrain/arrived", 1) == size:
        store.set("distrain/all", "1")
    asked_at = None
    while not store.check(["distrain/all"]):
        if store.check(["distrain/unequal"]):
            if rank == 0:
                time.sleep(_LINGER_SECONDS)  # it serves the store that the others look at
            other = expected if expected != own else "something else"
            raise ConfigError(
                f"nodes differ: this one expects {own}, another one {other}: give every node the same --nproc and"
                " --nodes, and see that all have their GPUs (or set run.device)"
            )
        if store.check(["distrain/left"]):
            raise PeerLostError("another process was stopped while it waited for all to come")
        asked_at = asked_at or (time.monotonic() if signals.requested() else None)
        if asked_at and time.monotonic() - asked_at > _STOP_SECONDS:
            store.set("distrain/left", "1")
            raise Stopped(f"stopped{StopAgreed().by} while it waited for other processes; nothing had to be saved")
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(size) if not store.check([f"distrain/here/{other}"])]
            raise PeerLostError(f"{size} processes were asked for; rank {', '.join(missing)} did not come")
        time.sleep(0.05)
    watch.beat()


@contextlib.contextmanager
def _loss_told(what: str) -> Iterator[None]:
    """Another process's loss, whatever torch raises for it, as PeerLostError."""
    try:
        yield
    except AgainError:
        raise  # it is told already
    except (RuntimeError, ValueError, OSError) as error:
        if _is_loss(error):
            first_line = str(error).strip().partition("\n")[0][:300]
            raise PeerLostError(f"{what}: {first_line}") from error
        raise


def _is_loss(error: BaseException) -> bool:
    """Whether an exception says that another process, or the link to it, is gone. gloo has no type of its own."""
    names = ("gloo", "nccl", "connection", "tcpstore", "broken pipe", "timed out", "socket")
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in names)


def accelerate_conflicts(environ: Any, precision: str, on_cpu: bool) -> list[str]:
    """One line for each thing that `accelerate launch` or its configuration file asks for and a run does not do."""
    found = []

    def asks(name: str, harmless: set[str], ours: str) -> None:
        value = environ.get(name, "").lower()
        if value not in harmless | {""}:
            found.append(f"  {name}={environ[name]}, but {ours}")

    asks("ACCELERATE_MIXED_PRECISION", {"no", MIXED[precision]}, f"train.precision={precision}")
    asks("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", {"1"}, "accumulation follows from train.micro_batch_size")
    asks("ACCELERATE_DYNAMO_BACKEND", {"no"}, "distrain does not compile the model")
    for feature in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "TP", "SAGEMAKER"):
        asks(f"ACCELERATE_USE_{feature}", {"false", "0", "no"}, "distrain trains with DDP alone")
    if not on_cpu:
        asks("ACCELERATE_USE_CPU", {"false", "0", "no"}, "run.device means a GPU; give run.device=cpu")
    return found
