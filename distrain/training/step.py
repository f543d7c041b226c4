"""One optimizer step: the local batch augmented, forward and backward passes, exchange of gradients, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.data.rounds import Batch
from distrain.environment import World
from distrain.training import augment, mixing, optim
from distrain.training.job import Job
from distrain.training.meters import StepResult
from distrain.training.profiling import Profile


@dataclass(frozen=True)
class _LocalBatch:
    """The augmented samples of this process in a step.

    Attributes:
        images: uint8 [n, H, W, C].
        labels: int64 [n].
        partners: index of the sample that each is mixed with: int64 [n]; None: they are not mixed.
        weight: of a sample's own label, if they are mixed.
        needs_blending: whether images still have to be mixed, with the same weight (mixup); with CutMix they are mixed.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor | None
    weight: float
    needs_blending: bool


class TrainingStep:
    """Trains one step from the local batches of this process.

    The loss is the sum over the samples times a factor (`DistributedModel.loss_scale`) with which the exchanged
    gradient is the mean over the global batch, whatever the sizes of local batches and micro-batches. A local batch may
    be empty.
    """

    def __init__(self, job: Job, profile: Profile) -> None:
        self._job, self._profile = job, profile
        self._mixes_labels = job.config.augment.mixes_labels

    def __call__(self, step: int, batches: Sequence[Batch], with_norm: bool = False) -> StepResult:
        """Train on the local batches of a step of the run, one for each virtual rank.

        Args:
            step: counted from 0.
            batches: the local batches.
            with_norm: whether the norm of the gradient is needed; clipping computes it in any case.
        """
        job, model = self._job, self._job.model
        optim.set_learning_rate(model.optimizer, job.learning_rate(step), job.config.train.lr)
        with model.distributed.busy.step(sum(len(batch.labels) for batch in batches)):
            return self._run(step, batches, with_norm)

    def _run(self, step: int, batches: Sequence[Batch], with_norm: bool) -> StepResult:
        job, model = self._job, self._job.model
        with job.runtime.collectives.fail_alone():  # functions of the user are checked in each step
            sums = [self._train(step, rank, batch) for rank, batch in zip(job.virtual_ranks, batches, strict=True)]
        model.distributed.exchange()
        norm = None
        if job.config.train.clip_norm is not None:
            norm = model.distributed.clip_norm(job.config.train.clip_norm)
        elif with_norm:
            norm = model.distributed.grad_norm()
        job.runtime.update(model.optimizer)
        if model.ema is not None:
            model.ema.update()
        return StepResult(torch.stack([each for of_rank in sums for each in of_rank]).view(len(sums), -1), norm)

    def _train(self, step: int, rank: World, batch: Batch) -> list[Tensor]:
        """Run the passes of a virtual rank; return the sums over its samples: see `StepResult`."""
        job = self._job
        seed = job.layer_seed(step, rank)
        if job.config.train.virtual_ranks is None:
            job.runtime.seed(seed)
        else:
            job.runtime.seed_all(seed)
        with self._profile.phase("copy"):
            local = self._augment(step, rank, batch)
        with job.model.distributed.virtual_rank(rank):
            sums = self._forward_backward(local)
        return sums[0] if len(sums) == 1 else [torch.stack(each).sum() for each in zip(*sums, strict=True)]

    def _augment(self, step: int, rank: World, batch: Batch) -> _LocalBatch:
        job, order, settings = self._job, self._job.order, self._job.config.augment
        images = job.augment(batch.images, batch.random_bits)
        how = mixing.draw(settings, order.seed, step, *images.shape[1:3])
        if how is None:
            return _LocalBatch(images, batch.labels, None, 1.0, False)
        partners = augment.mixup_partners(len(images), len(order.owned_lanes(rank)), images.device)
        if how.box is not None:
            images = mixing.paste(images, images[partners], how.box)
        return _LocalBatch(images, batch.labels, partners, how.weight, how.box is None)

    def _forward_backward(self, local: _LocalBatch) -> list[list[Tensor]]:
        """Run forward and backward over the micro-batches; return the sums over the samples of each.

        Under DDP every process runs the same number of them, because BatchNorm computes its statistics with
        collectives.
        """
        job, distributed = self._job, self._job.model.distributed
        scale = distributed.loss_scale
        samples, number = len(local.labels), job.accumulation_steps
        sums: list[list[Tensor]] = []
        for index in range(number):
            part = slice(samples * index // number, samples * (index + 1) // number)
            if part.start == part.stop and not distributed.runs_empty:
                continue
            with distributed.micro_batch(last=index == number - 1):
                logits = distributed.forward(self._inputs(local, part))
                loss = self._loss(local, part, logits)
                correct = [] if self._mixes_labels else [_correct(logits.detach(), local.labels[part])]
                distributed.backward(loss * scale)
            sums.append([loss.detach().double(), *correct])
        if not sums:
            zero = torch.zeros((), dtype=torch.float64, device=job.runtime.device)
            sums.append([zero] if self._mixes_labels else [zero, zero])
        return sums

    def _inputs(self, local: _LocalBatch, part: slice) -> Tensor:
        normalize = self._job.normalize
        inputs = normalize(local.images[part])
        if local.partners is None or not local.needs_blending:
            return inputs
        # In place: the memory layout is the same in all steps, and so is the code that is compiled for it.
        return inputs.lerp_(normalize(local.images[local.partners[part]]), 1 - local.weight)

    def _loss(self, local: _LocalBatch, part: slice, logits: Tensor) -> Tensor:
        """Return the loss summed over the samples; of mixed ones after Zhang et al., "mixup" (2018)."""
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


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of samples whose class was predicted: fp64 []."""
    return (logits.argmax(1) == labels).sum(dtype=torch.float64)
