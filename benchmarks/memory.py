"""The cost of reading as the data grows: memory, time per image, and time to plan a step.

- memory: growth of the peak resident memory of a new process that reads one epoch without a cache; compared with the
  size of its buffers, lanes / processes × samples of a shard × (bytes of an image + 40) × (1 + read_ahead); the 40
  bytes are label, id, position and random bits. The rest is one shard while it is parsed, a batch that spans two
  rounds, modules imported on first use, and the allocator's overhead.
- time: an epoch of 8×8 images, from 10⁴ to 10⁶ images
- plan: `Order.owned_before` of each step and `Order.positions` of each round, for one of W processes with 32 samples
  each in a step
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.commands import call_program
from benchmarks.context import Context, take_turns
from benchmarks.reader import BATCH, training_order
from benchmarks.table import Row, Table, ratio
from distrain import files
from distrain.data import manifest, rounds, shards
from distrain.data.manifest import Dataset, Manifest, Split
from distrain.data.order import Order
from distrain.environment import World

_ROUNDS = 3
"""Rounds of the smallest data set; with fewer, read-ahead would not fill its buffers."""

_TIMED = (10**4, 10**5, 10**6)
"""Numbers of 8×8 images."""

_PLANNED = (1, 64, 4096)
"""Numbers of processes."""


class _Case(NamedTuple):
    """A data set of 32×32 images in shards of `mib` MiB, and the number of processes that read it."""

    rounds: int
    lanes: int
    mib: int
    processes: int

    def __str__(self) -> str:
        total = self.rounds * self.lanes * self.mib
        return f"data {total} MiB, shards {self.mib} MiB, lanes {self.lanes}, processes {self.processes}"


def measure(context: Context) -> Table:
    """Measure MiB, microseconds per image and microseconds per step."""
    cases = _cases(context.quick)
    datasets = [_write_case(context.work / "memory", case) for case in cases]
    grown = take_turns(
        "memory",
        "MiB",
        {str(case): partial(_grown_mib, data, case.processes) for case, data in zip(cases, datasets, strict=True)},
        context.repeats,
    )
    rows = []
    for case, dataset in zip(cases, datasets, strict=True):
        world, order = World(0, case.processes), training_order(dataset, BATCH)
        buffers = rounds.memory(dataset, order, (world,), read_ahead=1) / 2**20
        rows += [grown[str(case)], Row(f"its buffers: {case}", "MiB", [buffers] * context.repeats)]

    times = {}
    for images in _TIMED[:2] if context.quick else _TIMED:
        noise = write_noise(context.work / "times" / str(images), images, side=8, number=64, lanes=64)
        times[f"reading {images:,} images of 8×8"] = partial(_microseconds_per_image, noise)
    plans = {f"plan of a step, 1 of {size:,} processes": partial(_plan_microseconds, size) for size in _PLANNED}
    rows += take_turns("time per image", "µs/image", times, context.repeats).values()
    rows += take_turns("plan", "µs", plans, context.repeats).values()
    first, *others = grown.values()
    ratios = [ratio(row, first) for row in others]
    return Table("Memory of reading, and time by the size of the data", rows, ratios)


def _cases(quick: bool) -> list[_Case]:
    mib = 1 if quick else 4
    return [
        _Case(_ROUNDS, 8, mib, 1),
        _Case(4 * _ROUNDS, 8, mib, 1),
        _Case(_ROUNDS, 8, mib, 2),
        _Case(2 * _ROUNDS, 4, mib, 1),
        _Case(_ROUNDS, 8, 2 * mib, 1),
    ]


def _write_case(folder: Path, case: _Case) -> Dataset:
    number, side = case.rounds * case.lanes, 32
    samples = number * case.mib * 2**20 // (side * side * 3)
    return write_noise(folder / "-".join(map(str, case[:3])), samples, side, number, case.lanes)


def write_noise(folder: Path, samples: int, side: int, number: int, lanes: int) -> Dataset:
    """Write a data set of random images into `number` shards, unless the folder has one already."""
    if (folder / manifest.NAME).exists():
        return manifest.read(folder)
    (folder / "train").mkdir(parents=True)
    sizes = [samples // number + (index < samples % number) for index in range(number)]
    noise = np.random.default_rng(0).integers(0, 256, (max(sizes), side, side, 3), np.uint8)
    entries = []
    for index, size in enumerate(sizes):
        name = f"train/{index:05d}.tar"
        ids = np.arange(size) + sum(sizes[:index])
        shards.write(folder / name, shards.Block(noise[:size], ids % 10, ids))
        entries.append(shards.describe(folder / name, name, size))
    content = Manifest(
        format="distrain-blocks",
        version=1,
        source={"kind": "noise"},
        classes=[str(label) for label in range(10)],
        image_shape=[side, side, 3],
        mean=[0.5] * 3,
        std=[0.3] * 3,
        splits={"train": Split(samples=samples, lanes=lanes, shards=entries)},
    )
    files.replace(folder / manifest.NAME, manifest.to_json(content))
    return manifest.read(folder)


def _grown_mib(dataset: Dataset, processes: int) -> float:
    return float(call_program("reader", dataset.root, processes)["grown_mib"])


def _microseconds_per_image(dataset: Dataset) -> float:
    result = call_program("reader", dataset.root, 1)
    return float(1e6 * result["seconds"] / result["images"])


def _plan_microseconds(size: int) -> float:
    """Return the mean time to plan a step."""
    order, world, steps = Order(size, size, 3_200, 32 * size, 0), World(size - 1, size), 100  # one round
    started = time.perf_counter()
    order.positions(0, world)
    for step in range(steps):
        order.owned_before(step * order.global_batch_size, world)
        order.owned_before((step + 1) * order.global_batch_size, world)
    return 1e6 * (time.perf_counter() - started) / steps
