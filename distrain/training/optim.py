"""Optimizers by name, the learning rate as a pure function of the step, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


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


def ema_decay(limit: float, updates: int) -> float:
    """Return the decay of an EMA that was updated `updates` times: it rises from 0.1 to the limit.

    With the limit from the start, the average would consist of the first weights for about 1 / (1 - limit) steps.
    """
    return min(limit, (1 + updates) / (10 + updates))


def make_ema(module: nn.Module, limit: float) -> AveragedModel:
    """Return the exponential moving average (EMA) of a module's weights and floating-point buffers.

    Each update computes decay · EMA + (1 - decay) · weights, with the decay of `ema_decay`. Buffers of integers, such
    as indices, are copied.
    """

    def update(averaged: Any, current: Any, _: Any) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            get_ema_multi_avg_fn(ema_decay(limit, int(ema.n_averaged)))(averaged, current, _)
        else:
            torch._foreach_copy_(averaged, current)

    ema = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    return ema


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
    """Restore what `state_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
