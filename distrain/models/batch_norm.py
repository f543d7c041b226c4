"""BatchNorm whose statistics are those of the global batch's samples, whatever the ranks' shares.

Statistics of each rank's own share would make what is trained depend on the number of processes. torch's
SyncBatchNorm weighs by counts too, but refuses CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over [N, C, …] on every rank of the default group; a share may be empty. Mean, then variance, each by a
    differentiable sum over the ranks: as Ioffe and Szegedy, "Batch normalization" (2015), with N of all ranks.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    # Compiled, its backward pass runs a second time through what is freed (torch 2.15).
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Normalised, as x is shaped."""
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        wide = x.to(self.running_mean.dtype)  # under autocast sums of bf16 would lose what they count
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        own = wide.new_tensor([x.numel() // x.shape[1]])
        sums = _sum(torch.cat([wide.sum(axes), own]))
        count = sums[-1]
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        variance = _sum(centred.square().sum(axes)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(x.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


def _sum(tensor: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(tensor)
    return total


class _Sum(torch.autograd.Function):
    """The sum over all ranks: each rank's loss depends on every rank's part, so gradients are summed likewise."""

    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def can_be_global(layer: nn.Module) -> bool:
    """Whether a layer is a BatchNorm that `over_all_ranks` takes care of. One that keeps no running statistics couples
    the samples of an evaluation too, and is left alone.
    """
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def over_all_ranks(module: nn.Module, on_gpu: bool) -> nn.Module:
    """The module with every BatchNorm's statistics taken over all ranks; parameters and buffers are the same ones."""
    if can_be_global(module):
        assert isinstance(module, _BatchNorm)
        return _converted(module, on_gpu)
    for name, child in module.named_children():
        setattr(module, name, over_all_ranks(child, on_gpu))
    return module


def _converted(layer: _BatchNorm, on_gpu: bool) -> nn.Module:
    if isinstance(layer, nn.SyncBatchNorm):
        if on_gpu:
            return layer
    elif on_gpu:
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        return synchronised
    new = GlobalBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    new.training = layer.training
    return new
