"""Models: `net`, or a class that the user names."""

from __future__ import annotations

import importlib
import sys
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
        x = self.pool(self.activation(self.conv1(x)))
        x = self.pool(self.activation(self.conv2(x)))
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
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.name={name}: {error}") from error
    model = factory(num_classes=num_classes, image_shape=image_shape)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name={name}: made a {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model.name={name}: has nothing to train")
    return model


def world_size_dependent(model: nn.Module) -> list[str]:
    """Kinds of layers that couple the samples of a share or draw random numbers: what is trained then depends on
    the number of processes.
    """
    return sorted({type(layer).__name__ for layer in model.modules() if isinstance(layer, _DEPEND_ON_SHARES)})


def _after_convolutions(pixels: int) -> int:
    return ((pixels - 4) // 2 - 4) // 2
