"""A run on torch's device `meta`, and a count of the operations that a step sends to its device.

Tensors on `meta` have shapes, types and layouts, but no values. It stands for a GPU: whatever would make the host wait
for a value of the device raises, and set-up and steps are those of a real run.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils._pytree as pytree
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.config import from_tree
from distrain.data.rounds import Batch
from distrain.environment import Environment
from distrain.training import setup
from distrain.training.job import Job

META = torch.device("meta")

_PARTS = {
    ("augment.py", "augment"): "augment",
    ("augment.py", "__call__"): "normalize",
    ("gradients.py", "forward"): "forward",
    ("step.py", "_loss"): "loss",
    ("gradients.py", "backward"): "backward",
    ("virtual_ranks.py", "virtual_rank"): "exchange",
    ("virtual_ranks.py", "exchange"): "exchange",
    ("gradients.py", "grad_norm"): "norm",
    ("gradients.py", "clip_norm"): "clip",
    ("runtime.py", "update"): "optimizer",
    ("optim.py", "update"): "ema",
}
"""Parts of a step, by the file and name of the function that runs them."""

_READS = ("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique", "_unique2")
"""Operations whose result, or the shape of it, is read from the device."""

_NO_LAUNCH = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh",
)  # fmt: skip
"""Operations without a kernel, beside views."""


class HostWaitError(AssertionError):
    """An operation makes the host wait for the device."""


class Launches(TorchDispatchMode):
    """Counts the operations on a device in a block; each launches a kernel or more.

    With `cpu`, the CPU stands for a GPU: for collectives, which gloo runs on CPUs alone.

    Attributes:
        parts: numbers of operations but collectives, by part of the step.
        collectives: numbers of collectives, by name.

    Raises:
        HostWaitError: an operation makes the host wait for the device.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.parts: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self._device = device

    @property
    def total(self) -> int:
        """Number of all operations on the device."""
        return self.parts.total() + self.collectives.total()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op.overloadpacket.__name__
        problem = _wait(name, args, kwargs, self._device)
        if problem is not None:
            raise HostWaitError(f"{op}: {problem}")
        no_kernel = self._device == "meta" and name.startswith(("_fused_sgd", "_fused_adam"))
        result = None if no_kernel else op(*args, **kwargs)
        launches = not op.is_view and name not in _NO_LAUNCH and _is_on((args, kwargs, result), self._device)
        if launches and op.namespace == "c10d":
            self.collectives[name] += 1
        elif launches and op.namespace == "aten":
            self.parts[_part()] += 1
        return result


def _wait(name: str, args: Any, kwargs: Any, device: str) -> str | None:  # noqa: PLR0911 - one for each reason
    """Return why an operation makes the host wait for a device, as text; or None."""
    if not _is_on((args, kwargs), device):
        return None
    if name in _READS:
        return "its result is read from the device"
    if name == "lift_fresh":  # by `torch.tensor`, after the copy
        return "values are copied from the CPU"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                return "the number of true values of a mask is read from the device"
            if index is not None and index.device.type != device:
                return "an index is copied from the CPU"
    if name == "_to_copy" and "device" in kwargs:
        devices, non_blocking = {args[0].device.type, kwargs["device"].type}, kwargs.get("non_blocking", False)
    elif name == "copy_":
        devices, non_blocking = {args[0].device.type, args[1].device.type}, len(args) > 2 and args[2]
    else:
        return None
    if len(devices) > 1 and not non_blocking:
        return "a copy that is not asynchronous"
    return None


def _is_on(values: Any, device: str) -> bool:
    """Whether one of the tensors, or a device that is named, is of this type."""
    for leaf in pytree.tree_leaves(values):
        named = leaf.device if isinstance(leaf, Tensor) else leaf
        if isinstance(named, torch.device) and named.type == device:
            return True
    return False


def _part() -> str:
    """Return the part of the step that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        part = _PARTS.get((code.co_filename.rpartition("/")[2], code.co_name))
        if part is not None and "/distrain/" in code.co_filename:
            return part
        frame = frame.f_back
    return "rest"


class _SetUp(TorchDispatchMode):
    """Answers what the set-up of a run reads from the device: 0, and that values are equal."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if _is_on(args, "meta") and name in ("_local_scalar_dense", "equal", "allclose"):
            return name != "_local_scalar_dense"
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def fused_optimizers_skipped() -> Iterator[None]:
    """Run the block without the fused kernels of optimizers, which do not exist for `meta`; `Launches` skips them."""
    with ExitStack() as patches:
        for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
            patches.enter_context(mock.patch.object(torch, name))
        yield


@contextlib.contextmanager
def job_on_meta(tree: dict[str, Any], fp16: bool = False) -> Iterator[Job]:
    """Set up a run on `meta`, with the choices of a GPU: fused optimizers, operations on lists, channels last.

    Args:
        tree: the configuration, with `run.device` cpu.
        fp16: whether gradients are scaled as with `train.precision` fp16.
    """
    config, environment = from_tree(tree), Environment()
    with (
        ExitStack() as patches,
        closing(setup.start_watchdog(config, environment)) as watchdog,
        setup.start_runtime(config, environment, watchdog) as runtime,
    ):
        for module, name in (("torch.optim.optimizer", "fused"), ("torch.utils._foreach_utils", "foreach")):
            supported = f"_get_{name}_kernels_supported_devices"
            owner = importlib.import_module(module)
            patches.enter_context(mock.patch.object(owner, supported, return_value=["cuda", "meta"]))
        for state in (PartialState(), AcceleratorState()):
            state.device = META
        accelerator = runtime._accelerator
        if fp16:
            accelerator.scaler = torch.amp.GradScaler("meta")
        with _SetUp():
            job = setup.set_up(config, time.monotonic(), runtime)
        if fp16:  # not before: there is no autocast for meta
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        yield job


def batches_on_meta(job: Job) -> list[Batch]:
    """Return local batches as `Feed` gives them to a step; all have the same size."""
    number = job.virtual_ranks[0].size
    size, rest = divmod(job.order.global_batch_size, number)
    assert rest == 0 == job.order.lanes % number
    batch = Batch(
        torch.empty(size, *job.dataset.image_shape, dtype=torch.uint8, device=META),
        torch.empty(size, dtype=torch.int64, device=META),
        np.zeros(size, np.int64),
        np.zeros(size, np.int64),
        torch.empty(size, 2, dtype=torch.int64, device=META),
    )
    return [batch] * len(job.virtual_ranks)
