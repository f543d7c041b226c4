"""A training step on a device that cannot be read: nothing makes the host wait; and the average of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves

from benchmarks.meta_device import META, HostWaitError, Launches, batches_on_meta, job_on_meta
from distrain.data.manifest import Dataset
from distrain.training import optim
from distrain.training.optim import WeightAverage
from distrain.training.profiling import Profile
from distrain.training.step import TrainingStep

AUGMENT = {"flip": True, "crop_padding": 2, "cutout": 4}
OPTIONS = {"micro_batch_size": 12, "clip_norm": 1.0, "ema_decay": 0.9, "label_smoothing": 0.1}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "net": {"model": {"name": "net"}},
    "resnet9": {"model": {"name": "resnet9"}, "train": {"ema_decay": 0.9}, "augment": AUGMENT},
    "options": {"model": {"name": "resnet9"}, "train": OPTIONS, "augment": {**AUGMENT, "mixup": 0.2}},
    "virtual": {
        "model": {"name": "resnet9"},
        "train": {**OPTIONS, "virtual_ranks": 2, "optimizer": "adamw"},
        "augment": {**AUGMENT, "erasing": 0.1, "cutmix": 1.0},
    },
    "fp16": {"model": {"name": "net"}, "train": {"clip_norm": 1.0, "optimizer": "adamw"}},
}
BUDGET = {  # of each case, in their order; 4 micro-batches with `options`, 2 virtual ranks of 2 with `virtual`
    "augment": (0, 18, 18, 156, 0),
    "normalize": (2, 2, 16, 16, 2),
    "forward": (11, 40, 160, 160, 11),
    "loss": (2, 2, 96, 96, 2),
    "backward": (21, 40, 295, 270, 25),
    "exchange": (0, 0, 0, 37, 0),
    "norm": (3, 3, 0, 0, 0),
    "clip": (0, 0, 8, 8, 15),
    "optimizer": (1, 1, 1, 2, 5),
    "ema": (0, 2, 2, 2, 0),
    "rest": (6, 6, 25, 37, 6),
}
"""Largest number of operations on the device in a step, by part. Lower one when fewer are needed."""


def launches(dataset: Dataset, folder: Path, sections: dict[str, dict[str, Any]], fp16: bool) -> Counter[str]:
    """Run three steps; return the operations of the third, by part."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dir": str(dataset.root), "cache": "off"},
        "run": {"dir": str(folder), "device": "cpu"},
        **sections,
        "train": {"max_steps": 9, "global_batch_size": 48, **sections.get("train", {})},
    }
    with job_on_meta(tree, fp16) as job:
        step, batches = TrainingStep(job, Profile(META)), batches_on_meta(job)
        for number in range(3):
            with Launches() as count:
                result = step(number, batches, with_norm=number == 2)
            assert result.sums.device == META
            # With mixed labels, no correct predictions are counted.
            assert result.sums.shape == (len(batches), 1 if job.config.augment.mixes_labels else 2)
    return count.parts


def test_no_step_waits_for_the_device_and_few_operations_are_launched(small: Dataset, tmp_path: Path) -> None:
    counts = [launches(small, tmp_path, sections, fp16=name == "fp16") for name, sections in CASES.items()]
    rows = [["", *CASES], *([part, *(count[part] for count in counts)] for part in BUDGET)]
    table = "\n".join("".join(f"{cell:>11}" for cell in row) for row in rows)
    print(table)
    assert {part for count in counts for part in count} <= BUDGET.keys()
    over = [part for part in BUDGET if any(map(int.__gt__, (count[part] for count in counts), BUDGET[part]))]
    assert not over, f"more than the budget in {over}:\n{table}"


