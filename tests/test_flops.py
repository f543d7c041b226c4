"""FLOPs of a model, and the part of a device's peak that training reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import distrain
from distrain import cli
from distrain.data.manifest import Dataset
from distrain.errors import Stopped
from distrain.models.small import Small
from distrain.runs import results
from distrain.training import flops
from distrain.training.flops import Flops, TrainingTime


class Known(nn.Module):
    """Two convolutions and a linear layer, for images of 8×8×3."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6 * 64, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.two(self.norm(self.one(images)).relu()).flatten(1))
        return logits


class Grouped(nn.Module):
    """Depthwise, grouped and transposed convolutions, for images of 8×8×3."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.grouped = nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 4, 1, groups=2)
        self.transposed, self.head = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Linear(6 * 256, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.transposed(self.grouped(self.depthwise(images))).flatten(1))
        return logits


class Reading(Known):
    """Decides by a value."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (2 if float(images.sum()) > 0 else 1)


@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda _, gradient: 2 * gradient)


class Custom(Known):
    """Uses an operation of another library."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = twice(super().forward(images))
        return logits


def test_flops_are_those_of_the_formula() -> None:
    one, two, head = 2 * 64 * 9 * 3 * 4, 2 * 64 * 9 * 4 * 6, 2 * 6 * 64 * 10
    # Backward: gradients of weights and of inputs, each as much as forward; the images have none.
    assert flops.of_model(Known(), (8, 8, 3)) == 2 * one + 3 * two + 3 * head


def test_groups_of_a_convolution_are_counted_alone() -> None:
    depthwise, grouped, transposed, head = 2 * 64 * 9 * 6, 2 * 64 * 3 * 4, 2 * 64 * 4 * 4 * 3, 2 * 6 * 256 * 10
    assert flops.of_model(Grouped(), (8, 8, 3)) == 2 * depthwise + 3 * (grouped + transposed + head)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "efficientnet_b0"])
def test_training_takes_three_times_the_flops_of_a_forward_pass(name: str) -> None:
    with torch.device("meta"):
        module = getattr(torchvision.models, name)()
    counter = FlopCounterMode(display=False)
    with counter:
        module(torch.empty(2, 3, 64, 64, device="meta"))
    training = flops.of_model(module, (64, 64, 3))
    assert training is not None
    assert training / (counter.get_total_flops() / 2) == pytest.approx(3, rel=0.03)  # the images have no gradient


def test_counting_changes_neither_the_model_nor_random_numbers() -> None:
    module = Known().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    assert flops.of_model(nn.Sequential(module, nn.Dropout()), (8, 8, 3))
    assert torch.equal(torch.get_rng_state(), random)
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("model", [Reading(), Custom(), nn.Flatten()])
def test_what_cannot_be_counted_is_not_guessed(model: nn.Module) -> None:
    assert flops.of_model(model, (8, 8, 3)) is None


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "fp16", 312),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # its tensor cores have no bf16
        ("NVIDIA H100 80GB HBM3", "fp64", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA Z1", "bf16", None),
        (None, "bf16", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets_or_not_known(
    name: str | None, precision: str, tflops: float | None
) -> None:
    assert flops.peak(name, precision) == (None if tflops is None else tflops * 1e12)


def test_rates_follow_from_images_and_time() -> None:
    steps, unknown = range(7, 37), {"tflops_per_second": None, "mfu": None}
    assert Flops(10**9, None).rates(steps, 100, TrainingTime(3.0, 12e12)) == {"tflops_per_second": 1.0, "mfu": 0.25}
    assert Flops(10**9, None).rates(steps, 100, TrainingTime(3.0, None)) == {"tflops_per_second": 1.0, "mfu": None}
    assert Flops(None, None).rates(steps, 100, TrainingTime(3.0, 12e12)) == unknown
    assert Flops(10**9, None).rates(range(0), 100, TrainingTime()) == {"tflops_per_second": 0.0, "mfu": None}
    growing = Flops(10**9, None, [(range(5), 10**8), (range(5, 17), 10**8)])  # ten of the steps have smaller images
    assert growing.rates(steps, 100, TrainingTime(3.0, None)) == {"tflops_per_second": 0.7, "mfu": None}
    assert Flops(10**9, None, [(range(5), None)]).rates(steps, 100, TrainingTime(3.0, None)) == unknown
    assert results.format_rate(1234.5, 1.0, 0.25) == "1,234 images/s, 1 TFLOP/s, MFU 25.0 %"
    assert results.format_rate(1234.5, None, None) == "1,234 images/s"


def test_a_run_has_its_rates_in_metrics_result_status_and_report(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(flops, "peak", lambda name, precision: 1e12)  # as if the CPU were in the table
    result = distrain.train(
        {
            "data": {"dir": str(small.root)},
            "run": {"dir": str(run)},
            "model": {"name": "small"},
            "train": {"epochs": 1, "global_batch_size": 64},
            "log": {"every_steps": 5, "report": False},
        }
    )
    per_image = flops.of_model(Small(10, (3, 16, 16)), small.manifest.image_shape)
    assert per_image is not None
    assert json.loads((run / "setup.json").read_text())["model"]["flops_per_image"] == per_image
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (each for each in lines if "train/loss" in each):
        assert line["train/tflops_per_second"] == pytest.approx(line["train/images_per_second"] * per_image / 1e12)
        assert line["train/mfu"] == pytest.approx(line["train/tflops_per_second"])
    assert result.tflops_per_second == pytest.approx(result.images_per_second * per_image / 1e12)
    assert result.mfu == pytest.approx(result.tflops_per_second)
    assert cli.main(["report", str(run)]) == 0
    page = next(run.rglob("*.html"))
    assert "peak (MFU)" in page.read_text()
    assert "MFU by step" in page.read_text()
    assert cli.main(["status", str(run)]) == 0
    assert "MFU" in capsys.readouterr().out


@pytest.mark.parametrize("first", [1e12, None])
def test_mfu_after_a_resume_is_that_of_the_devices_of_both_attempts(
    first: float | None, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is stopped between two lines of metrics.jsonl; the only line is about all steps."""
    run, second = tmp_path / "run", 3e12
    tree = {
        "data": {"dir": str(small.root)},
        "run": {"dir": str(run)},
        "model": {"name": "models_for_tests:Faulty"},
        "train": {"epochs": 2, "global_batch_size": 64},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "log": {"report": False},
    }
    monkeypatch.setattr(flops, "peak", lambda name, precision: first)
    monkeypatch.setenv("FAULT", "stop:0:7")
    with pytest.raises(Stopped):
        distrain.train(tree)
    (state,) = run.glob("checkpoints/*/state.json")
    before = json.loads(state.read_text())["losses"]["seconds"]
    monkeypatch.delenv("FAULT")
    monkeypatch.setattr(flops, "peak", lambda name, precision: second)
    result = distrain.train(tree)
    (line,) = [each for each in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in each]
    if first is None:
        assert result.mfu is None
        assert "train/mfu" not in line
        return
    seconds = 30 * 64 / result.images_per_second
    mean_peak = (before * first + (seconds - before) * second) / seconds
    assert result.mfu == pytest.approx(result.tflops_per_second * 1e12 / mean_peak)
    assert line["train/mfu"] == pytest.approx(result.mfu)
