"""A synthetic data set: shapes that are drawn from a seed. It needs no download.

A class is a shape r(θ) = 1 + Σ a_j cos(jθ + φ_j) whose coefficients depend only on the class. An image shows the shape
shifted, rotated, scaled and slightly deformed, in a random colour on a darker gradient, with noise and a bar over it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distrain.data.order import generator

_SHAPES_SEED = 20240229  # the shapes are the same for every seed, so that accuracies can be compared
_HARMONICS = np.arange(2, 7)
_TRAIN, _TEST, _CLASSES = range(3)


class Synthetic:
    """Synthetic images: `samples` for training and `test_samples` for test. Sample i has class i mod `num_classes`."""

    def __init__(self, samples: int, test_samples: int, image_size: int, num_classes: int, seed: int) -> None:
        self.image_shape = (image_size, image_size, 3)
        self.classes = [f"shape-{k:0{len(str(num_classes - 1))}d}" for k in range(num_classes)]
        self.labels = {
            "train": np.arange(samples, dtype=np.int64) % num_classes,
            "test": np.arange(test_samples, dtype=np.int64) % num_classes,
        }
        self._seed = seed

    def name(self, split: str, index: int) -> str:
        """Return split and index of a sample."""
        return f"synthetic {split} sample {index}"

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        """Draw one image: uint8 [H, W, 3]."""
        random = generator(self._seed, index, _TRAIN if split == "train" else _TEST)
        size = self.image_shape[0]
        axis = np.linspace(-1, 1, size)
        x, y = np.meshgrid(axis, axis)
        inside = _silhouette(x, y, int(self.labels[split][index]), random)
        background = random.uniform(0.1, 0.5, 3)
        contrast = random.uniform(0.05, 0.5, 3)
        slope = random.uniform(-0.15, 0.15, (2, 3))
        image = background + contrast * inside[..., None]
        image += x[..., None] * slope[0] + y[..., None] * slope[1]
        angle, offset = random.uniform(0, np.pi), random.uniform(-0.8, 0.8)
        bar = np.abs(np.cos(angle) * x + np.sin(angle) * y - offset) < 0.08
        image[bar] = random.uniform(0, 1, 3)
        image += random.normal(0, random.uniform(0.02, 0.12), image.shape)
        return np.asarray((image.clip(0, 1) * 255).round(), np.uint8)


def _silhouette(
    x: NDArray[np.float64], y: NDArray[np.float64], label: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Return the fraction of each pixel that the shape covers: float64 [H, W] in 0 … 1."""
    shape = generator(_SHAPES_SEED, label, _CLASSES)
    amplitude = shape.uniform(-0.4, 0.4, len(_HARMONICS)) / np.sqrt(_HARMONICS - 1)
    amplitude += random.normal(0, 0.02, len(_HARMONICS))  # so that no two images have the same outline
    phase = shape.uniform(0, 2 * np.pi, len(_HARMONICS))
    x0, y0 = random.uniform(-0.2, 0.2, 2)
    radius = random.uniform(0.45, 0.7)
    theta = np.arctan2(y - y0, x - x0) + random.uniform(-0.3, 0.3)
    outline = 1 + (amplitude * np.cos(theta[..., None] * _HARMONICS + phase)).sum(-1)
    distance = np.hypot(x - x0, y - y0) / radius
    sharpness = x.shape[0] * radius / 4
    return np.asarray(1 / (1 + np.exp(np.clip((distance - outline) * sharpness * 2, -30, 30))))
