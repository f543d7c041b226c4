"""`net`: the small CNN of PyTorch's CIFAR-10 tutorial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


class Net(nn.Module):
    """LeNet-like network: 62,006 parameters for 32×32 RGB images and 10 classes."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], activation: str = "relu") -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 16:
            raise ConfigError(f"model.name=net needs images of at least 16 pixels, these have {height}×{width}")
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * _after_convolutions(height) * _after_convolutions(width), 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, num_classes] of images [N, C, H, W]."""
        # The tutorial pools after the activation. These activations are monotonic, so pooling first gives the same bits
        # and is faster: a tenth of the step on CPUs.
        x = self.activation(self.pool(self.conv1(x)))
        x = self.activation(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = self.activation(self.fc1(x))
        x = self.activation(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


def _after_convolutions(pixels: int) -> int:
    return ((pixels - 4) // 2 - 4) // 2
