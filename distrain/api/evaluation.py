"""Evaluation from Python, and for the command line."""

from __future__ import annotations

import os
from typing import Literal

from distrain.api.arguments import one_of, path_of
from distrain.api.result import Result, of_record
from distrain.config import Overrides
from distrain.environment import Environment
from distrain.tools.evaluate import evaluate_run


def evaluate(
    run: str | os.PathLike[str],
    split: Literal["train", "val", "test"] = "test",
    *,
    checkpoint: str | None = None,
    overrides: Overrides = (),
) -> Result:
    """Evaluate a checkpoint of a run, as `distrain evaluate` does; RUN/evaluations/ holds the result as well.

        result = distrain.evaluate("runs/first", "val", checkpoint="last", overrides={"eval": {"batch_size": 64}})

    In a script that torchrun or accelerate launch starts, each process calls this and evaluates a part of the samples.

    Args:
        run: the run's folder.
        split: train, val or test.
        checkpoint: best, last, or a folder's name; None: the one that the run's result is of.
        overrides: values that replace the run's own, as for `Config.load`: `data.dir`, for instance, where the data
            set was moved. What was trained cannot be changed.

    Returns:
        The scores, on all processes.

    Raises:
        distrain.DataError: the folder holds no run, or the checkpoint or the data cannot be read.
        distrain.ConfigError: an override is wrong, or not what was trained.
        distrain.AgainError: a stop was requested, or another process failed.
        distrain.PeerFailedError: another process failed, and recorded why.
    """
    folder = path_of("run", run)
    one_of("split", split, ("train", "val", "test"))
    content = evaluate_run(folder, split, overrides, checkpoint, Environment.read(os.environ))
    return of_record(Result, content, run=folder)
