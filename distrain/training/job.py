"""The parts of a run that was set up. Nothing here changes any more, except tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.config import Config
from distrain.data import images
from distrain.data.cache import Cache
from distrain.data.decoding import Preprocessing
from distrain.data.encoded import EncodedCache
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradients import DistributedModel
from distrain.distributed.numerics import layer_seed
from distrain.distributed.runtime import Runtime
from distrain.environment import World
from distrain.runs import checkpoint
from distrain.training import augment, optim, optimizer_state
from distrain.training.augment import Normalizer
from distrain.training.flops import Flops
from distrain.training.optim import WeightAverage
from distrain.training.user_functions import UserFunctions

IMAGE_DECODER = "image decoder"
TRAINED_WEIGHTS = "weights."
"""Prefix, in optimizer.safetensors, of the trained weights if model.safetensors holds their EMA."""


@dataclass(frozen=True)
class TrainedModel:
    """The model, its optimizer and its input normalisation.

    Attributes:
        module: the model itself.
        distributed: the model as accelerate prepared it; used for training.
        optimizer: as accelerate prepared it.
        ema: exponential moving average of the weights, with `train.ema_decay`.
        mean: [C], of images in 0 … 1, on the device.
        std: [C].
        image_width: pixels.
    """

    module: nn.Module
    distributed: DistributedModel
    optimizer: Any
    ema: WeightAverage | None
    mean: Tensor
    std: Tensor
    image_width: int

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated, and saved as the result: the EMA if there is one, else the trained model."""
        return self.module if self.ema is None else self.ema.module

    @functools.cached_property
    def normalize(self) -> Normalizer:
        """The function from uint8 images to the model's input."""
        return Normalizer(self.mean, self.std, self.image_width)

    @functools.cached_property
    def mean_color(self) -> Tensor:
        """Colour of the squares of cutout: uint8 [C]."""
        return (self.mean * 255).round().to(torch.uint8)

    def checkpoint_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what a checkpoint holds: the evaluated weights; the optimizer's state, with an EMA the weights too."""
        tensors = optimizer_state.state_tensors(self.optimizer, self.module)
        if self.ema is not None:
            tensors |= {TRAINED_WEIGHTS + name: value for name, value in self.module.state_dict().items()}
        return self.eval_model.state_dict(), tensors

    def is_finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.module.parameters()]).all())


@dataclass(frozen=True)
class Job:
    """A run that was set up.

    Attributes:
        config: the configuration.
        dataset: the data set.
        order: which samples each step trains; it owns the global batch size.
        total_steps: optimizer steps of the whole run.
        runtime: this process among its peers.
        model: what is trained.
        functions: those of the user.
        cache: the train split in memory, where it fits and is wanted.
        identity: what decides what is trained; a checkpoint with another identity cannot be resumed.
        dependent_layers: kinds of layers that make the result depend on the number of processes.
        virtual_ranks: those that this process trains; without `train.virtual_ranks` each process is one.
        accumulation_steps: micro-batches of every virtual rank in a step.
        compilation: how passes of training are compiled, and for which sizes.
        flops: FLOPs of an image, and of the devices, on rank 0.
        preprocessing: how the images of an index are decoded; None for blocks.
        started: when this attempt began, by `time.monotonic`.
        compile_seconds: seconds of this attempt's first passes, if they compiled the model; else 0.
    """

    config: Config
    dataset: Dataset
    order: Order
    total_steps: int
    runtime: Runtime
    model: TrainedModel
    functions: UserFunctions
    cache: Cache | EncodedCache | None
    identity: dict[str, Any]
    dependent_layers: list[str]
    virtual_ranks: tuple[World, ...]
    accumulation_steps: int
    compilation: Compilation
    flops: Flops
    preprocessing: Preprocessing | None
    started: float
    compile_seconds: float = 0.0

    @functools.cached_property
    def normalize(self) -> Callable[[Tensor], Tensor]:
        """The function from uint8 images to the model's input, compiled as the model is."""
        return self.compilation.function(self.model.normalize.__call__, batches=1)

    @functools.cached_property
    def shift_and_cut(self) -> Callable[..., Tensor]:
        """The function `augment.shift_and_cut`, compiled as the model is."""
        return self.compilation.function(augment.shift_and_cut, batches=2)

    def augment(self, images: Tensor, random_bits: Tensor) -> Tensor:
        """Augment the images of a local batch: see `distrain.training.augment.augment`."""
        settings, also = self.config.augment, self.functions.augmentation
        return augment.augment(images, random_bits, settings, self.model.mean_color, also, self.shift_and_cut)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the model has BatchNorm."""
        return any(isinstance(layer, _BatchNorm) for layer in self.model.module.modules())

    @property
    def what_decides_bits(self) -> dict[str, str]:
        """The facts that decide the last bits of a result here, besides the configuration."""
        decoder = {IMAGE_DECODER: images.decoder_version()} if self.preprocessing is not None else {}
        return {**self.runtime.what_decides_bits, **decoder}

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def checkpoints(self) -> Path:
        """The folder RUN/checkpoints."""
        return self.folder / checkpoint.FOLDER

    def epoch(self, steps: int) -> float:
        """Epochs done after so many steps."""
        return steps / self.order.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step of the run."""
        train, schedule = self.config.train, self.functions.schedule
        if schedule is not None:
            return train.lr * schedule(step, self.total_steps)
        return optim.learning_rate(step, self.total_steps, train.schedule, train.lr, train.warmup_fraction)

    def layer_seed(self, step: int, rank: World) -> int:
        """Seed for layers that draw random numbers in a step, so that they draw the same after a resume."""
        return layer_seed(self.config.run.seed, step, rank.rank)
