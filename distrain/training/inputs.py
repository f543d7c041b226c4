"""The input of a run: sizes of images, decoding, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distrain import address, machine, startup
from distrain.config import Config
from distrain.data import cache, decoded, images, index, manifest, rounds
from distrain.data.cache import Cache
from distrain.data.decoded import DecodedBatches
from distrain.data.decoding import Bad, Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.encoded import EncodedCache
from distrain.data.fetch import FetchOptions
from distrain.data.gpu_decoding import GpuDecoder
from distrain.data.image_sizes import FULL_SIZE, ImageSizes, smaller_sizes
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.stream import TrainingBatches
from distrain.distributed.collectives import Collectives
from distrain.environment import World
from distrain.errors import ConfigError, DataError, UnreadableImagesError
from distrain.text import plural, shortened

_MARGIN = 8 / 7
"""Ratio of the shorter side to the crop in evaluation, where random parts are trained: 256 for 224 is usual."""
_MAX_NAMED = 10
"""Maximum number of unreadable images that a message names."""


def read_data(config: Config, *splits: str) -> Dataset:
    """Read the manifest of the data set that the configuration names, and give its images the size of the run.

    Raises:
        UserError: it cannot be read, lacks one of the splits, or its images cannot have this size.
    """
    return open_data(config, *splits).with_image_size(config.data.image_size)


def open_data(config: Config, *splits: str) -> Dataset:
    """Read the manifest of the data set that the configuration names, as it is.

    Raises:
        UserError: it cannot be read, or lacks one of the splits.
    """
    startup.waits_for(f"reading the description of {address.without_secrets(config.data.dir)}")
    dataset = manifest.read(config.data.dir, FetchOptions.of(config.data), config.data.tars)
    for split in splits:
        dataset.split(split)
    return dataset


def check_same_data(collectives: Collectives, dataset: Dataset, splits: Sequence[str]) -> None:
    """Check that all processes see the same data set, and that rank 0 sees every shard of it.

    Raises:
        DataError: on all processes.
    """
    others = collectives.unlike_rank_0(dataset.digest)
    if others:
        raise DataError(f"{dataset.root}: rank {', '.join(others)} sees another data set than rank 0; share one folder")
    missing = collectives.from_main(list(dataset.missing(splits)) if collectives.is_main else None)
    if missing:
        header = f"{dataset.root}: shards are missing or damaged:"
        cure = "restore them or prepare the data set again; `distrain verify` checks all shards"
        if dataset.is_index:
            header = f"{dataset.tars}: tar files are missing or damaged:"
            cure = "set data.tars if they were moved; else restore them, or index them again"
        raise DataError("\n  ".join([header, *shortened(missing, 5)]) + f"\n{cure}")


def order_of(dataset: Dataset, global_batch_size: int, seed: int) -> Order:
    """Return the order in which the train split is trained.

    Raises:
        ConfigError: an epoch has no whole global batch.
    """
    split = dataset.split("train")
    order = Order(len(split.sizes), split.lanes, int(split.sizes.min()), global_batch_size, seed)
    if order.steps_per_epoch == 0:
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} is larger than the {len(split.sizes) * split.sizes.min():,}"
            f" samples that an epoch of {dataset.root} can use; lower it, to a tenth of them or less"
        )
    return order


def make_order(config: Config, dataset: Dataset, world_size: int) -> Order:
    """Return the order of the run.

    Raises:
        ConfigError: it does not exist for this batch size, or on so many processes.
    """
    split = dataset.split("train")
    batch = config.train.global_batch_size
    order = order_of(dataset, batch, config.run.seed)
    order = replace(order, alternating_flip=config.augment.flip == "alternating")
    if config.train.virtual_ranks is not None:
        _check_virtual_ranks(config.train.virtual_ranks, config, split.lanes, world_size)
    if world_size > split.lanes:
        raise ConfigError(
            f"{plural(world_size, 'process')} for {plural(split.lanes, 'lane')} of {dataset.root}: start at most"
            f" {split.lanes}, or prepare the data set with --lanes {world_size} or more"
        )
    if world_size > batch:
        raise ConfigError(
            f"train.global_batch_size={batch} is smaller than the number of processes, {world_size}: "
            f"raise it, or start at most {batch}"
        )
    return order


def _check_virtual_ranks(number: int, config: Config, lanes: int, world_size: int) -> None:
    """Check that so many virtual ranks can divide the global batch, and that there is one for each process.

    Raises:
        ConfigError: they cannot, or there is none.
    """
    key, batch = f"train.virtual_ranks={number}", config.train.global_batch_size
    if number > min(lanes, batch):
        of = f"the {lanes} lanes of the data set" if lanes < batch else f"train.global_batch_size={batch}"
        raise ConfigError(f"{key}: more than {of}; use {min(lanes, batch)} at most")
    if world_size > number:
        raise ConfigError(
            f"{plural(world_size, 'process')} for {key}: each needs one; start {number} at most, or begin another run"
            f" with more virtual ranks"
        )
    if config.train.compile != "off" and (lanes % number or batch % number):
        divisors = [each for each in range(1, number + 1) if lanes % each == 0 == batch % each]
        raise ConfigError(
            f"{key}: with train.compile it should divide {lanes} lanes and train.global_batch_size={batch}, so that all"
            f" local batches have one size; try {divisors[-1]}"
        )


def make_cache(config: Config, dataset: Dataset, device: torch.device, processes: int) -> Cache | EncodedCache | None:
    """Return an empty cache of the training set, or None if it is read in every epoch.

    Args:
        config: the configuration.
        dataset: the data set.
        device: the device that this process trains on.
        processes: number of processes on this machine, which share its memory.

    Raises:
        ConfigError: the training set does not fit into the memory that `data.cache` names.
    """
    where = cache.choose_device(config.data.cache, dataset, device, processes)
    if where is None:
        return None
    if dataset.is_index:
        return EncodedCache(dataset.indexed("train").shards)
    fill_before_steps = config.data.cache != "auto"
    return Cache(dataset, where, pin=where.type != device.type, fill_before_steps=fill_before_steps)


_OF_AN_INDEX = {
    "data": ("tars", "start_size", "growth", "skip_bad", "decode_threads", "decode_device"),
    "augment": ("crop_scale", "crop_ratio", "trivial_augment"),
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


def training_shapes(config: Config, dataset: Dataset) -> list[list[int]]:
    """Return all [H, W, C] that training images have in the run, from the largest on."""
    start, (full, _, channels) = config.data.start_size, dataset.image_shape
    smaller = () if start is None else reversed(smaller_sizes(start, full))
    return [dataset.image_shape, *([size, size, channels] for size in smaller)]


def evaluation_shape(config: Config, dataset: Dataset) -> list[int]:
    """Return [H, W, C] of the images that are evaluated."""
    if not dataset.is_index:
        return dataset.image_shape
    transform = evaluation(config, dataset)
    return [transform.height, transform.width, 3]


def preprocessing(
    config: Config,
    dataset: Dataset,
    processes: int,
    device: torch.device | None = None,
    sizes: ImageSizes = FULL_SIZE,
) -> Preprocessing | None:
    """Return how the images of an index are decoded; None for blocks.

    Args:
        config: the configuration.
        dataset: the data set.
        processes: number of processes on this machine, which share its cores.
        device: the device that this process trains on; None: images are only evaluated.
        sizes: smaller sizes of training images.

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
        TrainingTransform(height, width, augment.crop_scale, augment.crop_ratio, augment.trivial_augment),
        evaluation(config, dataset),
        sizes,
    )


