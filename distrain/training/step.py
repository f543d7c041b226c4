"""One optimizer step: the local batch augmented, forward and backward passes, exchange of gradients, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.data.order import mixup_weight
from distrain.data.rounds import Batch
from distrain.environment import World
from distrain.training import augment, optim
from distrain.training.job import Job
from distrain.training.profiling import Profile


@dataclass(frozen=True)
class _LocalBatch:
    """The augmented samples of this process in a step.

    Attributes:
        images: uint8 [n, H, W, C].
        labels: int64 [n].
        partners: with mixup, index of the sample that each is mixed with: int64 [n].
        weight: with mixup, the fraction of itself that each keeps.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor | None
    weight: float


class TrainingStep:
    """Trains one step from the local batches of this process.

    The loss is the sum over the samples times a factor (`DistributedModel.loss_scale`) with which the exchanged
    gradient is the mean over the global batch, whatever the sizes of local batches and micro-batches. A local batch may
    be empty.
    """

    def __init__(self, job: Job, profile: Profile) -> None:
        self._job, self._profile = job, profile

    def __call__(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """Train on the local batches of a step of the run, one for each virtual rank.

        Returns:
            The sum of the losses of each virtual rank: fp64 [v], on the device. Reading them waits for the device.
        """
        job, model = self._job, self._job.model
        optim.set_learning_rate(model.optimizer, job.learning_rate(step), job.config.train.lr)
        with job.runtime.collectives.fail_alone():  # functions of the user are checked in each step
            losses = [self._train(step, rank, batch) for rank, batch in zip(job.virtual_ranks, batches, strict=True)]
        model.distributed.exchange()
        if job.config.train.clip_norm is not None:
            model.distributed.clip_norm(job.config.train.clip_norm)
        job.runtime.update(model.optimizer)
        if model.ema is not None:
            model.ema.update()
        return torch.stack(losses)

    def _train(self, step: int, rank: World, batch: Batch) -> Tensor:
        """Run the passes of a virtual rank; return the sum of its losses."""
        job = self._job
        seed = job.layer_seed(step, rank)
        if job.config.train.virtual_ranks is None:
            job.runtime.seed(seed)
        else:
            job.runtime.seed_all(seed)
        with self._profile.phase("copy"):
            local = self._augment(step, rank, batch)
        with job.model.distributed.virtual_rank(rank):
            losses = self._forward_backward(local)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _augment(self, step: int, rank: World, batch: Batch) -> _LocalBatch:
        job, order, settings = self._job, self._job.order, self._job.config.augment
        images = job.augment(batch.images, batch.random_bits)
        if not settings.mixup:
            return _LocalBatch(images, batch.labels, None, 1.0)
        partners = augment.mixup_partners(len(images), len(order.owned_lanes(rank)), images.device)
        return _LocalBatch(images, batch.labels, partners, mixup_weight(order.seed, step, settings.mixup))

    def _forward_backward(self, local: _LocalBatch) -> list[Tensor]:
        """Run forward and backward over the micro-batches.

        Under DDP every process runs the same number of them, because BatchNorm computes its statistics with
        collectives.
        """
        job, distributed = self._job, self._job.model.distributed
        scale = distributed.loss_scale
        samples, number = len(local.labels), job.accumulation_steps
        losses: list[Tensor] = []
        for index in range(number):
            part = slice(samples * index // number, samples * (index + 1) // number)
            if part.start == part.stop and not distributed.runs_empty:
                continue
            with distributed.micro_batch(last=index == number - 1):
                logits = distributed.forward(self._inputs(local, part))
                loss = self._loss(local, part, logits)
                distributed.backward(loss * scale)
            losses.append(loss.detach().double())
        return losses or [torch.zeros((), dtype=torch.float64, device=job.runtime.device)]

    def _inputs(self, local: _LocalBatch, part: slice) -> Tensor:
        normalize = self._job.normalize
        inputs = normalize(local.images[part])
        if local.partners is None:
            return inputs
        return inputs.lerp(normalize(local.images[local.partners[part]]), 1 - local.weight)

    def _loss(self, local: _LocalBatch, part: slice, logits: Tensor) -> Tensor:
        """Return the loss summed over the samples; with mixup after Zhang et al., "mixup" (2018)."""
        loss = self._sum_of_losses(logits, local.labels[part])
        if local.partners is None:
            return loss
        partner_loss = self._sum_of_losses(logits, local.labels[local.partners[part]])
        return loss * local.weight + partner_loss * (1 - local.weight)

    def _sum_of_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        job = self._job
        if job.functions.loss is not None:
            return job.functions.loss(logits, labels)
        smoothing = job.config.train.label_smoothing
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
