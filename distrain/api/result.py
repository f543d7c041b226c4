"""The results of training and of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

R = TypeVar("R", bound="Result")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The scores of a checkpoint on a split of the data.

    Attributes:
        run: folder of the run.
        checkpoint: name of the checkpoint's folder, such as `step-00001234`.
        split: train, val or test.
        accuracy: fraction of the samples whose class was predicted, in 0 … 1.
        correct: number of these samples.
        total: number of samples that were evaluated.
        accuracy_interval: lowest and highest accuracy of the 95 % confidence interval (Wilson, 1927). It is about the
            number of samples alone; the spread between seeds is not in it.
        loss: mean cross-entropy.
        top5_accuracy: fraction of the samples whose class is among the five most probable ones; None if there are at
            most five classes.
        macro_f1: mean F1 score of the classes that occur or are predicted.
        calibration_error: expected calibration error (Guo et al., 2017): the mean difference between accuracy and
            confidence, in 15 bins of the confidence.
        accuracy_by_class: accuracy of each class, which is its recall, in the order of the classes; None for one
            without samples.
        precision_by_class: precision of each class: 0 if it is never predicted, and None if it does not occur either.
        confusion: (true class, predicted class, number of samples) of each pair that occurs; the first class is 0.
        world_size: number of processes that evaluated.
    """

    run: Path
    checkpoint: str
    split: str
    accuracy: float
    correct: int
    total: int
    accuracy_interval: tuple[float, float]
    loss: float
    top5_accuracy: float | None
    macro_f1: float
    calibration_error: float
    accuracy_by_class: Mapping[str, float | None] = field(repr=False)
    precision_by_class: Mapping[str, float | None] = field(repr=False)
    confusion: tuple[tuple[int, int, int], ...] = field(repr=False)
    world_size: int

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.accuracy_by_class)

    def confusion_matrix(self) -> NDArray[np.int64]:
        """Return the number of samples by true class (row) and predicted class (column): int64 [K, K]."""
        matrix = np.zeros((len(self.accuracy_by_class),) * 2, np.int64)
        for true, predicted, count in self.confusion:
            matrix[true, predicted] = count
        return matrix


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Result):
    """The result of a run: the scores of its chosen checkpoint on test, and facts about the training.

    Attributes:
        steps: optimizer steps.
        epochs: steps in epochs.
        dropped_per_epoch: number of training samples that each epoch drops.
        seconds: duration of training in all attempts, without start-up.
        compile_seconds: duration of compilation in all attempts.
        train_seconds: duration of the steps alone in all attempts: without start-up, reading before an attempt's first
            step, evaluations and checkpoints.
        attempt_seconds: wall time of all attempts; None in the result of an older version.
        pause_seconds: wall time between the attempts, in which no process of the run existed; None as above.
        goodput: `train_seconds` / `attempt_seconds`; steps that were trained again after a crash count once.
        images_per_second: speed of the steps.
        tflops_per_second: 10¹² floating-point operations per second; None where they cannot be counted.
        mfu: model FLOPs utilisation, the fraction of the devices' peak; None where the peak is not known.
        memory_gib: the highest peaks of all processes since they began, in GiB: `host`, resident memory; `device`,
            memory that torch allocated on a GPU, None without one. What a script did before is in them.
        train_accuracy: fraction of the training samples whose class was predicted, in the augmented batches as they
            were trained, in the last complete epoch; None where labels are mixed.
        val_accuracy: accuracy of the checkpoint on val, by which it was chosen; None without a val split.
        stopped_early: why the run ended before its last step (`train.stop_after`); None if it did not.
        precision: `train.precision`.
        device: cpu or cuda.
        dependent_layers: layers of the model that make the result depend on the number of processes.
        warnings: signs that training went wrong.
        unreadable: images that could not be decoded, with the reason.
        profile: fraction of the time of training by phase.
        report: the page that shows the run; None if it was not written (`log.report`), or by another process.
    """

    steps: int
    epochs: float
    dropped_per_epoch: int
    seconds: float
    compile_seconds: float
    train_seconds: float
    attempt_seconds: float | None = None
    pause_seconds: float | None = None
    goodput: float | None = None
    images_per_second: float
    tflops_per_second: float | None = None
    mfu: float | None = None
    memory_gib: Mapping[str, float | None]
    train_accuracy: float | None
    val_accuracy: float | None
    stopped_early: str | None = None
    precision: str
    device: str
    dependent_layers: tuple[str, ...]
    warnings: tuple[str, ...]
    unreadable: tuple[str, ...]
    profile: Mapping[str, float] = field(repr=False)
    report: Path | None = None


def of_record(kind: type[R], content: Mapping[str, Any], **more: Any) -> R:
    """Build a result from the content of a run's file; keys that it does not know are passed over."""
    values = {**content, **more}
    values["accuracy_interval"] = tuple(content["accuracy_interval"])
    values["confusion"] = tuple((true, predicted, count) for true, predicted, count in content["confusion"])
    for name in ("dependent_layers", "warnings", "unreadable"):
        values[name] = tuple(content.get(name, ()))
    known = [each.name for each in fields(kind)]
    return kind(**{name: values[name] for name in known if name in values})
