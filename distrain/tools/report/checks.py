"""The checks of a report: what was compared in the files of a run, and what a reader should know beside it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from distrain.runs import checkpoint, results
from distrain.runs.folder import RunRecord
from distrain.text import plural
from distrain.tools.report import charts


class Check(NamedTuple):
    """A line under Checks.

    Attributes:
        mark: good: it was checked in the files of the run, and holds; bad: it does not; note: it was not checked.
        text: what was checked.
    """

    mark: Literal["good", "bad", "note"]
    text: str


def of_run(record: RunRecord) -> list[Check]:
    """Return what was checked in the files of the run, and what a reader should know beside it."""
    result, setup = record.result, record.setup
    checks = []
    if result is not None:
        checks += [_check_counts(result, setup), _check_metrics(record, result), _check_checkpoint(record, result)]
        if result["val_accuracy"] is not None:
            checks.append(_check_selection(record, result))
        if result.get("stopped_early"):
            checks.append(Check("note", f"The run was stopped {result['stopped_early']} (train.stop_after)."))
        if result["dropped_per_epoch"]:
            dropped = f"{result['dropped_per_epoch']:,} of {setup['data']['splits']['train']:,} training images"
            checks.append(Check("note", f"Each epoch drops {dropped}, different ones each time."))
    restarts = charts.restarts(record)
    if restarts:
        steps = ", ".join(f"{step:,}" for step in restarts[:8]) + (" …" if len(restarts) > 8 else "")
        checks.append(Check("note", f"The run was interrupted and resumed after step {steps}. {_effect(record)}"))
    dependent = setup["model"]["dependent"]
    if dependent:
        layers = ", ".join(dependent)
        text = f"The model has {layers}: on another number of processes, such layers compute something else."
        checks.append(Check("bad", text))
    else:
        checks.append(Check("note", _OTHER_NUMBER))
    return checks


_OTHER_NUMBER = (
    "On another number of processes, each step trains the same samples, and its gradient is the same except for"
    " rounding. Training amplifies rounding: weights and accuracy differ a little, as between two seeds."
)


def _effect(record: RunRecord) -> str:
    sizes = {attempt.get("world_size") for attempt in record.attempts if attempt.get("from_step") is not None}
    if len(sizes) > 1:
        return "The number of processes changed: the samples are the same, the weights differ as described below."
    return "On CPUs, an interruption changes no bit of the result if the number of processes stays the same."


def _check_counts(result: dict[str, Any], setup: dict[str, Any]) -> Check:
    """Compare the counts of the classes with the manifest's number of test images and with the accuracy."""
    confusion = results.Confusion.of_result(result)
    total, correct, expected = confusion.total, confusion.correct, setup["data"]["splits"].get("test", 0)
    if total != expected:
        return Check("bad", f"The confusion matrix counts {total:,} test images, the manifest {expected:,}.")
    counts = (result["total"], result["correct"])
    if counts != (total, correct) or abs(result["accuracy"] - correct / max(total, 1)) > 1e-9:
        return Check("bad", f"The accuracy is not that of the confusion matrix, {correct:,} of {total:,}.")
    images = plural(total, "test image")
    return Check("good", f"The confusion matrix counts {images}, as many as the manifest; {correct:,} are correct.")


def _check_metrics(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the last lines of the metrics with the result."""
    last = max((line["step"] for line in record.lines), default=0)
    if last != result["steps"]:
        return Check("bad", f"metrics.jsonl ends at step {last:,}, the result is of step {result['steps']:,}.")
    tested = [line["test/accuracy"] for line in record.lines if "test/accuracy" in line]
    if not tested or tested[-1] != result["accuracy"]:
        return Check("bad", "The last test accuracy in metrics.jsonl is not that of the result.")
    return Check("good", f"metrics.jsonl ends at the last step, {last:,}, with the accuracy of the result.")


def _check_checkpoint(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the files of the result's checkpoint with their digests."""
    name = result["checkpoint"]
    problem = checkpoint.problem(record.folder / checkpoint.FOLDER / name)
    if problem is not None:
        return Check("bad", f"The checkpoint of the result cannot be read: {problem}")
    return Check("good", f"The files of the evaluated checkpoint, {name}, are unchanged: their digests match.")


def _check_selection(record: RunRecord, result: dict[str, Any]) -> Check:
    """Compare the selected checkpoint with all evaluations on val."""
    scores = [(line["val/accuracy"], line["step"]) for line in record.lines if "val/accuracy" in line]
    best = max((accuracy for accuracy, _ in scores), default=None)
    step = results.step_of(result)
    if best is None or (best, step) not in scores or best != result["val_accuracy"]:
        return Check("bad", f"{result['checkpoint']} is not the best of the evaluations on val in metrics.jsonl.")
    number = plural(len(scores), "evaluation")
    return Check("good", f"{result['checkpoint']} is the best on val, of {number}; test did not select it.")
