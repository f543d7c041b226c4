"""Set-up of a run: data set → order → model and optimizer → warm-up. Nothing is written yet.

What is trained depends on data, configuration and seed alone: see docs/design.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrain import models, startup
from distrain.config import Config, identity, is_user_code, public
from distrain.data.image_sizes import ImageSizes
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.distributed import runtime
from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradients import DataParallel
from distrain.distributed.numerics import unlike_ranks
from distrain.distributed.runtime import Runtime
from distrain.distributed.virtual_ranks import Division, VirtualRanks
from distrain.distributed.watchdog import Watchdog
from distrain.environment import Environment
from distrain.errors import ConfigError
from distrain.models import pretrained
from distrain.models.batch_norm import can_be_synchronised, local_batch_norm
from distrain.runs.folder import STACKS
from distrain.runs.trackers import check_installed
from distrain.text import shortened
from distrain.training import flops, from_images, initial_weights, inputs, optim, optimizer_state, parameter_groups
from distrain.training.flops import Flops
from distrain.training.job import Job, TrainedModel
from distrain.training.optim import WeightAverage
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
    everyone = collectives.from_all({key: value for key, value in flat.items() if key not in _MAY_DIFFER})
    first = everyone[0]
    for rank, other in enumerate(everyone):
        differing = [key for key in first if other.get(key) != first[key]]
        if differing:
            values = ", ".join(f"{key} ({other.get(key)!r}, on rank 0 {first[key]!r})" for key in differing[:5])
            raise ConfigError(f"rank {rank} has another configuration than rank 0: {values}; give all nodes the same")


def _compare_numerics(config: Config, runtime: Runtime) -> None:
    """Warn where processes compute with other software or hardware, if the bits should not depend on their number."""
    if config.train.virtual_ranks is None:
        return
    unlike = unlike_ranks(runtime.collectives.from_all(runtime.what_decides_bits))
    for rank, names in list(unlike.items())[:1] if runtime.is_main else ():
        log.warning("the last bits of the weights depend on which process computes what: rank %s has %s", rank, names)


def _build(config: Config, dataset: Dataset, runtime: Runtime, started: float) -> Job:
    collectives, world, processes = runtime.collectives, runtime.world, runtime.environment.local_world_size
    order = inputs.make_order(config, dataset, world.size)
    virtual_ranks = world.virtual_ranks(config.train.virtual_ranks)
    number = virtual_ranks[0].size
    mean, std = normalization(config, dataset)
    _check_augmentation(config, dataset)
    _check_stop_after(config, dataset)
    total_steps = config.train.max_steps or (config.train.epochs or 0) * order.steps_per_epoch
    functions = collectives.all_or_none(lambda: _user_functions(config, dataset, runtime, total_steps))
    inputs.check(config, dataset)
    fewest, most = order.local_batch_sizes(number)
    accumulation_steps = -(-most // (config.train.micro_batch_size or most))
    smallest = (0,) if fewest < accumulation_steps else ()
    module = collectives.all_or_none(lambda: build_model(config, dataset, runtime.dtype, (2, 1, *smallest)))
    _check_batch_norm(config, module, dataset, order, number, accumulation_steps)
    _freeze(config, module, len(dataset.manifest.classes), runtime)
    image_sizes = inputs.image_sizes(config, total_steps)
    # Before layers are replaced by those with collectives.
    run_flops = _count_flops(config, module, dataset, image_sizes, runtime)
    dependent: list[str] = []
    if config.train.virtual_ranks is None:
        dependent = models.world_size_dependent(module, accumulates=config.train.micro_batch_size is not None)
    start = _initialise(config, module, dataset, runtime)
    preprocessing = inputs.preprocessing(config, dataset, processes, runtime.device, image_sizes)
    mean_tensor, std_tensor = (torch.tensor(each, dtype=runtime.dtype) for each in (mean, std))
    on_main = from_images.initialize(config, module, dataset, preprocessing, mean_tensor, std_tensor, runtime)
    module = local_batch_norm(module) if config.train.virtual_ranks else runtime.sync_batch_norm(module)
    runtime.move_to_device(module)
    if on_main:
        collectives.broadcast_weights(module)
    if config.train.virtual_ranks is not None:
        _check_same_weights(runtime, module)
    ema = _make_ema(config, module, runtime)
    sizes = order.micro_batch_sizes(number, accumulation_steps)
    if config.train.virtual_ranks is not None:
        sizes = tuple(size for size in sizes if size)  # empty ones are not run
    compilation = Compilation(config.train.compile, sizes, len(inputs.training_shapes(config, dataset)))
    distributed, optimizer = _prepare(config, module, runtime, compilation)
    mean_tensor, std_tensor = mean_tensor.to(runtime.device), std_tensor.to(runtime.device)
    width = dataset.image_shape[1]
    return Job(
        config=config,
        dataset=dataset,
        order=order,
        total_steps=total_steps,
        runtime=runtime,
        model=TrainedModel(module, distributed, optimizer, ema, mean_tensor, std_tensor, width),
        functions=functions,
        cache=collectives.all_or_none(lambda: inputs.make_cache(config, dataset, runtime.device, processes)),
        identity={
            **identity(config),
            **start,
            "data.mean": mean,
            "data.std": std,
            "data.manifest": dataset.digest,
            **_identity_of_bits(config, runtime),
        },
        dependent_layers=dependent,
        virtual_ranks=virtual_ranks,
        accumulation_steps=accumulation_steps,
        compilation=compilation,
        flops=run_flops,
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


def _check_same_weights(runtime: Runtime, module: nn.Module) -> None:
    """Check that all processes begin with the same weights. DDP sends those of rank 0, virtual ranks do not.

    Raises:
        ConfigError: on all processes.
    """
    if runtime.world.size == 1:
        return
    others = runtime.collectives.unlike_rank_0(models.digest({**module.state_dict(), **dict(module.named_buffers())}))
    if others:
        raise ConfigError(
            f"train.virtual_ranks: rank {', '.join(shortened(others, 5))} begins with other weights than rank 0: the"
            " model should draw its initial weights with torch's generator only"
        )


def _check_batch_norm(
    config: Config, module: nn.Module, dataset: Dataset, order: Order, number: int, accumulation_steps: int
) -> None:
    """Check that every BatchNorm gets more than one value of each channel in every step.

    torch raises in the first step where it does not; on several processes, the variance would silently be 0.

    Raises:
        ConfigError: it does not.
    """
    local, together = order.smallest_micro_batches(number, accumulation_steps)
    if local > 1:
        return
    synchronised = config.train.virtual_ranks is None and number > 1 and together > 1
    height, width, channels = inputs.training_shapes(config, dataset)[-1]
    image = torch.zeros(1, channels, height, width, dtype=next(module.parameters()).dtype)
    norms = models.norms_of_one_value(module, image)
    alone = [name for name, layer in norms if not (can_be_synchronised(layer) and synchronised)]
    if alone:
        batch, key = ("micro-batch", "micro") if accumulation_steps > 1 else ("local batch", "global")
        names = ", ".join(shortened(alone, 3))
        raise ConfigError(
            f"model.name={config.model.name}: a {batch} can have one image, and BatchNorm {names} gets 1×1 pixels of"
            f" it: one value has no variance; raise train.{key}_batch_size, or prepare larger images"
        )


def _freeze(config: Config, module: nn.Module, num_classes: int, runtime: Runtime) -> None:
    """Check `train.lr_scale`, and freeze the parameters whose factor is 0."""
    scale = config.train.lr_scale
    if not scale:
        return
    parameter_groups.check(module, scale, num_classes)
    parameter_groups.freeze(module, scale)
    for line in parameter_groups.describe(module, scale) if runtime.is_main else ():
        log.info("train.lr_scale: %s", line)


def _initialise(config: Config, module: nn.Module, dataset: Dataset, runtime: Runtime) -> dict[str, str]:
    """Load the weights of `model.init`; return their digest for the identity, whatever the file is called."""
    init, collectives = config.model.init, runtime.collectives
    if init is None:
        return {}
    if pretrained.is_name(init):
        startup.waits_for(f"fetching the weights {init}")
        first = runtime.environment.local_rank == 0  # of this node; the others wait until its cache has them
        collectives.all_or_none(lambda: pretrained.fetch(init, config.model.name) if first else None)
    mean, std = normalization(config, dataset)
    messages = collectives.all_or_none(
        lambda: initial_weights.load(config.model, module, dataset.manifest.classes, dataset.image_shape, mean, std)
    )
    for message in messages if runtime.is_main else ():
        log.info("model.init=%s: %s", init, message)
    return {"model.init": models.digest(module.state_dict())}


def _count_flops(
    config: Config, module: nn.Module, dataset: Dataset, image_sizes: ImageSizes, runtime: Runtime
) -> Flops:
    """Count the FLOPs of an image on rank 0, which writes the metrics; look up the peak of the devices."""
    if not runtime.is_main:
        return Flops(None, None)
    name = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
    peak = flops.peak(name, config.train.precision)
    full = flops.of_model(module, dataset.image_shape)
    of_smaller = [
        (stage.steps, flops.of_model(module, (stage.size, stage.size, dataset.image_shape[2])))
        for stage in image_sizes.smaller
    ]
    return Flops(full, None if peak is None else peak * runtime.world.size, of_smaller)


def _make_ema(config: Config, module: nn.Module, runtime: Runtime) -> WeightAverage | None:
    if config.train.ema_decay is None:
        return None
    ema = WeightAverage(module, config.train.ema_decay)
    ema.module = runtime.prepare_eval_model(ema.module)
    return ema


def normalization(config: Config, dataset: Dataset) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, with which images are normalised."""
    channels = dataset.image_shape[2]
    values = []
    for key, configured, measured in (
        ("mean", config.data.mean, dataset.manifest.mean),
        ("std", config.data.std, dataset.manifest.std),
    ):
        value = configured if configured is not None else measured
        if len(value) != channels:
            raise ConfigError(f"data.{key}: {len(value)} values for images of {channels} channels")
        values.append(value)
    return values[0], values[1]


