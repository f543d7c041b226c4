"""Optimizers by name, the learning rate as a pure function of the step, and the average of the weights.

Their state is saved by `optimizer_state`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from distrain import plugins
from distrain.config import Train, is_user_code
from distrain.errors import ConfigError
from distrain.text import shortened
from distrain.training import parameter_groups
from distrain.training.muon import Muon

_FEW_STEPS_PER_EPOCH, _FEW_STEPS, _FEW_STEPS_PRETRAINED = 10, 500, 100
"""Steps of an epoch, and of a run, below which most models learn little; and of a run with `model.init`."""


_INITIAL_LR = "initial_lr"
"""Name of a group's own learning rate at the start, as the schedulers of torch call it."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The keys of section `train` that describe the optimizer, for a function of the user.

    Attributes:
        lr: learning rate, before the schedule.
        momentum: in 0 … 1.
        nesterov: whether to use Nesterov momentum.
        betas: two numbers in 0 … 1.
        weight_decay: at least 0.
        args: `train.optimizer_args`, whose content is for the user's function alone.
    """

    lr: float
    momentum: float
    nesterov: bool
    betas: tuple[float, float]
    weight_decay: float
    args: Mapping[str, Any]

    @classmethod
    def of(cls, train: Train) -> OptimizerSettings:
        """Return the settings of a configuration."""
        betas = (train.betas[0], train.betas[1])
        args = MappingProxyType(train.optimizer_args)
        return cls(train.lr, train.momentum, train.nesterov, betas, train.weight_decay, args)


def build(train: Train, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the configuration names.

    SGD, Adam and AdamW are fused: one kernel for all parameters (a twentieth of a small step on CPUs).

    Args:
        train: section `train` of the configuration.
        module: the model, whose trainable parameters the optimizer updates.

    Raises:
        ConfigError: an optimizer of the user cannot be built, or does not update all trainable parameters.
    """
    settings = OptimizerSettings.of(train)
    optimizer: torch.optim.Optimizer
    if is_user_code(train.optimizer):
        optimizer = _build_user_optimizer(train, module, settings)
    else:
        shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        momentum: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov}
        groups = parameter_groups.groups(module, train)
        if train.optimizer == "muon":
            _check_has_matrices(groups)
            optimizer = Muon(
                groups, **shared, **momentum, iterations=train.muon_iterations, normalize=train.muon_normalize
            )
        elif train.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, **shared, **momentum, fused=True)
        else:
            kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
            optimizer = kind(groups, **shared, betas=settings.betas, fused=True)
    for group in optimizer.param_groups:
        group[_INITIAL_LR] = float(group["lr"])
    return optimizer


def _check_has_matrices(groups: list[dict[str, Any]]) -> None:
    """Check that Muon is used for some weights: without any, it is SGD."""
    if not any(group.get("orthogonal") for group in groups):
        raise ConfigError(
            "train.optimizer=muon: it is for weights of two or more dimensions outside the last layer, and none of"
            " these is trained; set train.optimizer=sgd"
        )


def _build_user_optimizer(train: Train, module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    subject = f"train.optimizer={train.optimizer}"
    factory = plugins.find(subject, train.optimizer)
    if isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer):
        keywords = _keywords(factory, settings)
        with plugins.user_code(f"{subject}: called with the parameters and {', '.join(keywords)}"):
            optimizer = factory(parameter_groups.groups(module, train), **keywords)
    else:
        _check_makes_groups(subject, train)
        with plugins.user_code(f"{subject}: called with (module, settings)"):
            optimizer = factory(module, settings)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{subject}: returns a {type(optimizer).__name__}, not one torch.optim.Optimizer")
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        raise ConfigError(
            f"{subject}: {type(optimizer).__name__} has two modes, train() and eval(), which are not supported: choose"
            " another one; train.ema_decay averages the weights of any optimizer"
        )
    _check_groups(subject, optimizer, module)
    return optimizer


