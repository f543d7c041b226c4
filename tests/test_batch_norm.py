"""BatchNorm over all ranks: real processes against torch's layer, in one process and fp64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group import Group
from models_for_tests import TwoNames
from torch import Tensor, nn

from benchmarks.meta_device import Launches
from distrain.models import world_size_dependent
from distrain.models.batch_norm import local_batch_norm, sync_batch_norm

STEPS = {
    1: [(5,), (0,), (4,)],
    2: [(5, 2), (0, 6), (0, 0), (1, 2)],
    3: [(4, 0, 3), (0, 0, 0), (0, 0, 3), (1, 2, 2)],
}
"""Sizes of the local batches in each step, by number of ranks."""


@dataclass(frozen=True)
class Case:
    """A layer, and the inputs of its steps.

    Attributes:
        shape: of a sample; C first.
        dtype: of the inputs.
        tolerance: of results, relative to the largest one; buffers have at most 1e-6.
        layout: of the inputs.
        options: of the layer.
    """

    shape: tuple[int, ...] = (6, 4, 5)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12
    layout: torch.memory_format = torch.contiguous_format
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def layer_dtype(self) -> torch.dtype:
        """The type of the layer under autocast."""
        return torch.promote_types(self.dtype, torch.float32)

    def layer(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        kind = nn.BatchNorm2d if len(self.shape) == 3 else nn.BatchNorm1d
        layer = kind(self.shape[0], dtype=dtype, **dict(self.options))
        for parameter in layer.parameters():
            nn.init.normal_(parameter, 1.0)
        return layer

    def batch(self, step: int, sizes: tuple[int, ...]) -> list[Tensor]:
        """The global batch of a step, and the gradient of its output."""
        torch.manual_seed(step)
        x, gradient = torch.randn(2, sum(sizes), *self.shape, dtype=torch.float64).to(self.dtype)
        return [(20 + 3 * x).contiguous(memory_format=self.layout), gradient]


CASES = {
    "fp64": Case(),
    "fp32": Case(dtype=torch.float32, tolerance=1e-5),
    "bf16": Case(dtype=torch.bfloat16, tolerance=2**-7),
    "fp16": Case(dtype=torch.float16, tolerance=2**-10),
    "channels last": Case(layout=torch.channels_last),
    "bf16, channels last": Case(dtype=torch.bfloat16, tolerance=2**-7, layout=torch.channels_last),
    "[N, C]": Case(shape=(6,)),
    "[N, C, L]": Case(shape=(6, 7)),
    "momentum None": Case(options=(("momentum", None),)),
    "without weights": Case(options=(("affine", False),)),
}


def steps_of_rank(case: Case, rank: int, steps: list[tuple[int, ...]], device: str = "cpu") -> list[dict[str, Tensor]]:
    """Run the steps of a rank; return the output, gradients and buffers of each."""
    layer = sync_batch_norm(case.layer(case.layer_dtype).to(device))
    results = []
    for step, sizes in enumerate(steps):
        local = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x, gradient = (each[local].to(device) for each in case.batch(step, sizes))
        out = layer(x.requires_grad_())
        out.backward(gradient)
        assert x.grad is not None
        assert out.dtype == x.grad.dtype == case.dtype
        if len(x) > 1:
            assert out.stride() == x.grad.stride() == x.stride()
        assert not any(buffer.requires_grad for buffer in layer.buffers()), "would hold the graphs of all steps"
        results.append({"out": out.detach(), "x": x.grad, **_state(layer)})
    return results


def _state(layer: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers, and the gradients of the parameters, which are set to None."""
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return buffers | {name: gradient for name, gradient in gradients.items() if gradient is not None}


def steps_of_all_cases() -> dict[str, Any]:
    """Run all cases on this rank; the results are NumPy arrays, which a pipe can send."""
    with a_group():
        rank, steps = dist.get_rank(), STEPS[dist.get_world_size()]
        results = {name: steps_of_rank(case, rank, steps) for name, case in CASES.items()}
    return {
        name: [{key: value.double().numpy() for key, value in step.items()} for step in each]
        for name, each in results.items()
    }


@contextlib.contextmanager
def a_group(backend: str = "gloo") -> Iterator[None]:
    """The process's group, or one of this process alone."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def expected(case: Case, steps: list[tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Run the same steps with torch's layer, in one process and fp64."""
    layer = case.layer(torch.float64)
    results = []
    for step, sizes in enumerate(steps):
        x, gradient = (each.double() for each in case.batch(step, sizes))
        if len(x) == 0:
            results.append({"out": x, "x": x, **_state(layer)})
            continue
        out = layer(x.requires_grad_())
        out.backward(gradient)
        assert x.grad is not None
        results.append({"out": out.detach(), "x": x.grad, **_state(layer)})
    return results