class Calls(Launches):
    """Records each operation, with the shapes of its tensors and the values of its other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = [
            (each.shape, each.stride(), each.dtype) if isinstance(each, Tensor) else each
            for each in tree_leaves((args, kwargs or {}))
            if isinstance(each, Tensor | float | int | torch.dtype | torch.device)
        ]
        self.calls.append((op.overloadpacket.__name__, arguments))
        return super().__torch_dispatch__(op, types, args, kwargs)


def test_only_rates_and_weights_differ_between_the_operations_of_two_steps(small: Dataset, tmp_path: Path) -> None:
    """A CUDA graph of a whole step would have to read the numbers that differ from the device."""
    tree = {
        "data": {"dir": str(small.root), "cache": "off"},
        "run": {"dir": str(tmp_path), "device": "cpu"},
        **CASES["options"],
        "train": {"max_steps": 9, "global_batch_size": 48, **OPTIONS, "micro_batch_size": None},
    }
    with job_on_meta(tree) as job:
        step, batches = TrainingStep(job, Profile(META)), batches_on_meta(job)
        recorded = [Calls() for _ in range(3)]
        for number, calls in enumerate(recorded):
            with calls:
                step(number, batches)
    one, other = (each.calls for each in recorded[1:])
    assert [name for name, _ in one] == [name for name, _ in other]
    differ = Counter(name for (name, arguments), (_, others) in zip(one, other, strict=True) if arguments != others)
    # Learning rate; EMA; mixup of images, and of losses in both passes.
    assert differ == {"_fused_sgd_": 1, "_foreach_lerp_": 1, "lerp_": 1, "mul": 4}


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize(
    "action",
    [
        lambda: on_meta().item(),
        lambda: float(on_meta()),
        lambda: bool(on_meta() > 0),
        lambda: on_meta(3).tolist(),
        lambda: on_meta(3).cpu(),
        lambda: on_meta(3).to("cpu", non_blocking=True),
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: torch.zeros(3).to(META),
        lambda: on_meta(3).copy_(torch.zeros(3)),
        lambda: on_meta(3)[on_meta(3) > 0],
        lambda: on_meta(3)[torch.tensor([0, 1])],
        lambda: on_meta(3).index_put_((on_meta(3) > 0,), on_meta()),
        lambda: on_meta(3).nonzero(),
        lambda: on_meta(3).masked_select(on_meta(3) > 0),
        lambda: on_meta(3).unique(),
        lambda: torch.equal(on_meta(3), on_meta(3)),
        lambda: on_meta(3).repeat_interleave(on_meta(3, dtype=torch.int64)),
    ],
)
def test_what_makes_the_host_wait_is_refused(action: Callable[[], object]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Launches():
        action()


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.ones(()).item(),
        lambda: bool(torch.ones(3).sum() > 0),
        lambda: torch.ones(3)[torch.ones(3) > 0],
        lambda: torch.ones(3).nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
    ],
)
def test_the_cpu_can_stand_for_the_device(action: Callable[[], object]) -> None:
    with pytest.raises(HostWaitError), Launches("cpu"):
        action()


def test_what_makes_nobody_wait_is_counted_if_it_is_on_the_device() -> None:
    with Launches() as count:
        torch.zeros(3).to(META, non_blocking=True)
        images = on_meta(4, 3)
        images[on_meta(4, dtype=torch.int64)].t().relu()
        torch.zeros(4).relu().tolist()
    assert count.parts == {"rest": 3}


# --- the average of the weights ---------------------------------------------------------------------------------------


class Module(nn.Module):
    """Parameters in two layouts, one of them used twice, and buffers of several types; one of these is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.head, self.tied = nn.Linear(4, 2), nn.Linear(4, 2)
        self.tied.weight = self.head.weight
        self.wide: Tensor
        self.calls: Tensor
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def change(self) -> None:
        """Change all tensors, as a training step does."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape))
            self.norm.running_var.add_(1)  # type: ignore[operator]
            self.norm.num_batches_tracked.add_(1)  # type: ignore[operator]
            self.wide.mul_(1.01)
        self.calls = self.calls + 1


def test_the_average_is_that_of_a_plain_loop_in_fp64() -> None:
    torch.manual_seed(0)
    module = Module()
    average = WeightAverage(module, 0.9)
    expected: dict[str, Tensor] = {}
    for update in range(50):
        module.change()
        average.update()
        decay = min(0.9, (1 + update) / (10 + update)) if update else 0.0
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * value.double()
            else:
                expected[name] = value
    state = average.module.state_dict()
    assert average.updates == 50
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert int(state["calls"]) == int(state["norm.num_batches_tracked"]) == 50
    assert average.module.tied.weight is average.module.head.weight


def test_the_average_has_the_bits_of_torchs() -> None:
    torch.manual_seed(0)
    module = Module()
    average = WeightAverage(module, 0.9)

    def update(averaged: Any, current: Any, number: Tensor) -> None:
        if averaged[0].is_floating_point():
            get_ema_multi_avg_fn(optim.ema_decay(0.9, int(number)))(averaged, current, number)

    torchs = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    for _ in range(30):
        module.change()
        average.update()
        torchs.update_parameters(module)
    same = average.module.state_dict()
    values = {name: value for name, value in torchs.module.state_dict().items() if value.is_floating_point()}
    assert len(values) == 11
    assert all(torch.equal(value, same[name]) for name, value in values.items())


def test_an_update_is_one_operation_for_each_type_and_waits_for_nothing() -> None:
    module = Module().to(META)
    average = WeightAverage(module, 0.9)
    for _ in range(2):
        with Launches() as count:
            average.update()
        assert sum(count.parts.values()) == 3  # fp32, fp64, int64


def test_the_average_has_the_memory_layout_of_the_weights(small: Dataset, tmp_path: Path) -> None:
    tree = {
        "data": {"dir": str(small.root), "cache": "off"},
        "run": {"dir": str(tmp_path), "device": "cpu"},
        "model": {"name": "resnet9"},
        "train": {"ema_decay": 0.9, "global_batch_size": 48},
    }
    with job_on_meta(tree) as job:
        ema = job.model.ema
        assert ema is not None
        pairs = list(zip(ema.module.parameters(), job.model.module.parameters(), strict=True))
    assert all(average.stride() == weight.stride() for average, weight in pairs)
    kernels = [weight for _, weight in pairs if weight.dim() == 4]
    assert kernels
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
