"""Exact evaluation: each process scores the samples that it alone owns, counts are summed once, and the total must
be the manifest's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from distrain.data.manifest import Dataset
from distrain.data.stream import EvaluationBatches
from distrain.distributed.runtime import POLL_SECONDS, Runtime
from distrain.errors import DataError
from distrain.training.augment import normalize

Keep = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Scores:
    """confusion: int64 [K, K], row = true class, column = predicted; loss: mean cross-entropy."""

    confusion: Tensor
    loss: float

    @property
    def total(self) -> int:
        """Samples scored."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Samples whose class was predicted."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Fraction of the samples whose class was predicted."""
        return self.correct / self.total

    def line(self, split: str) -> str:
        """The line that a run closes with."""
        return f"Accuracy of the network on the {self.total} {split} images: {100 * self.accuracy:.1f} %"

    def as_dict(self, classes: list[str]) -> dict[str, Any]:
        """For JSON; the accuracy of a class without samples is null."""
        by_class = zip(classes, self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return {
            "accuracy": self.accuracy,
            "correct": self.correct,
            "total": self.total,
            "loss": self.loss,
            "accuracy_by_class": {name: right / count if count else None for name, right, count in by_class},
            "confusion_matrix": self.confusion.tolist(),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    mean: Tensor,
    std: Tensor,
    batch_size: int,
    runtime: Runtime,
    keep: Keep | None = None,
) -> Scores:
    """Score a model on a split, on all processes together; the result is the same on each of them. `keep` is called
    with each batch of this process: images, ids, labels, logits.

    Raises:
        DataError: on all processes: a shard cannot be read, or the number of samples scored is not the manifest's.
        StopAgreed: one process was asked to stop, and all know.
    """
    num_classes = len(dataset.manifest.classes)
    # Counts and the loss travel in one vector of fp64, which holds integers exactly up to 2**53.
    sums = torch.zeros(num_classes**2 + 1, dtype=torch.float64, device=runtime.device)

    def score(images: Tensor, labels: Tensor, ids: Tensor) -> None:
        images, truth = images.to(runtime.device), labels.to(runtime.device)
        logits = model(normalize(images, mean, std))
        sums[:-1] += torch.bincount(truth * num_classes + logits.argmax(1), minlength=num_classes**2)
        sums[-1] += F.cross_entropy(logits, truth, reduction="sum")
        if keep is not None:
            keep(images, ids.to(runtime.device), truth, logits)

    training = model.training
    model.eval()
    with runtime.watch.phase("evaluate"), closing(EvaluationBatches(dataset, split, runtime.world, batch_size)) as all_:
        shown = tqdm(desc=split, unit="batch", leave=False, disable=None if runtime.is_main else True)
        with closing(shown):
            _for_each(all_, score, runtime, shown)
    model.train(training)
    runtime.sum(sums)
    total, promised = int(sums[:-1].sum()), dataset.split(split).samples
    if total != promised:
        raise DataError(f"{dataset.root}: {total} samples of {split} were scored, the manifest has {promised}")
    confusion = sums[:-1].to(torch.int64).reshape(num_classes, num_classes).cpu()
    return Scores(confusion, float(sums[-1]) / total)


def _for_each(
    batches: EvaluationBatches, score: Callable[[Tensor, Tensor, Tensor], None], runtime: Runtime, shown: Any
) -> None:
    """Score this process's batches, collective the others a few times a second until all are through: nobody is left
    waiting by one that was asked to stop, or cannot read a shard.
    """
    busy, scored, problem, meet_at = True, 0, None, time.monotonic() + POLL_SECONDS
    while True:
        try:
            if busy and batches.ready(POLL_SECONDS):
                batch = next(batches, None)
                busy = batch is not None
                if batch is not None:
                    score(*batch)
                    scored += 1
                    shown.update()
                    runtime.watch.waits_for = None
            elif busy:
                runtime.watch.waits_for = "its data"
        except DataError as error:
            problem = error
        if busy and problem is None and time.monotonic() < meet_at:
            continue
        if not runtime.still_busy(busy, scored > 0, problem):
            return
        scored, meet_at = 0, time.monotonic() + POLL_SECONDS
