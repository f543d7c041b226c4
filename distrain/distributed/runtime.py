"""The process among its peers: devices, precision, collectives, agreements. What accelerate prepares, it prepares here.

accelerate prepares the model and the optimizer, never the loader or the scheduler: prepared loaders split again what
is already split, and prepared schedulers step once per process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from distrain import machine, signals
from distrain.data.order import World
from distrain.distributed import accelerate_check, rendezvous
from distrain.distributed.peer_store import PeerStore
from distrain.distributed.rendezvous import loss_told
from distrain.distributed.watchdog import Watchdog
from distrain.errors import AgainError, ConfigError, PeerLostError, SaveError, Stopped, UserError
from distrain.failures import PeerFailedError, failure_of
from distrain.models.batch_norm import sync_batch_norm

T = TypeVar("T")

POLL_SECONDS = 0.25
"""About how often the processes ask each other whether to stop."""


class StopAgreed(Exception):  # noqa: N818 - what was asked for, not an error
    """All processes know, at the same place, that one was asked to stop."""

    @property
    def by(self) -> str:
        """For messages: ` by SIGTERM`."""
        return signals.requested_by()


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
    watch: Watchdog
    _control: Any
    """Group for words between processes, on CPUs: it neither waits for the device nor holds it up."""
    _peer_store: PeerStore | None
    _broken: bool = False
    _alone: bool = False

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave the group, so that another run can start in this process; alone, where this one failed alone."""
        if error is not None and (self._alone or not isinstance(error, _KNOWN_TO_ALL)):
            self._abandon(error)
        self._close()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device(self._accelerator.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.world.rank == 0

    def sync_batch_norm(self, module: nn.Module) -> nn.Module:
        """The model with BatchNorm's statistics taken over all processes; as it is, for one process."""
        return sync_batch_norm(module, self.device.type == "cuda") if self.world.size > 1 else module

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, AcceleratedOptimizer]:
        """The model under DDP and autocast, and the optimizer with fp16's scaler; both on the device."""
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)
        with self._collective():  # DDP compares and sends parameters
            prepared, stepping = self._accelerator.prepare(module, optimizer)
        if self.world.size > 1:
            # Or each forward pass would meet the others; evaluation takes the main one's buffers (`broadcast_buffers`).
            prepared.broadcast_buffers = False
        return prepared, stepping

    def prepare_scoring(self, module: nn.Module) -> nn.Module:
        """The model on the device and under autocast, without DDP."""
        prepared: nn.Module = self._accelerator.prepare_model(module, evaluation_mode=True)
        return prepared

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are reduced with the last one of a step alone."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients, and reduce them unless `accumulating`."""
        with self._collective():
            # accelerate divides by its own number of micro-batches, 1: an operation more each way.
            if self._accelerator.scaler is not None:
                self._accelerator.backward(loss)
            else:
                loss.backward()

    def clip(self, model: nn.Module, norm: float) -> None:
        """Bound the norm of the whole gradient."""
        self._accelerator.clip_grad_norm_(model.parameters(), norm)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give all processes the main one's buffers: BatchNorm's statistics are each process's own."""
        with self._collective():
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
        with self._collective():
            if self.world.size > 1:
                dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process's value, on each of them (pickled between processes of one job)."""
        box = [value]
        with self._collective():
            if self.world.size > 1:
                dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def from_all(self, value: Any) -> list[Any]:
        """Every process's value, on each of them (pickled between processes of one job)."""
        found = [value]
        with self._collective():
            if self.world.size > 1:
                found = [None] * self.world.size
                dist.all_gather_object(found, value, group=self._control)
        return found

    def agree(self, *flags: bool, main: int = 0) -> Agreed:
        """Meet, and know the same: whether one was asked to stop, how many raised each flag, the main one's number."""
        told = [signals.requested() is not None, *flags, main if self.is_main else 0]
        words = torch.tensor(told, dtype=torch.int64)
        with self._collective():
            if self.world.size > 1:
                dist.all_reduce(words, group=self._control)
        stop, *raised, number = words.tolist()
        return Agreed(stop > 0, tuple(raised), number)

    def leave_if_requested(self) -> None:
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

    def all_or_none(self, action: Callable[[], T]) -> T:
        """The value of what may fail on one process alone: then all raise its error."""
        problem: Exception | None = None
        try:
            value = action()
        except (UserError, AgainError) as error:
            problem = error
        if any(self.agree(problem is not None).flags):
            raise self.first_of_all(problem)
        return value

    def still_busy(self, busy: bool, progress: bool, problem: Exception | None) -> bool:
        """Meet while some wait for data or have work left: whether any does.

        Args:
            busy: this process does.
            progress: this process got on since the last collective.
            problem: why this process cannot go on.

        Raises:
            Exception: the first problem of any process, on all.
            StopAgreed: one process was asked to stop.
        """
        agreed = self.agree(busy, progress, problem is not None)
        any_busy, any_progress, any_problem = agreed.flags
        if any_problem:
            raise self.first_of_all(problem)
        if agreed.stop:
            raise StopAgreed
        if any_progress:
            self.watch.beat()
        return any_busy > 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around what this process may find impossible while the others wait for it: they are told why."""
        try:
            yield
        except UserError:
            self._alone = True
            raise

    @contextlib.contextmanager
    def peers(self) -> Iterator[None]:
        """Around what may fail because another process is gone: that is told as such."""
        try:
            with loss_told("another process is gone") if self.world.size > 1 else contextlib.nullcontext():
                yield
        except PeerLostError:
            self._broken = True
            why = self._peer_store.failed() if self._peer_store is not None else None
            if why is not None:
                raise PeerFailedError(why) from None
            raise

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """Around a collective: waiting for the others is known as waiting, their loss as loss."""
        if self.world.size == 1:
            yield
            return
        with self.peers(), self.watch.collective():
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
        for group in direct.param_groups:  # `zero_grad` takes 40 µs more
            for parameter in group["params"]:
                parameter.grad = None

    def _abandon(self, error: BaseException) -> None:
        """The other processes are somewhere else: leaving must not wait for them, and they are told why."""
        self._broken = self.world.size > 1
        if self._peer_store is not None and not isinstance(error, PeerFailedError):
            self._peer_store.leave(failure_of(error))

    def _close(self) -> None:
        if self._broken:  # a broken group may wait for the lost
            _left_behind.append(self)
        else:
            self._accelerator.free_memory()
            if self.owns_group and dist.is_initialized():
                dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


_KNOWN_TO_ALL = (UserError, AgainError, SaveError)
"""Errors that all processes raise at the same place (unless it was within `Runtime.alone`), or that say that another
one is gone already.
"""

_left_behind: list[Runtime] = []
"""Groups that lost a process: torch has one group a process, and these cannot be closed."""


@dataclass(frozen=True)
class Settings:
    """How a process computes: `run.device`, `train.precision`, `run.cpu_threads`, `train.deterministic`."""

    device: str
    precision: str
    cpu_threads: int
    deterministic: bool = False


def start(asked_for: Settings, start_seconds: float, watch: Watchdog) -> Runtime:
    """Join the group that the launcher's environment describes; one process alone where there is none.

    Raises:
        ConfigError: a device, precision or number of processes that cannot be had, or that accelerate's own
            configuration contradicts.
        PeerFailedError: another process cannot start, and says why.
        PeerLostError: a process did not come within `start_seconds`.
    """
    if _left_behind:
        raise PeerLostError("a run lost its peers in this process; another one needs a new process")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        store = rendezvous.own_part(dist.distributed_c10d._get_default_store()) if dist.get_world_size() > 1 else None
    else:
        store = rendezvous.connect(asked, start_seconds, watch) if asked > 1 else None
    peer_store = PeerStore(store) if store is not None else None
    if peer_store is not None:
        watch.connect(peer_store)
    try:
        return _start(asked_for, start_seconds, watch, store, peer_store)
    except PeerFailedError:
        raise
    except Exception as error:
        if peer_store is not None:
            peer_store.leave(failure_of(error))
            rendezvous.linger()
        raise


def _start(
    settings: Settings, start_seconds: float, watch: Watchdog, store: Any, peer_store: PeerStore | None
) -> Runtime:
    device, precision = settings.device, settings.precision
    on_cpu = _on_cpu(device, precision)
    _set_numerics(precision, settings.deterministic)
    if on_cpu:
        machine.keep_freed_memory()
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    owns_group = not dist.is_initialized()
    if owns_group and store is not None and peer_store is not None:
        rendezvous.join(store, peer_store, asked, "gloo" if on_cpu else "nccl", start_seconds, watch)
    accelerator = Accelerator(
        # Without cpu=True each CPU process that torchrun started believes that it is alone.
        cpu=on_cpu,
        mixed_precision=accelerate_check.MIXED[precision],
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    torch.set_num_threads(settings.cpu_threads)  # after accelerate, which sets its own number on CPUs
    world = World(accelerator.process_index, accelerator.num_processes)
    if owns_group and world.size != asked:
        raise ConfigError(f"{asked} processes were asked for, this one finds itself among {world.size}")
    if accelerator.device.type != ("cpu" if on_cpu else "cuda"):
        raise ConfigError(f"run.device={device}, but this process got {accelerator.device}")
    control = None
    if world.size > 1:
        with loss_told("another process is gone"):
            control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=rendezvous.BEYOND)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return Runtime(accelerator, world, dtype, owns_group, watch, control, peer_store)


def _set_numerics(precision: str, deterministic: bool) -> None:
    """How GPUs compute. fp32 is fp32: cuDNN's own default is TF32, with 10 bits of mantissa."""
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read at its first use
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # choosing by timing differs from run to run


def _on_cpu(device: str, precision: str) -> bool:
    """Whether to compute on the CPU.

    Raises:
        ConfigError: a device or precision that this process cannot have, or that accelerate contradicts.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("run.device=cuda: this process sees no GPU; use run.device=cpu, or mend the driver")
    on_cpu = device == "cpu" or not cuda
    if on_cpu and precision in ("fp16", "tf32"):
        raise ConfigError(f"train.precision={precision} needs a GPU; on the CPU use bf16 or fp32")
    accelerate_check.check(os.environ, precision, on_cpu)
    return on_cpu
