"""Compilation of the passes of training, and of the augmentation before them (`train.compile`).

What is compiled decides the last bits, so it must depend on the configuration and the data set alone, and not on the
sizes of batches that happened to come first. So the warm-up compiles for all sizes of the run, in a fixed order.
Evaluations are not compiled: they would need graphs of their own, and an average of the weights a model of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OTHER_GRAPHS = 8
"""torch's own limit of graphs for one piece of code."""


@dataclass(frozen=True)
class Compilation:
    """The mode in which the passes of training are compiled, and for which sizes.

    Attributes:
        mode: `train.compile`.
        sizes: the sizes of micro-batches that are trained in the run, on any process, from the largest on.
        image_sizes: number of sizes of images; each has graphs of its own.
    """

    mode: str
    sizes: tuple[int, ...]
    image_sizes: int = 1

    @property
    def is_on(self) -> bool:
        """Whether anything is compiled."""
        return self.mode != "off"

    @property
    def is_dynamic(self) -> bool:
        """Whether one graph is compiled for many sizes of batches, instead of one size."""
        return len(self.sizes) > 1

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether passes are CUDA graphs. The next pass overwrites what one returns: logits and gradients."""
        return self.mode == "reduce-overhead"

    def apply(self, module: nn.Module) -> None:
        """Compile a model, at its first passes."""
        if not self.is_on:
            return
        torch.compiler.reset()  # an earlier run in this process may have compiled the same code for other sizes
        # After a break in a graph, what follows is compiled for each size; beyond a limit, torch would not compile it.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, len(self.sizes) * self.image_sizes + _OTHER_GRAPHS)
        limits.fail_on_recompile_limit_hit = True
        if hasattr(torch._inductor.config, "deterministic"):  # no choice by measured times changes the last bits
            torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
        module.compile(mode=self.mode, dynamic=False)  # only what `begin_pass` marks is dynamic

    def begin_pass(self, inputs: Tensor) -> None:
        """Prepare the forward pass of a micro-batch: [n, C, H, W]."""
        if self.has_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        self._mark_size(inputs)

    def function(self, function: Callable[..., Tensor], batches: int) -> Callable[..., Tensor]:
        """Return a function of tensors, compiled as the model is, but without CUDA graphs: its result stays.

        Args:
            function: without gradients.
            batches: number of its first arguments whose first dimension is the size of a batch.
        """
        if not self.is_on:
            return function
        compiled = torch.compile(function, mode="default", dynamic=False)

        def call(*arguments: Any) -> Tensor:
            for batch in arguments[:batches]:
                self._mark_size(batch)
            result: Tensor = compiled(*arguments)
            return result

        return call

    def _mark_size(self, batch: Tensor) -> None:
        """Let torch compile for batches of any size, if the run has several."""
        if self.is_on and self.is_dynamic and len(batch) > 1:  # torch always compiles 0 and 1 separately
            torch._dynamo.maybe_mark_dynamic(batch, 0)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the block without compiled code, and compile nothing in it."""
        if not self.is_on:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


@contextlib.contextmanager
def settings_restored(mode: str) -> Iterator[None]:
    """Run the block, and restore torch's settings that `Compilation.apply` changes.

    Args:
        mode: `train.compile`.
    """
    if mode == "off":
        yield
        return
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    limits: dict[str, Any] = {
        "recompile_limit": dynamo.recompile_limit,
        "fail_on_recompile_limit_hit": dynamo.fail_on_recompile_limit_hit,
    }
    others: dict[str, Any] = {"deterministic": inductor.deterministic} if hasattr(inductor, "deterministic") else {}
    with dynamo.patch(limits), inductor.patch(others):  # changes nothing; its end restores these values
        yield


class AccumulatedGradients:
    """Keeps gradients that further micro-batches are added to out of the memory of CUDA graphs.

    Autograd does not copy the first gradient of a parameter: with CUDA graphs it stays in memory that the next pass
    overwrites. Later ones are added to it in place.
    """

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self._parameters = [each for each in parameters if each.requires_grad]
        self._copies: dict[nn.Parameter, Tensor] = {}

    def move(self) -> None:
        """Copy the gradients that a pass has left, so that the next pass may begin."""
        new = [each for each in self._parameters if each.grad is not None and each.grad is not self._copies.get(each)]
        gradients = [each.grad for each in new if each.grad is not None]
        if not new:
            return
        copies = [
            self._copies.setdefault(each, torch.empty_like(gradient))
            for each, gradient in zip(new, gradients, strict=True)
        ]
        torch._foreach_copy_(copies, gradients)
        for parameter, copy in zip(new, copies, strict=True):
            parameter.grad = copy
