"""BatchNorm with the statistics of the global batch, for any sizes of the local batches.

With the statistics of each local batch, the trained model would depend on the number of processes. torch's
SyncBatchNorm weights the ranks by their numbers of samples too, but does not support CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm for inputs [N, C, …] on all ranks of the default process group. A local batch may be empty.

    As in Ioffe and Szegedy, "Batch normalization" (2015), where N is the sum over all ranks. The mean, then the
    variance, are computed by a differentiable all-reduce.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    # torch.compile would run the backward pass twice, the second time through freed buffers (torch 2.15).
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; the result has its shape and type."""
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        wide = x.to(self.running_mean.dtype)  # under autocast, sums in bf16 would be too inaccurate
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        local_count = wide.new_tensor([x.numel() // x.shape[1]])
        sums = _sum(torch.cat([wide.sum(axes), local_count]))
        total = sums[-1]
        count = total.clamp(min=1)  # a micro-batch may be empty on all ranks: then nothing is updated
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        variance = _sum(centred.square().sum(axes)) / count
        if total > 0:
            self._update_running(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(x.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
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
    """The sum over all ranks. Each rank's loss depends on the inputs of all ranks, so gradients are summed too."""

    @staticmethod
    def forward(_: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def can_be_synchronised(layer: nn.Module) -> bool:
    """Whether `sync_batch_norm` converts a layer: a BatchNorm with running statistics.

    Without them, the samples of an evaluation batch depend on each other as well, so such a layer is not converted.
    """
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def sync_batch_norm(module: nn.Module, on_gpu: bool) -> nn.Module:
    """Convert each BatchNorm of a module to statistics over all ranks; parameters and buffers stay the same objects."""
    if can_be_synchronised(module):
        assert isinstance(module, _BatchNorm)
        return _converted(module, on_gpu)
    for name, child in module.named_children():
        setattr(module, name, sync_batch_norm(child, on_gpu))
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
