"""`distrain predict`: the most probable classes of image files, read as `distrain prepare folder` reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrain.data.sources import UnreadableError
from distrain.data.sources.folder import read_image
from distrain.errors import ConfigError, DataError
from distrain.text import printable, shortened
from distrain.tools import loaded_model

_BATCH = 64
_NAMED = 10


def predict(run: Path, files: Sequence[Path], which: str | None, device: str) -> Iterator[dict[str, Any]]:
    """For each file `{"file": …, "classes": {name: probability}}`, most probable first.

    Raises:
        DataError: the run has no checkpoint, or files cannot be read: they are named before anything is predicted.
        ConfigError: the model takes images that no file has.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this process sees no GPU; use --device cpu, or mend the driver")
    use = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    model = loaded_model.load(run, which, use)
    if model.image_shape[2] not in (1, 3):
        raise ConfigError(f"{run}: its images have {model.image_shape[2]} channels; image files have 1 or 3")
    _check(files, model.image_shape)
    for start in range(0, len(files), _BATCH):
        here = files[start : start + _BATCH]
        images = torch.from_numpy(np.stack([read_image(file.read_bytes(), model.image_shape) for file in here]))
        for file, row in zip(here, model.probabilities(images), strict=True):
            order = row.argsort(descending=True, stable=True).tolist()
            yield {"file": str(file), "classes": {model.classes[k]: float(row[k]) for k in order}}


def _check(files: Sequence[Path], image_shape: tuple[int, int, int]) -> None:
    """Read all once: a bad one among thousands is told before the first is predicted."""
    problems = []
    for file in files:
        problem = _problem(file, image_shape)
        if problem is not None:
            problems.append(f"{printable(str(file))}: {problem}")
    if problems:
        header = f"{len(problems)} of the images cannot be read:"
        raise DataError("\n  ".join([header, *shortened(problems, _NAMED)]))


def _problem(file: Path, image_shape: tuple[int, int, int]) -> str | None:
    try:
        read_image(file.read_bytes(), image_shape)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableError as error:
        return str(error)
    return None


def tell(found: dict[str, Any], top: int, as_json: bool) -> str:
    """One line for people, or for programs."""
    classes = dict(list(found["classes"].items())[:top])
    if as_json:
        return json.dumps({**found, "classes": classes})
    told = ", ".join(f"{printable(name)} {probability:.1%}" for name, probability in classes.items())
    return f"{printable(found['file'])}  {told}"
