"""The run: `fit` trains, evaluates and saves, step after step; `finish` scores the test split."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain import augment, checkpoint, evaluation, files
from distrain.config import Config, from_tree, load, public
from distrain.errors import DivergedError
from distrain.evaluation import Scores
from distrain.job import RESULT, Job, save, set_up
from distrain.stream import Batch, training_batches
from distrain.tracking import METRICS, JsonLines, Logs, Progress, WandbMirror, audit_path


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Train, evaluate and save a run; the same as `distrain train`.

    Args:
        config: a `Config`, nested mappings of its keys, or the path of a YAML file.

    Returns:
        What is in RUN/result.json.

    Raises:
        UserError: configuration, data or sources cannot be used, or the loss diverged.
    """
    started = time.monotonic()
    if isinstance(config, Mapping):
        config = from_tree(config)
    elif not isinstance(config, Config):
        config = load(Path(config))
    job = set_up(config, started)
    try:
        logs = _open_logs(job)
        result: dict[str, Any] = {}
        try:
            fit(job, logs)
            result = finish(job, logs)
        finally:
            logs.close({key: value for key, value in result.items() if isinstance(value, (int, float))})
        return result
    finally:
        job.runtime.close()


def fit(job: Job, logs: Logs) -> None:
    """Train the steps that are left."""
    config, state = job.config, job.state
    batches = training_batches(
        job.dataset,
        job.order,
        job.runtime.world,
        range(state.step, job.total_steps),
        config.data.read_ahead,
        with_words=config.augment.flip or config.augment.crop_padding > 0,
        pin=job.runtime.device.type == "cuda",
    )
    eval_every = config.eval.every_steps if config.eval.every_steps is not None else job.order.steps_per_epoch
    has_val = "val" in job.dataset.manifest.splits
    losses: list[Tensor] = []
    logged, clock = state.step, time.monotonic()
    with closing(batches):  # type: ignore[type-var]
        for batch in batches:
            losses.append(train_step(job, batch))
            if logs.audit is not None:
                epoch = state.step // job.order.steps_per_epoch
                logs.audit.write({"step": state.step, "epoch": epoch, "ids": batch.ids.tolist()})
            state.step += 1
            logs.progress.step()
            last = state.step == job.total_steps
            # Where there is no val, `finish` scores test after the last step.
            evaluates = has_val if last else _due(state.step, eval_every)
            saves = last or _due(state.step, config.checkpoint.every_steps)
            if not (evaluates or saves or _due(state.step, config.log.every_steps)):
                continue
            # Nothing is evaluated or saved before the loss is known to be finite.
            loss = _mean_loss(job, losses)
            seconds = time.monotonic() - clock
            state.train_seconds += seconds
            _log_train(job, logs, loss, state.step - logged, seconds)
            losses.clear()
            if evaluates or saves:
                _check_weights(job)
            if evaluates and _evaluate(job, logs):
                saves = True
            if saves:
                save(job, logs)
            logged, clock = state.step, time.monotonic()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train_step(job: Job, batch: Batch) -> Tensor:
    """One optimizer step on a rank's share of the global batch.

    DDP takes the mean of the ranks' gradients; each rank's loss is the sum over its samples times W / G, so the
    gradient is the global batch's mean whatever the shares and micro-batches.

    Returns:
        The sum of this rank's losses, fp64, not yet synchronised with the device.
    """
    config, rt = job.config.train, job.runtime
    for group in job.optimizer.param_groups:
        group["lr"] = job.learning_rate(job.state.step)
    rt.seed(job.layer_seed())  # layers that draw random numbers draw the same after a resume
    scale = rt.world.size / config.global_batch_size
    images, labels, weight = _to_device(job, batch)
    micro = min(config.micro_batch_size or len(labels), len(labels))
    total = torch.zeros((), dtype=torch.float64, device=rt.device)
    for start in range(0, len(labels), micro):
        with rt.accumulating(job.ddp, last=start + micro >= len(labels)):
            logits = job.ddp(augment.normalize(images[start : start + micro], job.mean, job.std))
            loss = F.cross_entropy(logits, labels[start : start + micro], reduction="sum") * weight
            rt.backward(loss * scale)
        total += loss.detach()
    if config.clip_norm is not None:
        rt.clip(job.ddp, config.clip_norm)
    rt.step(job.optimizer)
    return total


def _to_device(job: Job, batch: Batch) -> tuple[Tensor, Tensor, float]:
    """Augmented images and labels on the device, and what the loss counts for: 0 for an empty share, which takes
    part in the reduction with a black picture.
    """
    device, settings = job.runtime.device, job.config.augment
    if not len(batch.labels):
        black = torch.zeros(1, *job.dataset.manifest.image_shape, dtype=torch.uint8, device=device)
        return black, torch.zeros(1, dtype=torch.int64, device=device), 0.0
    images = batch.images.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True)
    words = batch.words.to(device, non_blocking=True)
    return augment.augment(images, words, settings.flip, settings.crop_padding), labels, 1.0


