"""The shipped configurations of large networks, which need a GPU, on fewer images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import make
from test_recipes import GUESSING, LARGE, accuracy

import distrain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("file", sorted(LARGE))
def test_a_recipe_of_a_large_network_learns(
    file: str, device: str, measured: Callable[[str, float, str], None], tmp_path: Path
) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    images = make(tmp_path / "data", 6000, 1000, image_size=32, lanes=8)
    result = accuracy(file, images.root, tmp_path / "run", distrain.train)
    measured("accuracy", 100 * result, "%")
    assert result >= 3 * GUESSING  # not measured yet
