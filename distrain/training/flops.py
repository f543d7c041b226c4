"""Floating-point operations (FLOPs) of training, and what part of the device's peak they reach (MFU).

Model FLOPs utilisation (MFU) after Chowdhery et al., "PaLM" (2022): the FLOPs of the model's forward and backward
passes per second, divided by the peak of all devices. FLOPs are those of convolutions and products of matrices, as
torch's `FlopCounterMode` counts them, except for gradients of convolutions; a model that computes activations again in
its backward pass has more of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

_IMAGES = 2
"""Number of images of which the passes are counted: BatchNorm may refuse a single one."""


@dataclass
class TrainingTime:
    """Time spent on training steps, by the devices of one attempt or of several.

    Attributes:
        seconds: the sum of all attempts.
        peak_flops: FLOPs that the devices would have done at their peak; None if a peak is not known.
    """

    seconds: float = 0.0
    peak_flops: float | None = 0.0

    def add(self, seconds: float, peak: float | None) -> None:
        """Add time of devices that together have this peak, in FLOP/s."""
        self.seconds += seconds
        self.peak_flops = None if self.peak_flops is None or peak is None else self.peak_flops + peak * seconds


@dataclass(frozen=True)
class Flops:
    """The FLOPs of a run, as far as they are known.

    Attributes:
        per_image: FLOPs of a forward and backward pass for each image; None if they cannot be counted.
        peak: FLOP/s of all devices together; None if not known.
        of_smaller: steps whose images are smaller, and the FLOPs for each of these.
    """

    per_image: int | None
    peak: float | None
    of_smaller: Sequence[tuple[range, int | None]] = ()

    def rates(self, steps: range, batch_size: int, time: TrainingTime) -> dict[str, float | None]:
        """Return `tflops_per_second` of all devices together, and `mfu`; None where something is not known.

        Args:
            steps: steps of the run that were trained.
            batch_size: images in each of them.
            time: the time that it took.
        """
        done = self._of_steps(steps, batch_size)
        if done is None:
            return {"tflops_per_second": None, "mfu": None}
        return {
            "tflops_per_second": done / max(time.seconds, 1e-9) / 1e12,
            "mfu": done / time.peak_flops if time.peak_flops else None,
        }

    def _of_steps(self, steps: range, batch_size: int) -> int | None:
        if self.per_image is None:
            return None
        flops = self.per_image * len(steps)
        for smaller, per_image in self.of_smaller:
            if per_image is None:
                return None
            both = range(max(steps.start, smaller.start), min(steps.stop, smaller.stop))
            flops -= (self.per_image - per_image) * len(both)
        return flops * batch_size


def of_model(module: nn.Module, image_shape: Sequence[int]) -> int | None:
    """Return the FLOPs of a forward and backward pass for each image; None if they cannot be counted.

    A copy of the model is run without values (torch's device `meta`), so it takes no time to compute, and changes
    nothing. It cannot be counted if the model reads values, or uses operations of another library than torch.

    Args:
        module: the model, on the CPU, before it is prepared for training on several processes.
        image_shape: height, width and channels.
    """
    height, width, channels = image_shape
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    counter, others = FlopCounterMode(display=False, custom_mapping=formulas), _OtherOperations()
    try:
        without_values = copy.deepcopy(module).to("meta")
        without_values.train()
        dtype = next(without_values.parameters()).dtype
        images = torch.empty(_IMAGES, channels, height, width, dtype=dtype, device="meta")
        with torch.random.fork_rng(devices=[]), counter, others:
            without_values(images).sum().backward()
    except Exception:  # the model's own code may fail on other tensors than those of a run in any way
        return None
    total = counter.get_total_flops()
    return total // _IMAGES if total and not others.used else None


def _convolution_backward(gradient: list[int], inputs: list[int], weight: list[int], *others: Any, **_: Any) -> int:
    """Return the FLOPs of a convolution's backward pass, from the arguments of `aten.convolution_backward`, or shapes.

    The gradients of inputs and weights each take as many as the forward pass. torch's own formula has too many for
    convolutions in groups.
    """
    transposed, needed = others[4], others[7]
    gradients = int(needed[0]) + int(needed[1])
    return gradients * conv_flop_count(inputs, weight, gradient, transposed)


class _OtherOperations(TorchDispatchMode):
    """Notes whether operations of other libraries are used, for which the counter has no formula."""

    used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used |= func.namespace not in ("aten", "prim", "prims", "profiler")
        return func(*args, **(kwargs or {}))


_PEAKS: Sequence[tuple[str, Mapping[str, float]]] = (
    (r"B200", {"fp32": 75, "tf32": 1125, "bf16": 2250, "fp16": 2250}),
    (r"H200|H100 80GB HBM3|H100 SXM5?|GH200 [0-9]+GB?", {"fp32": 67, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}),
    (r"H100 NVL|H200 NVL", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"H100 PCIe", {"fp32": 51, "tf32": 378, "bf16": 756.5, "fp16": 756.5}),
    (r"A100[- ](SXM4|PCIE|PCIe)-(40|80)GB|A100 80GB PCIe", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
    (r"A30", {"fp32": 10.3, "tf32": 82, "bf16": 165, "fp16": 165}),
    (r"A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    (r"A40", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    (r"L4", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121}),
    (r"L40S", {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362}),
    (r"GeForce RTX 4090", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    (r"GeForce RTX 3090", {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71}),
    (r"V100-SXM[23]-(16|32)GB(-LS)?", {"fp32": 15.7, "fp16": 125}),
    (r"V100-PCIE-(16|32)GB", {"fp32": 14, "fp16": 112}),
    (r"T4", {"fp32": 8.1, "fp16": 65}),
)
"""Names of GPUs as torch has them, without the vendor's, and TFLOP/s without sparsity by `train.precision`.

Sources are NVIDIA's data sheets of each GPU, of HGX for B200, and for GeForce the whitepapers of the architecture (Ada,
Ampere GA102; tensor cores that accumulate in fp32). Where a sheet gives a value with sparsity only, it is halved.
"""


def peak(device_name: str | None, precision: str) -> float | None:
    """Return the peak FLOP/s of a device; None for a CPU, or one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` has it. A part of a GPU (MIG) has another name, and no peak.
        precision: `train.precision`.
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name or "")
    for pattern, values in _PEAKS:
        if re.fullmatch(pattern, name):
            return values[precision] * 1e12 if precision in values else None
    return None