def _mean_loss(job: Job, losses: list[Tensor]) -> float:
    """Mean loss of the steps since the last call, over all ranks.

    Raises:
        DivergedError: on every rank, naming the first step whose loss is not finite.
    """
    sums = job.runtime.sum(torch.stack(losses)).tolist()
    batch = job.config.train.global_batch_size
    for number, value in enumerate(sums, job.state.step - len(sums)):
        if not math.isfinite(value):
            raise _diverged(job, number, f"the loss is {value / batch}")
    return float(sum(sums)) / (len(sums) * batch)


def _check_weights(job: Job) -> None:
    """The last update is seen by no loss yet: nothing is saved or scored before its weights are known to be finite."""
    if not all(bool(parameter.isfinite().all()) for parameter in job.module.parameters()):
        raise _diverged(job, job.state.step - 1, "the weights are no longer finite")


def _diverged(job: Job, step: int, what: str) -> DivergedError:
    # The checkpoint of `step` steps done holds the weights that this step failed with.
    good = [done for done in checkpoint.steps(job.checkpoints) if done < max(step, 1)]
    where = checkpoint.path_of(job.checkpoints, good[0]) if good else "none"
    return DivergedError(
        f"{what} at step {step + 1}, at learning rate {job.learning_rate(step):.3g};"
        f" last good checkpoint: {where}. Lower train.lr, or set train.clip_norm"
    )


def _log_train(job: Job, logs: Logs, loss: float, steps: int, seconds: float) -> None:
    step, settings = job.state.step, job.config.train
    rate = steps * settings.global_batch_size / max(seconds, 1e-9)
    lr = job.learning_rate(step - 1)
    epoch = step / job.order.steps_per_epoch
    left = (job.total_steps - step) * seconds / max(steps, 1)
    logs.progress.train(step, epoch, loss, lr, rate, left)
    logs.record(
        step,
        {
            "epoch": epoch,
            "train/loss": loss,
            "train/lr": lr,
            "train/images_per_second": rate,
            "seconds": job.elapsed,
        },
    )


def _evaluate(job: Job, logs: Logs) -> bool:
    """Score val (test where there is no val). Whether it is the best on val so far."""
    split = "val" if "val" in job.dataset.manifest.splits else "test"
    scores = _score(job, split)
    logs.progress.say(
        f"step {job.state.step}/{job.total_steps}  {split}: accuracy {scores.accuracy:.2%}  loss {scores.loss:.4f}"
    )
    logs.record(job.state.step, _as_metrics(job, split, scores))
    if split != "val":
        return False
    if job.state.best is not None and scores.accuracy <= job.state.best["accuracy"]:
        return False
    job.state.best = {"step": job.state.step, "accuracy": scores.accuracy}
    return True


def _as_metrics(job: Job, split: str, scores: Scores) -> dict[str, float]:
    return {f"{split}/accuracy": scores.accuracy, f"{split}/loss": scores.loss, "seconds": job.elapsed}


def _score(job: Job, split: str) -> Scores:
    job.runtime.share_buffers(job.module)
    size = job.config.eval.batch_size
    return evaluation.evaluate(job.module, job.dataset, split, job.mean, job.std, size, job.runtime)


def finish(job: Job, logs: Logs) -> dict[str, Any]:
    """Score the test split with the best checkpoint on val, or the last one where there is no val."""
    step = job.state.best["step"] if job.state.best else job.state.step
    if step != job.state.step:
        job.runtime.barrier()
        job.module.load_state_dict(checkpoint.load(checkpoint.path_of(job.checkpoints, step)).model)
    scores = _score(job, "test")
    classes = job.dataset.manifest.classes
    order, world = job.order, job.runtime.world
    epochs = job.state.step / order.steps_per_epoch
    result = {
        **scores.as_dict(classes),
        "steps": job.state.step,
        "epochs": int(epochs) if epochs.is_integer() else epochs,
        "world_size": world.size,
        "dropped_per_epoch": job.dataset.split("train").samples - order.steps_per_epoch * order.global_batch_size,
        "seconds": job.elapsed,
        "images_per_second": job.state.step * order.global_batch_size / max(job.state.train_seconds, 1e-9),
        "checkpoint": checkpoint.path_of(job.checkpoints, step).name,
        "val_accuracy": job.state.best["accuracy"] if job.state.best else None,
        "precision": job.config.train.precision,
        "device": str(job.runtime.device.type),
    }
    logs.record(job.state.step, _as_metrics(job, "test", scores))
    logs.progress.close()
    if job.runtime.is_main:
        files.replace(job.run / RESULT, json.dumps(result, indent=1) + "\n")
        print("Finished Training")
        print(scores.line("test"))
        print(f"Run: {job.run}", flush=True)
    return result


def _open_logs(job: Job) -> Logs:
    rt, config = job.runtime, job.config
    audit = JsonLines(audit_path(job.run, rt.world.rank)) if config.data.audit else None
    progress = Progress(rt.is_main, job.total_steps, job.state.step)
    if not rt.is_main:
        return Logs(progress, None, None, audit)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    name = config.wandb.name or job.run.resolve().name
    wandb = WandbMirror(config.wandb.mode, config.wandb.project, name, job.run, public(config), warn)
    return Logs(progress, JsonLines(job.run / METRICS), wandb, audit)
