"""`distrain predict`: print the most probable classes of image files, which are read as `prepare folder` reads them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distrain.data.pillow import DepthWarning, UnreadableError, recorded_warnings
from distrain.distributed import devices, gpu_errors
from distrain.errors import ConfigError, DataError
from distrain.files import read
from distrain.text import counted, percent, printable, shortened
from distrain.tools import loaded_model
from distrain.tools.loaded_model import MAX_BYTES, LoadedModel

log = logging.getLogger("distrain")

_BATCH_SIZE = 64
_MAX_REPORTED = 10


def predict(run: Path, files: Sequence[Path], which: str | None, device: str) -> Iterator[dict[str, Any]]:
    """Yield `{"file": …, "classes": {name: probability}}` for each file, the most probable class first.

    Args:
        run: the run's folder.
        files: image files.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        device: auto, cpu or cuda.

    Raises:
        DataError: the run has no checkpoint, or some files cannot be read; this is checked before the first prediction.
        ConfigError: the model takes images with a number of channels that no image file has; or the device cannot be
            used, or its memory is too small.
        GpuError: the GPU failed.
    """
    model = loaded_model.load_on(device, "--device ", run, which)
    gpu = devices.describe(0)
    if model.image_shape[2] not in (1, 3):
        raise ConfigError(f"{run}: its images have {model.image_shape[2]} channels; image files have 1 or 3")
    _check(files, model)
    for start in range(0, len(files), _BATCH_SIZE):
        batch = files[start : start + _BATCH_SIZE]
        with recorded_warnings():  # `_check` has shown them
            images = torch.stack([model.pixels(read(file, MAX_BYTES)) for file in batch])
        with gpu_errors.explained(gpu, "predict"):
            probabilities = model.probabilities(images)
        for file, row in zip(batch, probabilities, strict=True):
            yield {"file": str(file), "classes": model.by_class(row)}


def _check(files: Sequence[Path], model: LoadedModel) -> None:
    """Read all files once, so that a bad one among thousands is reported before the first prediction."""
    problems: list[str] = []
    remarks: list[tuple[str, Path]] = []
    for file in files:
        try:
            with recorded_warnings() as caught:
                model.pixels(read(file, MAX_BYTES))
        except OSError as error:
            problems.append(f"{printable(str(file))}: {error.strerror or str(error)}")
        except UnreadableError as error:
            problems.append(f"{printable(str(file))}: {printable(error)}")
        else:
            texts = {str(warning.message) for warning in caught if not isinstance(warning.message, DepthWarning)}
            remarks.extend((text, file) for text in sorted(texts))
    if problems:
        header = f"{len(problems)} of the images cannot be read:"
        raise DataError("\n  ".join([header, *shortened(problems, _MAX_REPORTED)]))
    if remarks:
        log.warning("%s", "\n  ".join([f"remarks on the {len(files):,} images:", *counted(remarks, str)]))


def format_prediction(prediction: dict[str, Any], top: int, as_json: bool) -> str:
    """Format a prediction as one line with its `top` classes: text for people, or JSON."""
    classes = dict(list(prediction["classes"].items())[:top])
    if as_json:
        return json.dumps({**prediction, "classes": classes})
    text = ", ".join(f"{printable(name)} {percent(probability)}" for name, probability in classes.items())
    return f"{printable(prediction['file'])}  {text}"
