"""Initial weights that a model computes from training images (data-dependent initialisation)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from distrain import plugins, startup
from distrain.config import Config, Eval
from distrain.data.decoding import Preprocessing
from distrain.data.manifest import Dataset
from distrain.data.stream import EvaluationBatches
from distrain.distributed.runtime import Runtime
from distrain.environment import World
from distrain.training import inputs
from distrain.training.augment import normalize

_METHOD = "initialize_from_images"
_IMAGES, _BYTES = 1000, 2**23
"""Maximum number of the images, and of their bytes as uint8: `whitened` needs 64 times as much for their patches."""


def initialize(
    config: Config,
    module: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing | None,
    runtime: Runtime,
) -> bool:
    """Call a model's `initialize_from_images` on rank 0, if it has one and its weights are not loaded.

    Args:
        config: the configuration.
        module: the model, on the CPU.
        dataset: its first training images are used, which do not depend on the number of processes.
        preprocessing: how the images of an index are decoded.
        runtime: this process among its peers.

    Returns:
        Whether it was called: the other processes do not have these weights yet.

    Raises:
        UserError: on all processes: images cannot be read, or the method fails.
    """
    method = getattr(module, _METHOD, None)
    if method is None or config.model.init is not None:
        return False

    def call() -> None:
        if not runtime.is_main:
            return
        startup.waits_for(f"initialising model {config.model.name} from training images")
        mean, std = inputs.normalization_tensors(config, dataset, runtime.dtype)
        images = normalize(_first_images(config, dataset, preprocessing), mean, std)
        with plugins.user_code(f"model.name={config.model.name}: {_METHOD} fails on images {list(images.shape)}"):
            method(images)

    runtime.collectives.all_or_none(call)
    return True


def _first_images(config: Config, dataset: Dataset, preprocessing: Preprocessing | None) -> Tensor:
    """Return the first images of the train split, as they are evaluated by default: uint8 [n, H, W, C]."""
    if preprocessing is not None:  # what the section eval says is not in the identity, and must not decide weights
        by_default = inputs.evaluation(config.model_copy(update={"eval": Eval()}), dataset)
        preprocessing = replace(preprocessing, evaluation=by_default)
    number = max(2, min(_IMAGES, _BYTES // dataset.sample_bytes))
    parts: list[Tensor] = []
    with closing(EvaluationBatches(dataset, "train", World(0, 1), number, preprocessing)) as batches:
        for images, _, _ in batches:
            parts.append(images)
            if sum(map(len, parts)) >= number:
                break
    return torch.cat(parts)[:number]
