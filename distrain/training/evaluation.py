"""Exact evaluation: each process scores its part of the samples, and the counts are summed once.

The total must be that of the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain import models, startup
from distrain.data.decoding import Bad, Preprocessing
from distrain.data.manifest import Dataset
from distrain.data.stream import EvaluationBatches
from distrain.distributed.collectives import POLL_SECONDS
from distrain.distributed.numerics import sum_in_order
from distrain.distributed.runtime import Runtime
from distrain.errors import DataError
from distrain.progress import Bar
from distrain.runs import results
from distrain.runs.results import Confusion
from distrain.training.augment import normalize

WHAT_INSTEAD = "in training the next readable one is used, and it is not evaluated"

Collect = Callable[[Tensor, Tensor, Tensor, Tensor], None]

_MAX_PENDING = 250
"""Batches whose predictions are on the device before they are counted."""
_TOP = 5
"""Classes that a sample's class is to be among, for the top-5 accuracy."""


@dataclass(frozen=True)
class Counts:
    """The counts of a part of a split: whole numbers, whose sums are exact.

    Attributes:
        confusion: number of samples by true and predicted class.
        in_top5: number of samples whose class is among the five most probable ones.
        calibration_gaps: see `results.calibration_gaps`.
    """

    confusion: Confusion
    in_top5: int
    calibration_gaps: results.Ints

    @classmethod
    def of_predictions(cls, predictions: results.Ints, num_classes: int) -> Counts:
        """Count samples: int64 [4, n], true and predicted class, confidence in units of 2⁻³², 1 if in the top 5."""
        truth, predicted, confidences, in_top5 = predictions
        codes = truth * num_classes + predicted
        return cls(
            Confusion.of_codes(codes, np.ones_like(codes), num_classes),
            int(in_top5.sum()),
            results.calibration_gaps(confidences, truth == predicted),
        )

    def plus(self, others: Sequence[Counts]) -> Counts:
        """Return the sums of several parts of a split."""
        parts = [self, *others]
        return Counts(
            self.confusion.plus([other.confusion for other in others]),
            sum(part.in_top5 for part in parts),
            np.sum([part.calibration_gaps for part in parts], 0),
        )


@dataclass(frozen=True)
class Scores:
    """The scores of a split: what was counted, and the mean cross-entropy."""

    counts: Counts
    loss: float
    bad: tuple[Bad, ...] = ()
    """Samples of an index that could not be decoded, and are not scored."""

    @property
    def confusion(self) -> Confusion:
        """The number of samples by true and predicted class."""
        return self.counts.confusion

    @property
    def total(self) -> int:
        """Number of samples scored."""
        return self.confusion.total

    @property
    def accuracy(self) -> float:
        """Fraction of the samples whose class was predicted."""
        return self.confusion.correct / self.confusion.total

    @property
    def top5_accuracy(self) -> float | None:
        """Fraction of the samples whose class is among the five most probable; None if there are at most five."""
        return self.counts.in_top5 / self.total if self.confusion.num_classes > _TOP else None

    @property
    def macro_f1(self) -> float:
        """Mean F1 score of the classes that occur or are predicted."""
        return results.macro_f1(self.confusion)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error."""
        return results.calibration_error(self.counts.calibration_gaps, self.total)

    def as_dict(self, classes: list[str]) -> dict[str, Any]:
        """Return the scores for JSON; the accuracy of a class without samples is null."""
        precisions = results.precision_by_class(self.confusion)
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": list(results.accuracy_interval(self.confusion.correct, self.total)),
            "correct": self.confusion.correct,
            "total": self.total,
            "loss": self.loss,
            "top5_accuracy": self.top5_accuracy,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "accuracy_by_class": {row.name: row.accuracy for row in results.accuracy_by_class(classes, self.confusion)},
            "precision_by_class": dict(zip(classes, precisions, strict=True)),
            "confusion": self.confusion.as_rows(),
        }

    def as_line(self, split: str) -> dict[str, float]:
        """Return the scores for a line of metrics.jsonl."""
        names = ("accuracy", "loss", "top5_accuracy", "macro_f1", "calibration_error")
        values = {name: getattr(self, name) for name in names}
        return {f"{split}/{name}": value for name, value in values.items() if value is not None}


class _Counter:
    """Counts predictions; they stay on the device, and no batch waits for it."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._pending: list[Tensor] = []
        self._counted = Counts.of_predictions(np.zeros((4, 0), np.int64), num_classes)

    def add(self, truth: Tensor, logits: Tensor, log_probabilities: Tensor) -> None:
        """Count a batch: the true classes int64 [n]; [n, K] each."""
        predicted = logits.argmax(1)
        confidences = log_probabilities.gather(1, predicted[:, None])[:, 0].exp().double() * 2**results.CONFIDENCE_BITS
        in_top5 = is_in_top(logits, truth, _TOP) if self._num_classes > _TOP else torch.zeros_like(truth)
        self._pending.append(torch.stack((truth, predicted, confidences.long(), in_top5)))
        if len(self._pending) >= _MAX_PENDING:
            self.counted()

    def counted(self) -> Counts:
        """Return the counts of all batches so far."""
        if self._pending:
            predictions = torch.cat(self._pending, 1).cpu().numpy()
            self._pending.clear()
            self._counted = Counts.of_predictions(predictions, self._num_classes).plus([self._counted])
        return self._counted


