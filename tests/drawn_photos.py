"""Photos of shapes in class folders, of several sizes; `python drawn_photos.py FOLDER N` draws N of each class."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Points = list[tuple[float, float]]


def _polygon(radii: Sequence[float], turn: float) -> Points:
    angles = [turn + 2 * np.pi * index / len(radii) for index in range(len(radii))]
    return [(radius * np.cos(angle), radius * np.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _outline(points: Points, turn: float) -> Points:
    cos, sin = np.cos(turn), np.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


SHAPES: dict[str, Callable[[float], Points]] = {
    "arrow": lambda turn: _outline(
        [(-1, -0.2), (0.2, -0.2), (0.2, -0.6), (1, 0), (0.2, 0.6), (0.2, 0.2), (-1, 0.2)], turn
    ),
    "cross": lambda turn: _polygon([1, 0.35, 0.35] * 4, turn),
    "hexagon": lambda turn: _polygon([0.9] * 6, turn),
    "star": lambda turn: _polygon([1, 0.45] * 5, turn),
}
"""Outlines in a circle of radius 1."""
OTHERS: dict[str, Callable[[float], Points]] = {
    "triangle": lambda turn: _polygon([1] * 3, turn),
    "square": lambda turn: _polygon([1] * 4, turn),
    "pentagon": lambda turn: _polygon([0.95] * 5, turn),
    "octagon": lambda turn: _polygon([0.9] * 8, turn),
    "disc": lambda turn: _polygon([0.85] * 40, turn),
    "bar": lambda turn: _outline([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)], turn),
    "wedge": lambda turn: _outline([(-1, -0.1), (1, -0.6), (1, 0.6), (-1, 0.1)], turn),
    "star 4": lambda turn: _polygon([1, 0.4] * 4, turn),
    "star 7": lambda turn: _polygon([1, 0.6] * 7, turn),
    "corner": lambda turn: _outline(
        [(-0.8, -0.8), (0.8, -0.8), (0.8, -0.3), (-0.3, -0.3), (-0.3, 0.8), (-0.8, 0.8)], turn
    ),
    "house": lambda turn: _outline([(-0.7, 0.7), (-0.7, -0.1), (0, -0.9), (0.7, -0.1), (0.7, 0.7)], turn),
    "tee": lambda turn: _outline(
        [(-0.8, -0.8), (0.8, -0.8), (0.8, -0.3), (0.3, -0.3), (0.3, 0.9), (-0.3, 0.9), (-0.3, -0.3), (-0.8, -0.3)], turn
    ),
}
"""Outlines of other classes, on which a network can be trained before."""


def draw(shape: Callable[[float], Points], seed: int) -> Image.Image:
    """A photo with one shape of any colour, size and direction, before a blurred background and some lines."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(90, 220, 2))
    rough = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
    image = rough.resize((width, height), Image.Resampling.BILINEAR)
    canvas, short = ImageDraw.Draw(image), min(width, height)
    for _ in range(6):
        ends = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(2)]
        canvas.line(ends, tuple(map(int, rng.integers(0, 256, 3))), 3)
    radius = short * rng.uniform(0.2, 0.4)
    x, y = (rng.uniform(side / 2 - short / 2 + radius, side / 2 + short / 2 - radius) for side in (width, height))
    points = [(x + radius * a, y + radius * b) for a, b in shape(rng.uniform(0, 2 * np.pi))]
    canvas.polygon(points, tuple(map(int, rng.integers(0, 256, 3))))
    return image


def write(folder: Path, number: int, shapes: dict[str, Callable[[float], Points]] = SHAPES, first: int = 0) -> None:
    """Write FOLDER/CLASS/N.jpg, so many of each class."""
    for index, (name, shape) in enumerate(shapes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for each in range(first, first + number):
            draw(shape, 1_000_000 * index + each).save(folder / name / f"{each}.jpg", quality=90)


def write_weights(torch_home: Path) -> None:
    """Write new weights as those of torchvision's resnet18, into the cache where they would be downloaded to."""
    import torch
    import torchvision

    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    path = torch_home / "hub/checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
