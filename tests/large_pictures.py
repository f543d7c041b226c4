"""Drawn pictures of many classes in tar files: `python large_pictures.py FOLDER` writes 1,000 classes, 500×375 pixels.

A class is a shape, its colour and that of the background, so that it is seen after any crop that shows both. Position,
size and brightness of a picture are random.
"""

from __future__ import annotations

import colorsys
import io
import sys
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image, ImageDraw

KINDS = 10
"""Number of shapes, and of colours of each kind: 1,000 classes."""
CORNERS = (3, 4, 5, 6)
"""Corners of the polygons among the shapes."""


def jpeg(label: int, number: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """Return a JPEG file, width × height, of class `label`; no two numbers give the same picture."""
    shape, colour, ground = label % KINDS, label // KINDS % KINDS, label // KINDS**2 % KINDS
    rng = np.random.default_rng([label, number])
    light, (width, height) = rng.uniform(0.75, 1.0), size
    image = Image.new("RGB", size, _rgb((ground + 0.5) / KINDS, 0.35, 0.6 * light))
    radius = rng.uniform(0.3, 0.45) * height
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    _draw(ImageDraw.Draw(image), shape, x, y, radius, _rgb(colour / KINDS, 1.0, light))
    noise = rng.normal(0, 6, (height, width, 1))
    file = io.BytesIO()
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * each) for each in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _draw(draw: ImageDraw.ImageDraw, shape: int, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape < len(CORNERS):
        draw.regular_polygon((x, y, r), CORNERS[shape], fill=colour)
    elif shape == 4:
        draw.ellipse(box, fill=colour)
    elif shape == 5:
        draw.ellipse(box, outline=colour, width=max(1, round(r / 3)))
    elif shape == 6:  # a cross
        draw.rectangle((x - r, y - r / 4, x + r, y + r / 4), fill=colour)
        draw.rectangle((x - r / 4, y - r, x + r / 4, y + r), fill=colour)
    elif shape == 7:  # bars
        for at in (-0.8, 0.0, 0.8):
            draw.rectangle((x - r, y + (at - 0.15) * r, x + r, y + (at + 0.15) * r), fill=colour)
    elif shape == 8:  # columns
        for at in (-0.8, 0.0, 0.8):
            draw.rectangle((x + (at - 0.15) * r, y - r, x + (at + 0.15) * r, y + r), fill=colour)
    else:  # dots
        for at in np.ndindex(3, 3):
            dx, dy = ((each - 1) * 0.75 * r for each in at)
            draw.ellipse((x + dx - r / 4, y + dy - r / 4, x + dx + r / 4, y + dy + r / 4), fill=colour)


def write(folder: Path, classes: int, per_class: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write train-*.tar with so many pictures of each class, in random order, and test-*.tar with one of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", range(per_class)), ("test", range(per_class, per_class + 1))):
        pictures = [(label, number) for number in numbers for label in range(classes)]
        np.random.default_rng(0).shuffle(pictures)
        with webdataset.ShardWriter(f"{folder}/{split}-%04d.tar", maxcount=1000, verbose=0) as tars:
            for at, (label, number) in enumerate(pictures):
                key = f"{at:08}"
                tars.write({"__key__": key, "jpg": jpeg(label, number, size), "cls": str(label).encode()})


if __name__ == "__main__":
    write(Path(sys.argv[1]), KINDS**3, 8)
