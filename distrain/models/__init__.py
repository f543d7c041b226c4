"""Models by name: `net`, `small`, `resnet9`, `whitened`, a model of torchvision or timm, or the user's own class."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain import config, plugins
from distrain.errors import ConfigError, DataError
from distrain.models import from_timm, from_torchvision, weight_files
from distrain.models.batch_norm import can_be_synchronised
from distrain.models.net import Net
from distrain.models.resnet9 import ResNet9
from distrain.models.small import Small
from distrain.models.weight_files import WeightFile
from distrain.models.whitened import Whitened
from distrain.text import printable, shortened

_BUILT_IN: dict[str, Callable[[int, tuple[int, int, int]], nn.Module]] = {
    "small": Small,
    "resnet9": ResNet9,
    "whitened": Whitened,
}


def build(name: str, activation: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the model of this name, with weights drawn from torch's current random state.

    Args:
        name: `net`, `small`, `resnet9`, `whitened`, a model of torchvision, `timm:NAME`, or `package.module:Class`,
            which is called with `num_classes` and `image_shape`.
        activation: the activation function of `net`.
        num_classes: the number of logits.
        image_shape: (C, H, W) of the images.

    Raises:
        ConfigError: there is no such model, or it cannot process these images.
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
        names = ", ".join(["net", *_BUILT_IN])
        others = f"give {names}, a model of torchvision, timm:NAME, or package.module:Class"
        raise ConfigError(f"model.name={name}: unknown; {f'did you mean {close[0]}?' if close else others}")
    if name.startswith(from_timm.PREFIX):
        return from_timm.build(name, num_classes, image_shape)
    model = plugins.make(f"model.name={name}", name, num_classes=num_classes, image_shape=image_shape)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name={name}: is a {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name={name}: has no trainable parameters")
    return model


def from_config(
    settings: config.Model,
    num_classes: int,
    image_shape: Sequence[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] = (2,),
) -> nn.Module:
    """Build the model that a configuration names, and try it on black images.

    Args:
        settings: section `model` of the configuration.
        num_classes: length of the model's output.
        image_shape: (H, W, C) of the images, as in a manifest.
        seed: `run.seed`; also where weights are loaded later, as a model may draw tensors that no checkpoint has.
        dtype: of the weights.
        batch_sizes: numbers of images to try the model on.

    Raises:
        ConfigError: it cannot be built, or does not give one logit for each class.
    """
    height, width, channels = image_shape
    torch.manual_seed(seed)  # weights are drawn on the CPU, so every device starts from the same
    model = build(settings.name, settings.activation, num_classes, (channels, height, width)).to(dtype)
    model.train()  # nothing of its result is used: a class that has its own may forget to return itself
    for samples in batch_sizes:
        check_output(settings.name, model, torch.zeros(samples, channels, height, width, dtype=dtype), num_classes)
    return model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, a model is in evaluation mode; then each layer has its own mode again: one may be frozen."""
    modes = {layer: layer.training for layer in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train(modes[model])  # a class may do more in its own `train`
        for layer, mode in modes.items():
            layer.training = mode


def check_output(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Check that a model maps images [N, C, H, W] to logits [N, num_classes]. Its buffers do not change.

    Raises:
        ConfigError: it raises, or its output has another shape.
    """
    with (
        plugins.user_code(f"model.name={name}: fails on images {list(images.shape)}"),
        evaluation_mode(model),
        torch.no_grad(),
    ):
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model.name={name}: returns {shape} for {len(images)} images, not [{len(images)}, {num_classes}]"
        )


def norms_of_one_value(model: nn.Module, image: Tensor) -> list[tuple[str, nn.Module]]:
    """Return names and layers of the BatchNorm of a model that get one value of each channel from a single image.

    For such a layer, the variance over a batch of one image does not exist. Layers in evaluation mode are not named.
    Buffers do not change.
    """
    named = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.training}
    with_one_value: set[nn.Module] = set()

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].dim() > 1 and inputs[0].numel() == inputs[0].shape[1]:
            with_one_value.add(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in named.values()]
    with evaluation_mode(model), torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return [(name, layer) for name, layer in named.items() if layer in with_one_value]


def check_gradients(name: str, model: nn.Module) -> None:
    """Check, after a backward pass, that all trainable parameters have dense gradients, even if these are zeros.

    Raises:
        ConfigError: a parameter was not used. DDP waits for the gradients of all parameters, and would fail. Or a
            gradient is sparse, with which no fused optimizer works.
    """
    sparse = [key for key, value in model.named_parameters() if value.grad is not None and value.grad.is_sparse]
    if sparse:
        raise ConfigError(
            f"model.name={name}: the gradients of {', '.join(shortened(sparse, 5))} are sparse, which is not supported;"
            " use layers with dense gradients (sparse=False)"
        )
    unused = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if unused:
        raise ConfigError(
            f"model.name={name}: the output does not depend on {', '.join(shortened(unused, 5))}; use all trainable"
            " parameters in forward, or remove them, or freeze them with requires_grad_(False)"
        )


def check_buffers(name: str, model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Check, after passes of training, that a model has the buffers that it had before, with the same shapes.

    Raises:
        ConfigError: it has not, so that a checkpoint could not be loaded.
    """
    other = [key for key, value in model.named_buffers() if key not in before or value.shape != before[key].shape]
    if other:
        raise ConfigError(
            f"model.name={name}: a training pass makes its buffers {', '.join(shortened(other, 5))}, or changes their"
            " shapes; register them in __init__, with the shapes that they keep"
        )


def initialise(model: nn.Module, path: Path, classes: Sequence[str]) -> list[str]:
    """Load weights from a file into a model. A head for other classes is re-initialised.

    Args:
        model: the model, with newly initialised weights.
        path: a safetensors file, or a state dict saved by `torch.save`. Only tensors are unpickled.
        classes: the names of the model's classes.

    Returns:
        Messages for the user: what was guessed, re-initialised or kept.

    Raises:
        ConfigError: the file cannot be read, or has weights that this model cannot have.
    """
    return load_weights(model, f"model.init={path}", weight_files.read(path), classes)


def load_weights(model: nn.Module, subject: str, file: WeightFile, classes: Sequence[str]) -> list[str]:
    """Load the weights of a file that was read; `subject` begins messages. Otherwise as `initialise`."""
    state = model.state_dict()
    weights, notes = weight_files.match(file.weights, state.keys())
    # Files of PyTorch 0.4 and earlier have no such counters; torch begins them at 0 too.
    weights |= {name: state[name] for name in state.keys() - weights.keys() if name.endswith(".num_batches_tracked")}
    head = head_of(model)
    differing = [name for name in state if name not in weights or weights[name].shape != state[name].shape]
    unexpected = [name for name in weights if name not in state]
    if unexpected or not all(_is_other_head(name, head, weights.get(name), state[name]) for name in differing):
        names = f"differ in {', '.join(shortened(differing, 5))}" if differing else "fit"
        more = f"; the file alone has {', '.join(shortened(list(map(printable, unexpected)), 5))}" if unexpected else ""
        raise ConfigError(f"{subject}: has the weights of another model; they {names}{more}")
    retained, note = _compare_classes(subject, state, head, differing, weights, file.classes, classes)
    weights = {name: weights[name] if name in retained else value for name, value in state.items()}
    casts = _check_types(subject, weights, state)
    model.load_state_dict(weights)
    check_finite(model, subject)
    return [*file.notes, *notes, *casts, note]


def _is_other_head(name: str, head: str, value: Tensor | None, expected: Tensor) -> bool:
    """Whether a tensor belongs to a head for another number of classes, or to one that the file does not have."""
    if not head or not name.startswith(f"{head}."):
        return False
    return value is None or (0 < value.dim() == expected.dim() and value.shape[1:] == expected.shape[1:])


def _compare_classes(
    subject: str,
    state: Mapping[str, Tensor],
    head: str,
    differing: Sequence[str],
    weights: Mapping[str, Tensor],
    trained: list[str] | None,
    classes: Sequence[str],
) -> tuple[set[str], str]:
    """Return the names of the weights to load, and a message about the head."""
    number = len(classes)
    if differing and differing[0] not in weights:
        reason = "the file does not have it"
    elif differing:
        other = len(weights[differing[0]])
        reason = f"{other} classes in the file, {len(state[differing[0]])} in the data set"
    elif trained is None:
        return set(state), f"{head or 'the head'} is kept: the file does not name its classes, but has {number} too"
    elif trained == list(classes):
        return set(state), f"{head or 'the head'} is kept: the file has the same classes"
    elif sorted(trained) == sorted(classes):
        reason = "the file has the same classes in another order"
    else:
        names = [printable(name) for name in trained if name not in set(classes)]
        reason = f"the classes have other names in the file: {', '.join(shortened(names, 3))}"
    if not head or not any(name.startswith(f"{head}.") and state[name].shape[:1] == (number,) for name in state):
        raise ConfigError(f"{subject}: {reason}, and the layer that computes the logits is not the model's last one")
    return {name for name in state if not name.startswith(f"{head}.")}, f"{head} is re-initialised: {reason}"


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_types(subject: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Check that weights can be converted to the types of a model's; return a message if that is needed.

    Raises:
        ConfigError: they cannot.
    """
    floats = {name for name, value in state.items() if value.is_floating_point()}
    wrong = [
        f"{name} ({_type(value)})"
        for name, value in weights.items()
        if value.layout != torch.strided
        or value.is_quantized
        or value.is_meta
        or (value.dtype not in _FLOATS if name in floats else value.dtype != state[name].dtype)
    ]
    if wrong:
        raise ConfigError(
            f"{subject}: weights should be dense, of float16, bfloat16, float32 or float64, but not"
            f" {', '.join(shortened(wrong, 5))}; convert them first"
        )
    types = sorted({f"{_type(weights[name])} to {_type(state[name])}" for name in floats & weights.keys()
                    if weights[name].dtype != state[name].dtype})  # fmt: skip
    return [f"weights are converted from {', '.join(types)}"] if types else []


def _type(value: Tensor) -> str:
    kind = "without content, " if value.is_meta else "sparse, " if value.layout != torch.strided else ""
    return kind + str(value.dtype).removeprefix("torch.")


def check_finite(model: nn.Module, subject: str) -> None:
    """Check that the weights of a model are finite; `subject` begins the message.

    Raises:
        DataError: some are NaN or infinite.
    """
    names = not_finite(model)
    if names:
        raise DataError(f"{subject}: weights are NaN or infinite: {', '.join(shortened(names, 5))}; use other weights")


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of the parameters, and of the statistics of BatchNorm, that are not finite.

    Other buffers may be infinite, such as the mask of an attention layer. Waits for the device.
    """
    statistics = ("running_mean", "running_var")
    named = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0].endswith(statistics))]
    finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
    return [name for (name, _), good in zip(named, finite, strict=True) if not good]


