"""Tar files of images and labels for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpeg(number: int, height: int = 8, width: int = 8) -> bytes:
    """A small picture, which is another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write a tar file; a sample is its key, and the content of each field."""
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for field, content in fields.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_numbered(folder: Path, name: str, labels: Sequence[Any], tars: int, first: int = 0) -> list[Path]:
    """Write tar files NAME-00000.tar …, of as many samples each; picture and key of a sample are its number."""
    folder.mkdir(exist_ok=True)
    samples = [
        (f"{number:06d}", {"jpg": jpeg(number), "cls": str(label).encode()})
        for number, label in enumerate(labels, first)
    ]
    parts = np.array_split(np.arange(len(samples)), tars)
    return [
        write(folder / f"{name}-{number:05d}.tar", [samples[index] for index in part])
        for number, part in enumerate(parts)
    ]
