"""A bundle: one folder with a model as it is shared with others, in the layout of the Hugging Face Hub.

    FOLDER/  config.json  model.safetensors  preprocessor_config.json  README.md

config.json has all that is needed to build the model and to prepare its images, and the digests of the two files after
it. preprocessor_config.json repeats the preprocessing in the keys of the Hub, for people and other programs. README.md
is the model card, which its owner may edit. Nothing in these files is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain import files
from distrain.errors import DataError
from distrain.runs import folder, records
from distrain.runs.records import Bundle, Description

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, PREPROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"
_MAX_BYTES = 2**40
CURE = "copy or download the bundle again, or write it again by `distrain export`"


def is_one(path: Path) -> bool:
    """Whether a folder is meant to be a bundle; a run's folder has another configuration."""
    return (path / CONFIG).is_file() and not (path / folder.CONFIG).exists()


def contents(description: Description, weights: bytes, card: str) -> dict[str, bytes]:
    """Return the content of each file of a bundle.

    Args:
        description: of the model.
        weights: content of the safetensors file.
        card: text of README.md.
    """
    preprocessor = f"{json.dumps(_hub_preprocessing(description), indent=1)}\n".encode()
    digests = {WEIGHTS: _digest(weights), PREPROCESSOR: _digest(preprocessor)}
    tree = description.model_dump(mode="json", exclude={"model": {"init"}})  # initial weights have been trained since
    config = records.to_json({"library_name": "distrain", **tree, "files": digests}).encode()
    return {CONFIG: config, WEIGHTS: weights, PREPROCESSOR: preprocessor, CARD: card.encode()}


def write(path: Path, content: Mapping[str, bytes]) -> None:
    """Write a bundle, so that it is complete on disk or not there at all.

    Args:
        path: the folder; it must not exist, or be empty.
        content: of each file.

    Raises:
        OSError: it cannot be written; what was written is removed.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        work.mkdir()
        for name, data in content.items():
            files.write(work / name, data)
        files.sync(work)
        os.rename(work, path)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    files.sync(path.parent)


def read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """Read a bundle: the description of its model, and its weights.

    Raises:
        DataError: a file is missing or damaged, or was written by another version or program.
        AgainError: the disk or server does not answer now.
    """
    import safetensors.torch

    record = records.read(path / CONFIG, Bundle, CURE)
    if record is None:
        raise DataError(f"{path}: not a bundle (no {CONFIG}); {CURE}")
    data = {name: _read_file(path / name) for name in (WEIGHTS, PREPROCESSOR)}
    for name, content in data.items():
        if _digest(content) != record.files.get(name):
            raise DataError(f"{path / name}: damaged, or of another model (its digest differs); {CURE}")
    try:
        return record, safetensors.torch.load(data[WEIGHTS])
    except Exception as error:  # of several kinds
        raise DataError(f"{path / WEIGHTS}: not a safetensors file ({error}); {CURE}") from error


def _read_file(path: Path) -> bytes:
    try:
        return files.read(path, _MAX_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; {CURE}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hub_preprocessing(description: Description) -> dict[str, Any]:
    """Return the preprocessing in the keys that image processors on the Hub have.

    They resize the shorter side and crop the centre. distrain does that for an index; for blocks it crops first, which
    is the same only for square images, so others have no keys about sizes.
    """
    height, width = description.evaluation.crop
    shorter = description.evaluation.resize or (height if height == width else None)
    sizes: dict[str, Any] = {}
    if shorter is not None:
        crop = {"height": height, "width": width}
        sizes = {"do_resize": True, "size": {"shortest_edge": shorter}, "resample": 2}
        sizes |= {"do_center_crop": True, "crop_size": crop}
    return {
        "do_convert_rgb": description.image_shape[2] == 3,
        **sizes,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": description.mean,
        "image_std": description.std,
    }
