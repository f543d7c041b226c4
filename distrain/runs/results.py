"""The scores of an evaluation: which classes were predicted as which, the accuracy of each class, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.text import percent

Ints = NDArray[np.int64]

CONFIDENCE_BITS = 32
"""Confidences are counted in units of 2⁻³²: sums of whole numbers are exact in any order."""
_BINS = 15
"""Bins of the confidence in the calibration error."""
_Z = 1.959963984540054
"""Quantile of the normal distribution that a 95 % interval has on each side."""


class ClassAccuracy(NamedTuple):
    """One class of a split: its name, its accuracy (None without samples) and its number of samples."""

    name: str
    accuracy: float | None
    samples: int


@dataclass(frozen=True)
class Confusion:
    """The number of samples of each true class that were predicted as each class.

    Only the pairs of classes that occur are stored: of K classes there are K² pairs, but at most as many occur as there
    are samples.

    Attributes:
        num_classes: K.
        true: int64 [P], the true class of each pair; the pairs are in ascending order.
        predicted: int64 [P].
        count: int64 [P], number of samples.
    """

    num_classes: int
    true: Ints
    predicted: Ints
    count: Ints

    @classmethod
    def of_codes(cls, codes: Ints, counts: Ints, num_classes: int) -> Confusion:
        """Add up the counts of equal codes, which are true class · K + predicted class."""
        unique, index = np.unique(codes, return_inverse=True)
        sums = np.zeros(len(unique), np.int64)
        np.add.at(sums, index, counts)
        return cls(num_classes, *np.divmod(unique, num_classes), sums)

    def plus(self, others: Iterable[Confusion]) -> Confusion:
        """Return the sum of the counts of several parts of a split."""
        parts = [self, *others]
        codes = [part.true * self.num_classes + part.predicted for part in parts]
        return Confusion.of_codes(
            np.concatenate(codes), np.concatenate([part.count for part in parts]), self.num_classes
        )

    @classmethod
    def of_result(cls, result: dict[str, Any]) -> Confusion:
        """Return the confusion in the content of RUN/result.json."""
        rows = np.array(result["confusion"], np.int64).reshape(-1, 3)
        return cls(len(result["accuracy_by_class"]), *rows.T)

    def as_rows(self) -> list[list[int]]:
        """Return `[true, predicted, count]` for each pair of classes that occurs, for JSON."""
        return np.stack([self.true, self.predicted, self.count], 1).tolist()  # type: ignore[no-any-return]

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.count.sum())

    @property
    def correct(self) -> int:
        """Number of samples whose class was predicted."""
        return int(self.count[self.true == self.predicted].sum())

    def samples_by_class(self) -> Ints:
        """Return the number of samples of each true class: int64 [K]."""
        return self._sums(self.true, self.count)

    def correct_by_class(self) -> Ints:
        """Return the number of samples of each class that were predicted as this class: int64 [K]."""
        right = self.true == self.predicted
        return self._sums(self.true[right], self.count[right])

    def predicted_by_class(self) -> Ints:
        """Return the number of samples that were predicted as each class: int64 [K]."""
        return self._sums(self.predicted, self.count)

    def most_frequent_mistakes(self, limit: int) -> list[tuple[int, int, int]]:
        """Return `(true, predicted, count)` of the most frequent pairs of two different classes."""
        wrong = np.flatnonzero(self.true != self.predicted)
        first = wrong[np.argsort(-self.count[wrong], kind="stable")[:limit]]
        return [(int(self.true[k]), int(self.predicted[k]), int(self.count[k])) for k in first]

    def most_confused(self, limit: int) -> list[int]:
        """Return the classes with the most mistakes, at most `limit`, in ascending order."""
        wrong = self.true != self.predicted
        mistakes = self._sums(self.true[wrong], self.count[wrong]) + self._sums(
            self.predicted[wrong], self.count[wrong]
        )
        return sorted(np.argsort(-mistakes, kind="stable")[:limit].tolist())

    def matrix(self, classes: Sequence[int]) -> Ints:
        """Return the counts among some classes: int64 [n, n], row = true class, column = predicted class."""
        index = np.full(self.num_classes, -1)
        index[list(classes)] = np.arange(len(classes))
        row, column = index[self.true], index[self.predicted]
        shown = (row >= 0) & (column >= 0)
        matrix = np.zeros((len(classes), len(classes)), np.int64)
        matrix[row[shown], column[shown]] = self.count[shown]
        return matrix

    def _sums(self, classes: Ints, counts: Ints) -> Ints:
        sums = np.zeros(self.num_classes, np.int64)
        np.add.at(sums, classes, counts)
        return sums


def accuracy_by_class(classes: Sequence[str], confusion: Confusion) -> list[ClassAccuracy]:
    """Return the accuracy of each of K classes, in their order."""
    counts = zip(classes, confusion.samples_by_class().tolist(), confusion.correct_by_class().tolist(), strict=True)
    return [ClassAccuracy(name, right / samples if samples else None, samples) for name, samples, right in counts]


def precision_by_class(confusion: Confusion) -> list[float | None]:
    """Return the precision of each of K classes: the fraction of the samples predicted as it that are of this class.

    A class that occurs and is never predicted has 0, as with scikit-learn's `zero_division=0`. One that neither occurs
    nor is predicted has None.
    """
    counts = (confusion.correct_by_class(), confusion.predicted_by_class(), confusion.samples_by_class())
    return [
        right / predicted if predicted else 0.0 if samples else None
        for right, predicted, samples in zip(*(each.tolist() for each in counts), strict=True)
    ]


def macro_f1(confusion: Confusion) -> float:
    """Return the mean F1 score of the classes that occur or are predicted, as scikit-learn's `f1_score` has it."""
    sizes = confusion.samples_by_class() + confusion.predicted_by_class()
    present = sizes > 0
    return float(np.mean(2 * confusion.correct_by_class()[present] / sizes[present]))


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the lowest and highest accuracy of the 95 % confidence interval (Wilson, 1927).

    It is about the samples alone: how far the accuracy on others of the same kind may be. How far another seed would
    be is not in it.
    """
    accuracy, ratio = correct / total, _Z * _Z / total
    centre = accuracy + ratio / 2
    half = math.sqrt(ratio * (accuracy * (1 - accuracy) + ratio / 4))
    # The limits are 0 and 1 exactly where none or all are correct; rounding would miss them.
    low = (centre - half) / (1 + ratio) if correct else 0.0
    high = (centre + half) / (1 + ratio) if correct < total else 1.0
    return low, high


def calibration_gaps(confidences: Ints, correct: NDArray[np.bool_]) -> Ints:
    """Return, for each bin of the confidence, the number of correct samples minus the sum of their confidences.

    Gaps of parts of a split are added; a split may have 2³¹ samples.

    Args:
        confidences: int64 [n], the probabilities of the predicted classes in units of 2⁻³².
        correct: bool [n], whether the predicted class is the true one.

    Returns:
        int64 [15], in units of 2⁻³². Bin b has the confidences above b / 15, up to (b + 1) / 15.
    """
    confidences = confidences.clip(1, 1 << CONFIDENCE_BITS)
    gaps = np.zeros(_BINS, np.int64)
    np.add.at(
        gaps, (confidences * _BINS - 1) >> CONFIDENCE_BITS, (correct.astype(np.int64) << CONFIDENCE_BITS) - confidences
    )
    return gaps


def calibration_error(gaps: Ints, total: int) -> float:
    """Return the expected calibration error (Guo et al., 2017) of `total` samples.

    It is the mean over the samples of the difference between the accuracy and the mean confidence of their bin.
    """
    return int(np.abs(gaps).sum()) / (total << CONFIDENCE_BITS)


def classes_of(result: dict[str, Any]) -> list[ClassAccuracy]:
    """Return the accuracy of each class from the content of RUN/result.json."""
    return accuracy_by_class(list(result["accuracy_by_class"]), Confusion.of_result(result))


def accuracy_line(split: str, total: int, accuracy: float) -> str:
    """Format the accuracy on a split, as the commands print it."""
    return f"Accuracy of the network on the {total} {split} images: {percent(accuracy)}"


def scores_line(scores: Mapping[str, Any]) -> str:
    """Format the interval of the accuracy, and the scores beside it; the top-5 accuracy only where there is one."""
    low, high = scores["accuracy_interval"]
    parts = [f"95 % interval {percent(low)} to {percent(high)}"]
    if scores["top5_accuracy"] is not None:
        parts.append(f"top-5 {percent(scores['top5_accuracy'])}")
    return ", ".join([*parts, f"macro-F1 {percent(scores['macro_f1'])}"])


def step_of(result: dict[str, Any]) -> int:
    """Return the step of the checkpoint that the accuracy in RUN/result.json belongs to."""
    return int(result["checkpoint"].rpartition("-")[2])


def format_rate(images_per_second: float, tflops_per_second: float | None, mfu: float | None) -> str:
    """Format the speed of training, with the rate of floating-point operations and its part of the peak where known."""
    parts = [f"{images_per_second:,.0f} images/s"]
    if tflops_per_second is not None:
        parts.append(f"{tflops_per_second:.3g} TFLOP/s")
    if mfu is not None:
        parts.append(f"MFU {percent(mfu)}")
    return ", ".join(parts)


def describe_checkpoint(result: dict[str, Any]) -> str:
    """Say which checkpoint the accuracy in RUN/result.json belongs to, and why this one."""
    accuracy = "" if result["val_accuracy"] is None else f", {percent(result['val_accuracy'])}"
    return f"step {step_of(result):,} ({why_chosen(result)}{accuracy})"


def why_chosen(result: dict[str, Any]) -> str:
    """Say why this checkpoint was evaluated for RUN/result.json."""
    return "the last" if result["val_accuracy"] is None else "the best on val"


def lowest_first(rows: Iterable[ClassAccuracy]) -> list[ClassAccuracy]:
    """Sort by accuracy, lowest first; classes without samples come last."""
    return sorted(rows, key=lambda row: (row.accuracy is None, row.accuracy or 0.0))