def is_in_top(logits: Tensor, truth: Tensor, number: int) -> Tensor:
    """Return whether the true class is among the `number` most probable ones: bool [n].

    Of equal logits the first class counts as the more probable one, as for `argmax`; `topk` may choose any.

    Args:
        logits: [n, K].
        truth: the true classes, int64 [n].
        number: in 1 … K.
    """
    truth = truth[:, None]
    true_logits, classes = logits.gather(1, truth), torch.arange(logits.shape[1], device=logits.device)
    before = (logits > true_logits) | ((logits == true_logits) & (classes < truth))
    return before.sum(1) < number


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    split: str,
    mean: Tensor,
    std: Tensor,
    batch_size: int,
    runtime: Runtime,
    preprocessing: Preprocessing | None = None,
    collect: Collect | None = None,
) -> Scores:
    """Score a model on a split, on all processes together; the result is the same on each of them.

    Args:
        model: gives logits [n, K].
        dataset: the data set.
        split: name of the split.
        mean: [C], for normalisation.
        std: [C].
        batch_size: most samples at once.
        runtime: this process among its peers.
        preprocessing: how the images of an index are decoded.
        collect: called with each batch of this process: images, ids, labels, logits.

    Raises:
        DataError: on all processes: a shard cannot be read, or the number of samples scored is not the manifest's.
        StopAgreed: on all processes, if one was asked to stop.
    """
    startup.waits_for(None)
    counter = _Counter(len(dataset.manifest.classes))
    losses: list[Tensor] = []

    def score(images: Tensor, labels: Tensor, ids: Tensor) -> None:
        images, truth = images.to(runtime.device), labels.to(runtime.device)
        runtime.seed(batches.numbers[len(losses)])  # a model may draw random numbers in evaluation too
        logits = model(normalize(images, mean, std))
        log_probabilities = logits.log_softmax(1)
        counter.add(truth, logits, log_probabilities)
        losses.append(F.nll_loss(log_probabilities, truth, reduction="sum").double())
        if collect is not None:
            collect(images, ids.to(runtime.device), truth, logits)

    with (
        models.evaluation_mode(model),
        runtime.watchdog.phase("evaluate"),
        closing(EvaluationBatches(dataset, split, runtime.world, batch_size, preprocessing)) as batches,
        closing(Bar(split, unit="batches", leave=False, show=runtime.is_main)) as bar,
    ):
        _for_each(batches, score, runtime, bar)
    local = dict(zip(batches.numbers, torch.stack(losses).tolist() if losses else (), strict=True))
    first, *others = runtime.collectives.from_all((counter.counted(), local, batches.bad))
    counts = first[0].plus([each for each, *_ in others])
    bad = sorted((each for *_, of_rank in (first, *others) for each in of_rank), key=lambda each: each.number)
    expected = dataset.split(split).samples - len(bad)
    if counts.confusion.total != expected:
        raise DataError(
            f"{dataset.root}: {counts.confusion.total} samples of {split} were scored, the manifest has {expected}"
        )
    if not expected:
        raise DataError(f"{dataset.root}: no image of {split} can be decoded; index other tar files")
    of_batches = {number: loss for _, each, _ in (first, *others) for number, loss in each.items()}
    # In the order of the batches: the same bits on any number of processes.
    return Scores(counts, sum_in_order(of_batches[each] for each in sorted(of_batches)) / expected, tuple(bad))


def _for_each(
    batches: EvaluationBatches, score: Callable[[Tensor, Tensor, Tensor], None], runtime: Runtime, bar: Any
) -> None:
    """Score this process's batches, and agree with the others a few times a second until all have finished.

    So none waits for one that was asked to stop, or cannot read a shard.
    """
    busy, batches_done, error, agree_at = True, 0, None, time.monotonic() + POLL_SECONDS
    while True:
        try:
            if busy and batches.ready(POLL_SECONDS):
                batch = next(batches, None)
                busy = batch is not None
                if batch is not None:
                    score(*batch)
                    batches_done += 1
                    bar.update()
                    runtime.watchdog.waiting_for(None)
            elif busy:
                runtime.watchdog.waiting_for("its data")
        except DataError as caught:
            error = caught
        if busy and error is None and time.monotonic() < agree_at:
            continue
        if not runtime.collectives.any_busy(busy, batches_done > 0, error):
            return
        batches_done, agree_at = 0, time.monotonic() + POLL_SECONDS
