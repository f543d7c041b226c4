"""Optimizers by name, the learning rate as a pure function of the step, and the average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from distrain.config import Train

_FEW_STEPS_PER_EPOCH, _FEW_STEPS = 10, 500
"""Steps of an epoch, and of a run, below which most models learn little."""


def build(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float,
    nesterov: bool,
    betas: Sequence[float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build SGD, Adam or AdamW, fused: one kernel for all parameters (a twentieth of a small step on CPUs)."""
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
        )
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)


def learning_rate(step: int, total_steps: int, schedule: str, peak: float, warmup_fraction: float) -> float:
    """Return the learning rate of a step in 0 … total_steps - 1, taken at the middle of the step so that none is 0.

    one_cycle: linear up and down, after Smith, "Super-convergence" (2018); cosine: linear up, then down after
    Loshchilov and Hutter, "SGDR" (2017).
    """
    progress = (step + 0.5) / total_steps
    if schedule == "constant":
        return peak
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    remaining = (1 - progress) / (1 - warmup_fraction)
    return peak * (remaining if schedule == "one_cycle" else 0.5 * (1 - math.cos(math.pi * remaining)))


def advice(train: Train, images: int, fewest: int) -> str | None:
    """Return better values for a run that would make only a few steps, as arguments to type; else None.

    Args:
        train: section `train` of the configuration.
        images: number of images that an epoch uses.
        fewest: smallest global batch that is possible.
    """
    batch, steps_per_epoch = train.global_batch_size, images // train.global_batch_size
    steps = train.max_steps or (train.epochs or 0) * steps_per_epoch
    if steps_per_epoch >= _FEW_STEPS_PER_EPOCH or steps >= _FEW_STEPS:
        return None
    power = 2 ** max(3, (images // _FEW_STEPS_PER_EPOCH).bit_length() - 1)
    smaller = max(fewest, min(batch, power))
    values = []
    if smaller < batch:
        values.append(f"train.global_batch_size={smaller}")
        if train.optimizer == "sgd":  # its updates are proportional to the learning rate
            values.append(f"train.lr={train.lr * smaller / batch:.2g}")
    if train.max_steps is not None:
        values.append(f"train.max_steps={2 * _FEW_STEPS}")
    else:
        values.append(f"train.epochs={-(-2 * _FEW_STEPS // max(images // smaller, 1))}")
    return " ".join(values)


def ema_decay(limit: float, updates: int) -> float:
    """Return the decay of an EMA that was updated `updates` times: it rises from 0.1 to the limit.

    With the limit from the start, the average would consist of the first weights for about 1 / (1 - limit) steps.
    """
    return min(limit, (1 + updates) / (10 + updates))


class WeightAverage:
    """The exponential moving average (EMA) of a module's weights and floating-point buffers.

    The first update copies the weights; each other one computes decay · EMA + (1 - decay) · weights, with the decay of
    `ema_decay`. Buffers of integers, such as counters, are copied. All tensors of a dtype are updated by one fused
    operation, which needs them in one memory layout: give the module as it is trained, on its device. No update waits
    for the device.

    Args:
        source: the module to average; `module` begins as its copy.
        limit: `train.ema_decay`.
    """

    def __init__(self, source: nn.Module, limit: float) -> None:
        self.module = copy.deepcopy(source)
        """The module that has the average."""
        self.updates = 0
        """Number of updates so far."""
        self._limit = limit
        pairs: dict[torch.dtype, list[tuple[_Slot, _Slot]]] = {}
        for average, current in zip(_slots(self.module), _slots(source), strict=True):
            pairs.setdefault(average.tensor.dtype, []).append((average, current))
        self._groups = list(pairs.values())

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the present weights."""
        weight = 1 - ema_decay(self._limit, self.updates)
        for group in self._groups:
            averages = [average.tensor for average, _ in group]
            current = [each.tensor for _, each in group]
            if self.updates and (averages[0].is_floating_point() or averages[0].is_complex()):
                torch._foreach_lerp_(averages, current, weight)
            else:
                torch._foreach_copy_(averages, current)
        self.updates += 1


class _Slot(NamedTuple):
    """A parameter or buffer by its name in a module: a pass may replace a buffer by another tensor."""

    tensors: dict[str, Tensor | None]
    name: str

    @property
    def tensor(self) -> Tensor:
        tensor = self.tensors[self.name]
        assert tensor is not None
        return tensor


def _slots(module: nn.Module) -> Iterator[_Slot]:
    """Yield the parameters and buffers of a module, each tensor once."""
    seen: set[int] = set()
    for layer in module.modules():
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield _Slot(cast(dict[str, Tensor | None], tensors), name)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state, flat: `parameter number.name` → tensor; settings are the configuration's."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `state_tensors` returned, each tensor in the memory layout of its parameter.

    A file has no layouts. With another one than the parameter's, CUDA's fused optimizers abort, and those of CPUs mix
    up the values.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        of_number = state.setdefault(int(number), {})
        of_number[name] = value
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            of_number[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
