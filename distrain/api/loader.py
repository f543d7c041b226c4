"""Batches for a training loop of one's own, in the order in which `distrain train` trains.

The samples of a step depend on the data set, the global batch size and the seed, not on the number of processes, and
any step is the first that is read: nothing of the loader has to be saved (see `distrain.data.order`).
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from distrain import config as configuration
from distrain.api.arguments import text_of
from distrain.api.group import check_process, check_same, collectives_for, local_processes, world_of
from distrain.config import Config
from distrain.data.cache import Cache
from distrain.data.decoded import DecodedBatches, EncodedBatches
from distrain.data.decoding import Preprocessing
from distrain.data.encoded import Encoded, EncodedCache
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.rounds import Batch
from distrain.data.stream import TrainingBatches
from distrain.distributed.collectives import Collectives
from distrain.environment import World
from distrain.errors import ConfigError
from distrain.training import inputs
from distrain.training.feed import Feed

log = logging.getLogger("distrain")

Item_co = TypeVar("Item_co", covariant=True)


class EncodedBatch(NamedTuple):
    """The local batch of a virtual rank in a step, as files of images that are not decoded.

    Encoded images (JPEG, PNG, …), labels int64 [n], ids int64 [n], positions in the global batch int64 [n], and random
    bits for augmentation, int64 [n, 2].
    """

    images: list[memoryview]
    labels: Tensor
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    random_bits: Tensor


class Options(TypedDict, total=False):
    """Arguments of `batches` that do not change the type of its items."""

    seed: int
    rank: int | None
    world_size: int | None
    image_size: int | None
    crop_scale: Sequence[float] | None
    crop_ratio: Sequence[float]
    alternating_flip: bool
    trivial_augment: bool
    decode_threads: int | None
    read_ahead: int
    device: str | torch.device | None
    tars: str | None
    cache: Literal["auto", "off", "ram", "device"]
    skip_bad: int


class Batches(Generic[Item_co]):
    """Iterator over this process's samples of each step; see `distrain.batches`.

    As a context manager, or with `close`, it ends its threads; it also does when it is exhausted, raises an error, is
    no longer referenced, or the interpreter exits.
    """

    def __init__(self, items: Iterator[Item_co], close: Callable[[], None]) -> None:
        self._items = items
        self._process = os.getpid()
        # Neither threads nor items refer to this object.
        self._close = weakref.finalize(self, _close_in_process, self._process, close)

    def __iter__(self) -> Iterator[Item_co]:
        return self

    def __next__(self) -> Item_co:
        if not self._close.alive:
            raise StopIteration
        if os.getpid() != self._process:
            raise ConfigError(
                f"the batches were opened in process {self._process}, whose threads read them, and a fork of it has no"
                " threads: take them in the process that opened them"
            )
        try:
            return next(self._items)
        except BaseException:  # StopIteration too
            self.close()
            raise

    def __enter__(self) -> Batches[Item_co]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; the last item is no longer valid. Further calls do nothing."""
        self._close()


def _close_in_process(process: int, close: Callable[[], None]) -> None:
    if os.getpid() == process:  # a fork has none of the threads that `close` ends
        close()