def _check_augmentation(config: Config, dataset: Dataset) -> None:
    settings, smallest = config.augment, min(inputs.training_shapes(config, dataset)[-1][:2])
    if settings.crop_padding >= smallest:
        raise ConfigError(f"augment.crop_padding={settings.crop_padding}: at most {smallest - 1} for these images")
    if settings.cutout > smallest:
        raise ConfigError(f"augment.cutout={settings.cutout}: at most {smallest} for these images")
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


def build_model(config: Config, dataset: Dataset, dtype: torch.dtype, batch_sizes: Sequence[int] = (2,)) -> nn.Module:
    """Build the model that the configuration names, with its initial weights, and try it on black images.

    Raises:
        ConfigError: it cannot be built, or does not give one logit for each class.
    """
    classes, shape = len(dataset.manifest.classes), dataset.image_shape
    module = models.from_config(config.model, classes, shape, config.run.seed, dtype, batch_sizes)
    of_evaluation = inputs.evaluation_shape(config, dataset)
    if of_evaluation != shape:
        cure = f"eval.crop={config.eval.crop}: if it needs images of {{}}, set eval.crop to null or to that size"
        _try_shape(config, module, dataset, of_evaluation, cure)
    for smaller in inputs.training_shapes(config, dataset)[1:]:
        cure = f"data.start_size={config.data.start_size}: if it needs images of {{}}, set data.start_size=null"
        _try_shape(config, module, dataset, smaller, cure)
    return module


