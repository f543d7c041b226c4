"""The process among its peers: devices, precision, collectives. The only module that knows accelerate.

accelerate prepares the model and the optimizer, never the loader or the scheduler: prepared loaders split again what
is already split, and prepared schedulers step once per process.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.order import World

MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}
"""What accelerate calls our precisions."""


@dataclass(frozen=True)
class Runtime:
    """One process of a run, and how it talks to the others."""

    _accelerator: Accelerator
    world: World
    dtype: torch.dtype
    owns_group: bool

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
        """Add to the gradients."""
        self._accelerator.backward(loss)

    def clip(self, model: nn.Module, norm: float) -> None:
        """Bound the norm of the whole gradient."""
        self._accelerator.clip_grad_norm_(model.parameters(), norm)

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the main one's buffers: BatchNorm's statistics are each process's own."""
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
        if self.world.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """The main process's value, on each of them (pickled between processes of one job)."""
        box = [value]
        if self.world.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

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

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group, so that another run can start in this process."""
        self._accelerator.free_memory()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def start(device: str, precision: str, cpu_threads: int, timeout_seconds: int) -> Runtime:
    """Join the group that the launcher's environment describes; one process alone where there is none.

    Raises:
        ConfigError: a device, precision or number of processes that cannot be had, or that accelerate's own
            configuration contradicts.
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
    owns_group = not dist.is_initialized()
    accelerator = Accelerator(
        # Without cpu=True each CPU process that torchrun started believes that it is alone.
        cpu=on_cpu,
        mixed_precision=MIXED[precision],
        gradient_accumulation_steps=1,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(cpu_threads)  # after accelerate, which sets its own number on CPUs
    world = World(accelerator.process_index, accelerator.num_processes)
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if owns_group and world.size != asked:
        raise ConfigError(f"{asked} processes were asked for, this one finds itself among {world.size}")
    return Runtime(accelerator, world, torch.float64 if precision == "fp64" else torch.float32, owns_group)


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
