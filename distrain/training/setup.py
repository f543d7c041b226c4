"""Set-up of a run: data set → order → model and optimizer → warm-up. Nothing is written yet.

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distrain import startup
from distrain.config import Config, identity, public
from distrain.data.manifest import Dataset
from distrain.distributed import runtime
from distrain.distributed.collectives import Collectives
from distrain.distributed.numerics import unlike_ranks
from distrain.distributed.runtime import Runtime
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment
from distrain.errors import ConfigError
from distrain.runs.folder import STACKS
from distrain.runs.trackers import check_installed
from distrain.training import inputs, model_setup
from distrain.training.job import Job
from distrain.training.user_functions import UserFunctions
from distrain.training.warm_up import warm_up

log = logging.getLogger("distrain")


def start_watchdog(config: Config, environment: Environment) -> Watchdog:
    """Start the watchdog with the time-outs of a run."""
    limits = config.timeouts  # guard: time-outs
    return Watchdog(
        {
            "start": limits.start_seconds + config.run.wait_seconds,  # all wait while rank 0 waits for the folder
            "first step": limits.start_seconds,
            "train": limits.step_seconds,
            "evaluate": limits.eval_seconds,
            "save": limits.save_seconds,
        },
        Path(config.run.dir, STACKS),
        environment,
    )


def start_runtime(config: Config, environment: Environment, watchdog: Watchdog) -> Runtime:
    """Join the other processes of the run."""
    run, train = config.run, config.train
    if environment.world.size > 1:
        startup.waits_for(f"waiting for all {environment.world.size:,} processes at {environment.rendezvous}")
    deterministic = train.deterministic or train.virtual_ranks is not None
    options = runtime.Options(
        run.device, train.precision, run.cpu_threads, deterministic, config.timeouts.start_seconds
    )
    return runtime.start(options, environment, watchdog)


def set_up(config: Config, started: float, runtime: Runtime) -> Job:
    """Set up a run at step 0, on all processes together.

    Args:
        config: the configuration.
        started: when this attempt began, by `time.monotonic`.
        runtime: this process among its peers.

    Raises:
        UserError: on all processes: the data set, the model or the number of processes cannot be used.
        Stopped: a stop was requested.
    """
    collectives = runtime.collectives
    collectives.stop_if_requested()
    _check_same_configuration(collectives, config)
    collectives.all_or_none(lambda: check_installed(config.log) if runtime.is_main else None)
    dataset = collectives.all_or_none(lambda: inputs.read_data(config, "train", "test"))
    inputs.check_same_data(collectives, dataset, list(dataset.manifest.splits))
    _compare_numerics(config, runtime)
    startup.waits_for(f"building model {config.model.name}, and trying it")
    job = _build(config, dataset, runtime, started)
    seconds = warm_up(job)
    collectives.stop_if_requested()
    return replace(job, compile_seconds=seconds if job.compilation.is_on else 0.0)


_MAY_DIFFER = ("run.dir", "data.dir", "data.tars", "data.cache_dir", "data.cache_gib", "model.init")
"""Keys that name paths, which may differ between nodes; what is stored there is compared."""


def _check_same_configuration(collectives: Collectives, config: Config) -> None:
    """Compare the configurations of all processes: a file edited on one node would change its weights, or hang."""
    flat = {f"{section}.{key}": value for section, part in public(config).items() for key, value in part.items()}
    flat |= identity(config)  # where the order of a mapping matters, it is compared too
    everyone = collectives.from_all({key: value for key, value in flat.items() if key not in _MAY_DIFFER})
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = [key for key in first if other.get(key) != first[key]]
        if differing:
            values = ", ".join(f"{key} ({other.get(key)!r}, on rank 0 {first[key]!r})" for key in differing[:5])
            raise ConfigError(f"rank {rank} has another configuration than rank 0: {values}; give all nodes the same")


def _compare_numerics(config: Config, runtime: Runtime) -> None:
    """Warn where processes compute with other software or hardware, if that decides what is trained."""
    if config.train.virtual_ranks is not None:
        effect = "the last bits of the weights depend on which process computes what"
    elif config.train.optimizer == "muon":  # the others compute element by element: the same bits everywhere
        effect = "train.optimizer=muon: each process multiplies matrices, so the weights of unlike ones drift apart"
    else:
        return
    unlike = unlike_ranks(runtime.collectives.from_all(runtime.what_decides_bits))
    for rank, names in list(unlike.items())[:1] if runtime.is_main else ():
        log.warning("%s: rank %s has %s", effect, rank, names)


def _build(config: Config, dataset: Dataset, runtime: Runtime, started: float) -> Job:
    collectives, world, processes = runtime.collectives, runtime.world, runtime.environment.local_world_size
    order = inputs.make_order(config, dataset, world.size)
    _check_augmentation(config, dataset)
    _check_stop_after(config, dataset)
    total_steps = config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch
    functions = collectives.all_or_none(lambda: _user_functions(config, dataset, runtime, total_steps))
    inputs.check(config, dataset)
    image_sizes = inputs.image_sizes(config, total_steps)
    preprocessing = inputs.preprocessing(config, dataset, processes, runtime.device, image_sizes)
    built = model_setup.build(config, dataset, order, image_sizes, preprocessing, runtime)
    mean, std = inputs.normalization(config, dataset)
    return Job(
        config=config,
        dataset=dataset,
        order=order,
        total_steps=total_steps,
        runtime=runtime,
        model=built.model,
        functions=functions,
        cache=collectives.all_or_none(lambda: inputs.make_cache(config, dataset, runtime.device, processes)),
        identity={
            **identity(config),
            **built.initial_weights,
            "data.mean": mean,
            "data.std": std,
            "data.manifest": dataset.digest,
            **_identity_of_bits(config, runtime),
        },
        dependent_layers=built.dependent_layers,
        virtual_ranks=world.virtual_ranks(config.train.virtual_ranks),
        accumulation_steps=built.accumulation_steps,
        compilation=built.compilation,
        flops=built.flops,
        preprocessing=preprocessing,
        started=started,
    )


def _identity_of_bits(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Return what decides the last bits besides the keys of the identity; with virtual ranks a resume keeps them."""
    if config.train.virtual_ranks is None:
        return {}
    return {
        "train.micro_batch_size": config.train.micro_batch_size,
        "train.compile": config.train.compile,
        "run.cpu_threads": config.run.cpu_threads,
        "run.device": runtime.device.type,
    }


