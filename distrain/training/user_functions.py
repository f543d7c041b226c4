"""Functions of the user in a run: schedule of the learning rate, loss, augmentation; each is checked before training.

Without `train.virtual_ranks`, losses and augmented images must be those of each sample alone: what a run trains would
depend on the number of processes otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distrain import plugins
from distrain.config import Config, is_user_code
from distrain.errors import ConfigError
from distrain.training.random_bits import mix

_STEPS_CHECKED = 1000
"""Largest number of steps whose learning rate is computed before training."""
_SAMPLES = 4
"""Samples of the batches that functions are tried on."""


class Schedule:
    """A function of (step, total_steps) that returns the factor of `train.lr` in a step, counted from 0."""

    def __init__(self, name: str) -> None:
        self._subject = f"train.schedule={name}"
        self._function = plugins.find(self._subject, name)

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the factor of a step.

        Raises:
            ConfigError: the function raised, or returned something else.
        """
        with plugins.user_code(f"{self._subject}: called with (step, total_steps)"):
            value = self._function(step, total_steps)
        try:
            factor = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            factor = math.nan
        if not 0 <= factor < math.inf:
            raise ConfigError(
                f"{self._subject}: returns {value!r:.50} for step {step} of {total_steps}, not a finite number of at"
                " least 0"
            )
        return factor

    def check(self, total_steps: int) -> None:
        """Check the factors of steps all along a run: they must depend on the arguments alone.

        Raises:
            ConfigError: they do not, or are no numbers.
        """
        steps = range(0, total_steps, -(-total_steps // _STEPS_CHECKED))
        factors, again = ([self(step, total_steps) for step in [*steps, total_steps - 1]] for _ in range(2))
        if factors != again:
            raise ConfigError(f"{self._subject}: returns other numbers for the same (step, total_steps)")


class Loss:
    """A function of (logits, labels), [n, K] and int64 [n], that returns the loss of each sample, [n]."""

    def __init__(self, name: str) -> None:
        self._subject = f"train.loss={name}"
        self._function = plugins.find(self._subject, name)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses: [].

        Raises:
            ConfigError: the function returned something else than a loss for each sample.
        """
        if not len(labels):
            return logits.sum()  # 0, for the backward pass; the function need not know empty batches
        losses = self._losses(logits, labels)
        return losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))  # fp16 overflows at 65,504

    def check(self, classes: int, device: torch.device, dtype: torch.dtype, each_alone: bool) -> None:
        """Try the function on random logits.

        Args:
            classes: K.
            device: where training computes.
            dtype: of the logits.
            each_alone: whether the loss of a sample must not depend on the others.

        Raises:
            ConfigError: it fails, or its losses cannot be used.
        """
        logits = torch.randn(_SAMPLES, classes, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        logits.requires_grad_()
        labels = torch.arange(_SAMPLES, device=device) % classes
        with plugins.user_code(f"{self._subject}: called with (logits, labels)"):
            losses = self._losses(logits, labels)
            parts = [self._losses(logits[part], labels[part]) for part in _PARTS]
        if not losses.requires_grad:
            raise ConfigError(f"{self._subject}: its losses have no gradient; compute them from the logits with torch")
        if not losses.isfinite().all():
            raise ConfigError(f"{self._subject}: returns {losses.tolist()} for random logits, which are not all finite")
        if each_alone and not torch.allclose(losses, torch.cat(parts), rtol=1e-3, atol=1e-5):
            raise ConfigError(f"{self._subject}: {_DEPENDS.format('the loss of a sample')}")

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses: Tensor = self._function(logits, labels)
        _check_tensor(f"{self._subject}: for logits {list(logits.shape)}", losses, labels.shape, logits.device)
        if not losses.is_floating_point():
            raise ConfigError(f"{self._subject}: returns {losses.dtype}, not floating-point losses")
        return losses


class Augmentation:
    """A function of (images, random_bits), uint8 [n, H, W, C] and int64 [n, 2], that returns images of that shape."""

    def __init__(self, name: str) -> None:
        self._subject = f"augment.also={name}"
        self._function = plugins.find(self._subject, name)

    def __call__(self, images: Tensor, random_bits: Tensor) -> Tensor:
        """Return augmented images.

        Args:
            images: uint8 [n, H, W, C].
            random_bits: int64 [n, 2], those of `augment.augment`; the function gets others, made from them.

        Raises:
            ConfigError: the function returned something else.
        """
        return self._augment(images, mix(random_bits)) if len(images) else images

    def check(self, shape: tuple[int, int, int], device: torch.device, each_alone: bool) -> None:
        """Try the function on random images of different brightness.

        Args:
            shape: (H, W, C).
            device: where training computes.
            each_alone: whether an image must depend on its own bits only, and on no other image.

        Raises:
            ConfigError: it fails, or its images cannot be used.
        """
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (_SAMPLES, *shape), dtype=torch.uint8, generator=generator)
        images = (images // torch.arange(1, _SAMPLES + 1, dtype=torch.uint8)[:, None, None, None]).to(device)
        bits = torch.randint(-(2**63), 2**63 - 1, (_SAMPLES, 2), generator=generator).to(device)
        with plugins.user_code(f"{self._subject}: called with (images, random_bits)"):
            whole = self._augment(images.clone(), bits)
            parts = [self._augment(images[part].clone(), bits[part]) for part in _PARTS]
        difference = (whole.short() - torch.cat(parts).short()).abs()
        if each_alone and int(difference.max()) > 1:  # one level may be rounding
            raise ConfigError(f"{self._subject}: {_DEPENDS.format('an image')}")

    def _augment(self, images: Tensor, random_bits: Tensor) -> Tensor:
        augmented: Tensor = self._function(images, random_bits)
        _check_tensor(f"{self._subject}: for images {list(images.shape)}", augmented, images.shape, images.device)
        if augmented.dtype != torch.uint8:
            raise ConfigError(f"{self._subject}: returns {augmented.dtype}, not uint8: round to 0 … 255")
        return augmented


@dataclass(frozen=True)
class UserFunctions:
    """The functions of a run that are the user's; None for those that the package has.

    Attributes:
        schedule: with `train.schedule`.
        loss: with `train.loss`.
        augmentation: with `augment.also`.
    """

    schedule: Schedule | None = None
    loss: Loss | None = None
    augmentation: Augmentation | None = None

    @classmethod
    def of(cls, config: Config) -> UserFunctions:
        """Import the functions that a configuration names.

        Raises:
            ConfigError: there is no such function, or its module raises.
        """
        train, also = config.train, config.augment.also
        return cls(
            Schedule(train.schedule) if is_user_code(train.schedule) else None,
            Loss(train.loss) if is_user_code(train.loss) else None,
            Augmentation(also) if also is not None else None,
        )


_PARTS = (slice(0, 1), slice(1, _SAMPLES))
_DEPENDS = (
    "{} depends on the other samples of the batch, or on random numbers of its own: what is trained would depend on the"
    " number of processes; compute each from its sample alone, or set train.virtual_ranks"
)


def _check_tensor(subject: str, value: Any, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.shape != shape or value.device != device:
        kind = f"{list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{subject} returns {kind}, not {list(shape)} on {device}")