@overload
def batches(
    data_dir: str | os.PathLike[str],
    *,
    global_batch_size: int,
    steps: range,
    virtual_ranks: None = None,
    decoded: Literal[True] = True,
    **options: Unpack[Options],
) -> Batches[Batch]: ...
@overload
def batches(
    data_dir: str | os.PathLike[str],
    *,
    global_batch_size: int,
    steps: range,
    virtual_ranks: int,
    decoded: Literal[True] = True,
    **options: Unpack[Options],
) -> Batches[list[Batch]]: ...
@overload
def batches(
    data_dir: str | os.PathLike[str],
    *,
    global_batch_size: int,
    steps: range,
    virtual_ranks: None = None,
    decoded: Literal[False],
    **options: Unpack[Options],
) -> Batches[EncodedBatch]: ...
@overload
def batches(
    data_dir: str | os.PathLike[str],
    *,
    global_batch_size: int,
    steps: range,
    virtual_ranks: int,
    decoded: Literal[False],
    **options: Unpack[Options],
) -> Batches[list[EncodedBatch]]: ...
def batches(
    data_dir: str | os.PathLike[str],
    *,
    global_batch_size: int,
    steps: range,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    virtual_ranks: int | None = None,
    image_size: int | None = None,
    crop_scale: Sequence[float] | None = None,
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    alternating_flip: bool = False,
    trivial_augment: bool = False,
    decoded: bool = True,
    decode_threads: int | None = None,
    read_ahead: int = 1,
    device: str | torch.device | None = None,
    tars: str | None = None,
    cache: Literal["auto", "off", "ram", "device"] = "off",
    skip_bad: int = 0,
) -> Batches[Any]:
    """Iterate over this process's samples of each step, in the order in which `distrain train` trains.

        for batch in distrain.batches("data/cifar10", global_batch_size=512, steps=range(start, stop)):
            loss = loss_of(model(distrain.normalize(batch.images, mean, std)), batch.labels)  # summed over samples
            (loss * distrain.loss_scale(512, world_size)).backward()

    An item is a `Batch`: images uint8 [n, H, W, C], labels int64 [n] (tensors); ids int64 [n], as stored with the
    images, and positions in the global batch int64 [n] (numpy arrays); random bits for augmentation int64 [n, 2]
    (tensor). It is valid until the next item is taken; copy what you need longer. n differs between processes and steps
    by a few samples if the number of processes divides neither the lanes nor the global batch size, and can be 0.

    All samples of a step together are the same on any number of processes: those of step s of `distrain train`, with
    the same data set, `train.global_batch_size` and `run.seed`. Threads read ahead.

    If torch.distributed is initialised, all its processes must call this function, and take the same steps: it has
    collectives (of CPU tensors, over gloo) when it is called, at the steps that begin a round of shards, and at the
    end. A problem of one process is then raised by all of them, at the same step. If there is no group, or `world_size`
    is given and is not the number of its processes, there are no collectives: only the process with the problem raises.

    Args:
        data_dir: folder or address of the data set, as `data.dir`.
        global_batch_size: samples per step, in total over all processes.
        steps: steps to read, counted from 0 over all epochs (`open_data` has the number of steps of an epoch).
        seed: of the order, the random crops and the random bits.
        rank: of this process. By default rank and number of processes are those of torch.distributed's default group,
            or else RANK and WORLD_SIZE of the environment, or 0 of 1. Give both, or none of them.
        world_size: number of processes.
        virtual_ranks: number of virtual ranks (`train.virtual_ranks`); then an item is a list of the batches of this
            process's virtual ranks, in their order.
        image_size: height and width that the images of an index get; None: the size that all have.
        crop_scale: of an index, smallest and largest fraction of an image's area that a random part has; None: the
            largest part at the centre.
        crop_ratio: smallest and largest aspect ratio of that part.
        alternating_flip: whether the random bits are those of `augment.flip` alternating: `distrain.augment` with
            `flip=True` then mirrors each image in every second epoch.
        trivial_augment: of an index, do one random operation on each image (`augment.trivial_augment`).
        decoded: False for the encoded images of an index; then a batch is an `EncodedBatch`, which stays valid.
        decode_threads: threads that decode the images of an index; None: the cores, divided among the machine's
            processes (LOCAL_WORLD_SIZE).
        read_ahead: rounds of shards to read before they are needed.
        device: where the tensors of an item are; for a GPU, the next batch is copied from pinned memory while the model
            computes. None: the CPU.
        tars: folder or address of the tar files of an index; None: where they were when it was made.
        cache: whether the training set is read once and cached in memory: see `data.cache`.
        skip_bad: number of images of an index that may turn out to be unreadable: the next readable one is used.

    Raises:
        ConfigError: an argument cannot be used; messages have the names of the configuration's keys. When the function
            is called.
        DataError: the data set cannot be read, when the function is called; or a shard, at a step that begins a round.
        UnreadableImagesError: more images than `skip_bad` cannot be decoded; in a group at the next step that begins a
            round, or at the end: a step before may have had substitutes.
    """
    check_process("distrain.batches")
    tree = {
        "run": {"seed": seed},
        "data": {
            "dir": text_of("data_dir", data_dir), "tars": tars, "image_size": image_size,
            "decode_threads": decode_threads, "read_ahead": read_ahead, "cache": cache, "skip_bad": skip_bad,
        },
        "augment": {
            "crop_scale": crop_scale, "crop_ratio": crop_ratio, "trivial_augment": trivial_augment,
            "flip": "alternating" if alternating_flip else False,
        },
        "train": {"global_batch_size": global_batch_size, "virtual_ranks": virtual_ranks},
    }  # fmt: skip
    collectives = collectives_for(world_size)
    plan = collectives.all_or_none(lambda: _plan(tree, steps, world_of(rank, world_size), decoded, device))
    inputs.check_same_data(collectives, plan.dataset, ["train"])
    check_same(collectives, "distrain.batches", plan.world, plan.must_be_same)
    reading = _Decoded(plan, collectives) if decoded else _Encoded(plan, collectives)
    items = reading.items() if virtual_ranks is not None else (item for (item,) in reading.items())
    return Batches(items, reading.close)


