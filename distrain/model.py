"""Models: `net`, or a class that the user names."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}

_DEPEND_ON_SHARES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)


class Net(nn.Module):
    """The small CNN of PyTorch's CIFAR-10 tutorial: 62,006 parameters for 32×32 RGB images and 10 classes."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], activation: str = "relu") -> None:
        super().__init__()
        channels, height, width = image_shape
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * _after_convolutions(height) * _after_convolutions(width), 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        # The tutorial pools after the activation. All of ours increase, so the maximum commutes with them, bit for bit,
        # and is cheaper to take first: a tenth of the step on CPUs.
        x = self.activation(self.pool(self.conv1(x)))
        x = self.activation(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = self.activation(self.fc1(x))
        x = self.activation(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def build(name: str, activation: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The model of that name, its weights drawn from torch's current seed.

    Args:
        name: `net`, or `package.module:Class`, called with `num_classes` and `image_shape`.
        activation: of `net`.
        num_classes: length of the model's output.
        image_shape: (C, H, W) of its input.

    Raises:
        ConfigError: no such model, or it does not take these images.
    """
    if name == "net":
        if min(image_shape[1:]) < 16:
            raise ConfigError(f"model.name=net takes images of at least 16 pixels, these have {image_shape[1:]}")
        return Net(num_classes, image_shape, activation)
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ConfigError(f"model.name={name}: unknown; give net, or package.module:Class")
    here = str(Path.cwd())
    if here not in sys.path:  # the command `distrain` does not look into the current folder by itself
        sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module_name), class_name)(
            num_classes=num_classes, image_shape=image_shape
        )
    except Exception as error:  # the user's code, which may do anything
        raise ConfigError(f"model.name={name}: {_told(error)}") from error
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
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:
        raise ConfigError(f"model.name={name}: fails on images {list(images.shape)}: {_told(error)}") from error
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model.name={name}: gives {shape} for {len(images)} images, not [{len(images)}, {num_classes}]"
        )


def _told(error: Exception) -> str:
    """An exception of the user's code in one line, with the place it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def world_size_dependent(model: nn.Module) -> list[str]:
    """Kinds of layers that couple the samples of a share or draw random numbers: what is trained then depends on
    the number of processes.
    """
    return sorted({type(layer).__name__ for layer in model.modules() if _depends_on_share(layer)})


def _depends_on_share(layer: nn.Module) -> bool:
    dropout = getattr(layer, "dropout", 0.0)  # of attention and recurrent layers
    return (
        isinstance(layer, _DEPEND_ON_SHARES)
        or (isinstance(dropout, float) and dropout > 0)
        or type(layer).__name__ == "StochasticDepth"  # torchvision's, which is not imported for its name
    )


def _after_convolutions(pixels: int) -> int:
    return ((pixels - 4) // 2 - 4) // 2
