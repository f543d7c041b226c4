"""Evaluation: images/s of `distrain.training.evaluation` on test, read from the shards.

The comparison is a bare loop over a tensor on the device, with the same model and the same metrics.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.context import Context, images_per_second, load, single_process, take_turns
from benchmarks.table import Table, ratio
from distrain import models
from distrain.training.augment import normalize
from distrain.training.evaluation import evaluate

BATCH = 512


def measure(context: Context) -> Table:
    """Measure the images/s of both, for every model."""
    dataset, manifest = context.dataset, context.dataset.manifest
    height, width, channels = dataset.image_shape
    rows, ratios = [], []
    with single_process(context) as runtime:
        images, labels = (tensor.to(runtime.device) for tensor in load(dataset, "test"))
        mean, std = (torch.tensor(values, device=runtime.device) for values in (manifest.mean, manifest.std))

        def distrain(model: nn.Module) -> int:
            return evaluate(model, dataset, "test", mean, std, BATCH, runtime).total

        def bare_loop(model: nn.Module) -> int:
            return _bare_loop(model, images, labels, mean, std, len(manifest.classes))

        for name in context.models:
            model = models.build(name, "relu", len(manifest.classes), (channels, height, width))
            model = runtime.prepare_eval_model(model)
            bare_loop(model)  # cuDNN chooses its kernels in the first pass
            contestants = {
                f"{name}: distrain": partial(images_per_second, partial(distrain, model), context.device),
                f"{name}: bare loop in memory": partial(images_per_second, partial(bare_loop, model), context.device),
            }
            pair = list(take_turns("evaluation", "images/s", contestants, context.repeats).values())
            rows += pair
            ratios.append(ratio(*pair))
    largest = min(BATCH, int(dataset.split("test").sizes.max()))
    note = f"distrain's batches are slices of a shard: at most {largest} images here"
    return Table(f"Evaluation on {context.device}, {len(labels):,} images, batches of {BATCH}", rows, ratios, [note])


@torch.no_grad()
def _bare_loop(model: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, classes: int) -> int:
    """Compute the confusion matrix and the loss, and return the number of images."""
    model.eval()
    confusion = torch.zeros(classes**2, dtype=torch.int64, device=images.device)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    for batch, truth in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(normalize(batch, mean, std))
        confusion += torch.bincount(truth * classes + logits.argmax(1), minlength=classes**2)
        loss += F.cross_entropy(logits, truth, reduction="sum")
    return int(confusion.sum())
