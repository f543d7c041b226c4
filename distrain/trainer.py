"""The run: set up, fit, finish.

1. `set_up`: data set → order → process group → model and optimizer → the checkpoint to go on from, if any
2. `fit`: one step after the other; log, evaluate and save where they fall due
3. `finish`: score the test split, write RUN/result.json

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from distrain import augment, checkpoint, evaluation, manifest, model, optim, runtime, tracking
from distrain.checkpoint import Saved
from distrain.config import Config, from_tree, identity, load
from distrain.errors import ConfigError, DataError, DivergedError
from distrain.evaluation import Scores
from distrain.manifest import Dataset
from distrain.order import Order
from distrain.runtime import Runtime
from distrain.stream import Batch, memory, training_batches
from distrain.tracking import JsonLines, Progress, WandbMirror

CONFIG, RESULT, CHECKPOINTS = "config.yaml", "result.json", "checkpoints"


@dataclass
class State:
    """What changes as the run goes on, beside weights and optimizer; all of it is in a checkpoint's state.json."""

    step: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    best: dict[str, Any] | None = None


@dataclass
class Job:
    """Everything that a run works with."""

    config: Config
    run: Path
    dataset: Dataset
    order: Order
    total_steps: int
    runtime: Runtime
    module: nn.Module
    """The model itself; evaluated and saved."""
    ddp: nn.Module
    """The model as accelerate prepared it; trained."""
    optimizer: Any
    mean: Tensor
    std: Tensor
    identity: dict[str, Any]
    started: float
    state: State = field(default_factory=State)

    @property
    def checkpoints(self) -> Path:
        """RUN/checkpoints."""
        return self.run / CHECKPOINTS

    @property
    def elapsed(self) -> float:
        """Wall seconds of all lives that led here."""
        return self.state.seconds + time.monotonic() - self.started