def _check_augmentation(config: Config, dataset: Dataset) -> None:
    settings, smallest = config.augment, min(inputs.training_shapes(config, dataset)[-1][:2])
    of_which = "these images" if config.data.start_size is None else f"images of data.start_size={smallest}"
    if settings.crop_padding >= smallest:
        raise ConfigError(f"augment.crop_padding={settings.crop_padding}: at most {smallest - 1} for {of_which}")
    if settings.cutout > smallest:
        raise ConfigError(f"augment.cutout={settings.cutout}: at most {smallest} for {of_which}")
    lanes, batch = dataset.split("train").lanes, config.train.global_batch_size
    if settings.mixes_labels and batch < 2 * lanes:
        raise ConfigError(
            f"augment.{'mixup' if settings.mixup else 'cutmix'} mixes samples of the same lane: of {lanes} lanes, a"
            f" train.global_batch_size of {batch} has fewer than two of each; raise it to {2 * lanes}, or"
            " prepare the data set with fewer --lanes"
        )


def _check_stop_after(config: Config, dataset: Dataset) -> None:
    """Check that `train.stop_after` has evaluations on val to count."""
    key, off = f"train.stop_after={config.train.stop_after}", "or set train.stop_after=null"
    if config.train.stop_after is not None and "val" not in dataset.manifest.splits:
        raise ConfigError(
            f"{key} counts evaluations on val, and {dataset.root} has no val split: prepare it with --val-fraction 0.1,"
            f" {off}"
        )
    if config.train.stop_after is not None and config.eval.every_steps == 0:
        raise ConfigError(
            f"{key} counts evaluations during the run, and eval.every_steps=0 has none: set it to null, once per epoch,"
            f" {off}"
        )


def _user_functions(config: Config, dataset: Dataset, runtime: Runtime, total_steps: int) -> UserFunctions:
    """Import the functions of the user, and try them.

    Raises:
        ConfigError: one cannot be used.
    """
    functions, each_alone = UserFunctions.of(config), config.train.virtual_ranks is None
    if functions.schedule is not None:
        functions.schedule.check(total_steps)
    with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []):
        if functions.loss is not None:
            functions.loss.check(len(dataset.manifest.classes), runtime.device, runtime.dtype, each_alone)
        if functions.augmentation is not None:
            height, width, channels = dataset.image_shape
            functions.augmentation.check((height, width, channels), runtime.device, each_alone)
    return functions
