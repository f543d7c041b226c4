"""Saves while training continues: what is saved, how they end, and what waits for them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_disks import hold_folder, refuse_folder
from datasets import make
from group import fork_server
from harness import TrainedRun, small_run, trained
from runs import metrics_but_times
from safetensors.torch import load_file
from torch import Tensor

import distrain
from distrain.data.manifest import Dataset
from distrain.distributed.watchdog import Watchdog
from distrain.errors import Stopped
from distrain.runs import attempts, checkpoint
from distrain.training import background_save, checkpointing
from distrain.training.background_save import BackgroundSave, HostBuffers

PARTIAL = ".partial-step-00000010"


def tree(data: Path, run: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """20 steps with a checkpoint every 10; nothing else waits for a checkpoint."""
    base = {
        "model": {"name": "models_for_tests:Linear"}, "train": {"max_steps": 20}, "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 10, "keep": 0},
    }  # fmt: skip
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    tree = small_run(data, run, **merged)
    tree["train"]["epochs"] = None
    tree["data"]["audit"] = True
    tree["log"]["report"] = False
    return tree


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Call `action` after so many steps, before what is due then."""
    real = Watchdog.step

    def count(self: Watchdog, done: int) -> None:
        real(self, done)
        if done == step:
            action()

    monkeypatch.setattr(Watchdog, "step", count)


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    folder = checkpoint.path_of(run / "checkpoints", step)
    return {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def test_steps_during_a_save_do_not_change_what_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "model": {"name": "models_for_tests:FromImages"},  # has BatchNorm, and matrices for Muon
        "train": {"optimizer": "muon", "ema_decay": 0.9, "virtual_ranks": 2, "max_steps": 20},
    }
    distrain.train(tree(data, tmp_path / "whole", **changes))
    begun, answers = hold_folder(monkeypatch, PARTIAL)
    at_step(monkeypatch, 17, lambda: begun.wait(60) and answers.set())  # seven steps while nothing is written yet
    distrain.train(tree(data, tmp_path / "delayed", **changes))
    for step in (10, 20):
        whole, delayed = tensors(tmp_path / "whole", step), tensors(tmp_path / "delayed", step)
        assert whole.keys() == delayed.keys()
        assert all(torch.equal(whole[name], delayed[name]) for name in whole)
    states = [
        json.loads((tmp_path / run / "checkpoints/step-00000010/state.json").read_text())
        for run in ("whole", "delayed")
    ]
    for state in states:
        for name in ("seconds", "compile_seconds", "losses"):
            del state[name]
    assert states[0] == states[1]
    trained(tmp_path / "delayed").same_as(trained(tmp_path / "whole"))


def test_a_checkpoint_that_failed_while_training_continued_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset: Dataset = make(tmp_path / "data", 600, 60, image_size=8, val_fraction=0.3)
    changes: dict[str, Any] = {"eval": {"every_steps": 4}, "checkpoint": {"every_steps": 0, "keep": 0}}
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = distrain.train(tree(dataset.root, whole, **changes))
    best = int(result.checkpoint.removeprefix("step-"))
    scores = {line["step"]: line["val/accuracy"] for line in metrics_but_times(whole) if "val/accuracy" in line}
    others = {step: score for step, score in scores.items() if step != best}
    second = max(others, key=lambda step: (others[step], -step))
    refuse_folder(monkeypatch, f".partial-step-{best:08d}")
    assert best < 20  # a later save succeeds, so the run does too
    result = distrain.train(tree(dataset.root, run, **changes))
    assert f"step {best}: no checkpoint could be saved: {run}" in caplog.text
    assert result.checkpoint == f"step-{second:08d}"
    assert metrics_but_times(run)[:-1] == metrics_but_times(whole)[:-1]  # but for the scores on test


def test_a_fault_of_the_thread_ends_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(*_: object) -> None:
        raise ZeroDivisionError("a fault while old checkpoints are deleted")

    monkeypatch.setattr(checkpoint, "prune", prune)
    with pytest.raises(ZeroDivisionError, match="old checkpoints"):
        distrain.train(tree(data, tmp_path / "run"))


def test_a_stop_waits_for_the_pending_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answers = hold_folder(monkeypatch, PARTIAL)

    def stop() -> None:
        assert begun.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        real = BackgroundSave.result
        monkeypatch.setattr(BackgroundSave, "result", lambda self: (answers.set(), real(self)))

    at_step(monkeypatch, 12, stop)
    with pytest.raises(Stopped, match="step 1[2-9] is saved"):
        distrain.train(tree(data, tmp_path / "run"))
    stopped, before = checkpoint.steps(tmp_path / "run/checkpoints")
    assert 12 <= stopped < 20
    assert before == 10


def test_an_error_waits_for_the_pending_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, answers = hold_folder(monkeypatch, PARTIAL)
    real = BackgroundSave.wait

    def fail() -> None:
        assert begun.wait(60)
        raise ZeroDivisionError("a fault of the model")

    def wait(self: BackgroundSave, seconds: float | None = None) -> bool:
        (attempt,) = attempts.history(tmp_path / "run")
        assert attempt["ended"] is None  # the lease is held as long as something is written
        answers.set()
        return real(self, seconds)

    monkeypatch.setattr(BackgroundSave, "wait", wait)
    at_step(monkeypatch, 12, fail)
    with pytest.raises(ZeroDivisionError, match="a fault of the model"):
        distrain.train(tree(data, tmp_path / "run"))
    assert checkpoint.newest_verified(tmp_path / "run/checkpoints") == 10


