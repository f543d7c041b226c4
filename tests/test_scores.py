"""Scores of an evaluation and of training: each is compared with its formula, or with what a run trained."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from datasets import make
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import distrain
from benchmarks.meta_device import META, Launches
from distrain import machine
from distrain.data.manifest import Dataset
from distrain.distributed.collectives import Collectives
from distrain.distributed.compilation import Compilation
from distrain.distributed.gradients import DataParallel
from distrain.environment import World
from distrain.runs import results, trackers
from distrain.runs.results import Confusion
from distrain.training import meters
from distrain.training.evaluation import Counts, _Counter, is_in_top
from distrain.training.meters import TrainAccuracy

CLASSES = 7
LINEAR = "models_for_tests:Linear"


def confusion(truth: Any, predicted: Any, classes: int = CLASSES) -> Confusion:
    codes = np.asarray(truth) * classes + np.asarray(predicted)
    return Confusion.of_codes(codes, np.ones(len(codes), np.int64), classes)


PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=60)


@given(PAIRS)
@settings(max_examples=50, deadline=None)
def test_precision_and_f1_are_those_of_scikit_learns_formulas(pairs: list[tuple[int, int]]) -> None:
    """`precision_score(average=None, zero_division=0)` and `f1_score(average="macro")`, written as loops."""
    precisions, f1_scores = [], []
    for k in range(CLASSES):
        right = sum(true == predicted == k for true, predicted in pairs)
        as_k, of_k = sum(predicted == k for _, predicted in pairs), sum(true == k for true, _ in pairs)
        precision, recall = right / as_k if as_k else 0.0, right / of_k if of_k else 0.0
        precisions.append(precision if as_k or of_k else None)
        if as_k or of_k:  # scikit-learn's labels are those that occur in either list
            f1_scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    counts = confusion(*zip(*pairs, strict=True))
    assert results.precision_by_class(counts) == precisions
    assert results.macro_f1(counts) == pytest.approx(sum(f1_scores) / len(f1_scores), rel=1e-12)


def test_scores_are_those_of_published_examples() -> None:
    counts = confusion([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], 3)  # of scikit-learn's documentation
    assert results.macro_f1(counts) == pytest.approx(0.26666666666666666)
    assert results.precision_by_class(counts) == pytest.approx([2 / 3, 0.0, 0.0])
    assert results.accuracy_interval(8, 10) == pytest.approx(
        (0.4901625, 0.9433178), abs=1e-7
    )  # R: prop.test(8, 10, correct = FALSE)
    assert results.accuracy_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)


def test_scores_are_formatted_and_sent_to_trackers() -> None:
    scores = {"accuracy_interval": [0.1, 0.25], "top5_accuracy": 0.9, "macro_f1": 0.5, "confusion": [[0, 0, 1]]}
    assert results.scores_line(scores) == "95 % interval 10.0 % to 25.0 %, top-5 90.0 %, macro-F1 50.0 %"
    assert results.scores_line({**scores, "top5_accuracy": None}).endswith("25.0 %, macro-F1 50.0 %")
    assert trackers.scalars({**scores, "memory_gib": {"host": 1.5, "device": None}}) == {
        "top5_accuracy": 0.9, "macro_f1": 0.5, "accuracy_interval/low": 0.1, "accuracy_interval/high": 0.25,
        "memory/host_gib": 1.5,
    }  # fmt: skip
    assert trackers.scalars({}) == {}  # of a run that is not done


@given(st.integers(1, 10**6).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
@settings(max_examples=50, deadline=None)
def test_the_interval_is_where_the_normal_test_of_the_accuracy_has_95_percent(counts: tuple[int, int]) -> None:
    correct, total = counts
    accuracy, (low, high) = correct / total, results.accuracy_interval(correct, total)
    assert 0 <= low <= accuracy <= high <= 1
    assert low < high
    for limit in (low, high):
        distance = abs(accuracy - limit)
        assert distance == pytest.approx(1.959964 * (limit * (1 - limit) / total) ** 0.5, rel=1e-4, abs=1e-9)
    assert (low == 0) == (correct == 0)
    assert (high == 1) == (correct == total)


def predictions(seed: int, samples: int) -> NDArray[np.int64]:
    """Columns of `Counts.of_predictions`, some with confidences on the borders of bins."""
    random = np.random.default_rng(seed)
    truth, predicted = random.integers(0, CLASSES, (2, samples))
    units = random.integers(1, 2**32 + 1, samples)
    on_border = random.random(samples) < 0.3
    units[on_border] = random.integers(1, 16, on_border.sum()) * 2**32 // 15
    return np.stack((truth, predicted, units, random.integers(0, 2, samples)))


@given(st.integers(0, 2**32), st.integers(1, 200), st.lists(st.integers(0, 200), max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_calibration_error_is_guos_and_exact_for_any_parts_of_a_split(
    seed: int, samples: int, cuts: list[int]
) -> None:
    rows = predictions(seed, samples)
    truth, predicted, units, _ = rows
    error = 0.0
    for b in range(15):  # Guo et al. (2017), equations 2 and 3: B_m has the confidences in ((m - 1) / M, m / M]
        in_bin = (units * 15 > b * 2**32) & (units * 15 <= (b + 1) * 2**32)
        if in_bin.any():
            accuracy, confidence = (truth == predicted)[in_bin].mean(), (units[in_bin] / 2**32).mean()
            error += in_bin.sum() / samples * abs(accuracy - confidence)
    whole = Counts.of_predictions(rows, CLASSES)
    assert results.calibration_error(whole.calibration_gaps, samples) == pytest.approx(error, rel=1e-9, abs=1e-12)
    borders = [0, *sorted(min(cut, samples) for cut in cuts), samples]
    first, *others = (Counts.of_predictions(rows[:, begin:end], CLASSES) for begin, end in itertools.pairwise(borders))
    total = first.plus(others)
    assert total.calibration_gaps.tolist() == whole.calibration_gaps.tolist()
    assert total.in_top5 == whole.in_top5 == rows[3].sum()
    assert total.confusion.as_rows() == whole.confusion.as_rows()


@given(st.integers(0, 2**32), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_of_equal_logits_the_first_class_counts_as_the_more_probable_one(seed: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (30, 20), generator=generator).float()  # few values: most are equal to others
    truth = torch.randint(0, 20, (30,), generator=generator)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    expected = (order[:, :number] == truth[:, None]).any(1)
    assert is_in_top(logits, truth, number).tolist() == expected.tolist()
    if number == 1:
        assert expected.tolist() == (logits.argmax(1) == truth).tolist()


def test_counting_a_batch_waits_for_nothing() -> None:
    counter, truth = _Counter(10), torch.empty(8, dtype=torch.int64, device=META)
    logits = torch.empty(8, 10, device=META)
    with Launches() as count:
        counter.add(truth, logits, logits)
    assert count.total <= 16


# --- runs -------------------------------------------------------------------------------------------------------------


def lines_of(run: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def tree(dataset: Dataset, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"dir": str(dataset.root)},
        "run": {"dir": str(folder)},
        "model": {"name": LINEAR},
        "log": {"report": False, "every_steps": 4},
        "eval": {"every_steps": 0},
        **sections,
        "train": {"epochs": 2, "global_batch_size": 64, **sections.get("train", {})},
    }


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set of which no sample is dropped from an epoch of batches of 64."""
    return make(tmp_path_factory.mktemp("data"), 512)


