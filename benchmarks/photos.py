"""Generated photos as JPEG files in tar files: what the part `decoding` reads."""

from __future__ import annotations

import functools
import io
import shutil
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image

from distrain import machine

HEIGHT, WIDTH = 375, 500
"""The most frequent size in ImageNet."""

CLASSES = 10
PHOTOS_PER_TAR = 500
"""The largest number; there are fewer if worker processes would have no tar file."""

_DETAILS = ((4, 70), (16, 40), (64, 25))
"""Columns of a rough random image, and its contrast. Their sum has the details of all sizes that photos have."""

_NOISE = 8.5
"""Standard deviation of a camera's noise: with it a file has 65 kB, as photos of this size have."""


def photo(number: int) -> bytes:
    """Return a JPEG file, 4:2:0, whose content follows from its number."""
    rng = np.random.default_rng(number)
    pixels = np.full((HEIGHT, WIDTH, 3), 120, np.float32)
    for columns, contrast in _DETAILS:
        rough = Image.fromarray(rng.integers(0, 255, (columns * 3 // 4, columns, 3), dtype=np.uint8))
        smooth = np.asarray(rough.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels += (smooth - 128) * (contrast / 128)
    pixels += np.roll(_noise(), rng.integers(_noise().size))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


@functools.cache
def _noise() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, _NOISE, (HEIGHT, WIDTH, 3)).astype(np.float32)


def write_tars(folder: Path, count: int) -> None:
    """Write `count` photos into tar files in `folder`, as webdataset's users do; nothing if the folder exists."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    in_tar = min(PHOTOS_PER_TAR, -(-count // machine.cores()))
    labels = np.random.default_rng(0).integers(CLASSES, size=count).tolist()
    with wds.ShardWriter(str(unfinished / "train-%04d.tar"), maxcount=in_tar, verbose=0) as sink:
        for number, label in enumerate(labels):
            sink.write({"__key__": f"{number:08d}", "jpg": photo(number), "cls": str(label).encode()})
    unfinished.rename(folder)


def tars(folder: Path) -> list[str]:
    """Return the tar files in `folder`, in their order."""
    return sorted(str(path) for path in folder.glob("*.tar"))
