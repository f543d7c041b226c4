"""Sizes of training images that grow during a run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distrain.data.image_sizes import FULL_SIZE, ImageSizes


def test_sizes_grow_in_steps_of_32_at_equal_distances() -> None:
    sizes = ImageSizes.growing(128, 224, 1000, [0.4, 0.7])
    by_size = {size: [step for step in range(1000) if sizes.at(step) == size] for size in (128, 160, 192, None)}
    assert {size: (steps[0], steps[-1]) for size, steps in by_size.items()} == {
        128: (0, 499), 160: (500, 599), 192: (600, 699), None: (700, 999),
    }  # fmt: skip
    assert sum(map(len, by_size.values())) == 1000
    uneven = ImageSizes.growing(128, 176, 100, [0.5, 0.5])
    assert [uneven.at(step) for step in (0, 49, 50, 99)] == [128, 128, None, None]
    assert FULL_SIZE.at(0) is None


@given(st.integers(1, 8), st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_sizes_never_shrink_and_end_at_the_full_one(start: int, more: int, total: int, a: float, b: float) -> None:
    growth = [min(a, b), max(a, b)]
    sizes = ImageSizes.growing(32 * start, 32 * start + more, total, growth)
    trained = [sizes.at(step) or 32 * start + more for step in range(total)]
    assert trained == sorted(trained)
    assert all(size % 32 == 0 for size in trained if size != 32 * start + more)
    assert all(size == 32 * start + more for size in trained[int(growth[1] * total) :])
