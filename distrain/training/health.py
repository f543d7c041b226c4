"""Signs in the scores of a run that its training went wrong.

They are compared with chance: the accuracy of a model that always predicts the largest class of the split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distrain.runs.results import Confusion
from distrain.text import percent, printable

_CURE = "Lower train.lr, or set train.clip_norm"


def chance(confusion: Confusion) -> float:
    """Return the fraction of the split's largest class."""
    return int(confusion.samples_by_class().max()) / confusion.total


def standard_error(accuracy: float, samples: int) -> float:
    """Return the standard error of an accuracy."""
    return math.sqrt(accuracy * (1 - accuracy) / samples)


def is_well_above(accuracy: float, level: float, samples: int) -> bool:
    """Whether an accuracy is so far above chance that it is no coincidence, even among many evaluations."""
    return accuracy - level >= max(4 * standard_error(level, samples), min(0.05, 2 * level))


def is_near(accuracy: float, level: float, samples: int) -> bool:
    """Whether an accuracy does not differ from chance, or is below it."""
    return accuracy <= level + 2 * standard_error(level, samples)


def has_collapsed(confusion: Confusion, best: float) -> bool:
    """Whether the accuracy is back at chance, or lost nine tenths of its lead, after `best` was well above it.

    In a small split, an accuracy that is near chance may still be that of the same model by chance.
    """
    level, samples = chance(confusion), confusion.total
    accuracy = confusion.correct / samples
    return (
        is_well_above(best, level, samples)
        and has_dropped(accuracy, best, samples)
        and (is_near(accuracy, level, samples) or accuracy <= level + 0.1 * (best - level))
    )


def has_dropped(accuracy: float, best: float, samples: int) -> bool:
    """Whether an accuracy is far below the best one on the same split: by two points, and four standard errors."""
    return best - accuracy > max(0.02, 4 * standard_error(best, samples))


def collapse_warning(
    split: str, step: int, confusion: Confusion, best_step: int, best: float, classes: Sequence[str]
) -> str:
    """Return the warning about a model that collapsed at a step."""
    accuracy, predicted = confusion.correct / confusion.total, np.unique(confusion.predicted)
    only = f"; all images are predicted as {printable(classes[predicted[0]])}" if len(predicted) == 1 else ""
    return (
        f"training collapsed: after step {step:,} the accuracy on {split} is {percent(accuracy)}"
        f" ({percent(chance(confusion))} is chance{only}); it was {percent(best)} after step {best_step:,}. {_CURE}"
    )


def drop_warning(accuracy: float, best_step: int, best: float) -> str:
    """Return the warning about last weights that are far worse than earlier ones, in a run without a val split."""
    return (
        f"the last weights reach {percent(accuracy)} on test, those after step {best_step:,} had {percent(best)}."
        " Without a val split the last weights are the result; with one (distrain prepare … --val-fraction 0.1) it is"
        " the best checkpoint on val"
    )


def chance_warning(confusion: Confusion) -> str:
    """Return the warning about a result that is not clearly above chance."""
    accuracy = confusion.correct / confusion.total
    return (
        f"the accuracy on test, {percent(accuracy)} of {confusion.total:,} images, is not clearly above chance"
        f" ({percent(chance(confusion))}, always the largest class): nothing shows that the model has learnt. Train"
        " longer, change train.lr, or check the labels"
    )
