"""A run being set up: data set → order → process group → model and optimizer → the checkpoint to go on from.

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from distrain import augment, checkpoint, files, manifest, model, optim, runtime, tracking
from distrain.checkpoint import Saved
from distrain.config import Config, identity, public
from distrain.errors import ConfigError, DataError
from distrain.fetch import Settings
from distrain.manifest import Dataset
from distrain.order import Order
from distrain.runtime import Runtime
from distrain.stream import memory
from distrain.tracking import Logs

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

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step of the run."""
        train = self.config.train
        return optim.learning_rate(step, self.total_steps, train.schedule, train.lr, train.warmup_fraction)

    def layer_seed(self) -> int:
        """Seed for layers that draw random numbers, of this step and rank: they draw the same after a resume."""
        # Odd factors: no two steps or ranks of a run share a seed. torch's CPU generator takes the low 32 bits.
        return (self.config.run.seed + self.state.step * 2654435761 + self.runtime.world.rank * 40503) % 2**63

    @property
    def elapsed(self) -> float:
        """Wall seconds of all lives that led here."""
        return self.state.seconds + time.monotonic() - self.started


def set_up(config: Config, started: float) -> Job:
    """Everything that a run needs, at the step it goes on from."""
    dataset = manifest.read(config.data.dir, Settings.of(config.data))
    splits = [split for split in ("train", "val", "test") if split in dataset.manifest.splits]
    for needed in ("train", "test"):
        dataset.split(needed)
    run = Path(config.run.dir)
    rt = runtime.start(config.run.device, config.train.precision, config.run.cpu_threads, config.run.timeout_seconds)
    try:
        agree_on_data(rt, dataset, splits)
        order = _order(config, dataset, rt.world.size)
        steps = config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch
        mean, std = _normalization(config, dataset)
        _check_crop(config, dataset)
        module = build_model(config, dataset, rt)
        job = Job(
            config,
            run,
            dataset,
            order,
            steps,
            rt,
            module,
            *_prepare(config, module, rt),
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


def agree_on_data(rt: Runtime, dataset: Dataset, splits: Sequence[str]) -> None:
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
    return values[0], values[1]


def _check_crop(config: Config, dataset: Dataset) -> None:
    largest = min(dataset.manifest.image_shape[:2]) - 1
    if config.augment.crop_padding > largest:
        raise ConfigError(f"augment.crop_padding={config.augment.crop_padding}: at most {largest} for these images")


def build_model(config: Config, dataset: Dataset, rt: Runtime) -> nn.Module:
    """The model that the configuration names, with its first weights; tried on two black pictures.

    Raises:
        ConfigError: it cannot be built, or does not give one logit for each class.
    """
    torch.manual_seed(config.run.seed)  # weights are drawn on the CPU, so every device starts from the same
    height, width, channels = dataset.manifest.image_shape
    classes = len(dataset.manifest.classes)
    module = model.build(config.model.name, config.model.activation, classes, (channels, height, width)).to(rt.dtype)
    model.check_output(config.model.name, module, torch.zeros(2, channels, height, width, dtype=rt.dtype), classes)
    kinds = model.world_size_dependent(module)
    if kinds and rt.is_main:
        print(
            f"warning: model {config.model.name} has {', '.join(kinds)}: what it learns depends on the number of"
            " processes",
            file=sys.stderr,
        )
    return module


def _prepare(config: Config, module: nn.Module, rt: Runtime) -> tuple[nn.Module, Any]:
    """The model and its optimizer, as accelerate prepares them."""
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
    return rt.prepare(module, optimizer)


def _settle(job: Job) -> None:
    """Two backward passes whose gradients are thrown away, before anything is loaded.

    DDP rebuilds its buckets after the first backward pass of a life, and sums in another order from then on: without
    this, a resumed run differs in the last bits from one that was not interrupted, on three processes or more.
    """
    buffers = {name: buffer.clone() for name, buffer in job.module.named_buffers()}
    images = torch.zeros(2, *job.dataset.manifest.image_shape, dtype=torch.uint8, device=job.runtime.device)
    for _ in range(2):
        job.runtime.backward(job.ddp(augment.normalize(images, job.mean, job.std)).sum() * 0)
    job.optimizer.zero_grad()
    for name, buffer in job.module.named_buffers():
        buffer.copy_(buffers[name])


def _resume(job: Job) -> None:
    """Go on from the newest readable checkpoint, or start fresh: the main process decides for all."""
    rt = job.runtime
    found: tuple[Path | None, str | None] = (None, None)
    if rt.is_main:
        try:
            saved = _choose(job)
            _open_folder(job, saved.step if saved is not None else 0)
            found = (saved.path if saved is not None else None, None)
        except (ConfigError, DataError) as error:
            found = (None, str(error))
    path, problem = rt.from_main(found)
    if problem is not None:
        raise DataError(problem)
    if path is not None:
        _restore(job, checkpoint.load(path))


def _open_folder(job: Job, done: int) -> None:
    """Make the run's folder, or cut it back to the steps that are done."""
    try:
        job.run.mkdir(parents=True, exist_ok=True)
        tracking.cut_back(job.run, done)
        files.replace(job.run / CONFIG, yaml.safe_dump(public(job.config), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"run.dir={job.run}: cannot be written: {error.strerror}; choose another folder") from error


def _choose(job: Job) -> Saved | None:
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
    return saved


def holds_run(run: Path) -> bool:
    """Whether a folder has anything of a run in it that would be lost: a step logged, a checkpoint, a result."""
    metrics = run / tracking.METRICS
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (run / RESULT).exists() or bool(checkpoint.steps(run / CHECKPOINTS))


def _restore(job: Job, saved: Saved) -> None:
    job.module.load_state_dict(saved.model)
    optim.load_state_tensors(job.optimizer, saved.optimizer)
    job.runtime.load_scaler_state(saved.state["scaler"])
    job.state = State(**{name: saved.state[name] for name in State.__dataclass_fields__})


def save(job: Job, logs: Logs) -> None:
    """Commit a checkpoint of this step. What it counts on, on every process, is on disk before."""
    logs.sync()
    job.runtime.barrier()
    if job.runtime.is_main:
        state = {
            **vars(job.state),
            "seconds": job.elapsed,
            "identity": job.identity,
            "scaler": job.runtime.scaler_state,
            "epoch": job.state.step // job.order.steps_per_epoch,
            "world_size": job.runtime.world.size,
            "cpu_threads": job.config.run.cpu_threads,
        }
        tensors = optim.state_tensors(job.optimizer)
        checkpoint.save(job.checkpoints, job.state.step, job.module.state_dict(), tensors, state)
        best = job.state.best["step"] if job.state.best else None
        checkpoint.prune(job.checkpoints, job.config.checkpoint.keep, best)


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
