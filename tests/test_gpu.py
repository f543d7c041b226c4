"""Tests on a GPU: the same samples and the same bits as before, and features of GPUs. Skipped without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ids_by_step
from safetensors.torch import load_file

import distrain
from distrain.data.manifest import Dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
Weights = dict[str, torch.Tensor]


def train(dataset: Dataset, run: Path, /, **sections: dict[str, Any]) -> Weights:
    tree: dict[str, dict[str, Any]] = {
        "data": {"dir": str(dataset.root), "audit": True},
        "run": {"dir": str(run), "device": "cuda"},
        "augment": {"flip": True, "crop_padding": 2, "cutout": 4, "mixup": 0.2},
        "train": {"max_steps": 40, "global_batch_size": 48, "lr": 0.01, "deterministic": True, "ema_decay": 0.9},
        "checkpoint": {"every_steps": 20, "keep": 0},
        "eval": {"every_steps": 0},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    distrain.train(tree)
    return load_file(run / "checkpoints/step-00000040/model.safetensors")


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", ["net", "resnet9"])
def test_the_kind_of_cache_does_not_change_the_bits(model: str, small: Dataset, tmp_path: Path) -> None:
    ends = [
        train(small, tmp_path / cache, data={"cache": cache}, model={"name": model})
        for cache in ("off", "ram", "device")
    ]
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])
    assert ids_by_step(tmp_path / "off") == ids_by_step(tmp_path / "device")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_deterministic_run_resumes_to_the_same_bits(precision: str, small: Dataset, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"name": "resnet9"}, "train": {"precision": precision}}
    whole = train(small, tmp_path / "whole", **sections)
    train(small, tmp_path / "cut", **sections)
    (tmp_path / "cut/result.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000040")
    assert same_bits(train(small, tmp_path / "cut", **sections), whole)


def test_the_gpu_and_the_cpu_train_the_same(small: Dataset, tmp_path: Path) -> None:
    ends = [
        train(small, tmp_path / device, run={"device": device}, train={"precision": "fp64"})
        for device in ("cpu", "cuda")
    ]
    assert ids_by_step(tmp_path / "cpu") == ids_by_step(tmp_path / "cuda")
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-10


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains(mode: str, small: Dataset, tmp_path: Path) -> None:
    end = train(small, tmp_path / "run", train={"compile": mode, "deterministic": False, "precision": "bf16"})
    assert all(bool(value.isfinite().all()) for value in end.values())
