"""A stand-in for CUDA graphs that runs on CPUs: compiled code whose outputs lie in memory that is used again.

With `train.compile=reduce-overhead` torch records the forward and the backward pass as CUDA graphs. A replay writes
logits and gradients to the same memory as the one before, and a new pass frees what the last one returned. What a
program still uses then is overwritten. Here all of it becomes NaN when a pass begins, so every such use shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from distrain.training import setup


class Recorder:
    """Compiles for the stand-in, and records what happens.

    Attributes:
        events: in their order: "compile forward 4" for a graph that is compiled when a batch of 4 comes, "compile
            forward dynamic 4" if it is for any size, and the same for backward; "begin" for each call of
            `torch.compiler.cudagraph_mark_step_begin`; "forward" and "backward" for each run of a graph; "warm" when
            the warm-up has ended.
        gradients_after_warm_up: number of parameters that had a gradient then.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gradients_after_warm_up = 0
        self._overwrites, self._batch_size = False, 0
        self._memory: list[Tensor] = []
        self._backend = aot_autograd(
            fw_compiler=lambda module, inputs: self._record("forward", module, inputs),
            bw_compiler=lambda module, inputs: self._record("backward", module, inputs),
        )

    @property
    def graphs(self) -> list[str]:
        """The graphs that were compiled for forward passes."""
        return [event for event in self.events if event.startswith("compile forward")]

    @property
    def events_of_training(self) -> list[str]:
        """The events after the warm-up."""
        return self.events[self.events.index("warm") + 1 :]

    def compile(self, model: Any, mode: str, dynamic: bool, torch_compile: Callable[..., Any]) -> Any:
        """Replace torch.compile."""
        if not isinstance(getattr(model, "__self__", None), torch.nn.Module):
            return model  # augmentation: it has no CUDA graph
        self._overwrites = mode == "reduce-overhead"
        compiled = torch_compile(model, backend=self._backend, dynamic=dynamic)

        def call(inputs: Tensor) -> Any:
            self._batch_size = len(inputs)
            return compiled(inputs)

        return call

    def begin_pass(self) -> None:
        """Free the outputs of the passes before."""
        self.events.append("begin")
        for memory in self._memory:
            memory.fill_(torch.nan if memory.is_floating_point() else 0)

    def warm_up(self, job: Any, original: Callable[[Any], float]) -> float:
        """Replace `warm_up`."""
        seconds = original(job)
        self.events.append("warm")
        self.gradients_after_warm_up = sum(each.grad is not None for each in job.model.module.parameters())
        return seconds

    def _record(self, kind: str, module: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        dynamic = " dynamic" if any(isinstance(each, torch.SymInt) for each in inputs) else ""
        self.events.append(f"compile {kind}{dynamic} {self._batch_size}")
        static: dict[tuple[Any, ...], Tensor] = {}

        def run(*arguments: Any) -> list[Any]:
            self.events.append(kind)
            outputs: list[Any] = list(module(*arguments))
            if not self._overwrites:
                return outputs
            of_inputs = {each.untyped_storage()._cdata for each in arguments if isinstance(each, Tensor)}
            return [
                self._written(static, index, value)
                if isinstance(value, Tensor) and value.untyped_storage()._cdata not in of_inputs
                else value
                for index, value in enumerate(outputs)
            ]

        return make_boxed_func(run)

    def _written(self, static: dict[tuple[Any, ...], Tensor], index: int, value: Tensor) -> Tensor:
        """Write an output of a graph to its memory."""
        key = (index, value.shape, value.stride(), value.dtype)
        if key not in static:
            static[key] = torch.empty_like(value)
            self._memory.append(static[key])
        return static[key].copy_(value).data


@contextlib.contextmanager
def simulated() -> Iterator[Recorder]:
    """Within the block, models are compiled for the stand-in."""
    recorder, torch_compile, warm_up = Recorder(), torch.compile, setup.warm_up
    with (
        mock.patch.object(
            torch, "compile", lambda model, mode, dynamic: recorder.compile(model, mode, dynamic, torch_compile)
        ),
        mock.patch.object(torch.compiler, "cudagraph_mark_step_begin", recorder.begin_pass),
        mock.patch.object(setup, "warm_up", lambda job: recorder.warm_up(job, warm_up)),
    ):
        yield recorder
