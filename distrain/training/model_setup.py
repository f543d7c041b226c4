"""Set-up of the trained model: built, tried, given its initial weights, and prepared for all processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distrain import models, startup
from distrain.config import Config, is_user_code
from distrain.data.decoding import Preprocessing
from distrain.data.image_sizes import ImageSizes
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradients import DataParallel
from distrain.distributed.runtime import Runtime
from distrain.distributed.virtual_ranks import Division, VirtualRanks
from distrain.errors import ConfigError
from distrain.models import pretrained
from distrain.models.batch_norm import can_be_synchronised, local_batch_norm
from distrain.text import shortened
from distrain.training import flops, from_images, initial_weights, inputs, optim, optimizer_state, parameter_groups
from distrain.training.flops import Flops
from distrain.training.job import TrainedModel
from distrain.training.optim import WeightAverage

log = logging.getLogger("distrain")


@dataclass(frozen=True)
class BuiltModel:
    """The model of a run, ready for its first passes.

    Attributes:
        model: with its optimizer.
        initial_weights: digest of the weights of `model.init`, for the run's identity.
        dependent_layers: kinds of layers that make the result depend on the number of processes.
        accumulation_steps: micro-batches of every virtual rank in a step.
        compilation: how passes are compiled, and for which sizes.
        flops: FLOPs of an image, and of the devices, on rank 0.
    """

    model: TrainedModel
    initial_weights: dict[str, str]
    dependent_layers: list[str]
    accumulation_steps: int
    compilation: Compilation
    flops: Flops


def build(
    config: Config,
    dataset: Dataset,
    order: Order,
    image_sizes: ImageSizes,
    preprocessing: Preprocessing | None,
    runtime: Runtime,
) -> BuiltModel:
    """Set up the model of a run, on all processes together.

    Raises:
        UserError: on all processes: it cannot be used.
    """
    number = runtime.world.virtual_ranks(config.train.virtual_ranks)[0].size
    fewest, most = order.local_batch_sizes(number)
    accumulation_steps = -(-most // (config.train.micro_batch_size or most))
    smallest = (0,) if fewest < accumulation_steps else ()
    module = runtime.collectives.all_or_none(lambda: build_model(config, dataset, runtime.dtype, (2, 1, *smallest)))
    _freeze(config, module, len(dataset.manifest.classes), runtime)
    _check_batch_norm(config, module, dataset, order, number, accumulation_steps)
    # Before layers are replaced by those with collectives.
    run_flops = _count_flops(config, module, dataset, image_sizes, runtime)
    dependent: list[str] = []
    if config.train.virtual_ranks is None:
        dependent = models.world_size_dependent(module, accumulates=config.train.micro_batch_size is not None)
    weights = _initialise(config, module, dataset, runtime)
    module = _distribute(config, module, dataset, preprocessing, runtime)
    ema = _make_ema(config, module, runtime)
    sizes = order.micro_batch_sizes(number, accumulation_steps)
    if config.train.virtual_ranks is not None:
        sizes = tuple(size for size in sizes if size)  # empty ones are not run
    compilation = Compilation(config.train.compile, sizes, len(inputs.training_shapes(config, dataset)))
    distributed, optimizer = _prepare(config, module, runtime, compilation)
    mean, std = (each.to(runtime.device) for each in inputs.normalization_tensors(config, dataset, runtime.dtype))
    model = TrainedModel(module, distributed, optimizer, ema, mean, std, dataset.image_shape[1])
    return BuiltModel(model, weights, dependent, accumulation_steps, compilation, run_flops)


def _distribute(
    config: Config,
    module: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing | None,
    runtime: Runtime,
) -> nn.Module:
    """Move the model to the devices of all processes, with its initial weights, and with their kind of BatchNorm."""
    on_main = from_images.initialize(config, module, dataset, preprocessing, runtime)
    module = local_batch_norm(module) if config.train.virtual_ranks else runtime.sync_batch_norm(module)
    runtime.move_to_device(module)
    if on_main:
        runtime.collectives.broadcast_weights(module)
    if config.train.virtual_ranks is not None:
        _check_same_weights(runtime, module)
    return module


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
    mean, std = inputs.normalization(config, dataset)
    messages = collectives.all_or_none(
        lambda: initial_weights.load(config.model, module, dataset.manifest.classes, dataset.image_shape, mean, std)
    )
    for message in messages if runtime.is_main else ():
        log.info("model.init=%s: %s", init, message)
    return {"model.init": models.digest(module.state_dict())}


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
