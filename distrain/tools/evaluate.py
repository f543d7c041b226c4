"""`distrain evaluate`: evaluate a checkpoint of a run, on any number of processes."""

from __future__ import annotations

import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain import files, models, signals
from distrain.config import Config, Overrides, identity
from distrain.data.manifest import Dataset
from distrain.distributed.collectives import StopAgreed
from distrain.distributed.numerics import torch_defaults
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment
from distrain.errors import ConfigError, DataError, Stopped
from distrain.models.mirror_average import as_evaluated
from distrain.runs import checkpoint, folder, records, results
from distrain.runs.checkpoint import Checkpoint
from distrain.runs.choice import choose
from distrain.training import evaluation, inputs
from distrain.training.evaluation import Scores
from distrain.training.model_setup import build_model
from distrain.training.setup import start_runtime, start_watchdog

log = logging.getLogger("distrain")


def evaluate_run(
    run: Path, split: str, overrides: Overrides, which: str | None, environment: Environment
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run, and write RUN/evaluations/SPLIT-CHECKPOINT.json.

    Args:
        run: the run's folder.
        split: train, val or test.
        overrides: values that replace the run's own, as for `config.load`.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.
        environment: this process among the others.

    Returns:
        The content of that file, without its version.

    Raises:
        UserError: the folder holds no run, or checkpoint, data or overrides cannot be used.
        AgainError: a stop was requested, or another process failed.
    """
    config = folder.configuration(run, overrides)
    with (
        torch_defaults(),
        signals.recorded(),
        closing(start_watchdog(config, environment)) as watchdog,
        start_runtime(config, environment, watchdog) as rt,
    ):
        dataset = rt.collectives.all_or_none(lambda: inputs.read_data(config, split))
        # The main process chooses: while the run is training, other processes may see newer checkpoints.
        path, skipped = rt.collectives.from_main(
            rt.collectives.all_or_none(lambda: choose(run, which) if rt.is_main else None)
        )
        for line in skipped if rt.is_main else []:
            log.warning("skipped %s", line)
        saved = rt.collectives.all_or_none(lambda: checkpoint.load(path))
        inputs.check_same_data(rt.collectives, dataset, [split])
        inputs.check(config, dataset)
        _check_identity(config, dataset, saved)
        try:
            scores = _evaluate(config, dataset, split, saved, rt)
        except StopAgreed as stop:
            raise Stopped(f"stopped{stop.by}; nothing was written") from None
        content = {
            **scores.as_dict(dataset.manifest.classes),
            "split": split,
            "checkpoint": saved.path.name,
            "world_size": rt.world.size,
        }
        if rt.is_main:
            _write(file_of(run, content), content)
    return content


def file_of(run: Path, content: dict[str, Any]) -> Path:
    """Return the path of the file that holds the scores of an evaluation."""
    return run / folder.EVALUATIONS / f"{content['split']}-{content['checkpoint']}.json"


def _write(out: Path, content: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(exist_ok=True)
        files.replace(out, records.to_json(content))
    except OSError as error:
        accuracy = results.accuracy_line(content["split"], content["total"], content["accuracy"])
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; make room there. {accuracy}") from error


def _evaluate(config: Config, dataset: Dataset, split: str, saved: Checkpoint, rt: Runtime) -> Scores:
    module = rt.collectives.all_or_none(lambda: _load_model(config, dataset, saved, rt))
    module = as_evaluated(rt.prepare_eval_model(module), config.eval.flip)
    mean, std = (
        torch.tensor(saved.state["identity"][f"data.{key}"], dtype=rt.dtype, device=rt.device)
        for key in ("mean", "std")
    )
    preprocessing = inputs.preprocessing(config, dataset, rt.environment.local_world_size)
    scores = evaluation.evaluate(module, dataset, split, mean, std, config.eval.batch_size, rt, preprocessing)
    bad = inputs.describe_bad(dataset, split, scores.bad)
    inputs.check_bad(bad, config.data.skip_bad)
    for name, reason in bad.items() if rt.is_main else ():
        log.warning("%s cannot be decoded (%s): it is not evaluated", name, reason)
    if not math.isfinite(scores.loss):
        raise DataError(f"{saved.path}: its model gives logits for {split} that are not finite; use another checkpoint")
    return scores


def _load_model(config: Config, dataset: Dataset, saved: Checkpoint, rt: Runtime) -> nn.Module:
    module = build_model(config, dataset, rt.dtype)
    models.load(module, saved.model, config.model.name, saved.path)
    return module


def _check_identity(config: Config, dataset: Dataset, saved: Checkpoint) -> None:
    """Check that the configuration is the one of the training; only the precision may differ."""
    requested = {**identity(config), "data.manifest": dataset.digest}
    # Mean, std and weights are taken from the checkpoint.
    not_compared = ("train.precision", "data.mean", "data.std", "model.init")
    differ = checkpoint.differences(
        *(
            # With virtual ranks a checkpoint has more fields, which only a resume must keep.
            {key: value for key, value in fields.items() if key in requested and key not in not_compared}
            for fields in (saved.state["identity"], requested)
        )
    )
    if differ:
        raise ConfigError("\n  ".join([f"{saved.path}: was not trained with this configuration:", *differ]))
