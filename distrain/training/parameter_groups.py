"""The groups of an optimizer, `train.lr_scale` and `train.decay_biases`, and which parameters are frozen."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain import models
from distrain.config import Train
from distrain.errors import ConfigError
from distrain.text import printable, shortened
from distrain.training import muon

HEAD, BACKBONE = "head", "backbone"


def factor(name: str, scale: Mapping[str, float], head: str) -> float:
    """Return the factor of the learning rate of a parameter: that of the last key that matches, else 1.

    Args:
        name: name of the parameter in the model.
        scale: `train.lr_scale`.
        head: name of the layer that computes the logits.
    """
    key = _deciding_key(name, scale, head)
    return 1.0 if key is None else scale[key]


def _deciding_key(name: str, scale: Mapping[str, float], head: str) -> str | None:
    return next((key for key in reversed(list(scale)) if _matches(key, name, head)), None)


def _matches(key: str, name: str, head: str) -> bool:
    if key in (HEAD, BACKBONE):
        return name.startswith(f"{head}.") == (key == HEAD)
    return fnmatchcase(name, key)


def check(module: nn.Module, scale: Mapping[str, float], num_classes: int) -> None:
    """Check that each key of `train.lr_scale` has an effect, and that some parameters are trained.

    Raises:
        ConfigError: this is not so; or `head` or `backbone` is given, and the last layer does not compute the logits.
    """
    head, parameters = models.head_of(module), dict(module.named_parameters())
    sizes = {len(value) for name, value in parameters.items() if name.startswith(f"{head}.") and value.dim()}
    for key in scale:
        if key in (HEAD, BACKBONE) and sizes != {num_classes}:
            raise ConfigError(
                f"train.lr_scale: {key} is not known: the model's last layer, {head or 'itself'}, does not compute the"
                " logits; give patterns of the names of parameters"
            )
        if not any(_matches(key, name, head) for name in parameters):
            layers = {f"{name.rpartition('.')[0]}.*" for name in parameters if "." in name}
            close = difflib.get_close_matches(key, [HEAD, BACKBONE, *parameters, *sorted(layers)], n=3, cutoff=0.5)
            if any(name.startswith(f"{key}.") for name in parameters):  # a layer
                close = [f"{key}.*"]
            examples = "did you mean" if close else "they have names such as"
            raise ConfigError(
                f"train.lr_scale: {printable(key)} matches no parameter of the model; {examples}"
                f" {', '.join(close or shortened(list(parameters), 5))}"
            )
        trained = (name for name, value in parameters.items() if value.requires_grad)
        if not any(_deciding_key(name, scale, head) == key for name in trained):
            raise ConfigError(
                f"train.lr_scale: {printable(key)} has no effect: later keys match all of its parameters, or the model"
                " has frozen them itself; put it last, or remove it"
            )
    if not any(value.requires_grad and factor(name, scale, head) for name, value in parameters.items()):
        raise ConfigError("train.lr_scale: all parameters are frozen; give some of them a factor above 0, such as head")


def freeze(module: nn.Module, scale: Mapping[str, float]) -> None:
    """Freeze the parameters whose factor is 0: they get no gradients.

    A BatchNorm of which nothing else is trained is set to evaluation mode: with the statistics of batches, the features
    of a frozen network would still change. One without parameters counts as if it had a weight.
    """
    head = models.head_of(module)

    def is_frozen(layer: str, name: str) -> bool:
        return factor(f"{layer}.{name}".lstrip("."), scale, head) == 0

    for layer_name, layer in module.named_modules():
        parameters = dict(layer.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            parameter.requires_grad_(parameter.requires_grad and not is_frozen(layer_name, name))
        if isinstance(layer, _BatchNorm) and all(is_frozen(layer_name, name) for name in parameters or ("weight",)):
            layer.eval()


def describe(module: nn.Module, scale: Mapping[str, float]) -> list[str]:
    """Return one line for each factor of the learning rate, with the parameters that have it; call `freeze` before."""
    head = models.head_of(module)
    by_factor: dict[float, list[str]] = {}
    for name, parameter in module.named_parameters():
        value = factor(name, scale, head) if parameter.requires_grad else 0.0
        by_factor.setdefault(value, []).append(name)
    return [
        f"{f'learning rate × {value:g}' if value else 'frozen'}: {', '.join(shortened(names, 3))}"
        for value, names in sorted(by_factor.items())
    ]


def groups(module: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, as few as possible: each is a further kernel of the fused ones.

    Args:
        module: the model; parameters that are frozen are in no group.
        train: section `train` of the configuration.

    Returns:
        Dicts with `params`; `lr` where it is scaled, `weight_decay` where it is 0 for biases, and `orthogonal` for the
        weights that Muon is for.
    """
    head = models.head_of(module)
    hidden = muon.hidden_weights(module, head) if train.optimizer == "muon" else set()
    parts: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = train.decay_biases or parameter.dim() > 1
            key = (factor(name, train.lr_scale, head), decays, parameter in hidden)
            parts.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            **({"lr": scale * train.lr} if scale != 1 else {}),
            **({} if decays else {"weight_decay": 0.0}),
            **({"orthogonal": True} if orthogonal else {}),
        }
        for (scale, decays, orthogonal), parameters in parts.items()
    ]