def test_a_job_that_lost_its_folder_does_not_commit_the_pending_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise KeyboardInterrupt  # ends the thread, where the real one ends the process

    begun, answers = hold_folder(monkeypatch, PARTIAL)

    def take_over() -> None:
        assert begun.wait(60)
        attempts.path_of(tmp_path / "run", 2).write_text("{}")
        answers.set()

    monkeypatch.setattr(checkpointing.os, "_exit", end)
    at_step(monkeypatch, 12, take_over)
    with pytest.raises((KeyboardInterrupt, distrain.AgainError)):
        distrain.train(tree(data, tmp_path / "run"))
    assert codes == [75]
    assert checkpoint.steps(tmp_path / "run/checkpoints") == []


def test_a_checkpoint_that_is_not_written_in_time_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from distrain.distributed import watchdog as module
    from distrain.environment import Environment

    ended, answers = threading.Event(), threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set() if code == 75 else None)
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(module.faulthandler, "dump_traceback", lambda *_, **__: None)
    watchdog = Watchdog({"save": 0.2, "train": 60}, tmp_path, Environment())
    save = BackgroundSave(1000, answers.wait)
    watchdog.enter("train")
    watchdog.saving(save)
    assert watchdog.status.is_saving
    deadline = time.monotonic() + 30
    while not ended.wait(0.01) and time.monotonic() < deadline:
        watchdog.heartbeat()  # the main thread makes progress
    answers.set()
    watchdog.close()
    assert "the checkpoint of step 1,000 is not written after 0.2 s: the disk of run.dir does not answer" in caplog.text


KILLED: dict[str, Any] = {"checkpoint": {"every_steps": 6, "keep": 1}}
POINTS = {
    "while it is written": ("open", 13),
    "before it counts": ("os.rename", 2),
    "while old ones are deleted": ("os.remove", 2),
}
"""Points of the second save: the name of an audit event of Python, and which of them."""


def train_until(tree: dict[str, Any], event: str, number: int) -> None:
    """Train, and end this process by SIGKILL before the n-th audit event whose name begins so, of the thread."""
    seen: list[str] = []

    def count(name: str, _: object) -> None:
        if name.startswith(event) and threading.current_thread().name == "distrain-save":
            seen.append(name)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    distrain.train(tree)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """The run of the kills, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    distrain.train(tree(data, run, **KILLED))
    return trained(run)


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_during_a_save_ends_with_the_same_bits(
    point: str, data: Path, tmp_path: Path, whole: TrainedRun
) -> None:
    run = tmp_path / "run"
    process = fork_server().Process(target=train_until, args=(tree(data, run, **KILLED), *POINTS[point]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    newest = checkpoint.steps(run / "checkpoints")[:1]
    assert newest == ([12] if "deleted" in point else [6])
    assert checkpoint.problem(checkpoint.path_of(run / "checkpoints", newest[0])) is None
    distrain.train(tree(data, run, **KILLED))
    trained(run).same_as(whole)
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_copies_do_not_change_with_the_tensors_and_their_memory_is_reused() -> None:
    buffers = HostBuffers()
    image = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    weight = torch.ones(3, requires_grad=True)
    (one, other) = buffers.copy([{"image": image, "weight": weight, "tied": weight}, {"weight": torch.tensor(True)}])
    expected = image.clone()
    with torch.no_grad():
        image.zero_()
        weight.zero_()
    assert torch.equal(one["image"], expected)
    assert one["image"].stride() == expected.stride()
    assert torch.equal(one["weight"], torch.ones(3))
    assert not one["weight"].requires_grad
    assert torch.equal(other["weight"], torch.tensor(True))
    addresses = {name: tensor.data_ptr() for name, tensor in one.items()}
    assert len(set(addresses.values())) == 3
    (again,) = buffers.copy([{"image": image, "weight": weight, "tied": torch.zeros(4)}])
    assert (again["image"].data_ptr(), again["weight"].data_ptr()) == (addresses["image"], addresses["weight"])
    assert torch.equal(again["tied"], torch.zeros(4))
    assert torch.equal(again["image"], image)


def test_a_host_without_memory_for_the_copy_is_an_error_of_the_save() -> None:
    buffers = HostBuffers()
    buffers.copy([{"small": torch.ones(3)}])
    huge = torch.ones(1).expand(2**55)
    message = checkpointing.os_error_of(lambda: buffers.copy([{"small": torch.ones(3), "huge": huge}]))
    assert message is not None
    assert message.startswith("memory of the host: has no room for a copy of the weights and the optimizer's state (")
    assert buffers._buffers == {}


class _OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def test_copies_from_a_gpu_are_waited_for_once_and_their_memory_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    queue: list[Callable[[], object]] = []
    real_copy, real_empty = torch.Tensor.copy_, torch.empty_like

    def empty_like(tensor: Tensor, *, device: str, pin_memory: bool, requires_grad: bool) -> Tensor:
        calls.append(f"pinned {device}" if pin_memory else device)
        return real_empty(tensor.as_subclass(torch.Tensor))

    def copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
        calls.append("copy" if non_blocking else "copy that the host waits for")
        queue.append(lambda: real_copy(target, source.as_subclass(torch.Tensor)))  # the GPU does it later

    class Stream:
        def synchronize(self) -> None:
            calls.append("synchronize")
            for work in queue:
                work()

    monkeypatch.setattr(background_save.torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    buffers = HostBuffers()
    weights = {name: torch.ones(4).as_subclass(_OnGpu) for name in ("one", "other")}
    (copies,) = buffers.copy([weights])
    assert calls == ["pinned cpu", "pinned cpu", "copy", "copy", "synchronize"]
    assert all(torch.equal(each, torch.ones(4)) for each in copies.values())
    calls.clear()
    buffers.copy([weights])
    assert calls == ["copy", "copy", "synchronize"]