def _check_makes_groups(subject: str, train: Train) -> None:
    """Check that no keys ask for groups of parameters, which a function of the user makes itself."""
    scaled = [key for key, factor in train.lr_scale.items() if factor not in (0, 1)]
    if scaled or not train.decay_biases:
        key = f"train.lr_scale of {', '.join(scaled)}" if scaled else "train.decay_biases=false"
        raise ConfigError(
            f"{subject}: is a function, which makes its own groups of parameters, so {key} would have no effect: set lr"
            " and weight_decay in its groups, or give a class of optimizers"
        )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's class, and its settings that are numbers or lists of them, as text."""
    values = {
        name: value for name, value in optimizer.defaults.items() if isinstance(value, float | int | tuple | list)
    }
    shown = {name: value for name, value in values.items() if value is not False}
    groups = f"; {len(optimizer.param_groups)} groups" if len(optimizer.param_groups) > 1 else ""
    return f"{type(optimizer).__name__}{''.join(f', {name} {value}' for name, value in shown.items())}{groups}"


def _keywords(factory: type, settings: OptimizerSettings) -> dict[str, Any]:
    """Return the arguments of a class of optimizers, beside the parameters."""
    accepted = inspect.signature(factory).parameters
    keys = ("lr", "momentum", "nesterov", "betas", "weight_decay")
    given = {key: getattr(settings, key) for key in keys if key == "lr" or key in accepted}
    return {**given, **settings.args}


def _check_groups(subject: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Check that an optimizer updates all trainable parameters of the model and no others, with a learning rate."""
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    forgotten = [named[id(each)] for each in module.parameters() if each.requires_grad and id(each) not in given]
    if forgotten:
        raise ConfigError(
            f"{subject}: does not have the parameters {', '.join(shortened(forgotten, 5))}; put them into one of its"
            " groups, or freeze them in the model with requires_grad_(False)"
        )
    if given - named.keys():
        raise ConfigError(f"{subject}: has parameters that the model does not have; give it those of `module`")
    for number, group in enumerate(optimizer.param_groups):
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ConfigError(
                f"{subject}: group {number} has no number lr, which is set in each step; give it the scale that it"
                " should have beside train.lr"
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, initial: float) -> None:
    """Set the learning rate of a step; a group that began with another rate than `initial` keeps that ratio.

    Args:
        optimizer: one that `build` returned.
        rate: the learning rate of the step.
        initial: `train.lr`.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * (group[_INITIAL_LR] / initial)  # times 1.0 exactly, for most


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


def advice(train: Train, images: int, fewest: int, pretrained: bool = False) -> str | None:
    """Return better values for a run that would make only a few steps, as arguments to type; else None.

    Args:
        train: section `train` of the configuration.
        images: number of images that an epoch uses.
        fewest: smallest global batch that is possible.
        pretrained: whether the run begins with weights that were trained before.
    """
    few_steps = _FEW_STEPS_PRETRAINED if pretrained else _FEW_STEPS
    batch, steps_per_epoch = train.global_batch_size, images // train.global_batch_size
    steps = train.max_steps or (train.epochs or 0) * steps_per_epoch
    if steps_per_epoch >= _FEW_STEPS_PER_EPOCH or steps >= few_steps:
        return None
    power = 2 ** max(3, (images // _FEW_STEPS_PER_EPOCH).bit_length() - 1)
    smaller = max(fewest, min(batch, power))
    values = []
    if smaller < batch:
        values.append(f"train.global_batch_size={smaller}")
        if train.optimizer == "sgd":  # its updates are proportional to the learning rate
            values.append(f"train.lr={train.lr * smaller / batch:.2g}")
    if train.max_steps is not None:
        values.append(f"train.max_steps={2 * few_steps}")
    else:
        values.append(f"train.epochs={-(-2 * few_steps // max(images // smaller, 1))}")
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
