"""Digests of weights, optimizer and trained ids: two runs are the same, bit for bit, if these are equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distrain import models
from distrain.data.order import mix_bits
from distrain.data.rounds import Batch
from distrain.training.job import Job

_BITS = 2**64


class TrainedIds:
    """A digest of which sample was trained at which place of which step; it does not depend on the number of processes.

    It is the sum, modulo 2^64, of a hash of (step, position in the global batch, id) of every sample: each process adds
    its own, in any order.

    Args:
        job: the run.
        digest: that of the steps trained before this attempt.
    """

    def __init__(self, job: Job, digest: str) -> None:
        self._collectives = job.runtime.collectives
        self._sum = int(digest, 16) if job.runtime.is_main else 0

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Add the samples of a step of the run: one local batch for each virtual rank."""
        positions, ids = (np.concatenate(each) for each in zip(*((b.positions, b.ids) for b in batches), strict=True))
        self._sum = (self._sum + hash_ids(step, positions, ids)) % _BITS

    def digest(self) -> str:
        """Return the digest over all processes (a collective): 16 hexadecimal digits."""
        return f"{sum(self._collectives.from_all(self._sum)) % _BITS:016x}"


def hash_ids(step: int, positions: NDArray[np.int64], ids: NDArray[np.int64]) -> int:
    """Return the sum of the hashes of samples, modulo 2^64.

    Args:
        step: step of the run.
        positions: int64 [n], place of each sample in the global batch.
        ids: int64 [n].
    """
    values = mix_bits(np.full(len(ids), step, np.uint64))
    values = mix_bits(values + positions.astype(np.uint64))
    values = mix_bits(values + ids.astype(np.uint64))
    return int(values.sum(dtype=np.uint64))


def of_run(job: Job, ids: str) -> dict[str, str]:
    """Return the digests for a line of metrics.jsonl: sha256 of weights and optimizer, and that of the ids."""
    weights, optimizer = job.model.checkpoint_tensors()
    return {"weights": models.digest(weights), "optimizer": models.digest(optimizer), "ids": ids}
