"""Models whose passes can be repeated with the same bits: only these can be trained with virtual ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError
from distrain.models.batch_norm import Buffers


def check_repeatable(
    forward: Callable[[Tensor], Tensor], module: nn.Module, buffers: Buffers, inputs: Tensor, seed: Callable[[], None]
) -> None:
    """Check that a pass that is repeated gives the same bits.

    Args:
        forward: the forward pass of the model, in training.
        module: the model.
        buffers: its buffers, which have been observed.
        inputs: normalised images [n, C, H, W].
        seed: seeds all generators.

    Raises:
        ConfigError: the model keeps something else than buffers from one pass to the next, or draws from a generator
            of its own.
    """

    def repeated() -> Tensor:
        buffers.begin_pass()
        seed()
        logits = forward(inputs).detach().clone()  # with CUDA graphs, the next pass overwrites them
        buffers.begin_pass()
        return logits

    buffers.begin_step()
    logits, weights = repeated(), [each.detach().clone() for each in module.parameters()]
    same = _equal(logits, repeated())
    pairs = zip(module.named_parameters(), weights, strict=True)
    changed = [name for (name, each), before in pairs if not _equal(each, before)]
    if changed or not same:
        what = f"changes its parameter {changed[0]}" if changed else "gives other logits"
        raise ConfigError(
            f"virtual ranks: the model {what} when a pass is repeated with the same images, buffers and random"
            " numbers, so its result would depend on the number of processes; keep in buffers what passes change, and"
            " draw from torch's own generator, or train without virtual ranks"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, where NaN equals NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
