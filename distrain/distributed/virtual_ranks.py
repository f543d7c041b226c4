"""Virtual ranks: processes that a run pretends to have, so that its bits do not depend on the number of real ones.

Every virtual rank runs its own forward and backward passes, with shapes and random numbers that do not depend on the
number of processes, and the gradients of all are added in the order of `gradient_tree`. So the weights are the same,
bit for bit, on any number of processes (EasyScale, SC'23, and VirtualFlow, MLSys'22, separate training from devices
like this).

A process adds up the largest subtrees that it can. Then each process receives one part, a W-th, of all subtrees of all
processes, completes the tree for that part, and sends the result to all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradient_tree import Node, TreeSum, subtrees
from distrain.distributed.gradients import DistributedModel
from distrain.distributed.stopwatch import Mark, Stopwatch
from distrain.environment import World
from distrain.errors import ConfigError
from distrain.models.batch_norm import Buffers
from distrain.models.repeatable import check_repeatable

_ALIGNMENT = 64
"""Bytes: a tensor begins at a multiple of this, as one that torch allocates itself."""
_SAMPLED = 100
"""Interval of the steps in which the exchange is measured on a GPU."""


@dataclass(frozen=True)
class Division:
    """The division of a global batch among virtual ranks.

    Attributes:
        world: this process and the number of processes.
        virtual_ranks: their number.
        global_batch_size: samples of a step.
    """

    world: World
    virtual_ranks: int
    global_batch_size: int

    def subtrees(self, rank: int) -> list[Node]:
        """The subtrees that a process adds up, from left to right."""
        ranks = World(rank, self.world.size).virtual_ranks(self.virtual_ranks)
        return subtrees(range(ranks[0].rank, ranks[-1].rank + 1), self.virtual_ranks)


class TreeExchange:
    """The gradients and buffers of a model that is trained by virtual ranks.

    Between `begin_rank` and `end_rank` a virtual rank runs its passes; the forward passes are run by `forward`. After
    all virtual ranks of this process, `exchange` adds up the gradients of all processes. It knows torch alone, so it
    serves the trainer (`VirtualRanks`) and other training loops (`distrain.VirtualRanks`).

    Args:
        module: the model.
        division: how the global batch is divided.
    """

    def __init__(self, module: nn.Module, division: Division) -> None:
        self.division, self._module = division, module
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        self._buffers = Buffers(module)
        self._statistics: list[Tensor] = []
        self._retained: list[Tensor] = []
        self._sums: list[_Sum] = []
        self._pass_count, self.in_step = 0, False

    def forward(self, model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Run a forward pass of the model, or of what wraps it; `inputs` is [n, …]."""
        self._pass_count += 1
        self._buffers.begin_forward()
        outputs = model(inputs)
        if self._statistics:
            weight = len(inputs) / self.division.global_batch_size
            torch._foreach_add_(self._statistics, self._buffers.statistics, alpha=weight)
        return outputs

    def observe(self) -> None:
        """See which buffers the first passes have changed; call it once, before a step."""
        self._buffers.observe(self._pass_count)
        self._statistics = [torch.zeros_like(value) for value in self._buffers.statistics]
        values = [*self.parameters, *self._statistics]
        self._sums = [_Sum(dtype, values, self.division) for dtype in dict.fromkeys(value.dtype for value in values)]

    def check_repeatable(self, forward: Callable[[Tensor], Tensor], inputs: Tensor, seed: Callable[[], None]) -> None:
        """Check that the model can be trained so; call it after `observe`: see `distrain.models.repeatable`."""
        check_repeatable(forward, self._module, self._buffers, inputs, seed)

    def begin_rank(self) -> None:
        """Begin the passes of a virtual rank, and a step with the first one."""
        if not self.in_step:
            self.in_step = True
            self._buffers.begin_step()
            for each in self._sums:
                each.begin()
        self._buffers.begin_pass()
        if self._statistics:
            torch._foreach_zero_(self._statistics)

    def end_rank(self, rank: int) -> None:
        """Move the gradients of a virtual rank to its leaf of the tree.

        Raises:
            ConfigError: a pass changed a buffer that the first pass did not change, or the shape or type of one.
        """
        problem = self._buffers.problem()
        if problem is not None:
            raise ConfigError(f"virtual ranks: {problem}, or train without virtual ranks")
        if rank == 0:
            self._retained = self._buffers.retained()
        gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in self.parameters]
        for total in self._sums:
            total.add_leaf(rank, [*gradients, *self._statistics])
        for parameter in self.parameters:
            parameter.grad = None

    def exchange(self) -> None:
        """Add the gradients of all virtual ranks, and update the running statistics of BatchNorm: a collective."""
        retained = self._retained or self._buffers.retained()
        by_index = {index: total for each in self._sums for index, total in each.total()}
        for value in retained if self.division.world.size > 1 else ():
            dist.broadcast(value, src=0)
        totals = [by_index[index] for index in sorted(by_index)]
        self._buffers.end_step(totals[len(self.parameters) :], retained)
        for parameter, gradient in zip(self.parameters, totals, strict=False):
            parameter.grad = gradient
        self.in_step, self._retained = False, []