def _try_shape(config: Config, module: nn.Module, dataset: Dataset, shape: Sequence[int], cure: str) -> None:
    """Try a model on black images [H, W, C] of another shape than the run's; the cure has {} for the run's size.

    Raises:
        ConfigError: it does not give one logit for each class.
    """
    (height, width, channels), dtype = shape, next(module.parameters()).dtype
    images = torch.zeros(2, channels, height, width, dtype=dtype)
    try:
        models.check_output(config.model.name, module, images, len(dataset.manifest.classes))
    except ConfigError as error:
        size = "×".join(map(str, dataset.image_shape[:2]))
        raise ConfigError(f"{error}; {cure.format(size)}") from error


def _prepare(
    config: Config, module: nn.Module, runtime: Runtime, compilation: Compilation
) -> tuple[DataParallel | VirtualRanks, Any]:
    """Prepare the model and its optimizer with accelerate."""
    settings = config.train
    optimizer = runtime.collectives.all_or_none(lambda: _make_optimizer(config, module))
    if is_user_code(settings.optimizer) and runtime.is_main:
        log.info("train.optimizer=%s: %s", settings.optimizer, optim.describe(optimizer))
    batch = settings.global_batch_size
    if settings.virtual_ranks is None:
        return runtime.prepare_data_parallel(module, optimizer, compilation, batch)
    division = Division(runtime.world, settings.virtual_ranks, batch)
    return runtime.prepare_virtual_ranks(module, optimizer, compilation, division)


def _make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer; one of the user is checked before."""
    name = config.train.optimizer
    if is_user_code(name):
        startup.waits_for(f"trying the optimizer {name}")
        optimizer_state.check_resumable(config.train, module, lambda: optim.build(config.train, module))
    return optim.build(config.train, module)


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