def difference(result: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert result.shape == right.shape
    return float((result - right).abs().max() / right.abs().max().clamp(min=1e-3)) if right.numel() else 0.0


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_compute_what_one_process_computes(size: int, group: Callable[[int], Group]) -> None:
    answers = group(size).call("function", steps_of_all_cases)
    for name, case in CASES.items():
        for step, right in enumerate(expected(case, STEPS[size])):
            of_ranks = [
                {key: torch.from_numpy(value) for key, value in answer[name][step].items()} for answer in answers
            ]
            for key in ("out", "x"):
                joined = torch.cat([each[key] for each in of_ranks])
                assert difference(joined, right[key]) <= case.tolerance, (name, step, key)
            for key in right.keys() & {"weight", "bias"}:
                added = torch.stack([each[key] for each in of_ranks]).sum(0)
                assert difference(added, right[key]) <= case.tolerance, (name, step, key)
            for key in ("running_mean", "running_var", "num_batches_tracked"):
                assert all(torch.equal(each[key], of_ranks[0][key]) for each in of_ranks), (name, step, key)
                assert difference(of_ranks[0][key], right[key].double()) <= min(case.tolerance, 1e-6), (name, step, key)


class Branches(nn.Module):
    """Two BatchNorm layers side by side, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.left_norm, self.right_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        """Numbers [N, 4, H - 2, W - 2]."""
        left = self.left_norm(self.left(images)).relu()
        return self.left_norm(left) * self.right_norm(self.right(images)).relu()


def gradients_of_a_model(compiled: bool) -> list[Any]:
    """Train two steps of two micro-batches, of any sizes, under DDP; return the gradients after each step."""
    torch.manual_seed(0)
    model: nn.Module = Branches().double()
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        model = sync_batch_norm(model)
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="aot_eager")
        prepared: Any = nn.parallel.DistributedDataParallel(model)
        prepared.broadcast_buffers = False
    else:
        rank, size, prepared = 0, 1, model
    gradients = []
    for micro_batches in ([(3, 4), (1, 2)], [(0, 5), (2, 0)]):
        for index, sizes in enumerate(micro_batches):
            images = torch.randn(sum(sizes), 3, 6, 6, dtype=torch.float64)
            local = images if size == 1 else images.split(sizes)[rank]
            with prepared.no_sync() if size > 1 and index == 0 else contextlib.nullcontext():
                (prepared(local).square().sum() * size).backward()
        gradients.append([each.grad.clone().numpy() for each in model.parameters() if each.grad is not None])
        model.zero_grad()
    return gradients


@pytest.mark.ranks
def test_a_model_under_ddp_with_accumulation_and_compiled(group: Callable[[int], Group]) -> None:
    right = gradients_of_a_model(compiled=False)
    for compiled in (False, True):
        for gradients in group(2).call("function", gradients_of_a_model, compiled):
            for result, one in zip(sum(gradients, []), sum(right, []), strict=True):
                assert difference(torch.from_numpy(result), torch.from_numpy(one)) < 1e-10, compiled


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("samples", [4, 0])
def test_no_pass_waits_for_the_device_and_launches_are_few(samples: int, momentum: float | None) -> None:
    layer = sync_batch_norm(nn.BatchNorm2d(3, momentum=momentum))
    x = torch.randn(samples, 3, 4, 4).bfloat16().requires_grad_()
    with a_group():
        with Launches("cpu") as forward:
            out = layer(x)
        gradient = torch.ones_like(out)
        with Launches("cpu") as backward:
            out.backward(gradient)
    assert forward.total <= 28
    assert backward.total <= 15
    assert forward.collectives == {"_allgather_base_": 1}
    assert backward.collectives == {"allreduce_": 1}


def test_a_second_derivative_is_refused() -> None:
    layer = sync_batch_norm(nn.BatchNorm1d(3))
    x = torch.randn(4, 3, requires_grad=True)
    with a_group():
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_only_gradients_that_are_needed_are_computed() -> None:
    layer = sync_batch_norm(nn.BatchNorm1d(3))
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.requires_grad_(False)
    with a_group(), Launches("cpu") as operations:
        layer(torch.randn(4, 3)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert operations.collectives == {"_allgather_base_": 1}


def test_evaluation_uses_the_running_statistics_and_no_collective() -> None:
    layer = nn.BatchNorm1d(3)
    layer(torch.randn(4, 3))
    layer.eval()
    x = torch.randn(2, 3)
    assert torch.equal(sync_batch_norm(copy.deepcopy(layer))(x), layer(x))


@pytest.mark.parametrize("convert", [local_batch_norm, sync_batch_norm])
def test_a_layer_with_two_names_is_converted_to_one_layer(convert: Callable[[nn.Module], nn.Module]) -> None:
    model = convert(TwoNames(10, (3, 4, 4)))
    assert isinstance(model, TwoNames)
    assert model.first is model.second
    assert not isinstance(model.first, nn.SyncBatchNorm)


class Squared(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_a_class_with_a_forward_of_its_own_is_named_and_not_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Squared(4), nn.BatchNorm2d(4))
    assert world_size_dependent(model) == ["Squared"]
    assert [type(layer).__name__ for layer in sync_batch_norm(model)] == ["Conv2d", "Squared", "GlobalBatchNorm"]
