"""BatchNorm whose result does not depend on which process has which samples.

`sync_batch_norm`: with the statistics of the global batch, for any sizes of the local batches. torch's SyncBatchNorm
weights the ranks by their numbers of samples too, but does not support CPUs.

`Buffers`: with virtual ranks, BatchNorm uses the statistics of a virtual rank's samples (ghost batch normalization,
Hoffer et al., "Train longer, generalize better", 2017), and the running statistics get the mean over all virtual ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class LocalBatchNorm(_BatchNorm):
    """BatchNorm for inputs [N, C, …] with the statistics of the local batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


class GlobalBatchNorm(LocalBatchNorm):
    """BatchNorm for inputs [N, C, …] on all ranks of the default process group. A local batch may be empty.

    As in Ioffe and Szegedy, "Batch normalization" (2015), where N is the sum over all ranks. The mean, then the
    variance, are computed by a differentiable all-reduce.
    """

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

    def convert(layer: nn.Module) -> nn.Module:
        return _converted(layer, on_gpu) if isinstance(layer, _BatchNorm) and can_be_synchronised(layer) else layer

    return _converted_in(module, convert, {})


def local_batch_norm(module: nn.Module) -> nn.Module:
    """Replace each SyncBatchNorm of a module: its collectives would wait for passes that others do not make."""

    def convert(layer: nn.Module) -> nn.Module:
        return _replaced(layer, LocalBatchNorm) if isinstance(layer, nn.SyncBatchNorm) else layer

    return _converted_in(module, convert, {})


