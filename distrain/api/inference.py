"""A run's model, from Python."""

from __future__ import annotations

import os
from typing import Literal

from distrain.api.arguments import one_of, path_of
from distrain.tools import loaded_model
from distrain.tools.loaded_model import LoadedModel


def load_model(
    run: str | os.PathLike[str], checkpoint: str | None = None, *, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> LoadedModel:
    """Load a run's model in evaluation mode, with its classes and its preprocessing; the data set is not needed.

        model = distrain.load_model("runs/first")
        model.predict("photo.jpg")  # {"cat": 0.93, "dog": 0.05, …}

    Args:
        run: the run's folder.
        checkpoint: best, last, or a folder's name; None: the one that the run's result is of.
        device: auto: the GPU if there is one, else the CPU.

    Returns:
        A `torch.nn.Module` for images uint8 [N, H, W, C].

    Raises:
        distrain.DataError: the folder holds no run, or the checkpoint cannot be read.
        distrain.ConfigError: the device cannot be used, or the model cannot be built here.
        distrain.GpuError: the GPU failed.
    """
    one_of("device", device, ("auto", "cpu", "cuda"))
    return loaded_model.load_on(device, "device=", path_of("run", run), checkpoint)
