"""Images/s of evaluation on test, read from the shards and counted exactly, beside a bare loop over a tensor that lies
on the device already: the same model, batches and counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain import models
from distrain.tools.bench.context import Context, alone, load, rate, take_turns
from distrain.tools.bench.table import Row, Table, ratio
from distrain.training.augment import normalize
from distrain.training.evaluation import evaluate

BATCH = 512


def measure(context: Context) -> Table:
    """Images/s of both, for every model."""
    dataset = context.dataset
    found = dataset.manifest
    height, width, channels = found.image_shape
    rows, ratios = [], []
    with alone(context) as runtime:
        images, labels = (tensor.to(runtime.device) for tensor in load(dataset, "test"))
        mean, std = (torch.tensor(values, device=runtime.device) for values in (found.mean, found.std))
        for name in context.models:
            model = models.build(name, "relu", len(found.classes), (channels, height, width))
            model = runtime.prepare_eval_model(model)

            def ours(model: nn.Module = model) -> int:
                return evaluate(model, dataset, "test", mean, std, BATCH, runtime).total

            def bare(model: nn.Module = model) -> int:
                return _bare(model, images, labels, mean, std, len(found.classes))

            bare()  # the first pass chooses kernels
            samples = take_turns(
                "evaluation",
                {
                    f"{name}: distrain": lambda ours=ours: rate(ours, context.device),  # type: ignore[misc]
                    f"{name}: bare loop in memory": lambda bare=bare: rate(bare, context.device),  # type: ignore[misc]
                },
                context.repeats,
            )
            both = [Row(key, "images/s", values) for key, values in samples.items()]
            rows += both
            ratios.append(ratio(*both))
    largest = min(BATCH, max(shard.samples for shard in dataset.split("test").shards))
    note = f"a batch of distrain's is a slice of a shard: {largest} images at most here"
    return Table(f"Evaluation on {context.device}, {len(labels):,} images, batches of {BATCH}", rows, ratios, [note])


@torch.no_grad()
def _bare(model: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, classes: int) -> int:
    """Images that were scored."""
    model.eval()
    confusion = torch.zeros(classes**2, dtype=torch.int64, device=images.device)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    for batch, truth in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(normalize(batch, mean, std))
        confusion += torch.bincount(truth * classes + logits.argmax(1), minlength=classes**2)
        loss += F.cross_entropy(logits, truth, reduction="sum")
    return int(confusion.sum())
