"""The state of an optimizer as tensors, for checkpoints; and a check, before training, that nothing of it is lost so.

`3.exp_avg` is the tensor `exp_avg` of the model's parameter 3. `group.0.k` is the value `k` of group 0, which some
optimizers change. A name that ends with # is a number of Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrain import models, plugins
from distrain.config import Train
from distrain.distributed import gpu_errors
from distrain.errors import ConfigError

_GROUP, _NUMBER = "group.", "#"
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}
_SET_IN_EACH_STEP = ("lr", "initial_lr")
"""Values of a group that the configuration and the step determine."""


def state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state, flat; parameters are numbered in the order of the model.

    The optimizer's own order may differ in another process, for example if a set of parameters was made.
    """
    tensors: dict[str, Tensor] = {}
    for number, values in _by_number(optimizer, module).items():
        for name, value in values.items():
            _add(tensors, f"{number}.{name}", value)
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in _SET_IN_EACH_STEP:
                _add(tensors, f"{_GROUP}{number}.{name}", value)
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `state_tensors` returned, each tensor in the memory layout of its parameter.

    A file has no layouts. With another one than the parameter's, CUDA's fused optimizers abort, and those of CPUs mix
    up the values.

    Raises:
        ConfigError: the optimizer has other parameters or groups than the one that was saved.
    """
    parameters, content = list(module.parameters()), optimizer.state_dict()
    positions = {id(parameter): index for index, parameter in enumerate(_in_groups(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    content["state"] = state
    try:
        for key, tensor in tensors.items():
            owner, _, name = key.removeprefix(_GROUP).partition(".")
            value = tensor.item() if name.endswith(_NUMBER) else tensor
            name = name.removesuffix(_NUMBER)
            if key.startswith(_GROUP):
                group = content["param_groups"][int(owner)]
                group[name] = _on_device_of(group.get(name), value)
                continue
            parameter = parameters[int(owner)]
            state.setdefault(positions[id(parameter)], {})[name] = _in_layout(value, parameter)
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"train.optimizer: has other parameters or groups than when the checkpoint was saved ({key}); bring its"
            " code back, or choose another run.dir"
        ) from error
    optimizer.load_state_dict(content)
    _restore_types(optimizer, state)


def bytes_on(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of the optimizer's state on a device."""
    values = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in values if value.device.type == device.type)


