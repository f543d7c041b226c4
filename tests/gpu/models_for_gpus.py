"""Models that observe the process that trains them; OBSERVED=FOLDER in the environment is where they report."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain import models

FIRST, WATCHED = 10, 50
"""Passes before the watched ones: warm-up and first steps, which may wait for the device; number of watched passes."""


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
    """Waiting for the GPU is an error in `WATCHED` passes; the file `watched` proves that they were made."""

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__(os.environ["WAITING"], num_classes, image_shape)

    def observe(self, number: int) -> None:
        """Switch torch's check on and off."""
        if number in (FIRST, FIRST + WATCHED):
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error" if number == FIRST else "default")
            if number > FIRST:
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
