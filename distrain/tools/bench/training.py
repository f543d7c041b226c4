"""Training, start and evaluation not included.

- the tutorial: `python -m distrain.tools.bench.plain` (ImageFolder, PIL, a DataLoader with two workers, batch 4,
  torch's own number of threads) beside `distrain train` with the settings of configs/tutorial.yaml, in one process of
  one thread
- a step from shards (data.cache=off), beside a bare loop over a tensor that lies on the device already: the same model,
  optimizer, batch and augmentation, in one thread; the first fifth of the steps is not counted on either side
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain import models
from distrain.config import Augment
from distrain.tools.bench.context import Context, alone, load, rate, take_turns
from distrain.tools.bench.members import write_folders
from distrain.tools.bench.processes import call, steady, step_keys, steps_of, train_command
from distrain.tools.bench.table import Row, Table, ratio
from distrain.training import augment, optim

_TUTORIAL = {
    "data.mean": "[0.5,0.5,0.5]",
    "data.std": "[0.5,0.5,0.5]",
    "train.epochs": "null",
    "train.global_batch_size": 4,
    "train.lr": 0.001,
    "train.schedule": "constant",
    "log.every_steps": 2000,
}
"""configs/tutorial.yaml, which is not part of the installed package."""
_CHANGES = Augment(flip=True)
_PLAIN, _OURS = "tutorial: plain PyTorch script", "tutorial: distrain"


def measure(context: Context) -> Table:
    """Images/s, and the share of a step that waits for data."""
    waits: dict[str, list[float]] = {}
    contestants = dict(_tutorial(context))
    pairs = [(model, batch) for model in context.models for batch in context.batches]
    for model, batch in pairs:
        contestants |= _pair(context, model, batch, waits)
    found = take_turns("training", contestants, context.repeats)
    rows = {name: Row(name, "images/s", samples) for name, samples in found.items()}
    waiting = [Row(f"{name}: waits for data", "%", samples) for name, samples in waits.items()]
    ratios = [ratio(rows[_OURS], rows[_PLAIN])]
    ratios += [ratio(rows[_name(*pair, True)], rows[_name(*pair, False)]) for pair in pairs]
    return Table(f"Training on {context.device}, one process", [*rows.values(), *waiting], ratios)


def _name(model: str, batch: int, ours: bool) -> str:
    return f"{model}, batch {batch}: {'distrain from shards' if ours else 'bare loop in memory'}"


def _tutorial(context: Context) -> Mapping[str, Callable[[], float]]:
    steps = 200 if context.quick else 5000
    most = 2_000 if context.quick else 20_000
    folder = context.images or write_folders(context.dataset, context.work / "files", most)
    run = context.work / "tutorial"

    def plain() -> float:
        asked = [sys.executable, "-m", "distrain.tools.bench.plain", str(folder), "--steps", str(steps)]
        return float(json.loads(call([*asked, "--device", context.device], threads=None))["images_per_second"])

    def ours() -> float:
        shutil.rmtree(run, ignore_errors=True)
        call(train_command(context, run, {**_TUTORIAL, "train.max_steps": steps}))
        return float(json.loads((run / "result.json").read_text())["images_per_second"])

    return {_PLAIN: plain, _OURS: ours}


def _pair(context: Context, model: str, batch: int, waits: dict[str, list[float]]) -> Mapping[str, Callable[[], float]]:
    name = _name(model, batch, True)

    def ours() -> float:
        found = _trained(context, context.work / "step", model, batch)
        waits.setdefault(name, []).append(100 * found[1])
        return found[0]

    return {name: ours, _name(model, batch, False): lambda: _bare(context, model, batch)}


def _trained(context: Context, run: Path, model: str, batch: int) -> tuple[float, float]:
    shutil.rmtree(run, ignore_errors=True)
    call(train_command(context, run, step_keys(context, model, batch)))
    found = steady(run)
    return found.rate, found.waits


def _bare(context: Context, model: str, batch: int) -> float:
    """Images/s of the shortest loop that trains the same."""
    images, labels = load(context.dataset, "train")
    steps = steps_of(context, batch)
    with alone(context) as runtime:
        loop = _Loop(context, model, batch, images.to(runtime.device), labels.to(runtime.device))
        loop.train(steps // 5)
        return rate(lambda: loop.train(steps - steps // 5), context.device)


class _Loop:
    def __init__(self, context: Context, model: str, batch: int, images: Tensor, labels: Tensor) -> None:
        found, self._batch = context.dataset.manifest, batch
        height, width, channels = found.image_shape
        self._images, self._labels, self._blank = images, labels, images[0, 0, 0]
        self._module = models.build(model, "relu", len(found.classes), (channels, height, width)).to(images.device)
        if images.is_cuda:
            self._module.to(memory_format=torch.channels_last)
        self._mean, self._std = (torch.tensor(values, device=images.device) for values in (found.mean, found.std))
        self._optimizer = optim.build("sgd", self._module.parameters(), 0.01, 0.9, True, (0.9, 0.999), 1e-3)

    def train(self, steps: int) -> int:
        """Images trained in so many steps."""
        for _ in range(steps):
            # Drawn with replacement: as much work as a stretch of a permutation, and no epochs to keep.
            index = torch.randint(len(self._images), (self._batch,), device=self._images.device)
            words = torch.randint(2**62, (self._batch, 2), device=self._images.device)
            images = augment.augment(self._images[index], words, _CHANGES, self._blank)
            logits = self._module(augment.normalize(images, self._mean, self._std))
            (F.cross_entropy(logits, self._labels[index], reduction="sum") / self._batch).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return steps * self._batch
