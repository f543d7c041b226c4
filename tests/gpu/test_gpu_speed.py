"""The speed of training on a GPU, compared with a bare loop over data on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import make

from benchmarks import training
from benchmarks.context import Context
from distrain.data.manifest import Dataset

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def images(device: str, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("speed") / "data", 20_000 if device == "cuda" else 2_000, image_size=32)


@pytest.mark.parametrize("model", ["net", "resnet9"])
def test_steps_from_shards(
    model: str, device: str, images: Dataset, measured: Callable[[str, float, str], None], tmp_path: Path
) -> None:
    if (device, model) == ("cpu", "resnet9"):
        pytest.skip("needs a GPU")
    # Before compute capability 8, GPUs have no bf16, and torch emulates it.
    half = "fp16" if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else "bf16"
    context = Context(
        dataset=images, work=tmp_path, out=tmp_path, images=None, repeats=2, quick=device == "cpu", device=device,
        models=(model,), recipe=Path(), precision=half, batches=(512,) if device == "cuda" else (128,),
        images_of_timed_run=200_000 if device == "cuda" else None,
    )  # fmt: skip
    table = training.measure(context)
    for row in [*table.rows, *table.ratios]:
        measured(f"{row.name}, {half}", row.as_dict()["median"], row.unit)
