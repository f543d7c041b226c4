"""Compiled models on a GPU, with CUDA graphs too, train what those that are not compiled train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import trained
from safetensors.torch import load_file
from torch._dynamo.utils import counters

pytestmark = pytest.mark.gpu
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"data": {"cache": "off"}},
    "accumulated": {"train": {"micro_batch_size": 12, "ema_decay": 0.9}, "eval": {"every_steps": 15}},
    "virtual ranks": {"train": {"virtual_ranks": 4}},
}
"""Options under which gradients have to outlive the next replay of a CUDA graph."""
MODEL = "models_for_gpus:Convolutional"


@pytest.fixture
def build(configuration: Configuration) -> Configuration:
    """`build(NAME, OPTIONS, MODE)`: a run in fp64 with a mode of `train.compile`."""

    def tree(name: str, options: str, mode: str) -> dict[str, dict[str, Any]]:
        sections = {section: dict(values) for section, values in OPTIONS[options].items()}
        sections["train"] = {**sections.get("train", {}), "precision": "fp64", "compile": mode}
        return configuration(name, **sections, model={"name": MODEL})

    return tree


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], Path]:
    """The runs of one process so far, by options and mode."""
    return {}


@pytest.fixture
def train_once(device: str, train: Train, build: Configuration, runs: dict[tuple[str, str], Path]) -> Train:
    """`train_once(OPTIONS, MODE)` trains a run if no test has done so; returns its folder."""

    def get(options: str, mode: str) -> Path:
        if (options, mode) not in runs:
            counters.clear()
            runs[options, mode] = train(build("run-" + mode, options, mode))
            _check_compiled(mode, device)
        return runs[options, mode]

    return get


def _check_compiled(mode: str, device: str) -> None:
    """Check by torch's counters that the whole model was one graph, and with CUDA graphs if the mode has them."""
    assert counters["stats"]["unique_graphs"] == (0 if mode == "off" else 1)
    assert not counters["graph_break"]
    if device == "cuda":
        assert not counters["inductor"]["cudagraph_skips"]


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a weight of two runs."""
    a, b = (load_file(run / "checkpoints/step-00000040/model.safetensors") for run in (one, other))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_trains_the_same(mode: str, options: str, train_once: Train) -> None:
    assert largest_difference(train_once(options, "off"), train_once(options, mode)) < 1e-8


def test_several_gpus_train_the_same(several: int, train: Train, build: Configuration) -> None:
    plain, compiled = (train(build(mode, "accumulated", mode), several) for mode in ("off", "reduce-overhead"))
    assert largest_difference(plain, compiled) < 1e-8


def test_a_resumed_run_has_the_same_bits(train: Train, train_once: Train, build: Configuration, tmp_path: Path) -> None:
    whole = train_once("plain", "default")
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints/step-00000040")
    trained(train(build("cut", "plain", "default"))).same_as(trained(whole))
