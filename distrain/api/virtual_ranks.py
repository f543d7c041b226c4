"""Gradients of a training loop of one's own, added as `train.virtual_ranks` adds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distrain.api.group import in_group, world_of
from distrain.distributed.virtual_ranks import Division, GradientSum
from distrain.environment import World
from distrain.errors import ConfigError
from distrain.text import plural


class VirtualRankGradients:
    """Adds the gradients of all virtual ranks in an order that does not depend on the number of processes.

        gradients = distrain.VirtualRankGradients(model.parameters(), virtual_ranks=8)
        for of_ranks in distrain.batches("data/cifar10", global_batch_size=512, steps=steps, virtual_ranks=8):
            for batch in of_ranks:
                (loss_sum(model, batch) / 512).backward()
                gradients.add()
            gradients.exchange()
            optimizer.step()
            optimizer.zero_grad()

    The sums have the same bits on any number of processes up to `virtual_ranks`, if the gradients of each virtual rank
    have: a pass computes no samples of two virtual ranks, all processes have the same kind of processor and the same
    number of threads (`torch.set_num_threads`), and random numbers of the model, such as dropout's, are seeded for each
    virtual rank and step. Use the model without DDP, and begin with the same weights on all processes. Buffers that a
    pass changes, such as BatchNorm's running statistics, are not exchanged: `distrain train` does that.

    Args:
        parameters: of the model; those that require no gradient are passed over.
        virtual_ranks: their number, over all processes.

    Raises:
        ConfigError: there are more processes than virtual ranks, or several processes without torch.distributed.
    """

    def __init__(self, parameters: Iterable[Tensor], *, virtual_ranks: int) -> None:
        world = world_of(None, None)
        if world.size > virtual_ranks:
            raise ConfigError(f"{plural(world.size, 'process')} for virtual_ranks={virtual_ranks}: each needs one")
        if world.size > 1 and not in_group():
            raise ConfigError(f"WORLD_SIZE={world.size}: call torch.distributed.init_process_group first")
        self.ranks: tuple[World, ...] = world.virtual_ranks(virtual_ranks)
        """The virtual ranks of this process, in the order of their batches."""
        self._parameters = [each for each in parameters if each.requires_grad]
        division = Division(world, virtual_ranks)
        dtypes = dict.fromkeys(each.dtype for each in self._parameters)
        self._sums = [GradientSum(dtype, self._parameters, division) for dtype in dtypes]
        self._added = 0

    def add(self) -> None:
        """Take the gradients of the next virtual rank of this process; the parameters then have none.

        Call it once for each virtual rank, after all its backward passes. A parameter without a gradient adds zeros.

        Raises:
            ConfigError: all virtual ranks of this process were added already.
        """
        if self._added == len(self.ranks):
            raise ConfigError(
                f"this process has {plural(len(self.ranks), 'virtual rank')}: call exchange after the last"
            )
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in self._parameters]
        for total in self._sums:
            if self._added == 0:
                total.begin()
            total.add_leaf(self.ranks[self._added].rank, gradients)
        self._added += 1
        for parameter in self._parameters:
            parameter.grad = None

    def exchange(self) -> None:
        """Give each parameter the sum of the gradients of all virtual ranks; a collective of the default group.

        The gradients are valid until `add` is called again.

        Raises:
            ConfigError: a virtual rank of this process was not added.
        """
        if self._added != len(self.ranks):
            raise ConfigError(f"{self._added} of this process's {plural(len(self.ranks), 'virtual rank')} were added")
        self._added = 0
        for each in self._sums:
            for index, total in each.total():
                self._parameters[index].grad = total
