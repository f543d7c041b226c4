"""BatchNorm whose result does not depend on which process has which samples.

`sync_batch_norm`: with the statistics of the global batch, for any sizes of the local batches. torch's SyncBatchNorm
weights the ranks by their numbers of samples too, but does not support CPUs, waits for the GPU in every forward pass,
and fails in bf16 or fp16 if a local batch is empty: that rank sends a tensor of another type.

`Buffers`: with virtual ranks, BatchNorm uses the statistics of a virtual rank's samples (ghost batch normalization,
Hoffer et al., "Train longer, generalize better", 2017), and the running statistics get the mean over all virtual ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
"""Context of the collectives of `GlobalBatchNorm`; a trained model sets it, to measure how long they wait."""


class LocalBatchNorm(_BatchNorm):
    """BatchNorm for inputs [N, C, …] with the statistics of the local batch."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")


class GlobalBatchNorm(LocalBatchNorm):
    """BatchNorm for inputs [N, C, …] on all ranks of the default process group. A local batch may be empty.

    As in Ioffe and Szegedy, "Batch normalization" (2015), where N is the sum over all ranks. The statistics have the
    type of the buffers: under autocast, sums in bf16 would be too inaccurate.

    The forward pass has one collective, and the backward pass has one. The numbers of samples are sent with the
    statistics, and are used only on the device, so that no pass waits for it.
    """

    # Ranks with local batches of other sizes compile other graphs, or none. Nothing ensures that these run their
    # collectives in the same order, nor that a lost peer is noticed in them; outside of graphs, the code's order holds.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; the result has its shape, type and layout."""
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        with torch.no_grad():
            mean, variance, count = _combine(_gather(_local_statistics(x, self.running_mean.dtype)))
            self._update_running(mean, variance, count)
        out: Tensor = _Normalise.apply(x, self.weight, self.bias, mean, variance, count, self.eps)
        return out

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the buffers; a micro-batch that is empty on all ranks changes nothing."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        present = count.clamp(max=1)  # 0 or 1
        self.num_batches_tracked.add_(present.long())
        if self.momentum is not None:
            factor = present * self.momentum
        else:
            factor = present / self.num_batches_tracked.clamp(min=1)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), factor)


class _GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's layers that apply dropout and an activation after BatchNorm."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; then dropout, if the layer has any, and its activation."""
        activated: Tensor = self.act(self.drop(super().forward(x)))
        return activated


def _local_statistics(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean, variance and number of the values of each channel: [2 C + 1]."""
    channels = x.shape[1]
    if x.numel() == 0:
        return x.new_zeros(2 * channels + 1, dtype=dtype)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(axes, dtype=dtype)
    variance = (x - _by_channel(mean, x)).square_().mean(axes)  # var_mean takes 8 times as long on CPUs
    return torch.cat([mean, variance, mean.new_full((1,), x.numel() // channels)])


def _gather(local: Tensor) -> Tensor:
    """Return the values of all ranks: [W, n] for [n]."""
    gathered = local.new_empty(dist.get_world_size(), len(local))
    with waiting():
        dist.all_gather_into_tensor(gathered, local[None])
    return gathered


def _combine(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of all ranks, [W, 2 C + 1], as in Chan et al., "Updating formulae" (1979).

    All ranks add the same numbers in the same order, so their results are the same, bit for bit.

    Returns:
        Mean [C], variance [C] and number of values [], of all ranks.
    """
    counts = statistics[:, -1:]
    count = counts.sum()
    fractions = counts / count.clamp(min=1)
    means, variances = statistics[:, :-1].chunk(2, dim=1)
    mean = (means * fractions).sum(0)
    distance = means - mean
    variance = (torch.addcmul(variances, distance, distance) * fractions).sum(0)
    return mean, variance, count


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """View values [C] so that they are broadcast over x [N, C, …]."""
    return values.view([1, -1] + [1] * (x.dim() - 2))


class _Normalise(torch.autograd.Function):
    """Normalise with the mean and variance of all ranks' x; the gradient takes into account that they depend on x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if weight is None:
            weight = torch.ones_like(mean)
        inverse_std = torch.rsqrt(variance + ctx.eps)
        of_weight, of_bias = _local_gradients(gradient, x, weight, mean, inverse_std)
        of_x = None
        if needs_x:
            # With z = (x - mean) · inverse_std and sums over all ranks:
            # weight · inverse_std · (gradient - Σ gradient / count - z · Σ (gradient · z) / count)
            sums = torch.stack([of_weight, of_bias])
            with waiting():
                dist.all_reduce(sums)
            scale = weight * inverse_std
            of_z, constant = sums.mul_(scale).div_(-count.clamp(min=1))
            of_x = F.batch_norm(x, mean, variance, of_z, constant, training=False, eps=ctx.eps)
            of_x.addcmul_(gradient, _by_channel(scale, x))
        return of_x, of_weight if needs_weight else None, of_bias if needs_bias else None, None, None, None, None


def _local_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums over this rank's samples of gradient · z and of gradient, z = (x - mean) · inverse_std: [C]."""
    if x.numel() == 0:  # the operation does not support it
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, None, None, mean, inverse_std, True, 0.0, [False, True, True]
    )
    return of_weight, of_bias


def can_be_synchronised(layer: nn.Module) -> bool:
    """Whether `sync_batch_norm` converts a layer: a BatchNorm with running statistics, of torch or of timm.

    Without them, the samples of an evaluation batch depend on each other as well, so such a layer is not converted. Nor
    is a class that computes something else in its `forward`.
    """
    if not isinstance(layer, _BatchNorm) or layer.running_mean is None:
        return False
    return type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or _has_activation(layer)


def _has_activation(layer: nn.Module) -> bool:
    """Whether a layer is timm's `BatchNormAct2d`, or its `SyncBatchNormAct`; timm need not be installed."""
    return type(layer).__module__.startswith("timm.") and hasattr(layer, "act") and hasattr(layer, "drop")


def sync_batch_norm(module: nn.Module) -> nn.Module:
    """Convert each BatchNorm of a module to statistics over all ranks; parameters and buffers stay the same objects."""

    def convert(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, _BatchNorm) or not can_be_synchronised(layer):
            return layer
        if not _has_activation(layer):
            return _replaced(layer, GlobalBatchNorm)
        new = _replaced(layer, _GlobalBatchNormAct)
        new.drop, new.act = layer.drop, layer.act
        return new

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
