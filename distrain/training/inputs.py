"""The input of a run: sizes of images, decoding, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from distrain import machine
from distrain.config import Config
from distrain.data import decoded, images, rounds
from distrain.data.decoding import Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.gpu_decoding import GpuDecoder
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.environment import World
from distrain.errors import ConfigError

_MARGIN = 8 / 7
"""Ratio of the shorter side to the crop in evaluation, where random parts are trained: 256 for 224 is usual."""

_OF_AN_INDEX = {
    "data": ("tars", "skip_bad", "decode_threads", "decode_device"),
    "augment": ("crop_scale", "crop_ratio"),
    "eval": ("crop", "resize"),
}
"""Keys that have an effect with an index only."""


def check(config: Config, dataset: Dataset) -> None:
    """Check that no key is set that has no effect with this data set.

    Raises:
        ConfigError: one is.
    """
    if dataset.is_index:
        if config.data.cache == "device":
            raise ConfigError("data.cache=device: the images of an index are encoded; use ram, auto or off")
        evaluation(config, dataset)
        return
    default = Config()
    given = [
        f"{section}.{key}"
        for section, keys in _OF_AN_INDEX.items()
        for key in keys
        if getattr(getattr(config, section), key) != getattr(getattr(default, section), key)
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: {dataset.root} has images of one size, which were decoded when it was prepared;"
            " remove it, or index the images with `distrain prepare webdataset`"
        )


def evaluation(config: Config, dataset: Dataset) -> EvaluationTransform:
    """Return how the images of an index are evaluated: not resized if all have one size, and no key asks for it.

    Raises:
        ConfigError: the crop is larger than the resized images.
    """
    height, width, _ = dataset.image_shape
    crop, resize = config.eval.crop, config.eval.resize
    if crop is None and resize is None and config.data.image_size is None:
        return EvaluationTransform(height, width, None)
    if crop is not None:
        height = width = crop
    if resize is None:
        resize = max(height, width)
        resize = math.floor(_MARGIN * resize + 0.5) if config.augment.crop_scale is not None else resize
    if resize < max(height, width):
        raise ConfigError(f"eval.resize={resize}: is smaller than the crop of {height}×{width}; raise it")
    return EvaluationTransform(height, width, resize)


def evaluation_shape(config: Config, dataset: Dataset) -> list[int]:
    """Return [H, W, C] of the images that are evaluated."""
    if not dataset.is_index:
        return dataset.image_shape
    transform = evaluation(config, dataset)
    return [transform.height, transform.width, 3]


def preprocessing(
    config: Config, dataset: Dataset, processes: int, device: torch.device | None = None
) -> Preprocessing | None:
    """Return how the images of an index are decoded; None for blocks.

    Args:
        config: the configuration.
        dataset: the data set.
        processes: number of processes on this machine, which share its cores.
        device: the device that this process trains on; None: images are only evaluated.

    Raises:
        ConfigError: images should be decoded on a GPU, but a CPU trains.
    """
    if not dataset.is_index:
        return None
    height, width, _ = dataset.image_shape
    augment, decoding = config.augment, images.Decoding.of(dataset.manifest.source)
    threads = decode_threads(config, processes)
    decoder = Decoder(threads, decoding)
    if config.data.decode_device == "gpu" and device is not None:
        if device.type != "cuda":
            raise ConfigError("data.decode_device=gpu: this run trains on the CPU; use cpu")
        decoder = GpuDecoder(device, threads, decoding)
    return Preprocessing(
        decoder,
        TrainingTransform(height, width, augment.crop_scale, augment.crop_ratio),
        evaluation(config, dataset),
    )


def memory(config: Config, dataset: Dataset, order: Order, ranks: Sequence[World], cached: bool, pinned: bool) -> int:
    """Bytes that a process needs for the samples of its virtual ranks.

    Args:
        config: the configuration.
        dataset: the data set.
        order: the order of training.
        ranks: the virtual ranks of the process.
        cached: whether the training set is cached.
        pinned: whether batches are in pinned memory, for a GPU.
    """
    if dataset.is_index:
        return decoded.memory(dataset, order, ranks, config.data.read_ahead, cached, pinned)
    return rounds.memory(dataset, order, ranks, config.data.read_ahead, cached, pinned)


def decode_threads(config: Config, processes: int) -> int:
    """Return the number of threads of a process that decode images."""
    return config.data.decode_threads or max(1, machine.cores() // processes)
