"""Batches from real shards have the samples that the order defines, for any number of processes and any first step."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrain import machine
from distrain.data import cache, manifest, shards
from distrain.data.background import Background
from distrain.data.cache import Cache
from distrain.data.manifest import Dataset, Shard
from distrain.data.order import Order, augmentation_bits
from distrain.data.rounds import memory
from distrain.data.stream import EvaluationBatches, TrainingBatches
from distrain.environment import World
from distrain.errors import ConfigError, ShardError


def order_of(dataset: Dataset, global_batch_size: int, seed: int = 1) -> Order:
    split = dataset.split("train")
    sizes = [shard.samples for shard in split.shards]
    return Order(len(sizes), split.lanes, min(sizes), global_batch_size, seed)


def planned(dataset: Dataset, order: Order, step: int) -> list[int]:
    """Ids of a step, computed only from the definition in `distrain.data.order` and the shards."""
    epoch, in_epoch = divmod(step, order.steps_per_epoch)
    ids = []
    for position in range(in_epoch * order.global_batch_size, (in_epoch + 1) * order.global_batch_size):
        row, lane = divmod(position, order.lanes)
        round_, index = divmod(row, order.samples_per_shard)
        shard = int(order.epoch_shards(epoch)[round_, lane])
        content = ids_of(dataset, shard)
        ids.append(content[order.shard_samples(epoch, shard, len(content))[index]])
    return ids


def reached(condition: Callable[[], bool]) -> bool:
    """Wait, up to a minute, until a condition holds."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


_IDS: dict[tuple[str, int], list[int]] = {}


def ids_of(dataset: Dataset, index: int) -> list[int]:
    key = (dataset.digest, index)
    if key not in _IDS:
        entry = dataset.split("train").shards[index]
        blocks = shards.read(dataset.root, entry, dataset.manifest.image_shape, len(dataset.manifest.classes))
        _IDS[key] = [i for block in blocks for i in block.ids.tolist()]
    return _IDS[key]


def streamed(
    dataset: Dataset, order: Order, world: World, steps: range, read_ahead: int = 1, cached: bool = False
) -> list[list[int]]:
    train = Cache(dataset, torch.device("cpu")) if cached else None
    batches = TrainingBatches(dataset, order, (world,), steps, read_ahead, with_random_bits=False, cache=train)
    with closing(batches):
        return [batch.ids.tolist() for (batch,) in batches]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2), st.integers(0, 2**62), st.booleans(), st.data())
def test_any_world_streams_the_samples_of_the_order_from_any_step(
    small: Dataset, global_batch_size: int, size: int, ahead: int, seed: int, cached: bool, data: st.DataObject
) -> None:
    order = order_of(small, global_batch_size, seed)
    first = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    steps = range(first, min(first + 6, 3 * order.steps_per_epoch))
    local_batches = [streamed(small, order, World(rank, size), steps, ahead + 1, cached) for rank in range(size)]
    for number, step in enumerate(steps):
        expected = planned(small, order, step)
        assert sorted(sum((of_rank[number] for of_rank in local_batches), [])) == sorted(expected)
        if size == 1:
            assert local_batches[0][number] == expected


def test_an_epoch_uses_every_sample_once_except_the_dropped_ones(small: Dataset) -> None:
    order = order_of(small, 32)
    ids = streamed(small, order, World(), range(3 * order.steps_per_epoch))
    dropped = []
    for epoch in range(3):
        seen = sum(ids[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch], [])
        assert len(set(seen)) == len(seen) == order.steps_per_epoch * 32
        dropped.append(set(range(1003)) - set(seen))
    assert dropped[0] != dropped[1] != dropped[2]


def test_images_labels_and_random_bits_belong_to_their_ids(small: Dataset) -> None:
    from distrain.preparation.sources.synthetic import Synthetic

    source = Synthetic(1003, 203, 16, 10, 0)
    order = order_of(small, 50)
    for rank in range(3):
        world = World(rank, 3)
        batches = TrainingBatches(small, order, (world,), range(30), 1, with_random_bits=True)
        with closing(batches):
            for step, (batch,) in enumerate(batches):
                for image, label, index in zip(batch.images, batch.labels, batch.ids, strict=True):
                    assert (image.numpy() == source.load("train", int(index))).all()
                    assert label == source.labels["train"][index]
                start = step % order.steps_per_epoch * 50
                positions = [each for each in range(50) if (start + each) % order.lanes % 3 == rank]
                assert batch.positions.tolist() == positions
                bits = augmentation_bits(order.seed, np.array([step]), np.array(positions))
                assert batch.random_bits.tolist() == bits.view(np.int64).tolist()