@dataclass
class Logs:
    """Where a run reports to; on other processes than the main one, only the audit is real."""

    progress: Progress
    metrics: JsonLines | None
    wandb: WandbMirror | None
    audit: JsonLines | None

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, mirrored to wandb."""
        if self.metrics is not None and self.wandb is not None:
            self.metrics.write({"step": step, **values})
            self.metrics.flush()
            self.wandb.log(values, step)

    def sync(self) -> None:
        """Put everything on disk."""
        for lines in (self.metrics, self.audit):
            if lines is not None:
                lines.sync()

    def close(self, summary: dict[str, Any]) -> None:
        """Close everything; `summary` goes to wandb."""
        self.progress.close()
        for lines in (self.metrics, self.audit):
            if lines is not None:
                lines.close()
        if self.wandb is not None:
            self.wandb.close(summary)


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


# --- set up ----------------------------------------------------------------------------------------------------------


def set_up(config: Config, started: float) -> Job:
    """Everything that a run needs, at the step it goes on from."""
    dataset = manifest.read(config.data.dir)
    splits = [split for split in ("train", "val", "test") if split in dataset.manifest.splits]
    for needed in ("train", "test"):
        dataset.split(needed)
    run = Path(config.run.dir)
    rt = runtime.start(config.run.device, config.train.precision, config.run.cpu_threads, config.run.timeout_seconds)
    try:
        _agree_on_data(rt, dataset, splits)
        order = _order(config, dataset, rt.world.size)
        steps = config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch
        mean, std = _normalization(config, dataset)
        job = Job(
            config,
            run,
            dataset,
            order,
            steps,
            rt,
            *_model_and_optimizer(config, dataset, rt),
            torch.tensor(mean, dtype=rt.dtype, device=rt.device),
            torch.tensor(std, dtype=rt.dtype, device=rt.device),
            {**identity(config), "data.mean": mean, "data.std": std, "data.manifest": dataset.digest},
            started,
        )
        _settle(job)
        _resume(job)
        if rt.is_main:
            _summary(job)
    except BaseException:
        rt.close()
        raise
    return job


def _agree_on_data(rt: Runtime, dataset: Dataset, splits: Sequence[str]) -> None:
    """All processes see the same data set, and the main one sees every shard of it."""
    if rt.from_main(dataset.digest) != dataset.digest:
        raise DataError(f"{dataset.root}: another data set than the main process has; share one folder")
    missing = rt.from_main(list(dataset.missing(splits)) if rt.is_main else None)
    if missing:
        more = [f"and {len(missing) - 5} more"] if len(missing) > 5 else []
        raise DataError(
            "\n  ".join([f"{dataset.root}: shards are missing or damaged:", *missing[:5], *more])
            + "\nrestore them or prepare the data set again; `distrain verify` checks all shards"
        )


def _order(config: Config, dataset: Dataset, world_size: int) -> Order:
    split = dataset.split("train")
    batch = config.train.global_batch_size
    order = Order(len(split.shards), split.lanes, min(shard.samples for shard in split.shards), batch, config.run.seed)
    if world_size > split.lanes:
        raise ConfigError(
            f"{world_size} processes for {split.lanes} lanes of {dataset.root}: start at most {split.lanes},"
            f" or prepare the data set with --lanes {world_size} or more"
        )
    if world_size > batch:
        raise ConfigError(
            f"train.global_batch_size={batch} is smaller than the number of processes, {world_size}: "
            f"raise it, or start at most {batch}"
        )
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"train.global_batch_size={batch} is larger than the {order.num_shards * order.samples_per_shard} samples"
            f" that an epoch of {dataset.root} can use; lower it"
        )
    return order


def _normalization(config: Config, dataset: Dataset) -> tuple[list[float], list[float]]:
    channels = dataset.manifest.image_shape[2]
    values = []
    for key, asked, found in (
        ("mean", config.data.mean, dataset.manifest.mean),
        ("std", config.data.std, dataset.manifest.std),
    ):
        value = asked if asked is not None else found
        if len(value) != channels:
            raise ConfigError(f"data.{key}: {len(value)} values for images of {channels} channels")
        values.append(value)
    if min(values[1]) <= 0:
        raise ConfigError(f"data.std={values[1]}: must be above 0; a channel that never changes needs data.std set")
    return values[0], values[1]


def _model_and_optimizer(config: Config, dataset: Dataset, rt: Runtime) -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(config.run.seed)  # weights are drawn on the CPU, so every device starts from the same
    height, width, channels = dataset.manifest.image_shape
    module = model.build(
        config.model.name, config.model.activation, len(dataset.manifest.classes), (channels, height, width)
    ).to(rt.dtype)
    kinds = model.world_size_dependent(module)
    if kinds and rt.is_main:
        print(
            f"warning: model {config.model.name} has {', '.join(kinds)}: what it learns depends on the number of"
            " processes",
            file=sys.stderr,
        )
    settings = config.train
    optimizer = optim.build(
        settings.optimizer,
        module.parameters(),
        settings.lr,
        settings.momentum,
        settings.nesterov,
        settings.betas,
        settings.weight_decay,
    )
    ddp, prepared = rt.accelerator.prepare(module, optimizer)
    return module, ddp, prepared


def _settle(job: Job) -> None:
    """Two backward passes whose gradients are thrown away, before anything is loaded.

    DDP rebuilds its buckets after the first backward pass of a life, and sums in another order from then on: without
    this, a resumed run differs in the last bits from one that was not interrupted, on three processes or more.
    """
    buffers = {name: buffer.clone() for name, buffer in job.module.named_buffers()}
    images = torch.zeros(2, *job.dataset.manifest.image_shape, dtype=torch.uint8, device=job.runtime.device)
    classes = len(job.dataset.manifest.classes)
    for _ in range(2):
        logits = job.ddp(augment.normalize(images, job.mean, job.std))
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(f"model.name={job.config.model.name}: gives {shape} for 2 images, not [2, {classes}]")
        job.runtime.accelerator.backward(logits.sum() * 0)
    job.optimizer.zero_grad()
    for name, buffer in job.module.named_buffers():
        buffer.copy_(buffers[name])


# --- resume ----------------------------------------------------------------------------------------------------------


def _resume(job: Job) -> None:
    """Go on from the newest readable checkpoint, or start fresh: the main process decides for all."""
    rt = job.runtime
    found: tuple[Path | None, str | None] = (None, None)
    if rt.is_main:
        try:
            found = (_choose(job), None)
        except (ConfigError, DataError) as error:
            found = (None, str(error))
    path, problem = rt.from_main(found)
    if problem is not None:
        raise DataError(problem)
    if path is not None:
        _restore(job, checkpoint.load(path))
    if rt.is_main:
        job.run.mkdir(parents=True, exist_ok=True)
        (job.run / RESULT).unlink(missing_ok=True)
        tracking.cut_back(job.run, job.state.step)
        text = yaml.safe_dump(job.config.model_dump(), sort_keys=False)
        (job.run / CONFIG).write_text(text, encoding="utf-8")
    rt.barrier()


def _choose(job: Job) -> Path | None:
    mode = job.config.run.resume
    if job.run.exists() and not job.run.is_dir():
        raise ConfigError(f"run.dir={job.run}: is a file; choose another folder")
    if not holds_run(job.run):
        if mode == "must":
            raise DataError(f"run.resume=must: {job.run} holds no run to go on from")
        return None
    if mode == "never":
        raise ConfigError(
            f"{job.run}: already holds a run; go on with it by run.resume=auto, or choose another run.dir"
        )
    saved, skipped = checkpoint.newest(job.checkpoints)
    for line in skipped:
        print(f"warning: skipped {line}", file=sys.stderr)
    if saved is None:
        if skipped or mode == "must":
            raise DataError(f"{job.run}: has no readable checkpoint to go on from; choose another run.dir")
        print(f"{job.run}: has no checkpoint yet; starting from the beginning")
        return None
    differ = checkpoint.differences(saved.state["identity"], job.identity)
    if differ:
        raise ConfigError(
            f"{saved.path}: belongs to another run; choose another run.dir, or set these back:\n"
            + "\n".join(f"  {line}" for line in differ)
        )
    # Newer ones, all damaged, would stand in the way of this life's own.
    for step in checkpoint.steps(job.checkpoints):
        if step > saved.step:
            shutil.rmtree(checkpoint.path_of(job.checkpoints, step))
    print(f"going on from {saved.path}")
    return saved.path


def holds_run(run: Path) -> bool:
    """Whether a folder has anything of a run in it."""
    return any((run / name).exists() for name in (CONFIG, RESULT, CHECKPOINTS, tracking.METRICS))


def _restore(job: Job, saved: Saved) -> None:
    job.module.load_state_dict(saved.model)
    optim.load_state_tensors(job.optimizer, saved.optimizer)
    if job.runtime.accelerator.scaler is not None:
        job.runtime.accelerator.scaler.load_state_dict(saved.state["scaler"])
    job.state = State(**{name: saved.state[name] for name in State.__dataclass_fields__})


def _save(job: Job, logs: Logs) -> None:
    """Commit a checkpoint of this step. What it counts on, on every process, is on disk before."""
    logs.sync()
    job.runtime.barrier()
    if job.runtime.is_main:
        scaler = job.runtime.accelerator.scaler
        state = {
            **vars(job.state),
            "seconds": job.elapsed,
            "identity": job.identity,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "epoch": job.state.step // job.order.steps_per_epoch,
            "world_size": job.runtime.world.size,
            "cpu_threads": job.config.run.cpu_threads,
        }
        tensors = optim.state_tensors(job.optimizer)
        checkpoint.save(job.checkpoints, job.state.step, job.module.state_dict(), tensors, state)
        best = job.state.best["step"] if job.state.best else None
        checkpoint.prune(job.checkpoints, job.config.checkpoint.keep, best)


# --- fit -------------------------------------------------------------------------------------------------------------


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
            evaluates = last or _due(state.step, eval_every)
            saves = last or _due(state.step, config.checkpoint.every_steps)
            if not (evaluates or saves or _due(state.step, config.log.every_steps)):
                continue
            # Nothing is evaluated or saved before the loss is known to be finite.
            loss = _mean_loss(job, losses)
            seconds = time.monotonic() - clock
            state.train_seconds += seconds
            _log_train(job, logs, loss, state.step - logged, seconds)
            losses.clear()
            if evaluates and _evaluate(job, logs):
                saves = True
            if saves:
                _save(job, logs)
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
    rate = optim.learning_rate(job.state.step, job.total_steps, config.schedule, config.lr, config.warmup_fraction)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    # Layers that draw random numbers draw the same after a resume.
    torch.manual_seed(hash((job.config.run.seed, job.state.step, rt.world.rank)) & (2**63 - 1))
    scale = rt.world.size / config.global_batch_size
    images, labels, weight = _to_device(job, batch)
    micro = min(config.micro_batch_size or len(labels), len(labels))
    total = torch.zeros((), dtype=torch.float64, device=rt.device)
    for start in range(0, len(labels), micro):
        last = start + micro >= len(labels)
        with contextlib.nullcontext() if last else rt.accelerator.no_sync(job.ddp):
            logits = job.ddp(augment.normalize(images[start : start + micro], job.mean, job.std))
            loss = F.cross_entropy(logits, labels[start : start + micro], reduction="sum") * weight
            rt.accelerator.backward(loss * scale)
        total += loss.detach()
    if config.clip_norm is not None:
        rt.accelerator.clip_grad_norm_(job.ddp.parameters(), config.clip_norm)
    job.optimizer.step()
    job.optimizer.zero_grad()
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
            good = [step for step in checkpoint.steps(job.checkpoints) if step <= number]
            where = checkpoint.path_of(job.checkpoints, good[0]) if good else "none"
            settings = job.config.train
            rate = optim.learning_rate(
                number, job.total_steps, settings.schedule, settings.lr, settings.warmup_fraction
            )
            raise DivergedError(
                f"the loss of step {number} is {value / batch}, at learning rate {rate:.3g}; last good checkpoint:"
                f" {where}. Lower train.lr, or set train.clip_norm"
            )
    return float(sum(sums)) / (len(sums) * batch)


def _log_train(job: Job, logs: Logs, loss: float, steps: int, seconds: float) -> None:
    step, settings = job.state.step, job.config.train
    rate = steps * settings.global_batch_size / max(seconds, 1e-9)
    lr = optim.learning_rate(step - 1, job.total_steps, settings.schedule, settings.lr, settings.warmup_fraction)
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


# --- evaluate and finish ---------------------------------------------------------------------------------------------


def _evaluate(job: Job, logs: Logs) -> bool:
    """Score val (test where there is no val). Whether it is the best on val so far."""
    split = "val" if "val" in job.dataset.manifest.splits else "test"
    scores = _score(job, split)
    logs.progress.say(
        f"step {job.state.step}/{job.total_steps}  {split}: accuracy {scores.accuracy:.2%}  loss {scores.loss:.4f}"
    )
    logs.record(job.state.step, {f"{split}/accuracy": scores.accuracy, f"{split}/loss": scores.loss})
    if split != "val":
        return False
    if job.state.best is not None and scores.accuracy <= job.state.best["accuracy"]:
        return False
    job.state.best = {"step": job.state.step, "accuracy": scores.accuracy}
    return True


def _score(job: Job, split: str) -> Scores:
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
    logs.record(job.state.step, {"test/accuracy": scores.accuracy, "test/loss": scores.loss})
    logs.progress.close()
    if job.runtime.is_main:
        write_json(job.run / RESULT, result)
        print("Finished Training")
        print(accuracy_line(scores, "test"))
        print(f"Run: {job.run}", flush=True)
    return result


def accuracy_line(scores: Scores, split: str) -> str:
    """The line that a run closes with."""
    return f"Accuracy of the network on the {scores.total} {split} images: {100 * scores.accuracy:.1f} %"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or not there."""
    work = path.with_name(f".{path.name}.partial")
    work.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    work.replace(path)