def _converted_in(
    module: nn.Module, convert: Callable[[nn.Module], nn.Module], converted: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Convert the layers of a module; one that it has under several names stays one layer."""
    if module not in converted:
        converted[module] = convert(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _converted_in(child, convert, converted)
    return converted[module]


def _converted(layer: _BatchNorm, on_gpu: bool) -> nn.Module:
    if isinstance(layer, nn.SyncBatchNorm):
        if on_gpu:
            return layer
    elif on_gpu:
        synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
        return synchronised
    return _replaced(layer, GlobalBatchNorm)


def _replaced(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    """Return a layer of another class with the same settings, parameters and buffers."""
    new = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    new.training = layer.training
    return new


_OF_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the buffers of every BatchNorm layer."""


class Buffers:
    """The buffers of a model that is trained by virtual ranks: in a step, each of them begins with the same values.

    - Running statistics of BatchNorm: after the step they have been updated with the mean of the virtual ranks'
      statistics, weighted by their samples. For this the layers' momentum is 1 from now on, so that a pass leaves the
      statistics of its batch in the buffers; in a layer that a pass uses several times, the mean of them.
    - Other buffers that a pass changes: those of virtual rank 0 are retained, as DDP retains those of rank 0.

    `observe` finds out which these are, once, after a first pass. One that changes only later is reported.
    """

    def __init__(self, module: nn.Module) -> None:
        self._momentum: dict[_BatchNorm, float | None] = {}
        for layer in module.modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
                self._momentum[layer] = layer.momentum
                layer.momentum = 1.0
        self._all = [
            _Buffer(f"{prefix}.{name}".lstrip("."), owner, name)
            for prefix, owner in module.named_modules()
            for name, _ in owner.named_buffers(recurse=False)
        ]
        self._initial = [each.tensor.clone() for each in self._all]
        self._norms: list[_BatchNorm] = []
        self._used_again: list[_BatchNorm] = []
        self._constant: list[_Buffer] = []
        self._retained: list[_Buffer] = []
        self.statistics: list[Tensor] = []
        """Running means and variances of BatchNorm, in which a pass leaves the statistics of its batch."""
        self._changing: list[list[Tensor]] = []
        self._saved: list[list[Tensor]] = []

    def observe(self, pass_count: int) -> None:
        """See which buffers the passes so far have changed, and restore their initial values.

        Args:
            pass_count: their number.
        """
        self._norms = [layer for layer in self._momentum if layer.training]
        before = {id(each.owner): initial for each, initial in zip(self._all, self._initial, strict=True)
                  if each.key == "num_batches_tracked"}  # fmt: skip
        for layer in self._norms:
            if layer.num_batches_tracked is not None and layer.num_batches_tracked - before[id(layer)] > pass_count:
                layer.momentum = None  # the mean since the counter was 0
                self._used_again.append(layer)
        for each, initial in zip(self._all, self._initial, strict=True):
            if each.owner in self._norms and each.key in _OF_BATCH_NORM:
                continue
            # Also by value: a compiled pass might not count its writes.
            changed = each.has_changed() or not torch.equal(each.tensor, initial)
            (self._retained if changed else self._constant).append(each)
        for each, initial in zip(self._all, self._initial, strict=True):
            each.put_back(initial)
        self._initial.clear()
        self.statistics = [value for layer in self._norms for value in _running(layer)]
        counters = [layer.num_batches_tracked for layer in self._norms if layer.num_batches_tracked is not None]
        # Lists of one dtype, where they can be: such a list is copied by one kernel.
        lists = (self.statistics, counters, [each.tensor for each in self._retained])
        self._changing = [values for values in lists if values]
        self._saved = [[torch.empty_like(value) for value in values] for values in self._changing]

    def begin_step(self) -> None:
        """Take the present values as those that each virtual rank begins with."""
        for saved, values in zip(self._saved, self._changing, strict=True):
            torch._foreach_copy_(saved, values)
        for each in self._constant:
            each.remember()

    def begin_pass(self) -> None:
        """Restore the values at the beginning of the step."""
        for saved, values in zip(self._saved, self._changing, strict=True):
            torch._foreach_copy_(values, saved)
        for each in self._retained:
            each.put_back()

    def begin_forward(self) -> None:
        """Let each layer that is used several times begin its mean."""
        for layer in self._used_again:
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.zero_()

    def problem(self) -> str | None:
        """Return what this pass has done to a buffer that cannot be supported, and the cure, as text; or None."""
        for each in self._constant:
            if each.has_changed():
                return (
                    f"the model changes its buffer {each.name} in some passes only, so its result would depend on the"
                    " number of processes; change it in every pass"
                )
        for each in self._retained:
            if each.is_reshaped():
                return (
                    f"a pass replaces the model's buffer {each.name} by one of another shape or type; give it those"
                    " that it keeps"
                )
        return None

    def retained(self) -> list[Tensor]:
        """Return a copy of the present values of those that are retained of virtual rank 0."""
        return [each.current.clone() for each in self._retained]

    def end_step(self, statistics: Sequence[Tensor], retained: Sequence[Tensor]) -> None:
        """Update the running statistics with those of the global batch, and set the retained buffers."""
        self.begin_pass()
        pairs = iter(zip(self.statistics, statistics, strict=True))
        for layer in self._norms:
            weight: Any = self._momentum[layer]
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
            if weight is None:
                assert layer.num_batches_tracked is not None
                weight = (1.0 / layer.num_batches_tracked).to(_running(layer)[0].dtype)
            for value, new in (next(pairs), next(pairs)):
                value.lerp_(new, weight)
        for each, new in zip(self._retained, retained, strict=True):
            each.tensor.copy_(new)


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


class _Buffer:
    """A buffer of a module, and whether it was written or replaced since it was remembered."""

    def __init__(self, name: str, owner: nn.Module, key: str) -> None:
        self.name, self.owner, self.key = name, owner, key
        self.remember()

    @property
    def current(self) -> Tensor:
        """The tensor that the module has now."""
        return self.owner.get_buffer(self.key)

    def remember(self) -> None:
        """Remember the present tensor, and how often it was written."""
        self.tensor = self.current
        self._version = self.tensor._version

    def has_changed(self) -> bool:
        """Whether it was replaced or written since it was remembered."""
        return self.current is not self.tensor or self.tensor._version != self._version

    def is_reshaped(self) -> bool:
        """Whether it was replaced by a tensor of another shape or type."""
        current = self.current
        return current.shape != self.tensor.shape or current.dtype != self.tensor.dtype

    def put_back(self, values: Tensor | None = None) -> None:
        """Make the module hold the remembered tensor again, with other values if given."""
        self.owner._buffers[self.key] = self.tensor
        if values is not None:
            self.tensor.copy_(values)
