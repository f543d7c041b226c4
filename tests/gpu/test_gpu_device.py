"""A process and its GPU: it opens no context on another one, and no step waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job

pytestmark = pytest.mark.gpu
Launched = Callable[..., Job]
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {"data": {"cache": "off"}},
    "bf16": {"train": {"precision": "bf16", "ema_decay": 0.9, "clip_norm": 1.0, "label_smoothing": 0.1}},
    "fp16": {"train": {"precision": "fp16"}},
    "accumulated": {"train": {"micro_batch_size": 24}},
    "virtual ranks": {"train": {"virtual_ranks": 2}},
}
"""Options that have operations of their own in a step."""


@pytest.mark.parametrize("cache", ["off", "ram", "device"])
def test_a_process_opens_no_context_on_another_gpu(
    cache: str, device: str, most: int, launched: Launched, configuration: Configuration, tmp_path: Path
) -> None:
    if device == "cpu" and cache == "device":
        pytest.skip("needs a GPU")
    tree = configuration("run", model={"name": "models_for_gpus:Contexts"}, data={"cache": cache})
    with launched(tree, most, environ={"OBSERVED": str(tmp_path)}) as job:
        assert job.wait() == 0, job.output
    for rank in range(most):
        assert (tmp_path / f"rank-{rank}").read_text() == (str(rank) if device == "cuda" else "")


@pytest.fixture
def watched(configuration: Configuration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Configuration:
    """`watched(MODEL, OPTIONS)`: a run in whose steps 10 to 60 waiting for the GPU is an error."""

    def build(model: str, options: str) -> dict[str, dict[str, Any]]:
        monkeypatch.setenv("OBSERVED", str(tmp_path))
        monkeypatch.setenv("WAITING", model)
        tree = configuration("run", **OPTIONS[options], model={"name": "models_for_gpus:Waiting"})
        # Nothing is logged or saved in these steps: both read the device.
        tree["train"] |= {"max_steps": 80, "deterministic": False}
        tree |= {"checkpoint": {"every_steps": 0, "every_minutes": 0}, "log": {"every_steps": 80, "report": False}}
        return tree

    return build


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", ["net", "resnet9"])
def test_no_step_waits_for_the_gpu(
    model: str, options: str, device: str, train: Train, watched: Configuration, tmp_path: Path
) -> None:
    if device == "cpu" and (options == "fp16" or model == "resnet9"):
        pytest.skip("needs a GPU")
    train(watched(model, options))
    assert (tmp_path / "watched").exists()


@pytest.mark.parametrize("options", ["bf16", "accumulated", "virtual ranks"])
def test_no_step_of_several_processes_waits_for_the_gpu(
    options: str, several: int, device: str, train: Train, watched: Configuration, tmp_path: Path
) -> None:
    train(watched("resnet9" if device == "cuda" else "net", options), several)
    assert (tmp_path / "watched").exists()