def test_the_accuracy_of_training_is_that_of_the_samples_trained(whole_batches: Dataset, tmp_path: Path) -> None:
    distrain.train(tree(whole_batches, tmp_path / "learnt", train={"lr": 0.05}))
    # At a learning rate that changes nothing, an evaluation of train has the same predictions.
    train = {"lr": 1e-12, "virtual_ranks": 3, "micro_batch_size": 10, "max_steps": 13, "epochs": None}
    model = {"name": LINEAR, "init": str(tmp_path / "learnt")}
    result = distrain.train(tree(whole_batches, tmp_path / "run", train=train, model=model))
    expected = distrain.evaluate(tmp_path / "run", "train").accuracy
    assert 0.3 < expected < 0.9
    assert result.train_accuracy == expected  # in the first 8 of 13 steps
    accuracies = lines_of(tmp_path / "run", "train/accuracy")
    assert list(accuracies) == [4, 8, 12, 13]
    assert (accuracies[4] + accuracies[8]) / 2 == expected


def test_what_is_known_of_the_accuracy_of_training() -> None:
    accuracy = TrainAccuracy(steps_per_epoch=3, batch_size=10)
    assert accuracy.of_last_epoch(0) is None
    accuracy.add(0, 5)
    accuracy.add(1, 6)
    assert (accuracy.take_line(2), accuracy.of_last_epoch(2)) == (0.55, 0.55)  # no epoch is complete
    accuracy.add(2, 7)
    resumed = TrainAccuracy(steps_per_epoch=3, batch_size=10)
    resumed.load_state_dict(json.loads(json.dumps(accuracy.state_dict())))
    for step, correct in ((3, 8), (4, 9)):
        resumed.add(step, correct)
    assert (resumed.take_line(3), resumed.of_last_epoch(5)) == (0.8, 0.6)
    resumed.add(5, 10)
    assert (resumed.take_line(1), resumed.of_last_epoch(6)) == (1.0, 0.9)
    resumed.add(6, None)  # labels are mixed
    assert (resumed.take_line(1), resumed.of_last_epoch(7)) == (None, 0.9)