def image_sizes(config: Config, total_steps: int) -> ImageSizes:
    """Return the smaller sizes of training images in a run."""
    start, full = config.data.start_size, config.data.image_size
    if start is None or full is None:
        return FULL_SIZE
    return ImageSizes.growing(start, full, total_steps, config.data.growth)


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


def bad_of_all(collectives: Collectives, reader: TrainingBatches | DecodedBatches) -> list[Bad]:
    """Return training images that no process could decode, since the last call; a collective."""
    bad, reader.bad = reader.bad, []
    of_ranks = collectives.from_all(bad) if any(collectives.agree(bool(bad)).flags) else []
    return [each for of_rank in of_ranks for each in of_rank]


def record_bad(
    known: dict[str, str], dataset: Dataset, split_name: str, bad: Sequence[Bad], allowed: int
) -> dict[str, str]:
    """Add the images that could not be decoded to those that are known; return the new ones, with the reasons.

    Raises:
        UnreadableImagesError: all together are more than allowed; then nothing is added.
    """
    described = describe_bad(dataset, split_name, bad)
    new = {name: reason for name, reason in described.items() if name not in known}
    check_bad({**known, **new}, allowed)
    known |= new
    return new


def describe_bad(dataset: Dataset, split_name: str, bad: Sequence[Bad]) -> dict[str, str]:
    """Return name and reason of images of an index that could not be decoded."""
    return {index.describe(dataset.indexed(split_name), each.number, each.offset): each.reason for each in bad}


def check_bad(bad: Mapping[str, str], allowed: int) -> None:
    """Check that no more images than allowed could not be decoded.

    Raises:
        UnreadableImagesError: they are more.
    """
    if len(bad) > allowed:
        header = f"{plural(len(bad), 'image')} cannot be decoded, {allowed} allowed:"
        lines = [f"{name}: {reason}" for name, reason in sorted(bad.items())]
        raise UnreadableImagesError(
            "\n  ".join([header, *shortened(lines, _MAX_NAMED)])
            + f"\nreplace them in the tar files and index these again, or allow them: data.skip_bad={len(bad)}"
        )


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


def normalization_tensors(config: Config, dataset: Dataset, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the same as tensors on the CPU: [C] each."""
    mean, std = normalization(config, dataset)
    return torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)
