"""The speed of training on a GPU, compared with a bare loop over data on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import make

from benchmarks import training
from benchmarks.context import Context

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["net", "resnet9"])
def test_steps_from_shards(
    model: str, device: str, measured: Callable[[str, float, str], None], tmp_path: Path
) -> None:
    if (device, model) == ("cpu", "resnet9"):
        pytest.skip("needs a GPU")
    dataset = make(tmp_path / "data", 20_000 if device == "cuda" else 2_000, image_size=32)
    context = Context(
        dataset=dataset, work=tmp_path, images=None, repeats=3, quick=device == "cpu", device=device, models=(model,),
        recipe=Path(), precision="bf16", batches=(512,) if device == "cuda" else (128,),
    )  # fmt: skip
    table = training.measure(context)
    for row in [*table.rows, *table.ratios]:
        measured(row.name, row.as_dict()["median"], row.unit)
