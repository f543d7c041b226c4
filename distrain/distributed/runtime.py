"""This process among its peers: device, precision, and what accelerate prepares.

accelerate prepares the model and the optimizer, never the loader or the scheduler: a prepared loader splits again what
is already split, and a prepared scheduler makes one step for each process.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, patch_environment
from torch import nn

from distrain import machine
from distrain.distributed import accelerate_check, devices, gpu_errors, rendezvous
from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradients import DataParallel
from distrain.distributed.liveness import LivenessClient, LivenessServer
from distrain.distributed.numerics import NEED_GPU, seed_all, seed_device, set_numerics, what_decides_bits
from distrain.distributed.peer_store import PeerStore
from distrain.distributed.peers import Peers
from distrain.distributed.virtual_ranks import Division, VirtualRanks
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment, World, hide_group
from distrain.errors import ConfigError, GpuError, PeerLostError
from distrain.failure_report import Failure, PeerFailedError, failure_of
from distrain.models.batch_norm import sync_batch_norm

log = logging.getLogger("distrain")


@dataclass(frozen=True)
class Options:
    """Settings of how a process computes.

    Attributes:
        device: `run.device`.
        precision: `train.precision`.
        cpu_threads: `run.cpu_threads`.
        deterministic: `train.deterministic`.
        start_seconds: `timeouts.start_seconds`, longest wait for the other processes.
    """

    device: str
    precision: str
    cpu_threads: int
    deterministic: bool
    start_seconds: float


class Runtime:
    """One process of a run. As a context manager it leaves the process group at the end."""

    def __init__(
        self,
        accelerator: Accelerator,
        environment: Environment,
        dtype: torch.dtype,
        owns_group: bool,
        watchdog: Watchdog,
        peers: Peers | None,
        collectives: Collectives,
    ) -> None:
        self._accelerator, self._owns_group = accelerator, owns_group
        self.environment, self.dtype = environment, dtype
        self.watchdog, self._peers, self.collectives = watchdog, peers, collectives
        self._device_name = devices.describe(self.device)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave the group, so that another run can start in this process.

        If this process ends with an error that the others do not raise, it does not wait for them.

        Raises:
            ConfigError, GpuError: in place of an error of the GPU, with what the user can do.
        """
        is_loss = error is not None and self.collectives.is_loss(error)
        self.leave_peers(is_loss=is_loss)
        meaning = None
        if error is not None:
            meaning = gpu_errors.explain(error, self._device_name, self.watchdog.status.phase)
        # On several nodes, rank 0 stays with the store until all know of a loss.
        if error is not None and (self.collectives.needs_record(error) or (is_loss and self.environment.several_nodes)):
            known = isinstance(error, (PeerFailedError, PeerLostError))
            self.collectives.abandon(None if known else failure_of(meaning or error, self.environment))
        self._close(device_failed=isinstance(meaning, GpuError))
        if meaning is not None:
            raise meaning from error

    def failure_of(self, error: BaseException) -> Failure:
        """Describe the error that ends this process; of an error of the GPU, what it means for the user."""
        meaning = gpu_errors.explain(error, self._device_name, self.watchdog.status.phase)
        return failure_of(meaning or error, self.environment)

    def leave_peers(self, *, is_loss: bool) -> None:
        """Let this process end by itself, with its own result or error.

        Args:
            is_loss: whether the others cannot continue without it.
        """
        if self._peers is not None:
            self._peers.leave(is_loss=is_loss)

    @property
    def world(self) -> World:
        """Rank of this process, and the number of processes."""
        return self.environment.world

    @property
    def device(self) -> torch.device:
        """The device on which this process computes."""
        return torch.device(self._accelerator.device)

    @functools.cached_property
    def what_decides_bits(self) -> dict[str, str]:
        """The facts that decide the last bits of a result here, besides the configuration."""
        return what_decides_bits(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and speaks to the user."""
        return self.environment.is_main

    def sync_batch_norm(self, module: nn.Module) -> nn.Module:
        """The model with BatchNorm's statistics taken over all processes; unchanged for a single process."""
        return sync_batch_norm(module) if self.world.size > 1 else module

    def move_to_device(self, module: nn.Module) -> None:
        """Move a model to the device, on a GPU with channels last in memory: convolutions are faster so."""
        module.to(self.device)
        if self.device.type != "cpu":
            module.to(memory_format=torch.channels_last)

    def prepare_data_parallel(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compilation: Compilation, global_batch_size: int
    ) -> tuple[DataParallel, AcceleratedOptimizer]:
        """The model under DDP and autocast, and the optimizer with fp16's scaler; both on the device."""
        compilation.apply(module)
        # DDP compares and sends parameters. Without the variable, accelerate names it the GPU of the local rank, which
        # does not exist where each process sees its own GPU alone.
        with self.collectives.collective(), patch_environment(ACCELERATE_BYPASS_DEVICE_MAP="true"):
            prepared, stepping = self._accelerator.prepare(module, optimizer)
        model = DataParallel(
            prepared, self._accelerator, self.collectives, compilation, self.world.size, global_batch_size
        )
        return model, stepping

    def prepare_virtual_ranks(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, compilation: Compilation, division: Division
    ) -> tuple[VirtualRanks, AcceleratedOptimizer]:
        """The model under autocast, and the optimizer with fp16's scaler; both on the device."""
        compilation.apply(module)
        prepared = self.prepare_eval_model(module)
        model = VirtualRanks(prepared, self._accelerator, self.collectives, compilation, division)
        return model, self._accelerator.prepare_optimizer(optimizer)

    def prepare_eval_model(self, module: nn.Module) -> nn.Module:
        """The model on the device and under autocast, without DDP."""
        prepared: nn.Module = self._accelerator.prepare_model(module, evaluation_mode=True)
        return prepared

    @property
    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's scaler, for a checkpoint; None for other precisions."""
        return self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore `scaler_state`."""
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)

    def seed(self, seed: int) -> None:
        """Seed the device's generator."""
        seed_device(self.device, seed)

    def seed_all(self, seed: int) -> None:
        """Seed every generator that a model may draw from: the device's, the CPU's, Python's and numpy's."""
        seed_all(self.device, seed)

    def update(self, optimizer: AcceleratedOptimizer) -> None:
        """Make a step of the prepared optimizer (fp16's scaler may skip it), and clear the gradients."""
        # The wrapper looks for a package on disk twice a step (0.1 ms): it is only called where its scaler is needed.
        direct = optimizer if self._accelerator.scaler is not None else optimizer.optimizer
        direct.step()
        for group in direct.param_groups:  # `zero_grad` takes 40 µs more
            for parameter in group["params"]:
                parameter.grad = None

    def _close(self, device_failed: bool) -> None:
        if self.collectives.broken or device_failed:  # closing might wait for the lost peer, or for the GPU
            _broken.append(self)
        else:
            self._accelerator.free_memory()
            if self._owns_group and dist.is_initialized():
                dist.destroy_process_group()
        if self._peers is not None:
            self._peers.close()
        AcceleratorState._reset_state(reset_partial_state=True)


_broken: list[Runtime] = []
"""Runtimes whose group lost a process, or whose GPU failed.

torch has one default group a process, and theirs cannot be closed; CUDA is unusable in this process after an error."""


def start(options: Options, environment: Environment, watchdog: Watchdog) -> Runtime:
    """Join the group that the launcher's environment describes; a single process without one.

    Raises:
        ConfigError: the device, precision or number of processes is not available, or accelerate's own configuration
            contradicts it.
        PeerFailedError: another process cannot start, and recorded why.
        PeerLostError: a process did not arrive in time.
    """
    if _broken:
        raise PeerLostError("a run lost its peers or its GPU in this process; start another run in a new process")
    world = environment.world
    if dist.is_initialized():
        world = World(dist.get_rank(), dist.get_world_size())
        store = rendezvous.meet_in_group(options.start_seconds) if world.size > 1 else None
    elif world.size > 1:
        store = rendezvous.connect(environment, options.start_seconds, watchdog)
    else:
        hide_group(os.environ)
        store = None
    peers = None
    if store is not None:
        with rendezvous.report_loss("rank 0 is gone"):
            peers = Peers(PeerStore(store, world), environment)
        watchdog.connect(peers)
    try:
        return _start(options, environment, watchdog, store, peers)
    except Exception as error:
        meaning = gpu_errors.explain(error, devices.describe(environment.local_rank), watchdog.status.phase)
        if peers is not None:
            peers.leave(is_loss=True)
            peers.store.record_failure(failure_of(meaning or error, environment))
            peers.store.wait_until_seen()
            peers.close()
        if meaning is not None:
            raise meaning from error
        raise


def _start(options: Options, environment: Environment, watchdog: Watchdog, store: Any, peers: Peers | None) -> Runtime:
    on_cpu = _on_cpu(options.device, options.precision)
    set_numerics(options.precision, options.deterministic)
    if on_cpu:
        machine.keep_freed_memory()
    owns_group = not dist.is_initialized()
    if owns_group and peers is not None:
        if environment.several_nodes and environment.is_main:
            peers.use_liveness(LivenessServer(store, peers.ended))
        rendezvous.join(environment, store, peers.store, "gloo" if on_cpu else "nccl", options.start_seconds, watchdog)
        if environment.several_nodes and not environment.is_main:
            _connect_to_main(environment, store, peers)
    accelerator = Accelerator(
        # Without cpu=True each CPU process that torchrun started believes that it is alone.
        cpu=on_cpu,
        mixed_precision=accelerate_check.MIXED[options.precision],
        gradient_accumulation_steps=1,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    torch.set_num_threads(options.cpu_threads)  # after accelerate, which sets its own number on CPUs
    world = World(accelerator.process_index, accelerator.num_processes)
    if owns_group and world.size != environment.world.size:
        raise ConfigError(
            f"{environment.world.size} processes were requested, but this one is in a group of {world.size}"
        )
    if accelerator.device.type != ("cpu" if on_cpu else "cuda"):
        raise ConfigError(f"run.device={options.device}, but this process got {accelerator.device}")
    control = None
    if peers is not None and not on_cpu:
        peers.use_backend(dist.distributed_c10d._get_default_group()._get_backend(accelerator.device))
    if world.size > 1:
        with rendezvous.report_loss("the processes could not connect to each other"):
            control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=rendezvous.NO_TIMEOUT)
    dtype = torch.float64 if options.precision == "fp64" else torch.float32
    collectives = Collectives(world, control, watchdog, peers.store if peers is not None else None)
    return Runtime(accelerator, replace(environment, world=world), dtype, owns_group, watchdog, peers, collectives)


def _connect_to_main(environment: Environment, store: Any, peers: Peers) -> None:
    """Connect to rank 0, so that the end of one process is seen by the others on all nodes."""
    address = str(environment.master_address)
    try:
        client = LivenessClient(store, address, environment.world, peers.ended)
    except dist.DistError as error:
        raise PeerLostError(f"rank 0 is gone: the store at {environment.rendezvous} does not answer") from error
    except OSError as error:
        log.warning(
            "rank %d: cannot connect to a port of %s that rank 0 has opened (%s): if a process is killed on one node,"
            " others may wait for it until their time-out; let the nodes of a job connect to each other's ports",
            environment.world.rank, address, error,
        )  # fmt: skip
        return
    peers.use_liveness(client)


def _on_cpu(device: str, precision: str) -> bool:
    """Decide whether to compute on the CPU.

    Raises:
        ConfigError: the device or precision is not available here, or accelerate contradicts it.
    """
    on_cpu = devices.on_cpu(device, os.environ, "run.device=")
    if on_cpu and precision in NEED_GPU:
        raise ConfigError(f"train.precision={precision} needs a GPU; on the CPU use bf16 or fp32")
    accelerate_check.check(os.environ, precision, on_cpu)
    return on_cpu