class VirtualRanks(DistributedModel):
    """The model, whose gradients are added in an order that does not depend on the number of processes.

    Args:
        module: the model, as accelerate prepared it.
        accelerator: what prepared it.
        collectives: for the loss of a peer.
        compilation: how the model is compiled.
        division: how the global batch is divided.
    """

    runs_empty = False

    def __init__(
        self,
        module: nn.Module,
        accelerator: Any,
        collectives: Collectives,
        compilation: Compilation,
        division: Division,
    ) -> None:
        super().__init__(module, accelerator, collectives, compilation)
        self._tree = TreeExchange(module, division)
        self._clock = _Clock(self._tree.parameters[0].device)

    @property
    def loss_scale(self) -> float:
        """1 / G: the gradients of the virtual ranks are added."""
        return 1 / self._tree.division.global_batch_size

    @contextlib.contextmanager
    def virtual_rank(self, rank: World) -> Iterator[None]:
        """Run the passes of a virtual rank; their gradients go to its leaf of the tree.

        Raises:
            ConfigError: a pass changed a buffer that the first pass did not change, or the shape or type of one.
        """
        if not self._tree.in_step:
            self._clock.begin_step()
        self._tree.begin_rank()
        yield
        with self._collectives.fail_alone():
            self._tree.end_rank(rank.rank)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of shape [n, K] for normalised images of shape [n, C, H, W]."""
        return self._tree.forward(super().forward, inputs)

    def observe(self) -> None:
        """See which buffers the first passes have changed; call it once, before a step."""
        self._tree.observe()

    def check_repeatable(self, inputs: Tensor, seed: Callable[[], None]) -> None:
        """Check that the model can be trained so; call it after `observe`: see `distrain.models.repeatable`."""
        self._tree.check_repeatable(self.forward, inputs, seed)

    def exchange(self) -> None:
        """Add the gradients of all virtual ranks, and update the running statistics of BatchNorm."""
        self._clock.begin_exchange()
        with self._collectives.collective(), self.busy.waiting():
            self._tree.exchange()
        self._clock.end_exchange()

    def exchange_fraction(self) -> float:
        """Fraction of the computing time that was spent on the exchange, which no computation hides."""
        return self._clock.fraction()


def outgoing(subtotals: Sequence[Tensor], size: int) -> Tensor:
    """Return what a process sends: to each process in turn its part, a `size`-th, of all subtotals; flat.

    Args:
        subtotals: the values of the subtrees of this process, from left to right; each flat [size · part].
        size: number of processes.
    """
    if len(subtotals) == 1:
        return subtotals[0]
    return torch.stack([each.view(size, -1) for each in subtotals], 1).flatten()


def complete(received: Tensor, nodes: Sequence[Sequence[Node]], leaves: int) -> Tensor:
    """Complete the tree for one part; return its root [part].

    Args:
        received: the part of all subtotals, process by process and from left to right; flat, overwritten.
        nodes: the subtrees of each process.
        leaves: number of leaves of the whole tree.
    """
    tree = TreeSum(leaves, Tensor.add_)
    subtotals = [node for of_process in nodes for node in of_process]
    for node, value in zip(subtotals, received.view(len(subtotals), -1), strict=True):
        tree.push(node, value)
    [(_, root)] = tree.take()
    return root


@dataclass
class _Flat:
    """A flat buffer, and views of it in the shapes and strides of the values that it holds."""

    values: Tensor
    views: list[Tensor]


class _Sum:
    """The sum over all virtual ranks of those gradients and statistics that have one dtype.

    They lie in flat buffers, each value in the strides of its parameter: the norm of the same values in another layout
    has other last bits.
    """

    def __init__(self, dtype: torch.dtype, values: Sequence[Tensor], division: Division) -> None:
        self._division = division
        self._indices = [index for index, value in enumerate(values) if value.dtype == dtype]
        self._like = [torch.empty_like(values[index], device="meta") for index in self._indices]
        self._device = values[0].device
        step = _ALIGNMENT // dtype.itemsize
        sizes = [-(-value.numel() // step) * step for value in self._like]
        self._offsets = [0, *itertools.accumulate(sizes)][:-1]
        self._part = -(-sum(sizes) // (step * division.world.size)) * step
        self._nodes = [division.subtrees(rank) for rank in range(division.world.size)]
        self._free: list[_Flat] = []
        self._result: _Flat | None = None
        self._tree = TreeSum(division.virtual_ranks, self._add)

    def begin(self) -> None:
        """Begin a step: the totals of the last one are no longer needed."""
        if self._result is not None:
            self._free.append(self._result)
            self._result = None

    def add_leaf(self, rank: int, values: Sequence[Tensor]) -> None:
        """Give the values of a virtual rank, the next one: those of all dtypes."""
        flat = self._free.pop() if self._free else self._allocate()
        torch._foreach_copy_(flat.views, [values[index] for index in self._indices])
        self._tree.push(Node(rank, 1), flat)

    def total(self) -> list[tuple[int, Tensor]]:
        """Return the sums, each with its index among all values; they are valid until the next step begins."""
        self._result, *others = [flat for _, flat in self._tree.take()]
        if self._division.world.size > 1:
            self._exchange([self._result.values, *(each.values for each in others)])
        self._free += others
        return list(zip(self._indices, self._result.views, strict=True))

    def _exchange(self, subtotals: list[Tensor]) -> None:
        """Complete the tree together with the other processes; the first subtotal becomes its root."""
        part, nodes = self._part, self._nodes
        sent = outgoing(subtotals, len(nodes))
        received = sent.new_empty(sum(map(len, nodes)) * part)
        dist.all_to_all_single(
            received, sent, [len(each) * part for each in nodes], [len(subtotals) * part for _ in nodes]
        )
        dist.all_gather_into_tensor(subtotals[0], complete(received, nodes, self._division.virtual_ranks))

    def _add(self, left: _Flat, right: _Flat) -> _Flat:
        left.values.add_(right.values)
        self._free.append(right)
        return left

    def _allocate(self) -> _Flat:
        values = torch.zeros(self._part * self._division.world.size, dtype=self._like[0].dtype, device=self._device)
        views = [
            values.as_strided(like.size(), like.stride(), offset)
            for like, offset in zip(self._like, self._offsets, strict=True)
        ]
        return _Flat(values, views)


class _Clock:
    """Measures the part of the computing time that the exchange takes; on a GPU in some steps only."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._steps = device.type == "cuda", 0
        self._stopwatch = Stopwatch(self._on_gpu)
        self._marks: list[Mark] = []
        self._seconds = {"passes": 0.0, "exchange": 0.0}

    def begin_step(self) -> None:
        self._steps += 1
        self._mark()

    def begin_exchange(self) -> None:
        self._mark()

    def end_exchange(self) -> None:
        self._mark()
        if self._marks:
            begin, exchange, end = self._marks
            self._stopwatch.add("passes", begin, exchange)
            self._stopwatch.add("exchange", exchange, end)
            self._marks = []

    def fraction(self) -> float:
        for name, seconds in self._stopwatch.take().items():
            self._seconds[name] += seconds
        return self._seconds["exchange"] / (sum(self._seconds.values()) or 1.0)

    def _mark(self) -> None:
        if not self._on_gpu or self._steps % _SAMPLED == 2:
            self._marks.append(self._stopwatch.mark())
