"""Optimizers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


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
