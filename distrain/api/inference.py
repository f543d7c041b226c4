"""The model of a run or of a bundle, from Python."""

from __future__ import annotations

import os
from typing import Literal

from distrain.api.arguments import one_of, path_of
from distrain.tools import loaded_model
from distrain.tools.loaded_model import LoadedModel


def load_model(
    run: str | os.PathLike[str], checkpoint: str | None = None, *, device: Literal["auto", "cpu", "cuda"] = "auto"
) -> LoadedModel:
    """Load the model of a run or of a bundle, in evaluation mode, with its classes and its preprocessing.

        model = distrain.load_model("runs/first")
        model.predict("photo.jpg")  # {"cat": 0.93, "dog": 0.05, …}

    The data set is not needed. Weights are read without running code from a file; a class of the user's
    (`model.name=package.module:Class`) is imported from the current folder or from Python's path.

    Args:
        run: the run's folder, or a bundle (`distrain export --bundle`).
        checkpoint: best, last, or a folder's name; None: the one that the run's result is of. None for a bundle.
        device: auto: the GPU if there is one, else the CPU.

    Returns:
        A `torch.nn.Module` for images uint8 [N, H, W, C].

    Raises:
        distrain.DataError: the folder holds no run, or the checkpoint or the bundle cannot be read.
        distrain.ConfigError: the device cannot be used, or the model cannot be built here, or `checkpoint` is given for
            a bundle.
        distrain.GpuError: the GPU failed.
    """
    one_of("device", device, ("auto", "cpu", "cuda"))
    return loaded_model.load_on(device, "device=", path_of("run", run), checkpoint)
