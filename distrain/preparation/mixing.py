"""A measure of how well classes are mixed along the samples of a split: arithmetic.

q is the probability that two different samples of one shard have the same class, p the same for two samples of the
whole split, and rho = (q - p) / (1 - p). It is 0 for samples in random order, and 1 if all samples of a shard have the
same class.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SORTED = 0.2
"""Data with a larger rho is refused: training would be bad."""
NOTICEABLE = 0.05
"""A larger rho is a warning."""
_SIGMAS = 4
"""A rho that is fewer standard errors above 0 may be chance."""


class Mixing(NamedTuple):
    """The order of a split's classes.

    Attributes:
        rho: 0 for random order, 1 for shards of one class; 0 if shards have one sample.
        error: standard error of rho for samples in random order.
        classes: mean number of different classes in a shard.
        chance: the same if the order were random.
        shard_samples: mean number of samples of a shard.
    """

    rho: float
    error: float
    classes: float
    chance: float
    shard_samples: float

    def exceeds(self, limit: float) -> bool:
        """Whether rho is above a limit, and above what chance explains."""
        return self.rho > max(limit, _SIGMAS * self.error)


def measure(labels: NDArray[np.int64], starts: NDArray[np.int64]) -> Mixing:
    """Measure how well classes are mixed.

    Args:
        labels: class of each sample, in order: int64 [N].
        starts: first sample of each shard, and the number of samples: int64 [S + 1].
    """
    sizes = np.diff(starts)
    shard = np.repeat(np.arange(len(sizes)), sizes)
    classes = int(labels.max()) + 1
    _, in_shard = np.unique(shard * classes + labels, return_counts=True)
    in_split = np.bincount(labels, minlength=classes)
    occurring = in_split[in_split > 0]
    pairs, all_pairs = int((sizes * (sizes - 1)).sum()), len(labels) * (len(labels) - 1)
    if pairs == 0 or len(occurring) == 1:
        return Mixing(0.0, 0.0, len(in_shard) / len(sizes), len(in_shard) / len(sizes), len(labels) / len(sizes))
    q = int((in_shard * (in_shard - 1)).sum()) / pairs
    p = int((occurring * (occurring - 1)).sum()) / all_pairs
    fractions = occurring / len(labels)
    squares, cubes = float((fractions**2).sum()), float((fractions**3).sum())
    # Variance of one pair's "same class", without the part that is constant in shards of equal size.
    variance = max(0.0, squares + squares**2 - 2 * cubes) / (pairs / 2)
    chance = float((1 - (1 - fractions) ** (len(labels) / len(sizes))).sum())
    return Mixing(
        (q - p) / (1 - p), math.sqrt(variance) / (1 - p), len(in_shard) / len(sizes), chance, len(labels) / len(sizes)
    )