def test_the_norm_is_that_of_the_gradient_before_it_is_clipped(whole_batches: Dataset, tmp_path: Path) -> None:
    """SGD without momentum moves the weights by the learning rate times the gradient."""
    plain = {"max_steps": 3, "epochs": None, "momentum": 0, "weight_decay": 0, "schedule": "constant", "lr": 0.5}
    every = {"log": {"report": False, "every_steps": 2}, "checkpoint": {"every_steps": 1, "keep": 0}}
    norms = {}
    for name, clip_norm in (("free", None), ("clipped", 0.01)):
        distrain.train(tree(whole_batches, tmp_path / name, train={**plain, "clip_norm": clip_norm}, **every))
        norms[name] = lines_of(tmp_path / name, "train/grad_norm")
        one, two = (load_file(tmp_path / name / f"checkpoints/step-{step:08d}/model.safetensors") for step in (1, 2))
        moved = float(torch.cat([(one[key] - two[key]).double().flatten() for key in one]).norm()) / 0.5
        assert moved == pytest.approx(norms[name][2] if clip_norm is None else clip_norm, rel=1e-3)
    assert list(norms["free"]) == list(norms["clipped"]) == [1, 2, 3]
    assert norms["free"][1] == norms["clipped"][1] > 0.01


def test_the_norm_of_fp16_is_that_of_the_unscaled_gradient() -> None:
    module = nn.Linear(3, 2)
    before = [each.detach().clone() for each in module.parameters()]
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    prepared, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    model = DataParallel(prepared, accelerator, Collectives(World(0, 1), None), Compilation("off", ()), 1, 8)
    loss = module(torch.ones(8, 3)).square().sum()
    loss.backward()
    gradients = [each.grad.clone() for each in module.parameters() if each.grad is not None]
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    try:
        module.zero_grad()
        model.backward(module(torch.ones(8, 3)).square().sum())
        torch.testing.assert_close(model.grad_norm(), torch.cat([each.flatten() for each in gradients]).norm())
        optimizer.step()
        for weight, start, gradient in zip(module.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(weight.detach(), start - 0.1 * gradient)
    finally:
        accelerator.state._reset_state(True)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_of_memory_is_that_of_this_process_alone() -> None:
    resident = psutil.Process().memory_info().rss
    here = machine.peak_memory()
    assert 0.99 * resident <= here < psutil.virtual_memory().total
    code = "from distrain import machine; print(machine.peak_memory())"
    other = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout)
    assert 2**20 < other < here / 2  # without torch


def test_the_peaks_are_the_highest_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: device.index * 2**29)
    assert meters.peak_memory(gpu)["device"] == 1.5

    def over_all(device: torch.device, others: list[dict[str, float]]) -> dict[str, float | None]:
        runtime: Any = SimpleNamespace(
            device=device, collectives=SimpleNamespace(from_all=lambda value: [value, *others])
        )
        return meters.peak_memory_of_all(runtime)

    assert over_all(gpu, [{"host": 999.0, "device": 1.0}]) == {"host": 999.0, "device": 1.5}
    assert over_all(torch.device("cpu"), [{"host": 999.0}]) == {"host": 999.0, "device": None}
