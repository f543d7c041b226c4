"""The accuracy of each class, computed from a confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from distrain.text import percent


class ClassAccuracy(NamedTuple):
    """One class of a split: its name, its accuracy (None without samples) and its number of samples."""

    name: str
    accuracy: float | None
    samples: int


def accuracy_by_class(classes: Sequence[str], confusion_matrix: Sequence[Sequence[int]]) -> list[ClassAccuracy]:
    """Return the accuracy of each class, in the order of the classes.

    Args:
        classes: K names.
        confusion_matrix: K rows of K counts; row = true class, column = predicted class.
    """
    rows = []
    for index, (name, counts) in enumerate(zip(classes, confusion_matrix, strict=True)):
        samples = sum(counts)
        rows.append(ClassAccuracy(name, counts[index] / samples if samples else None, samples))
    return rows


def classes_of(result: dict[str, Any]) -> list[ClassAccuracy]:
    """Return the accuracy of each class from the content of RUN/result.json."""
    return accuracy_by_class(list(result["accuracy_by_class"]), result["confusion_matrix"])


def accuracy_line(split: str, total: int, accuracy: float) -> str:
    """Format the accuracy on a split, as the commands print it."""
    return f"Accuracy of the network on the {total} {split} images: {percent(accuracy)}"


def lowest_first(rows: Iterable[ClassAccuracy]) -> list[ClassAccuracy]:
    """Sort by accuracy, lowest first; classes without samples come last."""
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy or 0.0))
