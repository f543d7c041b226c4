"""Faults that make the bits of a run depend on the number of processes: the tests of that promise must see each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distrain.distributed import virtual_ranks
from distrain.distributed.gradient_tree import Node
from distrain.distributed.virtual_ranks import TreeExchange
from distrain.environment import World
from distrain.training.job import Job
from distrain.training.step import TrainingStep


def _association() -> Any:
    """Each process adds up what it has, whether or not it is a subtree."""

    def complete(received: Tensor, nodes: Sequence[Sequence[Node]], leaves: int) -> Tensor:
        values = list(received.view(sum(map(len, nodes)), -1))
        of_processes = []
        for of_process in nodes:
            of_processes.append(sum(values[: len(of_process)], torch.zeros_like(values[0])))
            del values[: len(of_process)]
        return sum(of_processes[1:], of_processes[0])

    return mock.patch.object(virtual_ranks, "complete", complete)


def _seed() -> Any:
    """Dropout is seeded by the process."""
    original = Job.layer_seed
    return mock.patch.object(
        Job, "layer_seed", lambda job, step, rank: original(job, step, World(job.runtime.world.rank))
    )


def _layout() -> Any:
    """The gradient of a single process has other strides: the norm adds its values in another order."""
    original = TreeExchange.exchange

    def exchange(tree: Any) -> None:
        original(tree)
        if tree.division.world.size == 1:
            for parameter in tree.parameters:
                gradient = parameter.grad
                order = list(reversed(range(gradient.dim())))
                parameter.grad = gradient.permute(order).contiguous().permute(order)

    return mock.patch.object(TreeExchange, "exchange", exchange)


def _kernels() -> Any:
    """A single process computes with other kernels than several."""
    original = TreeExchange.forward

    def forward(tree: Any, model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=tree.division.world.size == 1):
            return original(tree, model, inputs)

    return mock.patch.object(TreeExchange, "forward", forward)


def _shape() -> Any:
    """Several processes compute in two micro-batches, a single one in one."""
    original = TrainingStep.__init__

    def init(step: Any, job: Job, profile: Any) -> None:
        object.__setattr__(job, "accumulation_steps", min(2, job.runtime.world.size))
        original(step, job, profile)

    return mock.patch.object(TrainingStep, "__init__", init)


def _buffers() -> Any:
    """Running statistics are those of the passes that this process made last."""
    original = virtual_ranks.Buffers.end_step

    def end_step(buffers: Any, statistics: Sequence[Tensor], retained: Sequence[Tensor]) -> None:
        original(buffers, [value.clone() for value in buffers.statistics], retained)

    return mock.patch.object(virtual_ranks.Buffers, "end_step", end_step)


MUTATIONS: dict[str, Callable[[], Any]] = {
    "association": _association,
    "seed": _seed,
    "layout": _layout,
    "kernels": _kernels,
    "shape": _shape,
    "buffers": _buffers,
}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """Run the block with a fault."""
    with MUTATIONS[name]():
        yield
