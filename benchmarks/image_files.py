"""The data set's images as other libraries store them: one file per image, in tar files or in class folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from benchmarks.context import load
from distrain.data.manifest import Dataset

IMAGES_PER_TAR = 1000
"""Number of samples, as in webdataset's examples."""


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    """Encode an image as png, jpg (quality 95) or npy."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, image)
    else:
        options: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95}}
        Image.fromarray(image).save(file, **options[kind])
    return file.getvalue()


def write_tars(dataset: Dataset, folder: Path, kind: str, limit: int) -> list[str]:
    """Write the first images of train into tar files, each image with its class; return the paths."""
    folder.mkdir(parents=True)
    images, labels = load(dataset, "train", limit)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=IMAGES_PER_TAR, verbose=0, encoder=False) as sink:
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            sink.write({"__key__": f"{number:08d}", kind: encode(image, kind), "cls": str(label).encode()})
    return sorted(str(path) for path in folder.glob("*.tar"))


def write_folders(dataset: Dataset, folder: Path, limit: int | None = None) -> Path:
    """Write the first images of train and test as JPEG files into class folders; return `folder`."""
    classes = dataset.manifest.classes
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
        images, labels = load(dataset, split, limit)
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            (folder / split / classes[label] / f"{number:08d}.jpg").write_bytes(encode(image, "jpg"))
    return folder
