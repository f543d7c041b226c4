"""What all parts are given, and how they take samples: in turns, so that a noisy minute hits all contestants."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distrain import config, machine
from distrain.data import shards
from distrain.data.manifest import Dataset
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment
from distrain.training import setup


@dataclass(frozen=True)
class Context:
    """What is measured on, and how often."""

    data: Path
    dataset: Dataset
    work: Path
    """Folder for what parts write; deleted at the end."""
    images: Path | None
    """Folder with train/CLASS/ and test/CLASS/, where there is one."""
    repeats: int
    quick: bool
    device: str
    """cpu or cuda."""
    models: tuple[str, ...]
    recipe: Path
    target: float | None = None
    """Accuracy in percent that the recipe is timed to; None: the plain script's."""
    batches: tuple[int, ...] = (128, 512)
    """Samples of a step, for one process."""

    @property
    def size(self) -> int:
        """Training images that a timed run should see: enough for seconds."""
        return 4_000 if self.quick else 1_000_000 if self.device == "cuda" else 50_000

    @property
    def most_processes(self) -> int:
        """GPUs, or cores that this process may use."""
        return torch.cuda.device_count() if self.device == "cuda" else machine.cores()


def take_turns(part: str, contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """A sample of each contestant, then again: `repeats` samples each."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with closing(tqdm(total=repeats * len(contestants), desc=part, unit="sample", disable=None, leave=False)) as shown:
        for _ in range(repeats):
            for name, measure in contestants.items():
                shown.set_postfix_str(name)
                found[name].append(measure())
                shown.update()
    return found


def rate(work: Callable[[], int], device: str = "cpu") -> float:
    """Images per second of one pass, whose images are counted by `work`."""
    synchronise(device)
    started = time.perf_counter()
    images = work()
    synchronise(device)
    return images / (time.perf_counter() - started)


def synchronise(device: str) -> None:
    """Wait for what a GPU was asked to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def load(dataset: Dataset, split: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images uint8 [N, H, W, C] and labels int64 [N] of a split, in memory; all, unless `most` is given."""
    found, images, labels, held = dataset.manifest, [], [], 0
    for shard in dataset.split(split).shards:
        if most is not None and held >= most:
            break
        for block in shards.read(dataset.root, shard, found.image_shape, len(found.classes)):
            images.append(block.images)
            labels.append(block.labels)
            held += len(block.labels)
    return torch.from_numpy(np.concatenate(images)[:most]), torch.from_numpy(np.concatenate(labels)[:most])


@contextlib.contextmanager
def alone(context: Context) -> Iterator[Runtime]:
    """This process as a run's only one: one thread, and the arithmetic that `distrain train` sets."""
    resolved = config.from_tree({"run": {"dir": str(context.work / "alone"), "device": context.device}})
    environment = Environment()
    with (
        closing(setup.start_watchdog(resolved, environment)) as watchdog,
        setup.start_runtime(resolved, environment, watchdog) as runtime,
    ):
        yield runtime
