"""Pictures of a run for people: what augmentation does to training images, and what the model misclassified.

They are saved in the run's folder, so a report needs neither the data set nor the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain import files
from distrain.data.order import alternate_flips, augmentation_bits
from distrain.data.rounds import Batch
from distrain.distributed.runtime import Runtime
from distrain.runs.folder import AUGMENTED, MISCLASSIFIED
from distrain.training import mixing
from distrain.training.augment import augment, mixup_partners
from distrain.training.job import Job

MAX_MISCLASSIFIED = 24
"""Most misclassified pictures saved of an evaluation."""
_PICTURES, _VARIANTS = 6, 6
"""Number of training pictures, and of augmented variants of each."""


class Misclassified(NamedTuple):
    """Samples predicted as another class, the most confident first.

    Attributes:
        images: uint8 [k, H, W, C].
        ids: int64 [k], index in the split of the source.
        labels: int64 [k].
        predicted: int64 [k].
        probabilities: fp64 [k], of the predicted class.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    predicted: Tensor
    probabilities: Tensor

    def most_confident(self, number: int) -> Misclassified:
        """Return the `number` most confident ones; of equal ones those with the smaller ids."""
        order = np.lexsort((self.ids.cpu().numpy(), -self.probabilities.cpu().numpy()))[:number]
        return self.at(torch.from_numpy(order.copy()))

    def at(self, index: Tensor) -> Misclassified:
        """Return those at int64 indices [n]."""
        return Misclassified(*(tensor[index.to(tensor.device)] for tensor in self))


class Collector:
    """Collects the samples misclassified with the highest confidence; on the device, without waiting for it."""

    def __init__(self, limit: int = MAX_MISCLASSIFIED) -> None:
        self._limit = limit
        self._collected: Misclassified | None = None

    def add(self, images: Tensor, ids: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Add a batch: images uint8 [n, H, W, C], ids and labels int64 [n], logits [n, K], all on one device."""
        probabilities, predicted = logits.double().softmax(1).max(1)
        # A correct one gets -1: it is sorted after all misclassified ones, and dropped at the end.
        probabilities = torch.where(predicted == labels, -1.0, probabilities)
        batch = Misclassified(images, ids, labels, predicted, probabilities)
        top = batch.at(probabilities.topk(min(self._limit, len(labels))).indices)
        if self._collected is not None:
            both = Misclassified(*(torch.cat(pair) for pair in zip(self._collected, top, strict=True)))
            top = both.at(both.probabilities.topk(min(self._limit, len(both.labels))).indices)
        self._collected = top

    def over_all(self, runtime: Runtime) -> Misclassified | None:
        """Return the most confident ones of all processes on rank 0 (a collective); None elsewhere, or without any."""
        local = self._local()
        keys = None if local is None else (local.probabilities, local.ids)
        by_rank = [(rank, *each) for rank, each in enumerate(runtime.collectives.from_all(keys)) if each is not None]
        if not by_rank:
            return None
        # Only the chosen ones are sent as pixels: first all processes learn which those are.
        probabilities = np.concatenate([each[1].numpy() for each in by_rank])
        ids = np.concatenate([each[2].numpy() for each in by_rank])
        ranks = np.repeat([each[0] for each in by_rank], [len(each[2]) for each in by_rank])
        chosen = np.lexsort((ids, -probabilities))[: self._limit]
        mine = set(ids[chosen[ranks[chosen] == runtime.world.rank]].tolist())
        sent = None
        if local is not None and mine:
            sent = local.at(torch.tensor([index for index, id_ in enumerate(local.ids.tolist()) if id_ in mine]))
        parts = [part for part in runtime.collectives.from_all(sent) if part is not None]
        whole = Misclassified(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return whole.most_confident(self._limit) if runtime.is_main else None

    def _local(self) -> Misclassified | None:
        if self._collected is None:
            return None
        local = Misclassified(*(tensor.cpu() for tensor in self._collected))
        local = local.at(torch.nonzero(local.probabilities >= 0).flatten())
        return local if len(local.ids) else None


def save_misclassified(run: Path, misclassified: Misclassified | None) -> None:
    """Write RUN/pictures/misclassified.safetensors; an empty file means that all samples were classified correctly.

    Raises:
        OSError: it could not be written.
    """
    tensors = {} if misclassified is None else {k: value.numpy() for k, value in misclassified._asdict().items()}
    _save(run / MISCLASSIFIED, tensors)


def save_augmented(job: Job, batch: Batch) -> None:
    """Write RUN/pictures/augmented.safetensors: the first pictures of virtual rank 0, and each of them as augmented.

    The pictures are uint8 [n, H, W, C], the augmentations of the first steps uint8 [n, variants, H, W, C].

    Raises:
        OSError: it could not be written.
    """
    settings, seed, also = job.config.augment, job.order.seed, job.functions.augmentation
    images = batch.images.cpu()
    pictures, fill = images[:_PICTURES], job.model.mean_color.cpu()
    variants = []
    for step in range(_VARIANTS):
        steps = np.array([step])
        drawn = augmentation_bits(seed, steps, batch.positions)
        if job.order.alternating_flip:  # each picture is mirrored in every second variant
            alternate_flips(drawn, seed, batch.ids, steps)
        local_bits = torch.from_numpy(drawn.view(np.int64))
        augmented = augment(pictures.clone(), local_bits[:_PICTURES], settings, fill, also)  # `also` may change them
        how = mixing.draw(settings, seed, step, *images.shape[1:3])
        if how is not None:
            lanes = len(job.order.owned_lanes(job.virtual_ranks[0]))
            partners = mixup_partners(len(images), lanes, images.device)[:_PICTURES]
            others = augment(images[partners], local_bits[partners], settings, fill, also)
            if how.box is not None:
                augmented = mixing.paste(augmented, others, how.box)
            else:
                augmented = (augmented * how.weight + others * (1 - how.weight)).round().to(torch.uint8)
        variants.append(augmented)
    _save(job.folder / AUGMENTED, {"images": pictures.numpy(), "variants": torch.stack(variants, 1).numpy()})


def _save(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    path.parent.mkdir(exist_ok=True)  # not its parents: a run's folder that was removed stays so
    files.replace(path, safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
