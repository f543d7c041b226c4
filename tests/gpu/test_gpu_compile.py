"""Compiled models on a GPU, with CUDA graphs too, train what those that are not compiled train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import trained
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"data": {"cache": "off"}},
    "accumulated": {"train": {"micro_batch_size": 12, "ema_decay": 0.9}, "eval": {"every_steps": 15}},
    "virtual ranks": {"train": {"virtual_ranks": 4}},
}
"""Options under which gradients have to outlive the next replay of a CUDA graph."""
FP64 = {"model": {"name": "models_for_tests:Normed"}, "train": {"precision": "fp64"}}


def _weights(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints/step-00000040/model.safetensors")


@pytest.fixture
def build(configuration: Configuration) -> Configuration:
    def tree(name: str, options: str, mode: str) -> dict[str, dict[str, Any]]:
        sections = {section: dict(values) for section, values in OPTIONS[options].items()}
        sections["train"] = {**sections.get("train", {}), **FP64["train"], "compile": mode}
        return configuration(name, **{**sections, "model": FP64["model"]})

    return tree


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_trains_the_same(mode: str, options: str, train: Train, build: Configuration) -> None:
    plain, compiled = (_weights(train(build(each, options, each))) for each in ("off", mode))
    largest = max(float((plain[name] - compiled[name]).abs().max()) for name in plain)
    assert largest < 1e-8


def test_several_gpus_train_the_same(several: int, train: Train, build: Configuration) -> None:
    plain, compiled = (
        _weights(train(build(each, "accumulated", each), several)) for each in ("off", "reduce-overhead")
    )
    assert max(float((plain[name] - compiled[name]).abs().max()) for name in plain) < 1e-8


def test_a_resumed_run_has_the_same_bits(train: Train, build: Configuration) -> None:
    whole, cut = (build(name, "plain", "default") for name in ("whole", "cut"))
    expected, run = trained(train(whole)), train(cut)
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000040")
    trained(train(cut)).same_as(expected)