@pytest.mark.parametrize("cached", [False, True])
def test_alternating_flips_mirror_each_image_in_every_second_epoch(small: Dataset, cached: bool) -> None:
    order = replace(order_of(small, 50), alternating_flip=True)
    length = order.steps_per_epoch

    def mirrored(world: World, steps: range) -> dict[tuple[int, int], int]:
        """Whether each sample is mirrored, by epoch and id."""
        train = Cache(small, torch.device("cpu")) if cached else None
        with closing(TrainingBatches(small, order, (world,), steps, 1, with_random_bits=True, cache=train)) as batches:
            return {
                (step // length, id_): bit
                for step, (batch,) in zip(steps, batches, strict=True)
                for id_, bit in zip(batch.ids.tolist(), (batch.random_bits[:, 0] & 1).tolist(), strict=True)
            }

    expected = mirrored(World(), range(3 * length))
    for size in (2, 3):
        ranks = [mirrored(World(rank, size), range(3 * length)) for rank in range(size)]
        assert {key: bit for rank in ranks for key, bit in rank.items()} == expected
    resumed = mirrored(World(), range(length + length // 2, 3 * length))
    assert resumed.items() <= expected.items()
    of_epoch = [{id_: bit for (epoch, id_), bit in expected.items() if epoch == number} for number in range(3)]
    first, second, third = of_epoch
    in_all = first.keys() & second.keys() & third.keys()
    assert len(in_all) > 800
    assert all(first[each] == third[each] != second[each] for each in in_all)
    assert 0.45 < sum(first.values()) / len(first) < 0.55


def test_evaluation_batches_are_the_same_for_every_world_and_have_each_sample_once(small: Dataset) -> None:
    def batches(size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        for rank in range(size):
            yield from EvaluationBatches(small, "test", World(rank, size), 7)

    def content(size: int) -> list[tuple[bytes, tuple[int, ...], tuple[int, ...]]]:
        return sorted(
            (images.numpy().tobytes(), tuple(labels.tolist()), tuple(ids.tolist()))
            for images, labels, ids in batches(size)
        )

    alone = content(1)
    assert sum(len(labels) for _, labels, _ in alone) == 203
    assert sorted(id_ for *_, ids in alone for id_ in ids) == list(range(203))
    for size in (2, 3, 5, 12, 20):  # more processes than lanes: some own nothing
        assert content(size) == alone


def test_the_error_for_a_damaged_shard_names_it(small: Dataset, tmp_path) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(tmp_path / "data")
    victim = dataset.root / dataset.split("train").shards[5].name
    content = bytearray(victim.read_bytes())
    content[2000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ShardError, match=f"{victim}.*changed"):
        streamed(dataset, order_of(dataset, 8), World(), range(200))


def test_closing_ends_the_reading_thread(small: Dataset) -> None:
    before = set(threading.enumerate())
    batches = TrainingBatches(small, order_of(small, 8), (World(),), range(1000), 1, with_random_bits=False)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before


def test_background_stays_within_its_limit_and_raises_errors_of_the_iterator() -> None:
    made, taken = [], []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            if number == 2:
                reached.set()
            yield number
        raise OSError("broken")

    background = Background(items(), ahead=2)
    assert reached.wait(30)
    assert made == [0, 1, 2]  # nothing is in use yet: ahead + 1 items may exist
    for _ in range(6):
        taken.append(next(background))
        assert made[-1] <= taken[-1] + 2
    with pytest.raises(OSError, match="broken"):
        next(background)
    assert taken == [0, 1, 2, 3, 4, 5]
    with pytest.raises(OSError, match="broken"):
        next(background)
    background.close()


def test_memory_is_the_size_of_the_buffers(small: Dataset) -> None:
    order = order_of(small, 8)
    per_sample = 16 * 16 * 3 + 2 * 8 + 8 + 2 * 8  # image, label and id, position, random bits
    assert memory(small, order, (World(0, 1),), 1) == 2 * 12 * order.samples_per_shard * per_sample
    assert memory(small, order, (World(0, 12),), 2) == 3 * order.samples_per_shard * per_sample


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read, in order."""
    names: list[str] = []
    original = shards.read

    def recording(root: object, shard: Shard, *rest: object, **more: object) -> list[shards.Block]:
        names.append(shard.name)
        return original(root, shard, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "read", recording)
    return names


def needed(dataset: Dataset, order: Order, world: World, epochs: range) -> list[str]:
    """Names of the shards that a rank trains in these epochs, each once, in the order of training."""
    names = [shard.name for shard in dataset.split("train").shards]
    indices = [order.epoch_shards(epoch)[:, list(order.owned_lanes(world))].ravel().tolist() for epoch in epochs]
    return list(dict.fromkeys(names[index] for index in sum(indices, [])))


@pytest.mark.parametrize("size", [1, 3])
def test_a_cache_can_be_filled_before_the_first_step(small: Dataset, size: int, read: list[str]) -> None:
    order, world = order_of(small, 32), World(size - 1, size)
    resumed = order.steps_per_epoch // 2  # in the middle of an epoch
    train = Cache(small, torch.device("cpu"), fill_before_steps=True)
    steps = range(resumed, 3 * order.steps_per_epoch)
    with closing(TrainingBatches(small, order, (world,), steps, 1, with_random_bits=False, cache=train)) as batches:
        assert batches.ready(resumed, 60)
        before = list(read)
        later = [batch.ids.tolist() for (batch,) in batches]
    assert read == before  # nothing is read during the steps
    assert set(needed(small, order, world, range(1, 3))) <= set(before)
    assert later == streamed(small, order, world, steps)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cache_is_filled_in_the_first_epoch_in_the_order_of_training(
    small: Dataset, size: int, read: list[str]
) -> None:
    order, world = order_of(small, 32), World(size - 1, size)
    steps = range(9 * order.steps_per_epoch)
    train = Cache(small, torch.device("cpu"))
    batches = TrainingBatches(small, order, (world,), steps, 1, with_random_bits=False, cache=train)
    with closing(batches):
        for _ in range(order.steps_per_epoch // 2):
            next(batches)
        expected = needed(small, order, world, range(9))
        assert reached(lambda: len(read) == len(expected))
        assert len(list(batches)) == 9 * order.steps_per_epoch - order.steps_per_epoch // 2
    assert read == expected
    assert len(expected) <= len(small.split("train").shards)


def test_a_cache_is_not_filled_with_shards_that_the_run_does_not_need(small: Dataset, read: list[str]) -> None:
    order, world = order_of(small, 32), World(0, 3)
    streamed(small, order, world, range(order.steps_per_epoch), cached=True)
    assert read == needed(small, order, world, range(1))


def test_a_damaged_shard_that_a_cache_reads_early_is_an_error_when_it_is_needed(
    small: Dataset, tmp_path, read: list[str]
) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(tmp_path / "data")
    order, world = order_of(dataset, 32), World(0, 2)
    victim = needed(dataset, order, world, range(9))[-1]
    epoch = next(each for each in range(9) if victim in needed(dataset, order, world, range(each + 1)))
    assert epoch >= 2
    (dataset.root / victim).write_bytes(b"")
    train = Cache(dataset, torch.device("cpu"))
    steps = range(9 * order.steps_per_epoch)
    batches = TrainingBatches(dataset, order, (world,), steps, 1, with_random_bits=False, cache=train)
    with closing(batches):
        next(batches)
        assert reached(lambda: victim in read)
        for _ in range(epoch * order.steps_per_epoch - 1):
            next(batches)
        with pytest.raises(ShardError, match=victim):
            list(batches)


@pytest.mark.parametrize("size", [1, 3])
def test_a_cache_gives_the_same_batches_and_reads_each_shard_once(small: Dataset, size: int, read: list[str]) -> None:
    order = order_of(small, 32)
    steps = range(6 * order.steps_per_epoch)
    world = World(size - 1, size)
    with closing(TrainingBatches(small, order, (world,), steps, 1, with_random_bits=False)) as streamed_:
        expected = [(batch.images.clone(), batch.labels.clone(), batch.ids.copy()) for (batch,) in streamed_]
    read.clear()
    train = Cache(small, torch.device("cpu"))
    with closing(TrainingBatches(small, order, (world,), steps, 1, with_random_bits=False, cache=train)) as batches:
        cached = [batch for (batch,) in batches]
    assert len(read) == len(set(read))
    assert len(cached) == len(expected)
    for batch, (images, labels, ids) in zip(cached, expected, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert np.array_equal(batch.ids, ids)


def test_the_device_of_the_cache_depends_on_free_memory(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, needed = torch.device("cpu"), cache.size(small)
    processes = 2
    for free, auto in ((8 * needed, cpu), (8 * needed - 8, None)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert cache.choose_device("auto", small, cpu, processes) == auto
        assert cache.choose_device("ram", small, cpu, processes) == cpu
        assert cache.choose_device("off", small, cpu, processes) is None
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * needed - 2)
    with pytest.raises(ConfigError, match=r"data.cache=ram: .* MiB are free for it"):
        cache.choose_device("ram", small, cpu, processes)
    with pytest.raises(ConfigError, match="needs a GPU"):
        cache.choose_device("device", small, cpu, processes)