def evaluate_run(run: Path, split: str, overrides: list[str], which: str | None) -> tuple[Scores, str, list[str]]:
    """Score a checkpoint of a run: `which` (best, last, or a folder's name), by default the one its result is of.

    Returns:
        The scores, the checkpoint's name and the classes.
    """
    if not (run / CONFIG).exists():
        raise DataError(f"{run}: holds no run (no {CONFIG})")
    config = load(run / CONFIG, overrides)
    dataset = manifest.read(config.data.dir)
    dataset.split(split)
    saved, skipped = _checkpoint_of(run, which)
    rt = runtime.start(config.run.device, config.train.precision, config.run.cpu_threads, config.run.timeout_seconds)
    try:
        for line in skipped if rt.is_main else []:
            print(f"warning: skipped {line}", file=sys.stderr)
        _agree_on_data(rt, dataset, [split])
        if saved.state["identity"]["data.manifest"] != dataset.digest:
            raise DataError(f"{dataset.root}: another data set than {saved.path} was trained on")
        module, _, _ = _model_and_optimizer(config, dataset, rt)
        module.load_state_dict(saved.model)
        mean, std = (
            torch.tensor(saved.state["identity"][f"data.{key}"], dtype=rt.dtype, device=rt.device)
            for key in ("mean", "std")
        )
        scores = evaluation.evaluate(module, dataset, split, mean, std, config.eval.batch_size, rt)
        classes = dataset.manifest.classes
        if rt.is_main:
            out = run / "evaluations" / f"{split}-{saved.path.name}.json"
            out.parent.mkdir(exist_ok=True)
            write_json(out, {**scores.as_dict(classes), "split": split, "world_size": rt.world.size})
            print(accuracy_line(scores, split))
            print(f"{saved.path.name}, written to {out}", flush=True)
    finally:
        rt.close()
    return scores, saved.path.name, classes


