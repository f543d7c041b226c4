"""A run being set up: data set → order → process group → model and optimizer → lease and checkpoint.

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distrain import files, models
from distrain.config import Config, identity, public
from distrain.data import cache, manifest
from distrain.data.cache import Cache
from distrain.data.fetch import FetchOptions
from distrain.data.manifest import Dataset, Manifest
from distrain.data.order import Order
from distrain.distributed import runtime
from distrain.distributed.runtime import Runtime
from distrain.distributed.watchdog import Watchdog
from distrain.errors import ConfigError, DataError
from distrain.runs.folder import SETUP, STACKS
from distrain.runs.trackers import check_tensorboard
from distrain.text import shortened
from distrain.training import optim
from distrain.training.checkpointing import os_error_of, resume
from distrain.training.job import Job
from distrain.training.summary import facts, tell_start


def watch(config: Config) -> Watchdog:
    """The time-outs of a run."""
    limits = config.timeouts
    return Watchdog(
        {
            "start": limits.start_seconds + config.run.wait_seconds,  # all wait while the main process waits
            "first step": limits.start_seconds,
            "train": limits.step_seconds,
            "evaluate": limits.eval_seconds,
            "save": limits.save_seconds,
        },
        Path(config.run.dir, STACKS),
    )


def start_runtime(config: Config, watchdog: Watchdog) -> Runtime:
    """Join the other processes of the run."""
    run, train = config.run, config.train
    settings = runtime.Settings(run.device, train.precision, run.cpu_threads, train.deterministic)
    return runtime.start(settings, config.timeouts.start_seconds, watchdog)


def set_up(config: Config, started: float, rt: Runtime) -> Job:
    """Everything that a run needs, at the step it goes on from."""
    rt.leave_if_requested()
    _agree_on_configuration(rt, config)
    if config.log.tensorboard:
        rt.all_or_none(lambda: check_tensorboard() if rt.is_main else None)
    dataset = rt.all_or_none(lambda: read_data(config, "train", "test"))
    agree_on_data(rt, dataset, list(dataset.manifest.splits))
    job = _build(config, dataset, rt, started)
    _warm_up(job)
    rt.leave_if_requested()
    try:
        resume(job)
        if rt.is_main:
            found = facts(job)
            text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
            problem = os_error_of(lambda: files.replace(job.run / SETUP, text))
            if problem is not None:  # a full disk: nothing that is trained depends on it
                print(f"warning: {SETUP} could not be written: {problem}", file=sys.stderr)
            tell_start(job, found)
    except BaseException:
        job.close()
        raise
    return job


_OF_EACH_NODE = ("run.dir", "data.dir", "data.cache_dir", "data.cache_gib", "model.init")
"""Keys that name places, which may be others on another node; what lies there is compared."""


def _agree_on_configuration(rt: Runtime, config: Config) -> None:
    """A file that was edited on one node alone would train other weights there, or leave processes waiting."""
    own = {f"{section}.{key}": value for section, part in public(config).items() for key, value in part.items()}
    compared = {key: value for key, value in own.items() if key not in _OF_EACH_NODE}
    everyone = rt.from_all(compared)
    for rank, other in enumerate(everyone):
        differ = [key for key in everyone[0] if other.get(key) != everyone[0][key]]
        if differ:
            told = ", ".join(f"{key} ({other.get(key)!r}, on rank 0 {everyone[0][key]!r})" for key in differ[:5])
            raise ConfigError(f"rank {rank} has another configuration than rank 0: {told}; give all nodes the same")


def read_data(config: Config, *splits: str) -> Dataset:
    """The data set that the configuration names.

    Raises:
        UserError: it cannot be read, or lacks one of the splits.
    """
    dataset = manifest.read(config.data.dir, FetchOptions.of(config.data))
    for needed in splits:
        dataset.split(needed)
    return dataset


def _build(config: Config, dataset: Dataset, rt: Runtime, started: float) -> Job:
    """The job at step 0."""
    order = make_order(config, dataset, rt.world.size)
    mean, std = _normalization(config, dataset)
    _check_augmentation(config, dataset)
    fewest, most = order.local_batch_sizes(rt.world.size)
    passes = -(-most // (config.train.micro_batch_size or most))
    module = rt.all_or_none(lambda: build_model(config, dataset.manifest, rt.dtype, empty=fewest < passes))
    dependent = models.world_size_dependent(module, accumulates=config.train.micro_batch_size is not None)
    start = _initialise(config, module, rt)
    module = rt.sync_batch_norm(module)
    average = _average(config, module, rt)
    ddp, optimizer = _prepare(config, module, rt)
    return Job(
        config=config,
        run=Path(config.run.dir),
        dataset=dataset,
        order=order,
        total_steps=config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch,
        runtime=rt,
        module=module,
        ddp=ddp,
        optimizer=optimizer,
        mean=torch.tensor(mean, dtype=rt.dtype, device=rt.device),
        std=torch.tensor(std, dtype=rt.dtype, device=rt.device),
        identity={**identity(config), **start, "data.mean": mean, "data.std": std, "data.manifest": dataset.digest},
        started=started,
        cache=_cache(config, dataset, rt),
        average=average,
        dependent=dependent,
        passes=passes,
    )


def _initialise(config: Config, module: nn.Module, rt: Runtime) -> dict[str, str]:
    """Weights from `model.init`; what identifies them, whatever the file is called."""
    if config.model.init is None:
        return {}
    path = Path(config.model.init)
    anew = rt.all_or_none(lambda: models.initialise(module, path))
    if anew and rt.is_main:
        print(f"model.init: {anew}", flush=True)
    return {"model.init": models.digest(module)}


def _average(config: Config, module: nn.Module, rt: Runtime) -> AveragedModel | None:
    """A second model that follows the weights: decay · average + (1 - decay) · weights after every step."""
    if config.train.ema_decay is None:
        return None
    follow = get_ema_multi_avg_fn(config.train.ema_decay)
    average = AveragedModel(module, multi_avg_fn=follow, use_buffers=True).to(rt.device)
    average.module = rt.prepare_scoring(average.module)
    return average


def _cache(config: Config, dataset: Dataset, rt: Runtime) -> Cache | None:
    place = rt.all_or_none(lambda: cache.choose_device(config.data.cache, dataset, rt.device))
    return Cache(dataset, place, pin=place.type != rt.device.type) if place is not None else None


def agree_on_data(rt: Runtime, dataset: Dataset, splits: Sequence[str]) -> None:
    """All processes see the same data set, and the main one sees every shard of it."""
    digests = rt.from_all(dataset.digest)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise DataError(f"{dataset.root}: rank {', '.join(others)} sees another data set than rank 0; share one folder")
    missing = rt.from_main(list(dataset.missing(splits)) if rt.is_main else None)
    if missing:
        raise DataError(
            "\n  ".join([f"{dataset.root}: shards are missing or damaged:", *shortened(missing, 5)])
            + "\nrestore them or prepare the data set again; `distrain verify` checks all shards"
        )


def make_order(config: Config, dataset: Dataset, world_size: int) -> Order:
    """The order of the run.

    Raises:
        ConfigError: it cannot be had with this batch, or on so many processes.
    """
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


def _check_augmentation(config: Config, dataset: Dataset) -> None:
    settings, smallest = config.augment, min(dataset.manifest.image_shape[:2])
    if settings.crop_padding >= smallest:
        raise ConfigError(f"augment.crop_padding={settings.crop_padding}: at most {smallest - 1} for these images")
    if settings.cutout > smallest:
        raise ConfigError(f"augment.cutout={settings.cutout}: at most {smallest} for these images")
    lanes, batch = dataset.split("train").lanes, config.train.global_batch_size
    if settings.mixup and batch < 2 * lanes:
        raise ConfigError(
            f"augment.mixup mixes samples of the same lane: of {lanes} lanes, a train.global_batch_size of {batch} has"
            f" fewer than two of each; raise it to {2 * lanes}, or prepare the data set with fewer --lanes"
        )


def build_model(config: Config, data: Manifest, dtype: torch.dtype, empty: bool = False) -> nn.Module:
    """The model that the configuration names, with its first weights; tried on two black pictures, and on none if a
    share may be `empty`.

    Raises:
        ConfigError: it cannot be built, or does not give one logit for each class.
    """
    torch.manual_seed(config.run.seed)  # weights are drawn on the CPU, so every device starts from the same
    height, width, channels = data.image_shape
    classes, name = len(data.classes), config.model.name
    module = models.build(name, config.model.activation, classes, (channels, height, width)).to(dtype)
    for samples in (2, 0) if empty else (2,):
        images = torch.zeros(samples, channels, height, width, dtype=dtype)
        models.check_output(name, module, images, classes)
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
    if settings.compile != "off":
        module.compile(mode=settings.compile)
    return rt.prepare(module, optimizer)


def _warm_up(job: Job) -> None:
    """Two backward passes whose gradients are thrown away, before anything is loaded.

    DDP rebuilds its buckets after the first backward pass of an attempt, and sums in another order from then on: without
    this, a resumed run differs in the last bits from one that was not interrupted, on three processes or more.
    """
    buffers = {name: buffer.clone() for name, buffer in job.module.named_buffers()}
    images = torch.zeros(2, *job.dataset.manifest.image_shape, dtype=torch.uint8, device=job.runtime.device)
    for _ in range(2):
        with job.runtime.alone(), _what_cannot_be_had():
            with job.runtime.peers():
                logits = job.ddp(job.normalize(images))
            job.runtime.backward(logits.sum() * 0)
        models.check_gradients(job.config.model.name, job.module)  # DDP's second pass would fail, in words of its own
    job.optimizer.zero_grad()
    for name, buffer in job.module.named_buffers():
        buffer.copy_(buffers[name])


@contextlib.contextmanager
def _what_cannot_be_had() -> Iterator[None]:
    """Around the first passes: a compiler that is missing, or an operation that has no deterministic form."""
    try:
        yield
    except Exception as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ConfigError(f"train.compile: the model cannot be compiled: {told}; set train.compile=off") from error
        if "deterministic" in str(error):
            raise ConfigError(f"train.deterministic: {told}; set it to false, or change the model") from error
        raise
