"""`distrain predict`: print the most probable classes of image files, which are read as `prepare folder` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.data.sources import UnreadableError
from distrain.data.sources.images import read_image
from distrain.errors import ConfigError, DataError
from distrain.files import read
from distrain.text import printable, shortened
from distrain.tools import loaded_model

_BATCH_SIZE = 64
_MAX_REPORTED = 10
_MAX_BYTES = 2**30
"""Maximum size of an image file."""


def predict(run: Path, files: Sequence[Path], which: str | None, device: str) -> Iterator[dict[str, Any]]:
    """Yield `{"file": …, "classes": {name: probability}}` for each file, the most probable class first.

    Args:
        run: the run's folder.
        files: image files.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        device: auto, cpu or cuda.

    Raises:
        DataError: the run has no checkpoint, or some files cannot be read; this is checked before the first prediction.
        ConfigError: the model takes images with a number of channels that no image file has.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this process sees no GPU; use --device cpu, or fix the driver")
    chosen_device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = loaded_model.load(run, which, chosen_device)
    if model.image_shape[2] not in (1, 3):
        raise ConfigError(f"{run}: its images have {model.image_shape[2]} channels; image files have 1 or 3")
    _check(files, model.image_shape)
    for start in range(0, len(files), _BATCH_SIZE):
        batch = files[start : start + _BATCH_SIZE]
        images = torch.from_numpy(np.stack([read_image(read(file, _MAX_BYTES), model.image_shape) for file in batch]))
        for file, row in zip(batch, model.probabilities(images), strict=True):
            order = row.argsort(descending=True, stable=True).tolist()
            yield {"file": str(file), "classes": {model.classes[k]: float(row[k]) for k in order}}


def _check(files: Sequence[Path], image_shape: tuple[int, int, int]) -> None:
    """Read all files once, so that a bad one among thousands is reported before the first prediction."""
    problems = []
    for file in files:
        problem = _problem(file, image_shape)
        if problem is not None:
            problems.append(f"{printable(str(file))}: {problem}")
    if problems:
        header = f"{len(problems)} of the images cannot be read:"
        raise DataError("\n  ".join([header, *shortened(problems, _MAX_REPORTED)]))


def _problem(file: Path, image_shape: tuple[int, int, int]) -> str | None:
    try:
        read_image(read(file, _MAX_BYTES), image_shape)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableError as error:
        return printable(error)
    return None


def format_prediction(prediction: dict[str, Any], top: int, as_json: bool) -> str:
    """Format a prediction as one line with its `top` classes: text for people, or JSON."""
    classes = dict(list(prediction["classes"].items())[:top])
    if as_json:
        return json.dumps({**prediction, "classes": classes})
    text = ", ".join(f"{printable(name)} {probability:.1%}" for name, probability in classes.items())
    return f"{printable(prediction['file'])}  {text}"
