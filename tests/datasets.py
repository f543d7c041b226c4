"""Data sets for tests."""

from __future__ import annotations

from pathlib import Path

from distrain.data.manifest import Dataset
from distrain.preparation.blocks import Options, prepare
from distrain.preparation.sources.synthetic import Synthetic


def make(out: Path, samples: int, test_samples: int = 100, image_size: int = 16, **options: object) -> Dataset:
    """Make a synthetic data set."""
    source_options = {"samples": samples, "test_samples": test_samples, "image_size": image_size, "classes": 10}
    dataset, made = prepare(
        out,
        "synthetic",
        source_options,
        lambda _: Synthetic(samples, test_samples, image_size, 10, 0),
        Options(**options),
    )
    assert made
    return dataset
