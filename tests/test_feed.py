"""Batches on their way to a GPU, on a simulated one that is slower than the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from indexes import build
from simulated_gpu import SimulatedGpu
from test_stream import order_of, reached

from distrain.data import decoded, shards
from distrain.data.cache import Cache
from distrain.data.decoded import DecodedBatches
from distrain.data.decoding import Decoder, EvaluationTransform, Preprocessing, TrainingTransform
from distrain.data.images import Decoding
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.rounds import memory
from distrain.data.stream import TrainingBatches
from distrain.distributed.busy_clock import BusyClock
from distrain.distributed.stopwatch import Stopwatch
from distrain.distributed.virtual_ranks import _Clock
from distrain.environment import World
from distrain.training.feed import Feed
from distrain.training.profiling import Profile
from distrain.training.stopping import wait_for_data


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simulated = SimulatedGpu(monkeypatch, index=3)
    yield simulated
    simulated.close()


def runtime_of(gpu: SimulatedGpu) -> Any:
    """A runtime of one process."""

    def any_busy(busy: bool, progress: bool, error: Exception | None) -> bool:
        if error is not None:
            raise error
        return busy

    watchdog = SimpleNamespace(waiting_for=lambda what: None)
    return SimpleNamespace(device=gpu.device, watchdog=watchdog, collectives=SimpleNamespace(any_busy=any_busy))


def reader_of(
    gpu: SimulatedGpu, dataset: Dataset, order: Order, steps: range, cache: str = "off", rank: int = 0
) -> TrainingBatches:
    device = {"off": None, "ram": torch.device("cpu"), "device": gpu.device}[cache]
    train = Cache(dataset, device, pin=cache == "ram") if device is not None else None
    ranks = World(rank, 2).virtual_ranks(4)
    return TrainingBatches(dataset, order, ranks, steps, 1, with_random_bits=True, device=gpu.device, cache=train)


def feed_of(gpu: SimulatedGpu, reader: TrainingBatches | DecodedBatches, order: Order, profile: Profile) -> Feed:
    return Feed(reader, order, gpu.device, partial(wait_for_data, runtime_of(gpu), reader, None), profile)


def train(
    gpu: SimulatedGpu, reader: TrainingBatches | DecodedBatches, order: Order, steps: range, seconds: float = 0.0
) -> Profile:
    """Feed a model whose steps take so many seconds of the GPU, and none of the host."""
    profile = Profile(gpu.device)
    feed = feed_of(gpu, reader, order, profile)
    for step in steps:
        feed.take(step)
        gpu.compute.submit(lambda: time.sleep(seconds))
        profile.step()
        if step + 1 < steps.stop:
            feed.prefetch(step + 1)
    gpu.compute.synchronize()
    return profile


@pytest.mark.parametrize("cache", ["off", "ram", "device"])
def test_the_reading_thread_uses_the_gpu_of_its_process(small: Dataset, gpu: SimulatedGpu, cache: str) -> None:
    order = order_of(small, 32)
    steps = range(order.steps_per_epoch)
    with closing(reader_of(gpu, small, order, steps, cache)) as reader:
        train(gpu, reader, order, steps)
    devices = {device for thread, device, _ in gpu.calls if thread == "distrain-read"}
    assert devices == {3}


@pytest.mark.parametrize(
    ("batch", "cache", "rank"),
    [
        (32, "off", 0),
        (8, "off", 0),
        (300, "off", 0),
        (1100, "off", 0),
        (38, "off", 1),
        (300, "ram", 0),
        (38, "ram", 1),
    ],
)
def test_copies_arrive_whole_and_the_host_waits_for_none(
    small: Dataset, gpu: SimulatedGpu, batch: int, cache: str, rank: int
) -> None:
    """A step of 38 samples that ends in the next round has two of it, and none for the virtual ranks of rank 1."""
    order = order_of(small, min(batch, 24 * 41))  # a round has 12 × 41 samples
    steps = range(3 * order.steps_per_epoch)
    ranks = World(rank, 2).virtual_ranks(4)
    with closing(TrainingBatches(small, order, ranks, steps, 1, with_random_bits=True)) as plain:
        expected = [
            (part.images.clone(), part.labels.clone(), part.random_bits.clone())
            for batches in plain
            for part in batches
        ]
    with closing(reader_of(gpu, small, order, steps, cache, rank)) as reader:
        feed = feed_of(gpu, reader, order, Profile(gpu.device))
        copied = []
        for step in steps:
            copied += feed.take(step)
            feed.prefetch(step + 1) if step + 1 < steps.stop else None
        gpu.compute.synchronize()
    for part, (images, labels, random_bits) in zip(copied, expected, strict=True):
        assert torch.equal(part.images, images)
        assert torch.equal(part.labels, labels)
        assert torch.equal(part.random_bits, random_bits)
    calls = [call for thread, _, call in gpu.calls if thread != "distrain-read"]
    assert "copy" in calls
    assert "copy that the host waits for" not in calls


def test_memory_is_the_size_of_the_pinned_buffers(small: Dataset, gpu: SimulatedGpu) -> None:
    order, ranks = order_of(small, 32), World(0, 2).virtual_ranks(4)
    with closing(reader_of(gpu, small, order, range(1))) as reader:
        next(reader)
    of_torch = sum(1 << (size - 1).bit_length() for size in gpu.pinned_sizes)
    of_numpy = 2 * 6 * order.samples_per_shard * 16  # two buffers; ids and positions of six lanes
    assert memory(small, order, ranks, 1, pinned=True) == of_torch + of_numpy


def test_closing_ends_a_reader_that_waits_for_the_gpu(small: Dataset, gpu: SimulatedGpu) -> None:
    order = order_of(small, 12 * 41)  # a step is a round
    steps, go_on = range(8), threading.Event()
    with closing(reader_of(gpu, small, order, steps)) as reader:
        reader.copy_stream.submit(go_on.wait)  # type: ignore[union-attr]
        feed = feed_of(gpu, reader, order, Profile(gpu.device))
        feed.take(0)
        feed.take(1)  # releases the buffers of round 0, which are not copied yet
        assert reached(lambda: gpu.calls.count(("distrain-read", 3, "Event.query")) > 3)
        assert not reader.ready(2, 0.0)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    assert "distrain-read" not in {thread.name for thread in threading.enumerate()}
    go_on.set()


@pytest.mark.parametrize("is_slow", [False, True])
def test_data_is_the_time_in_which_the_gpu_waits_for_data(
    small: Dataset, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    order = order_of(small, 123)  # 8 steps an epoch of 2 rounds
    steps = range(24)
    read = shards.read

    def slowly(*args: Any, **more: Any) -> list[shards.Block]:
        time.sleep(0.03 if is_slow else 0.01)  # 6 shards a round of 4 steps
        return read(*args, **more)

    monkeypatch.setattr(shards, "read", slowly)
    started = time.perf_counter()
    with closing(reader_of(gpu, small, order, steps)) as reader:
        profile = train(gpu, reader, order, steps, seconds=0.002 if is_slow else 0.025)
    fractions = profile.take(time.perf_counter() - started, 0.0)
    assert fractions["data"] > 0.3 if is_slow else fractions["data"] < 0.05
    assert fractions["copy"] < 0.5


def test_copies_are_measured_however_often_lines_are_written(gpu: SimulatedGpu) -> None:
    profile, lines = Profile(gpu.device), []
    for _ in range(12):
        with profile.phase("copy"):
            gpu.compute.submit(lambda: time.sleep(0.002))
        profile.step()
        gpu.compute.synchronize()
        lines.append(profile.take(0.01, 0.0)["copy"])
    assert [call for _, _, call in gpu.calls].count("Event.record") == 4  # two steps are measured
    assert min(lines[1:]) > 0.1
    assert profile.total()["copy"] > 0.1


def test_a_cache_is_written_when_the_gpu_no_longer_uses_its_memory(small: Dataset, gpu: SimulatedGpu) -> None:
    go_on, entry = threading.Event(), small.split("train").shards[0]
    blocks = shards.read(small.root, entry, small.manifest.image_shape, len(small.manifest.classes))
    gpu.compute.submit(go_on.wait)
    train = Cache(small, gpu.device)
    writer = threading.Thread(target=train.put, args=(0, blocks))
    writer.start()
    writer.join(0.2)
    assert not train.contains(0)
    go_on.set()
    writer.join(60)
    assert train.contains(0)


def test_a_stopwatch_does_not_wait_for_the_gpu(gpu: SimulatedGpu) -> None:
    stopwatch, go_on = Stopwatch(on_gpu=True), threading.Event()
    start = stopwatch.mark()
    gpu.compute.submit(go_on.wait)
    stopwatch.add("work", start, stopwatch.mark())
    assert stopwatch.take() == {}
    go_on.set()
    gpu.compute.synchronize()
    assert stopwatch.take()["work"] > 0
    assert stopwatch.take() == {}


def test_the_exchange_of_virtual_ranks_is_measured_on_the_gpu(gpu: SimulatedGpu) -> None:
    clock = _Clock(gpu.device)
    for _ in range(3):  # only the second step is measured
        clock.begin_step()
        gpu.compute.submit(lambda: time.sleep(0.01))
        clock.begin_exchange()
        gpu.compute.submit(lambda: time.sleep(0.03))
        clock.end_exchange()
    assert [call for _, _, call in gpu.calls].count("Event.record") == 3
    gpu.compute.synchronize()
    assert 0.6 < clock.fraction() < 0.9


def test_busy_time_is_measured_on_the_gpu_without_that_in_which_it_waits(gpu: SimulatedGpu) -> None:
    clock = BusyClock(gpu.device, 2)
    for _ in range(3):  # only the second step is measured
        with clock.step(samples=8):
            gpu.compute.submit(lambda: time.sleep(0.02))
            with clock.waiting():
                gpu.compute.submit(lambda: time.sleep(0.2))
    assert [call for _, _, call in gpu.calls].count("Event.record") == 4
    gpu.compute.synchronize()
    busy = clock.take()
    assert busy is not None
    assert 0.02 <= busy.computing < 0.15
    assert (busy.data, busy.samples) == (0.0, 8.0)
    assert clock.take() is None


def test_data_is_also_the_time_in_which_the_gpu_waits_for_images_that_are_decoded(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = build(tmp_path, {"train": [40], "test": [4]}, lanes=1, shards=1).with_image_size(16)
    order, steps = Order(1, 1, 40, 4, seed=1), range(10)  # one round
    write = Decoder._write

    def slowly(*args: Any) -> None:
        time.sleep(0.01)
        write(*args)

    monkeypatch.setattr(Decoder, "_write", slowly)
    monkeypatch.setattr(decoded, "_DECODED_BYTES", 1)
    how = Preprocessing(
        Decoder(1, Decoding()), TrainingTransform(16, 16, None, (1, 1)), EvaluationTransform(16, 16, None)
    )
    with closing(DecodedBatches(index, order, (World(),), steps, 1, how, gpu.device)) as reader:
        reader.ready(0, 60)
        started = time.perf_counter()
        profile = train(gpu, reader, order, steps)
    assert profile.take(time.perf_counter() - started, 0.0)["data"] > 0.6