def load(model: nn.Module, weights: Mapping[str, Tensor], name: str, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into the model that it was saved from.

    Raises:
        ConfigError: the model's class has changed since.
        DataError: weights are not finite.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.name={name}: has changed since {checkpoint} was saved: {reason}") from error
    _check_types(str(checkpoint), weights, model.state_dict())
    check_finite(model, str(checkpoint))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 digest of tensors, with their names, types and shapes. Waits for the device."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def head_of(model: nn.Module) -> str:
    """Return the name of the last layer with weights, which usually computes the logits; empty for the model itself."""
    return list(model.state_dict())[-1].rpartition(".")[0]


def world_size_dependent(model: nn.Module, accumulates: bool = False) -> list[str]:
    """Return the types of the layers that make the trained model depend on the number of processes.

    These layers draw random numbers, or compute a sample's output from other samples of the local batch.

    Args:
        model: the model.
        accumulates: whether local batches are computed in micro-batches (gradient accumulation), so that BatchNorm uses
            the statistics of a micro-batch.
    """
    return sorted({type(layer).__name__ for layer in model.modules() if _depends_on_local_batch(layer, accumulates)})


_RANDOM_LAYERS = ("StochasticDepth", "DropPath", "DropBlock2d", "PatchDropout")
"""Classes of torchvision and timm that draw random numbers; by name, as these need not be imported."""


def _depends_on_local_batch(layer: nn.Module, accumulates: bool) -> bool:
    if isinstance(layer, _BatchNorm):
        return layer.training and (accumulates or not can_be_synchronised(layer))
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    dropout = getattr(layer, "dropout", 0.0)  # of attention and recurrent layers
    return (
        isinstance(layer, nn.RReLU)
        or (isinstance(dropout, float) and dropout > 0)
        or type(layer).__name__ in _RANDOM_LAYERS
    )
