"""The initial weights of a run, `model.init`: pretrained ones by name, those of another run, or of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from distrain import models
from distrain.config import Model
from distrain.errors import ConfigError
from distrain.models import pretrained
from distrain.models.weight_files import WeightFile
from distrain.runs import checkpoint
from distrain.runs.choice import choose
from distrain.runs.folder import CONFIG


def load(
    settings: Model,
    module: nn.Module,
    classes: Sequence[str],
    image_shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[str]:
    """Load the weights of `model.init` into a model; do nothing without one.

    Args:
        settings: section `model` of the configuration.
        module: the model, with newly initialised weights.
        classes: names of its classes.
        image_shape: (H, W, C) of the images, as in a manifest.
        mean: of each channel of the images, as they are normalised in this run.
        std: standard deviation of each channel, likewise.

    Returns:
        Messages for the user.

    Raises:
        ConfigError: there are no such weights, or they are those of another model.
    """
    init = settings.init
    if init is None:
        return []
    if not pretrained.is_name(init):
        return _load_from_path(module, Path(init), classes)
    height, width, channels = image_shape
    file = pretrained.read(init, settings.name, (channels, height, width))
    messages = models.load_weights(module, f"model.init={init}", file, classes)
    return [*messages, *_compare_normalization(file, mean, std)]


def _compare_normalization(file: WeightFile, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Return a message if images are normalised in another way than those that the weights were trained on."""
    if file.mean is None or file.std is None or len(mean) != len(file.mean):
        return []
    if np.allclose([mean, std], [file.mean, file.std], atol=1e-3):
        return []
    expected = (("mean", file.mean), ("std", file.std))
    keys = [f"data.{key}=[{','.join(f'{value:g}' for value in values)}]" for key, values in expected]
    return [f"its images were normalised in another way than those of this run: set {' '.join(keys)}"]


def _load_from_path(module: nn.Module, path: Path, classes: Sequence[str]) -> list[str]:
    """Load weights from a file, a checkpoint, or the checkpoint of a run that its result is of."""
    if not path.is_dir():
        return models.initialise(module, path, classes)
    is_checkpoint = checkpoint.is_one(path)
    if not is_checkpoint and not (path / CONFIG).exists():
        raise ConfigError(
            f"model.init={path}: is neither a run's folder nor a checkpoint; give one of these, or a file of weights"
        )
    chosen, skipped = (path, []) if is_checkpoint else choose(path, None)
    checkpoint.load(chosen)  # compares its files with their digests
    which = f"{chosen.name} is taken, the checkpoint of the run's result: the best on val, or without val the last"
    return [
        *skipped,
        *([which] if chosen != path else []),
        *models.initialise(module, chosen / checkpoint.MODEL, classes),
    ]
