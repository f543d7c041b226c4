"""The data set's images as others keep them: one file an image, in tars or in class folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from distrain.data.manifest import Dataset
from distrain.tools.bench.context import load

PER_TAR = 1000
"""Images in a tar, as webdataset's examples have it."""


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    """An image's bytes as png, jpg (of quality 95) or npy."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, image)
    else:
        options: dict[str, Any] = {"png": {}, "jpg": {"quality": 95}}[kind]
        Image.fromarray(image).save(file, {"png": "PNG", "jpg": "JPEG"}[kind], **options)
    return file.getvalue()


def write_tars(dataset: Dataset, folder: Path, kind: str, most: int) -> list[str]:
    """The first images of train, a member and a class each; the tars' paths."""
    folder.mkdir(parents=True)
    images, labels = load(dataset, "train", most)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=PER_TAR, verbose=0, encoder=False) as sink:
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            sink.write({"__key__": f"{number:08d}", kind: encode(image, kind), "cls": str(label).encode()})
    return sorted(str(path) for path in folder.glob("*.tar"))


def write_folders(dataset: Dataset, folder: Path, most: int) -> Path:
    """The first images of train and test as JPEG files in class folders."""
    for split in ("train", "test"):
        for name in dataset.manifest.classes:
            (folder / split / name).mkdir(parents=True)
        images, labels = load(dataset, split, most)
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            name = dataset.manifest.classes[label]
            (folder / split / name / f"{number:08d}.jpg").write_bytes(encode(image, "jpg"))
    return folder
