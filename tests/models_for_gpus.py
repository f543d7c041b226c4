"""Models for the suite for GPUs; those that observe their process report to the folder OBSERVED of the environment."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain import models

FIRST, WATCHED = 30, 50
"""Steps before the watched ones, and number of the watched ones.

The first epoch, in which a cache is filled, and the warm-up may wait for the device.
"""


class Convolutional(nn.Sequential):
    """Has convolutions and BatchNorm, and is compiled to one graph."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        super().__init__(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * (height // 2) * (width // 2), num_classes),
        )


class _Observer(nn.Module):
    """Counts the forward passes of a model in training."""

    def __init__(self, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.inner = models.build(name, "relu", num_classes, image_shape)
        self._pass_count = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        if torch.is_grad_enabled():
            self._pass_count += 1
            self.observe(self._pass_count)
        logits: Tensor = self.inner(images)
        return logits

    def observe(self, number: int) -> None:
        """Called before each pass."""
        raise NotImplementedError


class Waiting(_Observer):
    """Waiting for the GPU is an error in `WATCHED` steps; the file `watched` proves that they were made.

    WAITING in the environment is the model that is trained, and ACCUMULATION_STEPS the number of passes in a step.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(os.environ["WAITING"], num_classes, image_shape)

    def observe(self, number: int) -> None:
        """Switch torch's check on and off."""
        accumulation_steps = int(os.environ["ACCUMULATION_STEPS"])
        first, last = FIRST * accumulation_steps, (FIRST + WATCHED) * accumulation_steps
        if number in (first, last):
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error" if number == first else "default")
            if number == last:
                Path(os.environ["OBSERVED"], "watched").touch()


class Contexts(_Observer):
    """A file `rank-R` lists the GPUs on which this process has a context."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__("net", num_classes, image_shape)

    def observe(self, number: int) -> None:
        """Write the file once, after all threads have worked."""
        if number == FIRST:
            rank = os.environ.get("RANK", "0")
            Path(os.environ["OBSERVED"], f"rank-{rank}").write_text(" ".join(map(str, _contexts())))


def _contexts() -> list[int]:
    """Return the GPUs on which this process has a primary context; asks the driver, which opens none."""
    if not torch.cuda.is_available():
        return []
    driver: Any = ctypes.CDLL("libcuda.so.1")
    opened, flags, active = [], ctypes.c_uint(), ctypes.c_int()
    for index in range(torch.cuda.device_count()):
        device = ctypes.c_int()
        assert driver.cuDeviceGet(ctypes.byref(device), index) == 0
        assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        if active.value:
            opened.append(index)
    return opened
