"""`distrain evaluate`: score a checkpoint of a run, on any number of processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain import files, models, signals
from distrain.config import Config, identity
from distrain.data.manifest import Dataset
from distrain.distributed.collectives import StopAgreed
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment
from distrain.errors import ConfigError, Stopped
from distrain.runs import checkpoint, folder
from distrain.runs.checkpoint import Saved
from distrain.tools.loaded_model import choose
from distrain.training import evaluation
from distrain.training.evaluation import Scores
from distrain.training.setup import build_model, check_same_data, read_data, start_runtime, start_watchdog


def evaluate_run(
    run: Path, split: str, overrides: Sequence[str], which: str | None, environment: Environment
) -> tuple[Scores, str, list[str]]:
    """Score a checkpoint of a run: `which` (best, last, or a folder's name), by default the one its result is of.

    Returns:
        The scores, the checkpoint's name and the classes.
    """
    config = folder.configuration(run, overrides)
    with (
        signals.recorded(),
        closing(start_watchdog(config, environment)) as watchdog,
        start_runtime(config, environment, watchdog) as rt,
    ):
        dataset = rt.collectives.all_or_none(lambda: read_data(config, split))
        # The main process chooses: of a run that goes on, others may see newer ones.
        path, skipped = rt.collectives.from_main(
            rt.collectives.all_or_none(lambda: choose(run, which) if rt.is_main else None)
        )
        for line in skipped if rt.is_main else []:
            print(f"warning: skipped {line}", file=sys.stderr)
        saved = rt.collectives.all_or_none(lambda: checkpoint.load(path))
        check_same_data(rt, dataset, [split])
        _check_identity(config, dataset, saved)
        try:
            scores = _score(config, dataset, split, saved, rt)
        except StopAgreed as stop:
            raise Stopped(f"stopped{stop.by}; nothing was written") from None
        if rt.is_main:
            print(scores.line(split), flush=True)
            scored = {**scores.as_dict(dataset.manifest.classes), "split": split, "world_size": rt.world.size}
            _write(run / "evaluations" / f"{split}-{saved.path.name}.json", scored)
    return scores, saved.path.name, dataset.manifest.classes


def _write(out: Path, scored: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(exist_ok=True)
        files.replace(out, json.dumps(scored, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; the score is above") from error
    print(f"written to {out}", flush=True)


def _score(config: Config, dataset: Dataset, split: str, saved: Saved, rt: Runtime) -> Scores:
    module = rt.collectives.all_or_none(lambda: _trained(config, dataset, saved, rt))
    module = rt.prepare_eval_model(module)
    mean, std = (
        torch.tensor(saved.state["identity"][f"data.{key}"], dtype=rt.dtype, device=rt.device)
        for key in ("mean", "std")
    )
    return evaluation.evaluate(module, dataset, split, mean, std, config.eval.batch_size, rt)


def _trained(config: Config, dataset: Dataset, saved: Saved, rt: Runtime) -> nn.Module:
    module = build_model(config, dataset.manifest, rt.dtype)
    models.load(module, saved.model, config.model.name, saved.path)
    return module


def _check_identity(config: Config, dataset: Dataset, saved: Saved) -> None:
    """What is scored is what was trained; only the precision to score in may differ."""
    asked = {**identity(config), "data.manifest": dataset.digest}
    # Mean, std and all weights are the checkpoint's own.
    free = ("train.precision", "data.mean", "data.std", "model.init")
    trained = saved.state["identity"]
    differ = checkpoint.differences(
        *({k: v for k, v in fields.items() if k not in free} for fields in (trained, asked))
    )
    if differ:
        raise ConfigError("\n  ".join([f"{saved.path}: was not trained with this configuration:", *differ]))
