"""Forward and backward passes of the trained model, and the exchange of its gradients between the processes.

A step runs, for each virtual rank of this process, the passes of its micro-batches, and then
calls `exchange`; after it the gradients are those of the global batch on every process.

`DataParallel`: a process is one virtual rank; DDP all-reduces the gradients during the last backward pass.
`distrain.distributed.virtual_ranks`: several of them, whose gradients are added in a fixed order.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distrain.distributed.busy_clock import BusyClock
from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import AccumulatedGradients, Compilation
from distrain.environment import World
from distrain.errors import ConfigError
from distrain.models import batch_norm


def loss_scale(global_batch_size: int, world_size: int) -> float:
    """Return the factor for a loss that is summed over the local batch, so that its gradient under DDP is exact.

    DDP averages the gradients of the processes. If each multiplies its sum by `world_size / global_batch_size`, the
    result is the gradient of the mean loss of the global batch, also if local batches differ in size or are empty.

    Raises:
        ConfigError: there are more processes than samples, so the arguments may have been exchanged; or none.
    """
    if not 1 <= world_size <= global_batch_size:
        raise ConfigError(f"world_size={world_size}: should be 1 to global_batch_size, which is {global_batch_size}")
    return world_size / global_batch_size  # guard: loss-scale


class DistributedModel(ABC):
    """The trained model under autocast, as accelerate prepared it.

    Args:
        prepared: the model.
        accelerator: what prepared it; it owns fp16's scaler.
        collectives: for the loss of a peer.
        compilation: how the model is compiled.

    Attributes:
        busy: measures the time in which this process is busy in a step.
    """

    def __init__(self, prepared: Any, accelerator: Any, collectives: Collectives, compilation: Compilation) -> None:
        self._model, self._accelerator, self._collectives = prepared, accelerator, collectives
        self._compilation = compilation
        self.busy = BusyClock(next(prepared.parameters()).device, collectives.size)
        batch_norm.waiting = self.busy.waiting
        self._accumulated = AccumulatedGradients(prepared.parameters()) if compilation.has_cuda_graphs else None

    runs_empty = True
    """Whether empty micro-batches are run too, because the passes contain collectives."""

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """Factor for a loss summed over samples, so that the exchanged gradient is the mean over the global batch."""

    def virtual_rank(self, rank: World) -> contextlib.AbstractContextManager[None]:
        """Run the passes of a virtual rank."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Run the passes of a micro-batch of a virtual rank: its gradients are added to those of the ones before."""
        with contextlib.nullcontext() if last else self._no_exchange():
            yield
        if not last and self._accumulated is not None:
            self._accumulated.move()

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Run passes whose gradients are not exchanged yet."""
        return contextlib.nullcontext()

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape [n, K] for normalised images of shape [n, C, H, W].

        With CUDA graphs, the next forward pass overwrites them.
        """
        self._compilation.begin_pass(inputs)
        with self._collectives.detect_loss():  # BatchNorm's statistics are collectives
            logits: Tensor = self._model(inputs)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss that was multiplied by `loss_scale`."""
        with self._collectives.collective():
            # accelerate divides by its own number of micro-batches, 1: an operation more each way.
            if self._accelerator.scaler is not None:
                self._accelerator.backward(loss)
            else:
                loss.backward()
        self.busy.end_backward()

    @abstractmethod
    def exchange(self) -> None:
        """Make the gradients those of the global batch, after the passes of all virtual ranks."""

    def clip_norm(self, limit: float) -> Tensor:
        """Scale the exchanged gradient down to a norm of at most `limit`; return the norm that it had: []."""
        norm: Tensor = self._accelerator.clip_grad_norm_(self._model.parameters(), limit)
        return norm

    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the exchanged gradient, as clipping computes it: []."""
        self._accelerator.unscale_gradients()  # those of fp16
        gradients = [each.grad for each in self._model.parameters() if each.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @abstractmethod
    def exchange_fraction(self) -> float:
        """Fraction of the computing time that waits for the exchange of gradients; 0 where it is not known yet."""


class DataParallel(DistributedModel):
    """The model under DDP; unwrapped for a single process.

    Args:
        prepared: the model.
        accelerator: what prepared it.
        collectives: for the loss of a peer.
        compilation: how the model is compiled.
        world_size: number of processes.
        global_batch_size: samples of a step.
    """

    def __init__(
        self,
        prepared: Any,
        accelerator: Any,
        collectives: Collectives,
        compilation: Compilation,
        world_size: int,
        global_batch_size: int,
    ) -> None:
        super().__init__(prepared, accelerator, collectives, compilation)
        self._world_size, self._global_batch_size = world_size, global_batch_size
        if world_size > 1:
            # Or each forward pass would be a collective; evaluation broadcasts rank 0's buffers itself.
            prepared.broadcast_buffers = False
            self.busy.follow_gradients(prepared.parameters())

    @property
    def loss_scale(self) -> float:
        """W / G: DDP averages the gradients of the processes, whatever the sizes of their local batches."""
        return loss_scale(self._global_batch_size, self._world_size)

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        """Run passes whose gradients DDP does not all-reduce; the last micro-batch of a step exchanges them all."""
        context: contextlib.AbstractContextManager[None] = self._accelerator.no_sync(self._model)
        return context

    def exchange(self) -> None:
        """Do nothing: the last backward pass has exchanged them."""

    def exchange_fraction(self) -> float:
        """Fraction of the computing time that waits for the all-reduce, as DDP samples it (1 step in 100)."""
        if not hasattr(self._model, "_get_ddp_logging_data"):
            return 0.0
        data = self._model._get_ddp_logging_data()
        names = (
            "forward_compute_time",
            "backward_compute_time",
            "backward_comm_time",
            "backward_compute_comm_overlap_time",
        )
        forward, backward, communication, hidden = (int(data.get(f"avg_{name}", 0)) for name in names)
        exposed = max(communication - hidden, 0)
        return exposed / (forward + backward + exposed) if forward + backward else 0.0
