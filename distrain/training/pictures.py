"""Pictures of a run for people: what augmentation does to training images, and what the model got wrong.

They lie in the run's folder, so a report needs neither the data set nor a model.
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
from distrain.data.order import augmentation_bits, mixup_weight
from distrain.data.stream import Batch
from distrain.distributed.runtime import Runtime
from distrain.runs.folder import AUGMENTED, WRONG
from distrain.training.augment import augment
from distrain.training.job import Job

MOST_WRONG = 24
"""Pictures that were got wrong, kept of an evaluation."""
_SHOWN, _VARIANTS = 6, 6
"""Training pictures, and variants of each."""


class Wrong(NamedTuple):
    """Samples taken for another class, most probable first: images uint8 [k, H, W, C]; ids (index in the source's
    split), labels and predicted classes int64 [k]; probabilities of the predicted class fp64 [k].
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    predicted: Tensor
    probabilities: Tensor

    def best(self, most: int) -> Wrong:
        """The `most` most probable ones; of equal ones those with the smaller id."""
        order = np.lexsort((self.ids.cpu().numpy(), -self.probabilities.cpu().numpy()))[:most]
        return self.at(torch.from_numpy(order.copy()))

    def at(self, index: Tensor) -> Wrong:
        """Those at int64 indices [n]."""
        return Wrong(*(tensor[index.to(tensor.device)] for tensor in self))


class Collector:
    """Keeps, on the device and without waiting for it, the samples that were got wrong with the highest probability."""

    def __init__(self, most: int = MOST_WRONG) -> None:
        self._most = most
        self._kept: Wrong | None = None

    def add(self, images: Tensor, ids: Tensor, labels: Tensor, logits: Tensor) -> None:
        """A batch: images uint8 [n, H, W, C], ids and labels int64 [n], logits [n, K], all on one device."""
        probabilities, predicted = logits.double().softmax(1).max(1)
        # A right one gets no probability: it stays behind all wrong ones, and is left out at the end.
        probabilities = torch.where(predicted == labels, -1.0, probabilities)
        found = Wrong(images, ids, labels, predicted, probabilities)
        here = found.at(probabilities.topk(min(self._most, len(labels))).indices)
        if self._kept is not None:
            both = Wrong(*(torch.cat(pair) for pair in zip(self._kept, here, strict=True)))
            here = both.at(both.probabilities.topk(min(self._most, len(both.labels))).indices)
        self._kept = here

    def over_all(self, runtime: Runtime) -> Wrong | None:
        """The most probable ones of all processes, on the main one; they meet. None elsewhere, and if all is right."""
        own = self._own()
        told = None if own is None else (own.probabilities, own.ids)
        everyone = [(rank, *each) for rank, each in enumerate(runtime.from_all(told)) if each is not None]
        if not everyone:
            return None
        # Only what is shown travels as pixels: first all learn whose those are.
        probabilities = np.concatenate([each[1].numpy() for each in everyone])
        ids = np.concatenate([each[2].numpy() for each in everyone])
        ranks = np.repeat([each[0] for each in everyone], [len(each[2]) for each in everyone])
        chosen = np.lexsort((ids, -probabilities))[: self._most]
        mine = set(ids[chosen[ranks[chosen] == runtime.world.rank]].tolist())
        sent = None
        if own is not None and mine:
            sent = own.at(torch.tensor([place for place, id_ in enumerate(own.ids.tolist()) if id_ in mine]))
        parts = [part for part in runtime.from_all(sent) if part is not None]
        whole = Wrong(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return whole.best(self._most) if runtime.is_main else None

    def _own(self) -> Wrong | None:
        if self._kept is None:
            return None
        own = Wrong(*(tensor.cpu() for tensor in self._kept))
        own = own.at(torch.nonzero(own.probabilities >= 0).flatten())
        return own if len(own.ids) else None


def save_wrong(run: Path, wrong: Wrong | None) -> None:
    """Write RUN/pictures/wrong.safetensors; without any, an empty one stands for `all was right`.

    Raises:
        OSError: it could not be written.
    """
    tensors = {} if wrong is None else {name: value.numpy() for name, value in wrong._asdict().items()}
    _save(run / WRONG, tensors)


def save_augmented(job: Job, batch: Batch) -> None:
    """Write RUN/pictures/augmented.safetensors: the main process's first pictures uint8 [n, H, W, C], and what the
    augmentation of the first steps would make of each: uint8 [n, variants, H, W, C].

    Raises:
        OSError: it could not be written.
    """
    settings, seed = job.config.augment, job.order.seed
    images = batch.images.cpu()
    shown, blank = images[:_SHOWN], job.blank.cpu()
    variants = []
    for step in range(_VARIANTS):
        words = augmentation_bits(seed, step, job.order.global_batch_size)
        own = torch.from_numpy(words[job.order.positions(0, job.runtime.world)].view(np.int64).copy())
        changed = augment(shown, own[:_SHOWN], settings, blank)
        if settings.mixup:
            partners = torch.from_numpy(job.order.partners(0, job.runtime.world))[:_SHOWN]
            kept = mixup_weight(seed, step, settings.mixup)
            others = augment(images[partners], own[partners], settings, blank)
            changed = (changed * kept + others * (1 - kept)).round().to(torch.uint8)
        variants.append(changed)
    _save(job.run / AUGMENTED, {"images": shown.numpy(), "variants": torch.stack(variants, 1).numpy()})


def _save(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in arrays.items()}))