@dataclass(frozen=True)
class _Plan:
    """The arguments of `batches`, after all checks."""

    config: Config
    dataset: Dataset
    order: Order
    world: World
    steps: range
    device: torch.device
    decoded: bool

    @property
    def ranks(self) -> tuple[World, ...]:
        """The virtual ranks of this process."""
        return self.world.virtual_ranks(self.config.train.virtual_ranks)

    @property
    def must_be_same(self) -> dict[str, Any]:
        """The arguments that must be the same on all processes."""
        train, augment = self.config.train, self.config.augment
        return {
            "global_batch_size": train.global_batch_size,
            "steps": self.steps,
            "seed": self.config.run.seed,
            "world_size": self.world.size,
            "virtual_ranks": train.virtual_ranks,
            "image_size": self.config.data.image_size,
            "crop_scale": augment.crop_scale,
            "crop_ratio": augment.crop_ratio,
            "alternating_flip": augment.flip == "alternating",
            "trivial_augment": augment.trivial_augment,
            "decoded": self.decoded,
        }


def _plan(tree: dict[str, Any], steps: range, world: World, decoded: bool, device: str | torch.device | None) -> _Plan:
    config = configuration.from_tree(tree)
    if not isinstance(steps, range) or steps.step != 1 or steps.start < 0:
        raise ConfigError(f"steps={steps!r}: should be range(first, stop), counted from 0 over all epochs")
    where = _device(device)
    dataset = inputs.open_data(config, "train")
    if decoded:
        dataset = dataset.with_image_size(config.data.image_size)
        inputs.check(config, dataset)
    else:
        _check_encoded(config, dataset, where)
    order = inputs.make_order(config, dataset, world.size)
    return _Plan(config, dataset, order, world, steps, where, decoded)


def _check_encoded(config: Config, dataset: Dataset, device: torch.device) -> None:
    if not dataset.is_index:
        raise ConfigError(f"decoded=False: {dataset.root} has images that were decoded when it was prepared")
    given = {"image_size": config.data.image_size, "crop_scale": config.augment.crop_scale}
    names = [name for name, value in given.items() if value is not None]
    names += ["trivial_augment"] * config.augment.trivial_augment + ["device"] * (device.type != "cpu")
    if names:
        raise ConfigError(f"{', '.join(names)}: has no effect with decoded=False; leave it None")


