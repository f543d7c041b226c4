"""Evaluation of images together with their mirror images."""

from __future__ import annotations

from torch import Tensor, nn


class MirrorAverage(nn.Module):
    """Gives the mean of a model's logits for an image and for its mirror image.

    Args:
        model: gives logits [n, K] for images [n, C, H, W].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits [n, K], in the images' dtype: under autocast the model's may be bf16."""
        logits, of_mirrored = self.model(images), self.model(images.flip(3))
        mean: Tensor = (logits.to(images.dtype) + of_mirrored.to(images.dtype)) / 2
        return mean


def as_evaluated(model: nn.Module, flip: bool) -> nn.Module:
    """Return the model as it is evaluated: with `flip` (`eval.flip`) its `MirrorAverage`, else itself."""
    return MirrorAverage(model) if flip else model
