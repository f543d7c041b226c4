"""Mixing of samples (mixup, CutMix): each is mixed with a partner, and the labels of both are trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distrain.config import Augment
from distrain.data.order import cutmix_box, draws_cutmix, mixup_weight


class Mixing(NamedTuple):
    """The way in which all samples of a step are mixed with their partners.

    Attributes:
        weight: of a sample's own label; that of its partner has the rest.
        box: with CutMix, what a sample gets from its partner: top, left, bottom and right. None for mixup, where
            images have the weights of the labels.
    """

    weight: float
    box: tuple[int, int, int, int] | None


def draw(settings: Augment, seed: int, step: int, height: int, width: int) -> Mixing | None:
    """Return how a step mixes images of this size; None if it does not."""
    if not settings.mixes_labels:
        return None
    if not settings.cutmix or (settings.mixup and not draws_cutmix(seed, step)):
        return Mixing(mixup_weight(seed, step, settings.mixup), None)
    top, left, bottom, right = box = cutmix_box(seed, step, settings.cutmix, height, width)
    return Mixing(1 - (bottom - top) * (right - left) / (height * width), box)


def paste(images: Tensor, partners: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Return images with the box of their partners, uint8 [N, H, W, C] each."""
    top, left, bottom, right = box
    mixed = images.clone()
    mixed[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
    return mixed