def _device(device: str | torch.device | None) -> torch.device:
    try:
        where = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"device: should be the name of a device, such as cpu or cuda; got {device!r}") from error
    if where.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device}: use cpu or cuda, and copy the tensors from the CPU to other devices")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: torch can use no GPU here")
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


class _Decoded:
    """Reads the batches of `plan`."""

    def __init__(self, plan: _Plan, collectives: Collectives) -> None:
        self._plan, self._collectives = plan, collectives
        self._bad: dict[str, str] = {}
        self._preprocessing = inputs.preprocessing(plan.config, plan.dataset, local_processes(), plan.device)
        self.reader = _reader(plan, collectives, self._preprocessing)
        self._feed = Feed(self.reader, plan.order, plan.device, self._wait)

    def close(self) -> None:
        """End all threads."""
        self.reader.close()
        if self._preprocessing is not None:
            self._preprocessing.decoder.close()

    def items(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step, one for each virtual rank."""
        for step in self._plan.steps:
            yield self._take(step)
        self._check_bad()

    def _take(self, step: int) -> list[Batch]:
        batches = self._feed.take(step)
        if self._collectives.size == 1:
            self._check_bad()
        if step + 1 < self._plan.steps.stop:
            self._feed.prefetch(step + 1)  # only for a GPU; ids and positions stay until that step is taken
        return batches

    def _check_bad(self) -> None:
        """Check that no more images than allowed could not be decoded so far; a collective.

        Raises:
            UnreadableImagesError: on all processes.
        """
        dataset, allowed = self._plan.dataset, self._plan.config.data.skip_bad
        if not dataset.is_index:
            return
        bad = inputs.bad_of_all(self._collectives, self.reader)
        new = inputs.record_bad(self._bad, dataset, "train", bad, allowed)
        for name, reason in new.items() if self._collectives.is_main else ():
            log.warning("%s cannot be decoded (%s): the next readable one is used instead", name, reason)

    def _wait(self, step: int) -> None:
        if self._collectives.size > 1:
            self._check_bad()
        self._collectives.all_or_none(lambda: self.reader.ready(step, None))


def _reader(
    plan: _Plan, collectives: Collectives, preprocessing: Preprocessing | None
) -> TrainingBatches | DecodedBatches:
    config, dataset = plan.config, plan.dataset
    cache = collectives.all_or_none(lambda: inputs.make_cache(config, dataset, plan.device, local_processes()))
    what = (dataset, plan.order, plan.ranks, plan.steps, config.data.read_ahead)
    if preprocessing is not None:
        assert not isinstance(cache, Cache)
        return collectives.all_or_none(lambda: DecodedBatches(*what, preprocessing, plan.device, cache))
    assert not isinstance(cache, EncodedCache)
    return TrainingBatches(*what, True, plan.device, cache)


class _Encoded:
    """Reads the encoded batches of `plan`."""

    def __init__(self, plan: _Plan, collectives: Collectives) -> None:
        self._plan, self._collectives = plan, collectives
        what = (plan.dataset, plan.order, plan.ranks, plan.steps, plan.config.data.read_ahead)
        self.reader = collectives.all_or_none(lambda: EncodedBatches(*what))

    def close(self) -> None:
        """End all threads."""
        self.reader.close()

    def items(self) -> Iterator[list[EncodedBatch]]:
        """Yield the batches of each step, one for each virtual rank."""
        for step in self._plan.steps:
            if step == self._plan.steps.start or self._plan.order.begins_round(step):
                self._collectives.all_or_none(lambda: self.reader.ready(step, None))  # noqa: B023 - called at once
            yield [_encoded_batch(samples) for samples in next(self.reader)]


def _encoded_batch(samples: Encoded) -> EncodedBatch:
    return EncodedBatch(
        [samples.stretches[which].images[number] for which, number in samples.origin.tolist()],
        torch.from_numpy(samples.samples["label"].astype(np.int64)),
        samples.samples["id"].astype(np.int64),
        samples.positions,
        torch.from_numpy(samples.random_bits.view(np.int64)),
    )
