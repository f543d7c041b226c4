"""The context of every part: its settings, samples taken in turns, and the data set in memory."""

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

from benchmarks.table import Row
from distrain import config, machine
from distrain.data import shards
from distrain.data.manifest import Dataset
from distrain.distributed.runtime import Runtime
from distrain.environment import Environment
from distrain.training import setup


@dataclass(frozen=True)
class Context:
    """The settings that all parts share."""

    dataset: Dataset
    work: Path
    """Folder for temporary files of the parts."""
    out: Path
    """Folder for data that later runs use again."""
    images: Path | None
    """Folder with image files in train/CLASS/ and test/CLASS/; None: parts that need one write it."""
    repeats: int
    quick: bool
    device: str
    """The device: cpu or cuda."""
    models: tuple[str, ...]
    recipe: Path
    """Configuration that the parts accuracy and launches train."""
    precision: str = "fp32"
    """Precision of the timed runs: `train.precision`."""
    target: float | None = None
    """Accuracy in percent that the recipe is timed to; None: the plain script's."""
    batches: tuple[int, ...] = (128, 512)
    """Batch sizes of one process."""
    images_of_timed_run: int | None = None
    """Number of images that a timed run trains on; None: enough for some seconds."""
    photos: int = 2_000
    """Number of photos that the part decoding generates."""
    loaders: tuple[str, ...] | None = None
    """Names of the loaders of the part decoding; None: all that are installed."""

    @property
    def timed_images(self) -> int:
        """Number of images that a timed run trains on."""
        if self.images_of_timed_run is not None:
            return self.images_of_timed_run
        return 4_000 if self.quick else 500_000 if self.device == "cuda" else 50_000

    @property
    def photo_epochs(self) -> int:
        """Number of times that the part decoding reads all photos for one sample."""
        return 1 if self.quick else 3

    @property
    def max_processes(self) -> int:
        """Number of GPUs, or of cores that this process may use."""
        return torch.cuda.device_count() if self.device == "cuda" else machine.cores()


def take_turns(part: str, unit: str, contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Row]:
    """Take a sample of each contestant in turn, `repeats` times, so that noise of the machine affects all of them."""
    rows = {name: Row(name, unit, []) for name in contestants}
    with closing(tqdm(total=repeats * len(rows), desc=part, unit="sample", disable=None, leave=False)) as progress:
        for _ in range(repeats):
            for name, measure in contestants.items():
                progress.set_postfix_str(name)
                rows[name].samples.append(measure())
                progress.update()
    return rows


def images_per_second(work: Callable[[], int], device: str = "cpu") -> float:
    """Time one call of `work`, which returns the number of images that it processed."""
    _synchronize(device)
    started = time.perf_counter()
    images = work()
    _synchronize(device)
    return images / (time.perf_counter() - started)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def load(dataset: Dataset, split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Load the images (uint8 [N, H, W, C]) and labels (int64 [N]) of a split, or the first `limit` of them."""
    manifest, images, labels, count = dataset.manifest, [], [], 0
    for shard in dataset.blocks(split).shards:
        if limit is not None and count >= limit:
            break
        for block in shards.read(dataset.root, shard, dataset.image_shape, len(manifest.classes)):
            images.append(block.images)
            labels.append(block.labels)
            count += len(block.labels)
    return torch.from_numpy(np.concatenate(images)[:limit]), torch.from_numpy(np.concatenate(labels)[:limit])


@contextlib.contextmanager
def single_process(context: Context, precision: str = "fp32") -> Iterator[Runtime]:
    """Set up this process as the only one of a run: one thread, and the arithmetic settings of `distrain train`."""
    resolved = config.from_tree(
        {
            "run": {"dir": str(context.work / "alone"), "device": context.device},
            "train": {"precision": precision},
        }
    )
    environment = Environment()
    with (
        closing(setup.start_watchdog(resolved, environment)) as watchdog,
        setup.start_runtime(resolved, environment, watchdog) as runtime,
    ):
        yield runtime