def _checkpoint_of(run: Path, which: str | None) -> tuple[Saved, list[str]]:
    if which is not None and which not in ("best", "last"):
        return checkpoint.load(run / CHECKPOINTS / which), []
    saved, skipped = checkpoint.newest(run / CHECKPOINTS)
    if saved is None:
        raise DataError("\n  ".join([f"{run}: has no readable checkpoint", *skipped]))
    best = saved.state["best"]
    if best is None and which == "best":
        raise DataError(f"{run}: has no best checkpoint, as its data set has no val split; take last")
    if best is not None and which != "last":
        return checkpoint.load(checkpoint.path_of(run / CHECKPOINTS, best["step"])), skipped
    return saved, skipped


# --- what people see -------------------------------------------------------------------------------------------------


def _open_logs(job: Job) -> Logs:
    rt, config = job.runtime, job.config
    audit = JsonLines(tracking.audit_path(job.run, rt.world.rank)) if config.data.audit else None
    progress = Progress(rt.is_main, job.total_steps, job.state.step)
    if not rt.is_main:
        return Logs(progress, None, None, audit)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    name = config.wandb.name or job.run.resolve().name
    wandb = WandbMirror(config.wandb.mode, config.wandb.project, name, job.run, config.model_dump(), warn)
    return Logs(progress, JsonLines(job.run / tracking.METRICS), wandb, audit)


def _summary(job: Job) -> None:
    """What is about to run, before it does."""
    rt, order, train = job.runtime, job.order, job.config.train
    found = job.dataset.manifest
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in found.splits.items())
    parameters = sum(parameter.numel() for parameter in job.module.parameters())
    largest, ideal = order.largest_share(rt.world.size), order.global_batch_size / rt.world.size
    buffers = memory(job.dataset, order, rt.world, job.config.data.read_ahead) / 2**20
    print(
        f"data     {job.dataset.root}: {splits}; {len(found.classes)} classes, {'×'.join(map(str, found.image_shape))}"
    )
    print(f"model    {job.config.model.name}, {parameters:,} parameters; {train.optimizer}, {train.precision}")
    print(f"devices  {rt.world.size} × {rt.device.type}; slowest share {largest / ideal:.2f} × the ideal of {ideal:g}")
    print(f"memory   {buffers:,.0f} MiB per process for reading")
    print(f"steps    {job.total_steps:,} of {order.global_batch_size}, {order.steps_per_epoch:,} an epoch")
    print(f"run      {job.run}", flush=True)
