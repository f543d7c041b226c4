"""Every precision on a GPU: it learns, and a deterministic run resumes to the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from harness import trained

from distrain.data.manifest import Dataset

pytestmark = pytest.mark.gpu
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("precisions") / "data", 6000, 1000, image_size=32, lanes=8)


def _skip_without(precision: str, device: str) -> None:
    if device == "cpu" and precision in ("tf32", "fp16"):
        pytest.skip("needs a GPU")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns(
    precision: str, device: str, images: Dataset, most: int, train: Train, configuration: Configuration, measured: Any
) -> None:
    _skip_without(precision, device)
    # The recipe of configs/synthetic.yaml, which reaches 92.1 % on a CPU.
    changes = {
        "data": {"dir": str(images.root)},
        "augment": {"flip": False, "crop_padding": 0, "cutout": 0, "erasing": 0, "mixup": 0, "cutmix": 0},
        "train": {"max_steps": None, "epochs": 6, "global_batch_size": 64, "lr": 0.05, "schedule": "one_cycle",
                  "precision": precision, "deterministic": False},
    }  # fmt: skip
    run = train(configuration("run", **changes), most)
    result = json.loads((run / "result.json").read_text())
    measured("accuracy", 100 * result["accuracy"], "%")
    assert result["accuracy"] > 0.8
    assert (result["memory_gib"]["device"] is None) == (device == "cpu")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_deterministic_run_resumes_to_the_same_bits(
    precision: str, optimizer: str, large: str, device: str, train: Train, configuration: Configuration, tmp_path: Path
) -> None:
    _skip_without(precision, device)
    settings = {"precision": precision, "optimizer": optimizer, "lr": 1e-3, "clip_norm": 1.0, "ema_decay": 0.9}
    # Convolutions and BatchNorm: weights are channels_last on GPUs, and so must be the optimizer's state.
    sections = {"model": {"name": large}, "train": settings}
    whole = train(configuration("whole", **sections))
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoints/step-00000040")
    trained(train(configuration("cut", **sections))).same_as(trained(whole))
