"""Models by name: `net`, `small`, `resnet9`, torchvision's, or a class that the user names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from distrain import plugins
from distrain.errors import ConfigError
from distrain.models import from_torchvision
from distrain.models.batch_norm import can_be_global
from distrain.models.net import Net
from distrain.models.resnet9 import ResNet9
from distrain.models.small import Small

_BUILT_IN: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {"small": Small, "resnet9": ResNet9}

_PICKLES = (".pt", ".pth", ".bin")


def build(name: str, activation: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model of that name, its weights drawn from torch's current seed.

    Args:
        name: `net`, `small`, `resnet9`, one of torchvision's, or `package.module:Class`, called with `num_classes` and
            `image_shape`.
        activation: of `net`.
        num_classes: length of the model's output.
        image_shape: (C, H, W) of its input.

    Raises:
        ConfigError: no such model, or it does not take these images.
    """
    if name == "net":
        return Net(num_classes, image_shape, activation)
    if name in _BUILT_IN:
        return _BUILT_IN[name](num_classes, image_shape)
    if ":" not in name:
        known = from_torchvision.names()
        if name in known:
            return from_torchvision.build(name, num_classes, image_shape)
        close = difflib.get_close_matches(name, ["net", *_BUILT_IN, *known], n=1)
        own = ", ".join(["net", *_BUILT_IN])
        hint = f"did you mean {close[0]}?" if close else f"give {own}, one of torchvision's, or package.module:Class"
        raise ConfigError(f"model.name={name}: unknown; {hint}")
    model = plugins.make(f"model.name={name}", name, num_classes=num_classes, image_shape=image_shape)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name={name}: made a {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name={name}: has nothing to train")
    return model


def check_output(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Try a model on images [N, C, H, W]; its buffers stay as they were.

    Raises:
        ConfigError: it fails, or does not give [N, num_classes].
    """
    training = model.training
    with plugins.telling(f"model.name={name}: fails on images {list(images.shape)}"), torch.no_grad():
        logits = model.eval()(images)
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model.name={name}: gives {shape} for {len(images)} images, not [{len(images)}, {num_classes}]"
        )


def check_gradients(name: str, model: nn.Module) -> None:
    """After a backward pass: every parameter that is to be trained has got a gradient, if only of zeros.

    Raises:
        ConfigError: one has none: it would stay as it is, and DDP, which waits for all of them, fails.
    """
    without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise ConfigError(
            f"model.name={name}: the output does not depend on {', '.join(without[:5])}{more}; use what forward does"
            " not use, or take it out, or freeze it: requires_grad_(False)"
        )


def initialise(model: nn.Module, path: Path) -> str | None:
    """Give a model the weights in a file; its head keeps its own where the file's is of another size.

    Args:
        model: whose parameters and buffers are overwritten.
        path: safetensors, or a state dict as `torch.save` writes it (.pt, .pth, .bin), of which only tensors are read.

    Returns:
        What starts anew, if anything does.

    Raises:
        ConfigError: the file cannot be read, or is of another model.
    """
    found = _read_weights(path)
    own = model.state_dict()
    head = _head(own)
    other = [name for name in own if name not in found or found[name].shape != own[name].shape]
    strange = [name for name in found if name not in own]
    if strange or any(not head or not name.startswith(f"{head}.") or name not in found for name in other):
        names = ", ".join([*other, *strange][:5])
        raise ConfigError(f"model.init={path}: holds the weights of another model; they differ in {names}")
    model.load_state_dict({name: own[name] if name in other else value for name, value in found.items()})
    if not other:
        return None
    return f"{head} starts anew: {len(found[other[0]])} classes in {path}, {len(own[other[0]])} here"


def load(model: nn.Module, weights: Mapping[str, Tensor], name: str, where: Path) -> None:
    """Give a model the weights of a checkpoint of its own.

    Raises:
        ConfigError: its class has changed since.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"model.name={name}: is no longer the model that {where} was saved of: {told}") from error


def digest(model: nn.Module) -> str:
    """xxh3-128 of all weights, by name."""
    found = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _head(state: dict[str, Tensor]) -> str:
    """The last layer with weights: what gives the logits."""
    return list(state)[-1].rpartition(".")[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        if path.suffix in _PICKLES:
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            found = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"model.init={path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # either library says in its own way that this is no such file
        raise ConfigError(f"model.init={path}: holds no weights ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"model.init={path}: holds no state dict; save `model.state_dict()`")
    return found


def world_size_dependent(model: nn.Module, in_parts: bool = False) -> list[str]:
    """Kinds of layers that couple the samples of a share or draw random numbers: what is trained then depends on
    the number of processes. `in_parts`: shares are computed in micro-batches, of which BatchNorm takes its statistics.
    """
    return sorted({type(layer).__name__ for layer in model.modules() if _depends_on_share(layer, in_parts)})


def _depends_on_share(layer: nn.Module, in_parts: bool) -> bool:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return in_parts or not can_be_global(layer)
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    dropout = getattr(layer, "dropout", 0.0)  # of attention and recurrent layers
    return (
        isinstance(layer, nn.RReLU)
        or (isinstance(dropout, float) and dropout > 0)
        or type(layer).__name__ == "StochasticDepth"  # torchvision's, which is not imported for its name
    )
