"""One optimizer step: a rank's share of the global batch onto the device, augmented, forward, backward, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.data.order import mixup_weight
from distrain.data.stream import Batch, TrainingBatches
from distrain.training import augment
from distrain.training.job import Job


class Feed:
    """Batches on the device. On a GPU the next one is copied, on a stream of its own, while a step is computed."""

    def __init__(self, batches: TrainingBatches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None

    def take(self) -> Batch:
        """The next step's."""
        batch, self._ahead = self._ahead or self._copied(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (batch.images, batch.labels, batch.random_bits):
                tensor.record_stream(current)
        return batch

    def copy_ahead(self) -> None:
        """Begin to copy the batch after; its data must be there already."""
        if self._stream is not None and self._ahead is None:
            self._ahead = self._copied()

    def _copied(self) -> Batch:
        batch = next(self._batches)
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            images, labels, words = (
                tensor.to(self._device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.random_bits)
            )
        return Batch(images, labels, batch.ids, words)


@dataclass(frozen=True)
class _Share:
    """Augmented images uint8 [n, H, W, C] and labels int64 [n]; with mixup each one's partner int64 [n] and how much of
    itself it keeps.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor | None
    kept: float


def train_step(job: Job, batch: Batch) -> Tensor:
    """One optimizer step on a rank's share of the global batch.

    DDP takes the mean of the ranks' gradients; each rank's loss is the sum over its samples times W / G, so the
    gradient is the global batch's mean whatever the shares and micro-batches. A share may be empty.

    Returns:
        The sum of this rank's losses, fp64, not yet synchronised with the device.
    """
    config, rt = job.config.train, job.runtime
    for group in job.optimizer.param_groups:
        group["lr"] = job.learning_rate(job.state.step)
    rt.seed(job.layer_seed())  # layers that draw random numbers draw the same after a resume
    scale = rt.world.size / config.global_batch_size
    with job.profile.phase("copy"):
        share = _share(job, batch)
    losses: list[Tensor] = []
    # As many passes on every rank, or those that share BatchNorm's statistics would wait for each other.
    samples, passes = len(share.labels), job.passes
    for number in range(passes):
        here = slice(samples * number // passes, samples * (number + 1) // passes)
        with rt.accumulating(job.ddp, last=number == passes - 1):
            with rt.peers():
                logits = job.ddp(_inputs(job, share, here))
            loss = _loss(share, here, logits, config.label_smoothing)
            rt.backward(loss * scale)
        losses.append(loss.detach().double())
    if config.clip_norm is not None:
        rt.clip(job.ddp, config.clip_norm)
    rt.step(job.optimizer)
    if job.average is not None:
        job.average.update_parameters(job.module)
    return losses[0] if passes == 1 else torch.stack(losses).sum()


def _share(job: Job, batch: Batch) -> _Share:
    settings, order = job.config.augment, job.order
    images = augment.augment(batch.images, batch.random_bits, settings, job.blank)
    if not settings.mixup:
        return _Share(images, batch.labels, None, 1.0)
    partners = torch.from_numpy(order.partners(job.state.step % order.steps_per_epoch, job.runtime.world))
    kept = mixup_weight(order.seed, job.state.step, settings.mixup)
    return _Share(images, batch.labels, partners.to(job.runtime.device, non_blocking=True), kept)


def _inputs(job: Job, share: _Share, here: slice) -> Tensor:
    own = job.normalize(share.images[here])
    if share.partners is None:
        return own
    return own.lerp(job.normalize(share.images[share.partners[here]]), 1 - share.kept)


def _loss(share: _Share, here: slice, logits: Tensor, smoothing: float) -> Tensor:
    """The sum over the samples; under mixup after Zhang et al., "mixup" (2018)."""
    loss = F.cross_entropy(logits, share.labels[here], reduction="sum", label_smoothing=smoothing)
    if share.partners is None:
        return loss
    others = share.labels[share.partners[here]]
    other = F.cross_entropy(logits, others, reduction="sum", label_smoothing=smoothing)
    return loss * share.kept + other * (1 - share.kept)
