"""A process and its GPU: it opens no context on another one, and no step waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Job

pytestmark = pytest.mark.gpu
Launched = Callable[..., Job]
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {"data": {"cache": "off"}},
    "device": {"data": {"cache": "device"}},
    "bf16": {"train": {"precision": "bf16", "ema_decay": 0.9, "clip_norm": 1.0, "label_smoothing": 0.1}},
    "fp16": {"train": {"precision": "fp16"}},
    "accumulated": {"train": {"micro_batch_size": 12}},
    "virtual ranks": {"train": {"virtual_ranks": 2}},
}
"""Options that have operations of their own in a step."""
ACCUMULATION_STEPS = {"accumulated": 4, "virtual ranks": 2}
"""Passes of one process in a step, for options with several; two processes have half of them each."""


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
def watched(
    configuration: Configuration, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Configuration]:
    """`watched(MODEL, OPTIONS, PROCESSES)`: a run of 85 steps, in 50 of which waiting for the GPU is an error."""

    def build(model: str, options: str, processes: int = 1) -> dict[str, dict[str, Any]]:
        steps = max(1, ACCUMULATION_STEPS.get(options, 1) // processes)
        for name, value in (("OBSERVED", tmp_path), ("WAITING", model), ("ACCUMULATION_STEPS", steps)):
            monkeypatch.setenv(name, str(value))
        tree = configuration("run", model={"name": "models_for_gpus:Waiting"})
        # In ram: torch's check is for all threads, and the one that reads waits where it fills a cache on the GPU.
        for section, values in {"data": {"cache": "ram"}, **OPTIONS[options]}.items():
            tree[section] |= values
        # Nothing is logged or saved in these steps: both read the device.
        tree["train"] |= {"max_steps": 85, "deterministic": False}
        tree |= {"checkpoint": {"every_steps": 0, "every_minutes": 0}, "log": {"every_steps": 85, "report": False}}
        return tree

    yield build
    if device == "cuda":  # after a failure, it would fail the next tests too
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", ["net", "resnet9"])
def test_no_step_waits_for_the_gpu(
    model: str, options: str, device: str, train: Train, watched: Configuration, tmp_path: Path
) -> None:
    if device == "cpu" and (options in ("fp16", "device") or model == "resnet9"):
        pytest.skip("needs a GPU")
    train(watched(model, options))
    assert (tmp_path / "watched").exists()


@pytest.mark.parametrize("options", ["bf16", "accumulated", "virtual ranks"])
@pytest.mark.usefixtures("several")
def test_no_step_of_two_processes_waits_for_the_gpu(
    options: str, device: str, train: Train, watched: Configuration, tmp_path: Path
) -> None:
    train(watched("resnet9" if device == "cuda" else "net", options, 2), 2)
    assert (tmp_path / "watched").exists()
