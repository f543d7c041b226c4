"""The arithmetic of the report's charts: axes, and the values that are shown under the pointer."""

from __future__ import annotations

import numpy as np
import pytest

from distrain.runs.results import Confusion
from distrain.tools.report import axes, charts
from distrain.tools.report.charts import _Line, _Metric, _Points


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([2.3, 1.0, 0.5, 0.4, 0.3], False),
        ([2.3, 0.1, 0.1, 0.1, 0.1], True),  # the first loss is 23 times the median
        ([2.3, 0.1, 0.1, 0.1, 0.0], False),  # there is no logarithm of 0
        ([1.0], False),
    ],
)
def test_an_axis_is_logarithmic_if_one_value_dwarfs_the_others(values: list[float], is_log: bool) -> None:
    assert axes.axis_of(values, 0, 100, may_be_log=True).is_log == is_log
    assert not axes.axis_of(values, 0, 100).is_log


@pytest.mark.parametrize(
    ("values", "may_be_log", "texts"),
    [
        ([0, 1000], False, ["0", "200", "400", "600", "800", "1,000"]),
        ([0.001, 0.049], False, ["0", "0.01", "0.02", "0.03", "0.04", "0.05"]),
        ([0, 50_000], False, ["0", "10 k", "20 k", "30 k", "40 k", "50 k"]),
        ([97.5], False, ["60", "80", "100", "120", "140"]),
        ([0.0, 0.0], False, ["-1", "-0.5", "0", "0.5", "1"]),
        ([0.1, 0.1, 0.1, 3.0], True, ["0.1", "0.2", "0.5", "1", "2"]),
        ([1.0, 1.0, 1.0, 1e6], True, ["1", "100", "10 k", "1 M"]),
        ([1.0, 1.0, 1.0, 1e20], True, ["1", "10 k", "100 M", "1e12", "1e16", "1e20"]),
    ],
)
def test_ticks_are_round_numbers_inside_the_axis(values: list[float], may_be_log: bool, texts: list[str]) -> None:
    axis = axes.axis_of(values, 10, 110, may_be_log)
    ticks = axis.ticks()
    assert [text for _, text in ticks] == texts
    positions = [position for position, _ in ticks]
    assert positions == sorted(positions)
    assert 10 <= positions[0] < positions[-1] <= 110
    assert (np.diff(axis.pixels(sorted(values))) >= 0).all()


def line(name: str, x: list[float], y: list[float]) -> _Line:
    return _Line(name, "red", "", False, _Points(*(np.array(values, float) for values in (x, y, y, y))))


def test_each_part_of_a_chart_has_the_values_under_the_pointer() -> None:
    metric = _Metric("Accuracy", "accuracy", "accuracy, %", 100, " %")
    axis = axes.axis_of([0, 30], charts.LEFT, charts.RIGHT)
    lines = [line("train", [10, 20, 30], [50, 60, 70.125]), line("val", [20], [55])]
    columns = charts._columns(lines, axis, "step", metric)
    assert [column.text for column in columns] == [
        "step 10\ntrain 50 %", "step 20\ntrain 60 %\nval 55 %", "step 30\ntrain 70.12 %",
    ]  # fmt: skip
    for column, position in zip(columns, axis.pixels([10, 20, 30]), strict=True):
        assert column.x < position < column.x + column.width
    assert columns[0].x == charts.LEFT
    assert sum(column.width for column in columns) == pytest.approx(charts.RIGHT - charts.LEFT)


def test_a_long_curve_has_a_limited_number_of_parts_with_its_last_values() -> None:
    steps = np.arange(1, 10_001, dtype=float)
    axis = axes.axis_of(steps, charts.LEFT, charts.RIGHT)
    curve = line("loss", list(steps), list(steps))
    columns = charts._columns([curve], axis, "step", _Metric("Loss", "loss", "loss"))
    assert 100 < len(columns) <= 120
    assert columns[-1].text == "step 10,000\nloss 1e+04"


def result_of(classes: int, samples: int) -> dict[str, object]:
    draws = np.random.default_rng(0)
    codes, counts = np.unique(draws.integers(0, classes**2, samples), return_counts=True)
    confusion = Confusion.of_codes(codes, counts, classes)
    return {"accuracy_by_class": dict.fromkeys(range(classes), 0.5), "confusion": confusion.as_rows()}


@pytest.mark.parametrize(("classes", "has_numbers", "has_names"), [(2, 1, 1), (20, 1, 1), (21, 0, 1), (1000, 0, 0)])
def test_a_confusion_matrix_has_the_counts_of_few_classes(classes: int, has_numbers: int, has_names: int) -> None:
    result = result_of(classes, 5000)
    matrix = charts.matrix(result, [f"class {k}" for k in range(classes)])
    assert (matrix.has_numbers, matrix.has_names) == (bool(has_numbers), bool(has_names))
    assert len(matrix.classes) == min(classes, 100)
    assert len(matrix.cells) <= len(matrix.classes) ** 2
    confusion = Confusion.of_result(result)
    counted = {(true, predicted): count for true, predicted, count in confusion.as_rows()}
    for cell in matrix.cells:
        true, predicted = (int(matrix.classes[index][0].split()[1]) for index in (cell.row, cell.column))
        samples = int(confusion.samples_by_class()[true])
        assert cell.number == str(counted[true, predicted])
        assert cell.text.startswith(
            f"class {true} predicted as class {predicted}: {counted[true, predicted]:,} of {samples:,} ("
        )
