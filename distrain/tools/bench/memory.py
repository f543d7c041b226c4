"""What reading needs, whatever the size of the data: memory, time an image, and time to plan a step.

- memory: how far the resident memory of a fresh process grows while it reads an epoch, without a cache, beside the
  buffers, lanes / processes × samples of a shard × bytes of a sample × (1 + read_ahead). What lies above them is a
  shard as it is parsed, a batch that is joined from two rounds, code that is loaded at its first use, the allocator.
- time: an epoch of 8×8 images, of 10^4 to 10^6 of them
- plan: `Order.owned_before`, `positions` and `partners` for one rank of W, of 32 samples each
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distrain import files
from distrain.data import manifest, shards, stream
from distrain.data.manifest import Dataset, Manifest, Split
from distrain.data.order import Order, World
from distrain.tools.bench.context import Context, take_turns
from distrain.tools.bench.processes import call
from distrain.tools.bench.reader import BATCH, order_of
from distrain.tools.bench.table import Row, Table, ratio

_ROUNDS = 3
"""Of the smallest data set: with fewer, read-ahead would not fill its buffers."""


_TIMED = (10**4, 10**5, 10**6)
"""Images of 8×8."""


class _Case(NamedTuple):
    """Shards of `mib` MiB of 32×32 images."""

    rounds: int
    lanes: int
    mib: int
    processes: int

    def __str__(self) -> str:
        whole = self.rounds * self.lanes * self.mib
        return f"data {whole} MiB, shards {self.mib} MiB, lanes {self.lanes}, processes {self.processes}"


def measure(context: Context) -> Table:
    """MiB, and microseconds."""
    cases, bounds = _cases(context.quick), {}
    contestants: dict[str, Callable[[], float]] = {}
    for case in cases:
        dataset = write(
            context.work / "memory" / "-".join(map(str, case[:3])),
            case.rounds * case.lanes * case.mib * 2**20 // 3072,
            32,
            case.rounds * case.lanes,
            case.lanes,
        )
        world = World(0, case.processes)
        bounds[str(case)] = stream.memory(dataset, order_of(dataset, BATCH), world, read_ahead=1) / 2**20
        contestants[str(case)] = functools.partial(_grown, dataset, case.processes)
    times = _times(context)
    plans = {f"plan of a step, 1 of {size:,} processes": functools.partial(_plan, size) for size in (1, 64, 4096)}
    found = take_turns("memory", {**contestants, **times, **plans}, context.repeats)
    grown = [Row(name, "MiB", found[name]) for name in contestants]
    bound = [Row(f"its buffers: {name}", "MiB", [bounds[name]] * context.repeats) for name in contestants]
    rows = [row for pair in zip(grown, bound, strict=True) for row in pair]
    rows += [Row(name, "µs/image", found[name]) for name in times]
    rows += [Row(name, "µs", found[name]) for name in plans]
    ratios = [ratio(row, grown[0]) for row in grown[1:]]
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


def _times(context: Context) -> dict[str, Callable[[], float]]:
    sizes = _TIMED[:2] if context.quick else _TIMED
    made = {size: write(context.work / "times" / str(size), size, 8, 64, 64) for size in sizes}
    return {
        f"reading {size:,} images of 8×8": functools.partial(_microseconds, dataset) for size, dataset in made.items()
    }


def write(folder: Path, samples: int, side: int, number: int, lanes: int) -> Dataset:
    """A data set of noise, straight as shards; one that is there already is taken as it is."""
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
    made = Manifest(
        format="distrain-blocks",
        version=1,
        source={"kind": "noise"},
        classes=[str(label) for label in range(10)],
        image_shape=[side, side, 3],
        mean=[0.5] * 3,
        std=[0.3] * 3,
        splits={"train": Split(samples=samples, lanes=lanes, shards=entries)},
    )
    files.replace(folder / manifest.NAME, manifest.to_json(made))
    return manifest.read(folder)


def _reader(dataset: Dataset, processes: int) -> dict[str, float]:
    said = call([sys.executable, "-m", "distrain.tools.bench.reader", str(dataset.root), str(processes)])
    found: dict[str, float] = json.loads(said)
    return found


def _grown(dataset: Dataset, processes: int) -> float:
    return _reader(dataset, processes)["grown_mib"]


def _microseconds(dataset: Dataset) -> float:
    found = _reader(dataset, 1)
    return 1e6 * found["seconds"] / found["images"]


def _plan(size: int) -> float:
    """Microseconds of a step, the mean of some."""
    order, world, steps = Order(size, size, 10_000, 32 * size, 0), World(size - 1, size), 20
    started = time.perf_counter()
    for step in range(steps):
        order.owned_before(step * order.global_batch_size, world)
        order.positions(step, world)
        order.partners(step, world)
    return 1e6 * (time.perf_counter() - started) / steps
