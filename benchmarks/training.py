"""Training: images/s of one process. Start-up and evaluation are not included.

Steps from shards (data.cache=off), and a bare loop over a tensor on the device with the same model, optimizer, batch,
precision and augmentation; both with one thread, and without the first fifth of the steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.commands import speed_after_warm_up, timed_keys, timed_steps, train
from benchmarks.context import Context, images_per_second, load, single_process, take_turns
from benchmarks.table import Row, Table, ratio
from distrain import models
from distrain.config import Augment, Train
from distrain.distributed.numerics import autocast
from distrain.training import augment, optim

_AUGMENTATION = Augment(flip=True)


def measure(context: Context) -> Table:
    """Measure images/s, and the percentage of the time that a step waits for data."""
    contestants: dict[str, Callable[[], float]] = {}
    pairs: list[tuple[str, str]] = []
    waiting: dict[str, list[float]] = {}
    for model in context.models:
        for batch in context.batches:
            steps = _steps(context, model, batch, waiting)
            contestants |= steps
            pairs.append(tuple(steps))  # type: ignore[arg-type]
    rows = take_turns("training", "images/s", contestants, context.repeats)
    return Table(
        f"Training on {context.device} in {context.precision}, one process",
        [*rows.values(), *(Row(f"{name}: waits for data", "%", samples) for name, samples in waiting.items())],
        [ratio(rows[name], rows[baseline]) for name, baseline in pairs],
    )


def _steps(context: Context, model: str, batch: int, waiting: dict[str, list[float]]) -> dict[str, Callable[[], float]]:
    """Return distrain and the bare loop, in this order; distrain adds its waiting times to `waiting`."""
    name, run = f"{model}, batch {batch}: distrain from shards", context.work / "steps"

    def distrain() -> float:
        train(context, run, timed_keys(context, model, batch))
        speed = speed_after_warm_up(run)
        waiting.setdefault(name, []).append(100 * speed.waiting)
        return speed.images_per_second

    def bare_loop() -> float:
        images, labels = load(context.dataset, "train")
        steps = timed_steps(context, batch)
        with single_process(context, context.precision) as runtime:
            loop = _BareLoop(context, model, batch, images.to(runtime.device), labels.to(runtime.device))
            loop.train(steps // 5)
            return images_per_second(lambda: loop.train(steps - steps // 5), context.device)

    return {name: distrain, f"{model}, batch {batch}: bare loop in memory": bare_loop}


class _BareLoop:
    """The shortest loop that trains the same model in the same way, from tensors on the device."""

    def __init__(self, context: Context, model: str, batch: int, images: Tensor, labels: Tensor) -> None:
        manifest, self._batch = context.dataset.manifest, batch
        height, width, channels = context.dataset.image_shape
        self._images, self._labels, self._blank = images, labels, images[0, 0, 0]
        self._model = models.build(model, "relu", len(manifest.classes), (channels, height, width)).to(images.device)
        if images.is_cuda:
            self._model.to(memory_format=torch.channels_last)
        self._mean, self._std = (torch.tensor(v, device=images.device) for v in (manifest.mean, manifest.std))
        self._autocast = autocast(images.device, context.precision)
        self._optimizer = optim.build(Train(lr=0.01, nesterov=True, weight_decay=1e-3), self._model)

    def train(self, steps: int) -> int:
        """Train for `steps` steps, and return the number of images."""
        for _ in range(steps):
            # Drawn with replacement: as much work as a slice of a permutation, without counting epochs.
            index = torch.randint(len(self._images), (self._batch,), device=self._images.device)
            random_bits = torch.randint(2**62, (self._batch, 2), device=self._images.device)
            images = augment.augment(self._images[index], random_bits, _AUGMENTATION, self._blank)
            with self._autocast:
                logits = self._model(augment.normalize(images, self._mean, self._std))
            (F.cross_entropy(logits, self._labels[index], reduction="sum") / self._batch).backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return steps * self._batch
