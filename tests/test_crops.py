"""Random parts of images are those of torchvision's RandomResizedCrop: the same limits, distribution and fall-back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop

from distrain.data.crops import covering_boxes, random_boxes

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
sides = st.integers(1, 5000)


def bits(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=20),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_a_part_is_within_its_image_and_depends_on_the_bits_of_its_sample_alone(
    sizes: list[tuple[int, int]], scale: list[float], ratio: list[float], seed: int
) -> None:
    shapes, random_bits = np.array(sizes), bits(len(sizes), seed)
    boxes = random_boxes(shapes, random_bits, scale, ratio)
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= shapes[:, 0]).all()
    assert (left + width <= shapes[:, 1]).all()
    for row in range(len(sizes)):
        assert (random_boxes(shapes[row : row + 1], random_bits[row : row + 1], scale, ratio) == boxes[row]).all()


def test_parts_are_distributed_as_those_of_torchvision() -> None:
    height, width, count = 375, 500, 20_000
    boxes = random_boxes(np.tile([height, width], (count, 1)), bits(count), SCALE, RATIO)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)])
    for column in range(4):
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            ours, reference = np.quantile(boxes[:, column], quantile), np.quantile(theirs[:, column], quantile)
            assert ours == pytest.approx(reference, abs=6), (column, quantile)  # about 3 standard errors


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (100, 100), (3, 2)])
def test_where_no_part_fits_it_is_the_centre_as_in_torchvision(size: tuple[int, int]) -> None:
    scale = (50.0, 60.0)  # larger than any image
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), list(scale), list(RATIO))
    assert random_boxes(np.array([size]), bits(1), scale, RATIO)[0].tolist() == list(expected)


@given(sides, sides, st.integers(1, 500), st.integers(1, 500))
def test_a_covering_part_is_as_large_as_possible_and_central(rows: int, columns: int, height: int, width: int) -> None:
    top, left, box_height, box_width = covering_boxes(np.array([[rows, columns]]), height, width)[0].tolist()
    assert box_height == rows or box_width == columns
    assert (top, left) == (round((rows - box_height) / 2), round((columns - box_width) / 2))  # as torchvision
    scale = min(rows / height, columns / width)
    assert abs(box_height - max(1, scale * height)) <= 0.5 + 1e-6
    assert abs(box_width - max(1, scale * width)) <= 0.5 + 1e-6
