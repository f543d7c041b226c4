"""The promise on GPUs: the same samples, and the same bits, whatever is cached, killed or started in parallel."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Job, trained
from runs import ids_by_step
from safetensors.torch import load_file

import distrain
from distrain.tools.hash_runs import check_equal, hash_runs

pytestmark = pytest.mark.gpu
Train = Callable[..., Path]
Configuration = Callable[..., dict[str, dict[str, Any]]]
FP64 = {"precision": "fp64", "deterministic": False}


def distance(one: Path, other: Path) -> float:
    """The largest difference of a weight of two runs."""
    a, b = (load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors") for run in (one, other))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_the_kind_of_cache_does_not_change_the_bits(
    large: str, device: str, train: Train, configuration: Configuration
) -> None:
    caches = ("off", "ram", "device") if device == "cuda" else ("off", "ram")
    runs = [trained(train(configuration(each, data={"cache": each}, model={"name": large}))) for each in caches]
    for run in runs[1:]:
        run.same_as(runs[0])


def test_a_gpu_trains_as_a_cpu_does(device: str, train: Train, configuration: Configuration, tmp_path: Path) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU")
    ours = train(configuration("gpu", train=FP64))
    theirs = configuration("cpu", train=FP64, run={"device": "cpu"})
    distrain.train(theirs)
    assert ids_by_step(ours) == ids_by_step(tmp_path / "cpu")
    assert distance(ours, tmp_path / "cpu") < 1e-10


@pytest.mark.parametrize("model", ["net", "models_for_tests:Normed"])
def test_fp64_is_the_same_on_any_number_of_gpus(
    model: str, several: int, sizes: list[int], train: Train, configuration: Configuration
) -> None:
    runs = [train(configuration(str(w), train=FP64, model={"name": model}), w) for w in sizes]
    for run in runs[1:]:
        assert ids_by_step(run) == ids_by_step(runs[0])
        assert distance(run, runs[0]) < 1e-10


@pytest.fixture
def steps(device: str) -> int:
    """Steps of a run that is killed after 21 of them: enough of them on GPUs too, where one takes milliseconds."""
    return 200 if device == "cuda" else 40


@pytest.mark.parametrize("virtual", [False, True], ids=["deterministic", "virtual ranks"])
def test_killed_and_resumed_ends_with_the_same_bits(
    virtual: bool,
    steps: int,
    large: str,
    most: int,
    train: Train,
    launched: Callable[..., Job],
    configuration: Configuration,
) -> None:
    options = {"train": {"precision": "bf16", "ema_decay": 0.9, "max_steps": steps}, "model": {"name": large}}
    options["train"] |= {"virtual_ranks": 8} if virtual else {}
    options["checkpoint"] = {"keep": 2}
    whole = trained(train(configuration("whole", **options), most))
    killed = configuration("killed", **options)
    with launched(killed, most) as job:
        job.wait_for("train", 21)
        job.signal("everything", number=signal.SIGKILL)
        job.all_gone(60)
    assert not Path(killed["run"]["dir"], "result.json").exists(), "killed too late to prove anything"
    trained(train(killed, most)).same_as(whole)


def test_virtual_ranks_have_the_same_bits_on_any_number_of_gpus(
    large: str, sizes: list[int], train: Train, configuration: Configuration
) -> None:
    options = {"train": {"virtual_ranks": 8, "precision": "bf16"}, "model": {"name": large}}
    # With one GPU: the same run twice.
    runs = [train(configuration(f"{index}-{w}", **options), w) for index, w in enumerate([1, *sizes])]
    check_equal(hash_runs(runs))


def test_virtual_ranks_resume_on_another_number_of_gpus(
    steps: int, several: int, train: Train, launched: Callable[..., Job], configuration: Configuration
) -> None:
    options = {"train": {"virtual_ranks": 8, "max_steps": steps}, "checkpoint": {"keep": 2}}
    whole, elastic = configuration("whole", **options), configuration("elastic", **options)
    train(whole)
    with launched(elastic, several) as job:
        job.wait_for("train", 21)
        job.signal("everything", number=signal.SIGKILL)
        job.all_gone(60)
    train(elastic)
    check_equal(hash_runs([Path(whole["run"]["dir"]), Path(elastic["run"]["dir"])]))