def check_resumable(train: Train, module: nn.Module, build: Callable[[], torch.optim.Optimizer]) -> None:
    """Check an optimizer of the user by a few steps: that it works, is the same after a resume, and follows lr.

    Weights, gradients and the state of torch's generators are as before.

    Args:
        train: section `train` of the configuration.
        module: the model on its device, with its initial weights.
        build: returns a new optimizer of the model.

    Raises:
        ConfigError: it is not.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before, device = _copies(parameters), parameters[0].device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _compare_with_resumed(train, module, parameters, build)
    finally:
        _set(parameters, before)
        for parameter in parameters:
            parameter.grad = None


def _compare_with_resumed(
    train: Train, module: nn.Module, parameters: Sequence[nn.Parameter], build: Callable[[], torch.optim.Optimizer]
) -> None:
    """Compare a second step with that of an optimizer that was resumed before it, and with one of half the lr."""
    subject, optimizer = f"train.optimizer={train.optimizer}", build()
    _set_learning_rate(optimizer, 1.0)
    _step(subject, optimizer, parameters, seed=0)
    _check_kinds(subject, optimizer, module)
    saved, weights, not_saved = _saved(subject, optimizer, module), _copies(parameters), _not_saved(optimizer)
    _step(subject, optimizer, parameters, seed=1)
    changed = [name for name, text in _not_saved(optimizer).items() if not_saved.get(name) != text]
    if changed:
        raise ConfigError(
            f"{subject}: a step changes {changed[0]}, which is not saved: keep it in state[parameter] or in a group, as"
            " tensors or numbers"
        )
    expected, state = _copies(parameters), _saved(subject, optimizer, module)
    for factor in (1.0,) if train.schedule == "constant" else (1.0, 0.5):
        _set(parameters, weights)
        resumed = build()
        with plugins.user_code(f"{subject}: its state cannot be restored"):
            load_state_tensors(resumed, module, saved)
        _set_learning_rate(resumed, factor)
        _step(subject, resumed, parameters, seed=2)
        same_weights = all(map(_same_bits, parameters, expected))
        if factor == 1 and not (same_weights and _same_state(_saved(subject, resumed, module), state)):
            raise ConfigError(
                f"{subject}: a step after a resume differs from the same step without one: it draws random numbers, or"
                " has values outside of its state and groups; keep them in state[parameter] or in a group, as tensors"
                " or numbers"
            )
        if factor < 1 and same_weights:
            raise ConfigError(
                f'{subject}: a step with half of group["lr"] changes the weights in the same way, so train.schedule'
                " would have no effect: read that value in each step, or set train.schedule=constant"
            )


def _set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set that of each group to `factor` times its initial one, a number as in training, also for a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def _saved(subject: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the state as a checkpoint has it."""
    with plugins.user_code(f"{subject}: its state cannot be saved"):
        tensors = state_tensors(optimizer, module)
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _step(subject: str, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = parameter.detach() * 0.01 + 0.001
    try:
        optimizer.step()
    except plugins.CATCHABLE as error:
        if gpu_errors.is_one(error):
            raise
        raise ConfigError(f"{subject}: fails in a step: {plugins.describe(error)}") from error


def _check_kinds(subject: str, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Check that a checkpoint can hold all that an optimizer has in its state."""
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    for key, values in optimizer.state.items():
        if id(key) not in named:
            raise ConfigError(
                f"{subject}: has state[{key!r}], which is not saved: keep it in state[parameter] or in a group"
            )
        for name, value in values.items():
            plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
            if not (plain or value is None or type(value) in _DTYPES):
                raise ConfigError(
                    f"{subject}: has a {type(value).__name__} in state[parameter][{name!r}], which is not saved: keep"
                    " tensors and numbers there"
                )


def _not_saved(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the values of the groups that are neither tensors nor numbers, and those of attributes, as text."""
    in_groups = {
        f"group {number}[{name!r}], a {type(value).__name__}": repr(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params" and not isinstance(value, Tensor) and type(value) not in _DTYPES
    }
    attributes = {
        f"attribute {name!r}, a {type(value).__name__}": repr(_comparable(value))
        for name, value in vars(optimizer).items()
        if name not in ("state", "param_groups", "defaults")  # groups begin with the tensors of `defaults`
    }
    return in_groups | attributes


def _comparable(value: Any) -> Any:
    """Return a value whose text shows whether numbers, texts or tensors in it have changed; parameters do not count."""
    if isinstance(value, Tensor):
        return None if isinstance(value, nn.Parameter) else models.digest({"": value})
    if isinstance(value, Mapping):
        return [(_comparable(key), _comparable(each)) for key, each in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_comparable(each) for each in value]
    return value if isinstance(value, bool | int | float | str) else None


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in the memory of the host: that of a GPU may be needed by the optimizers."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


@torch.no_grad()
def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN is equal to itself here."""
    return torch.equal(*(each.detach().cpu().contiguous().flatten().view(torch.uint8) for each in (one, other)))


def _same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and _same_bits(value, other[name]) for name, value in one.items()
    )


def _add(tensors: dict[str, Tensor], name: str, value: Any) -> None:
    """Add a tensor or a number; None is nothing, and `check_resumable` refuses what steps change beside these."""
    if isinstance(value, Tensor):
        tensors[name] = value
    elif type(value) in _DTYPES:
        tensors[name + _NUMBER] = torch.tensor(value, dtype=_DTYPES[type(value)], device="cpu")


def _in_groups(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order by which torch numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _by_number(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[int, dict[str, Any]]:
    """Return the state of each parameter, by its number in the model."""
    numbers = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    by_position = optimizer.state_dict()["state"]
    return {numbers[id(each)]: by_position[at] for at, each in enumerate(_in_groups(optimizer)) if at in by_position}


def _on_device_of(before: Any, value: Any) -> Any:
    return value.to(before.device) if isinstance(before, Tensor) and isinstance(value, Tensor) else value


def _in_layout(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _restore_types(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Give the state its own types again: torch converts it to those of the parameters when it loads it."""
    for position, parameter in enumerate(_in_groups(optimizer)):
        for name, value in state.get(position, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = _in_layout(value, parameter).to(loaded.device)
