"""A whole run in one process: its folder, its result, resuming it, and errors before it starts."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import make
from group import Group
from models_for_tests import Projected
from runs import as_record, metrics_but_times
from safetensors.torch import load_file

import distrain
from distrain import cli, config, signals
from distrain.data import manifest
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError, DataError, DivergedError, Stopped
from distrain.runs.folder import read
from distrain.text import percent
from distrain.tools import loaded_model, report
from distrain.tools.report import charts
from distrain.tools.status import format_status, run_status
from distrain.training import checkpointing


def tree(dataset: Dataset, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    sections_by_name: dict[str, dict[str, Any]] = {
        "data": {"dir": str(dataset.root)},
        "run": {"dir": str(folder)},
        "train": {"epochs": 2, "global_batch_size": 64},
        "log": {"report": False},
    }
    for section, values in sections.items():
        sections_by_name.setdefault(section, {}).update(values)
    return sections_by_name


def arguments(sections: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_has_the_documented_files_and_result(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = distrain.train(tree(small, run, data={"audit": True}))
    record = {"version": 1, **as_record(result)}
    assert (record.pop("run"), record.pop("split"), record.pop("report")) == (str(run), "test", None)
    assert json.loads((run / "result.json").read_text()) == record
    assert result.total == 203
    matrix = result.confusion_matrix().tolist()
    assert result.correct == sum(matrix[k][k] for k in range(10))
    assert result.accuracy == result.correct / 203
    assert sum(map(sum, matrix)) == 203
    for k, name in enumerate(small.manifest.classes):
        row = matrix[k]
        assert result.accuracy_by_class[name] == row[k] / sum(row)
    assert (result.steps, result.epochs, result.world_size) == (2 * 15, 2, 1)
    assert result.dropped_per_epoch == 1003 - 15 * 64
    assert result.seconds > 0
    assert result.images_per_second > 0
    assert sorted(path.name for path in run.iterdir()) == [
        "attempts", "audit", "checkpoints", "config.yaml", "metrics.jsonl", "pictures", "result.json",
        "setup.json",
    ]  # fmt: skip
    assert config.load(run / "config.yaml") == config.from_tree(tree(small, run, data={"audit": True}))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "train/loss", "train/lr", "train/images_per_second"} <= metrics[0].keys()
    assert metrics[-1]["test/accuracy"] == result.accuracy
    assert capsys.readouterr().out == ""  # only the command prints a result


def test_the_command_ends_with_the_result(small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", *arguments(tree(small, run)), "log.report=false"]) == 0
    result = json.loads((run / "result.json").read_text())
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last == [
        "Finished Training",
        f"Accuracy of the network on the 203 test images: {100 * result['accuracy']:.1f} %",
        f"Run: {run}",
    ]


def test_losses_logged_are_means_over_the_steps_since_the_last_line(small: Dataset, tmp_path: Path) -> None:
    def losses(name: str, every: int) -> list[float]:
        distrain.train(tree(small, tmp_path / name, log={"every_steps": every}, eval={"every_steps": 0}))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["train/loss"] for line in lines if "train/loss" in line]

    each, fives = losses("each", 1), losses("fives", 5)
    assert len(each) == 30
    assert fives == pytest.approx([sum(each[i : i + 5]) / 5 for i in range(0, 30, 5)], rel=1e-6)


def test_an_existing_run_is_not_overwritten(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distrain.train(tree(small, run))
    before = files(run)
    with pytest.raises(ConfigError, match="already holds a run"):
        distrain.train(tree(small, run, run={"resume": "never"}))
    assert files(run) == before


def test_a_finished_run_resumes_to_the_same_result(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = distrain.train(tree(small, run))
    weights = files(run / "checkpoints")
    again = distrain.train(tree(small, run, run={"resume": "must"}))
    assert files(run / "checkpoints") == weights
    for key in ("accuracy", "loss", "steps", "confusion"):
        assert getattr(again, key) == getattr(first, key)


def test_must_needs_a_run_and_auto_does_not(small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run.resume=must: .* holds no run"):
        distrain.train(tree(small, tmp_path / "run", run={"resume": "must"}))
    assert not (tmp_path / "run").exists()
    assert distrain.train(tree(small, tmp_path / "run", run={"resume": "auto"})).steps == 30


def test_a_signal_stops_a_run_and_the_next_call_resumes(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"model": {"name": "models_for_tests:Faulty"}, "log": {"every_steps": 4}}
    distrain.train(tree(small, tmp_path / "whole", **changes))
    handlers = [signal.getsignal(number) for number in signals.STOP]
    for forward_pass in (1, 12, 25):  # while it starts, and twice while it trains
        monkeypatch.setenv("FAULT", f"stop:0:{forward_pass}")
        with pytest.raises(Stopped, match="SIGUSR1"):
            distrain.train(tree(small, tmp_path / "run", **changes))
        assert [signal.getsignal(number) for number in signals.STOP] == handlers
    monkeypatch.delenv("FAULT")
    distrain.train(tree(small, tmp_path / "run", **changes))
    assert metrics_but_times(tmp_path / "run") == metrics_but_times(tmp_path / "whole")
    ends = [load_file(tmp_path / name / "checkpoints/step-00000030/model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_checkpoints_by_the_clock_change_nothing_else(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "unhurried:0:1")  # 40 ms a step: the clock is checked several times
    checkpoints = {}
    for name, minutes in (("off", 0), ("on", 1e-5)):
        settings = {"checkpoint": {"every_steps": 0, "every_minutes": minutes, "keep": 0}, "log": {"every_steps": 4}}
        distrain.train(tree(small, tmp_path / name, model={"name": "models_for_tests:Faulty"}, **settings))
        checkpoints[name] = len(list((tmp_path / name / "checkpoints").iterdir()))
    assert checkpoints["off"] == 1
    assert checkpoints["on"] > 2
    assert metrics_but_times(tmp_path / "on") == metrics_but_times(tmp_path / "off")


def test_a_run_of_another_identity_is_refused_by_the_fields_that_differ(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distrain.train(tree(small, run))
    before = files(run)
    changes = {"run": {"resume": "auto", "seed": 5}, "train": {"lr": 0.3}, "checkpoint": {"every_steps": 3}}
    with pytest.raises(ConfigError) as caught:
        distrain.train(tree(small, run, **changes))
    message = str(caught.value)
    assert "run.seed: 0 in the checkpoint, 5 now" in message
    assert "train.lr: 0.05 in the checkpoint, 0.3 now" in message
    assert "checkpoint.every_steps" not in message
    other = make(tmp_path / "other", 700, shards=24, lanes=12)
    with pytest.raises(ConfigError, match="data.dir: another data set now"):
        distrain.train(tree(other, run, run={"resume": "auto"}))
    with pytest.raises(ConfigError) as caught:
        distrain.train(tree(small, run, run={"resume": "auto"}, train={"epochs": 4}))
    weights = re.search(r"to train for longer, .* model.init=(\S+)", str(caught.value))
    assert weights is not None
    assert Path(weights[1]).is_file()
    assert files(run) == before


def test_moved_data_and_other_intervals_resume(small: Dataset, tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    distrain.train(tree(small, whole))
    distrain.train(tree(small, moved, checkpoint={"every_steps": 7, "keep": 0}))
    for step in (28, 30):
        shutil.rmtree(moved / f"checkpoints/step-{step:08d}")
    shutil.copytree(small.root, tmp_path / "data")
    again = manifest.read(tmp_path / "data")
    changes = {"run": {"resume": "auto"}, "log": {"every_steps": 3}, "train": {"micro_batch_size": 64}}
    distrain.train(tree(again, moved, **changes))
    ends = [load_file(run / "checkpoints/step-00000030/model.safetensors") for run in (whole, moved)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_damaged_checkpoint_is_skipped_by_name(
    small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    run = tmp_path / "run"
    distrain.train(tree(small, run, checkpoint={"every_steps": 10}))
    expected = (run / "checkpoints/step-00000030/model.safetensors").read_bytes()
    (run / "checkpoints/step-00000030/model.safetensors").write_bytes(expected[:-1] + b"x")
    distrain.train(tree(small, run, run={"resume": "auto"}))
    warning = next(record for record in caplog.records if "skipped" in record.getMessage())
    assert warning.levelno == logging.WARNING
    assert "step-00000030/model.safetensors: damaged" in warning.getMessage()
    assert "resuming from" in caplog.text
    assert (run / "checkpoints/step-00000030/model.safetensors").read_bytes() == expected
    for step in (20, 30):
        (run / f"checkpoints/step-{step:08d}/state.json").unlink()
    with pytest.raises(DataError, match="no readable checkpoint"):
        distrain.train(tree(small, run, run={"resume": "auto"}))


def test_the_best_checkpoint_on_val_is_retained_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make(tmp_path / "data", 2000, 200, val_fraction=0.2)
    run = tmp_path / "run"
    # With this learning rate training diverges late: the last checkpoint is not the best one.
    changes = {
        "train": {"epochs": 6, "schedule": "constant", "lr": 0.2, "global_batch_size": 32},
        "checkpoint": {"keep": 1},
    }
    result = distrain.train(tree(dataset, run, **changes))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val/accuracy"] for line in lines if "val/accuracy" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert result.checkpoint == f"step-{best:08d}"
    assert result.val_accuracy == scores[best]
    assert (run / "checkpoints" / result.checkpoint).is_dir()
    assert cli.main(["evaluate", str(run)]) == 0
    eval_model = json.loads((run / f"evaluations/test-{result.checkpoint}.json").read_text())
    record = as_record(result)
    assert {name: record[name] for name in eval_model.keys() & record.keys()}.items() <= eval_model.items()
    assert f"macro-F1 {percent(result.macro_f1)}, calibration error {percent(result.calibration_error)}\n" in (
        capsys.readouterr().out
    )


@pytest.mark.ranks
def test_a_run_stops_early_at_the_same_step_after_a_resume_and_on_two_processes(
    tmp_path: Path, group: Callable[[int], Group], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    dataset = make(tmp_path / "data", 600, 60, val_fraction=0.3)
    changes: dict[str, Any] = {
        "model": {"name": "models_for_tests:Linear"},
        "train": {"epochs": None, "max_steps": 60, "global_batch_size": 32, "schedule": "constant", "lr": 0.05,
                  "stop_after": 3, "virtual_ranks": 2},
        "eval": {"every_steps": 3}, "checkpoint": {"every_steps": 4, "keep": 0}, "log": {"every_steps": 5},
    }  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = distrain.train(tree(dataset, whole, **changes))
    scores = [line["val/accuracy"] for line in metrics_but_times(whole) if "val/accuracy" in line]
    best = scores.index(max(scores))
    assert result.steps == 3 * len(scores) == 3 * (best + 1 + 3) < 60
    assert result.checkpoint == f"step-{3 * (best + 1):08d}"
    assert result.stopped_early == "after 3 evaluations without a better one on val"
    assert f"stopped {result.stopped_early}" in caplog.text
    assert distrain.train(tree(dataset, whole, **changes)).steps == result.steps  # nothing is left to train

    shutil.copytree(whole, run)  # as if the job was killed after its last checkpoint but one
    (run / "result.json").unlink()
    shutil.rmtree(run / f"checkpoints/step-{result.steps:08d}")
    state = json.loads(max((run / "checkpoints").iterdir()).joinpath("state.json").read_text())
    assert 0 < state["evaluations_since_best"] < 3
    with pytest.raises(ConfigError, match="train.stop_after: 3 in the checkpoint, 4 now"):
        distrain.train(tree(dataset, run, **{**changes, "train": {**changes["train"], "stop_after": 4}}))
    assert group(2).train(tree(dataset, run, **changes))["stopped_early"] == result.stopped_early
    assert metrics_but_times(run) == metrics_but_times(whole)
    progress = run_status(run)
    assert (progress["state"], progress["step"]) == ("done", result.steps)
    assert "stopped  after 3 evaluations" in format_status(progress)
    assert charts.restarts(read(whole)) == []  # the second attempt had nothing to train
    report.write([run])
    assert "stopped after 3 evaluations" in (run / "report/index.html").read_text()


def test_evaluate_takes_any_split_and_checkpoint(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = distrain.train(tree(small, run, checkpoint={"every_steps": 20}))
    capsys.readouterr()
    assert cli.main(["evaluate", str(run)]) == 0
    assert f"203 test images: {100 * result.accuracy:.1f} %" in capsys.readouterr().out
    assert cli.main(["evaluate", str(run), "--split", "train", "--checkpoint", "step-00000020"]) == 0
    assert json.loads((run / "evaluations/train-step-00000020.json").read_text())["total"] == 1003
    for wrong in (["--split", "val"], ["--checkpoint", "best"], ["--checkpoint", "step-99"]):
        assert cli.main(["evaluate", str(run), *wrong]) == 78
    assert cli.main(["evaluate", str(tmp_path / "nowhere")]) == 78


def test_evaluate_and_predict_draw_what_a_model_does_not_save_as_training_did(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = distrain.train(tree(small, run, model={"name": "models_for_tests:Projected"}, run={"seed": 7}))
    torch.manual_seed(1)
    assert cli.main(["evaluate", str(run)]) == 0
    eval_model = json.loads(next((run / "evaluations").iterdir()).read_text())
    assert eval_model["confusion"] == as_record(result)["confusion"]
    torch.manual_seed(2)
    loaded = loaded_model.load(run, None).model
    torch.manual_seed(7)
    assert torch.equal(loaded.projection, Projected(10, (3, 16, 16)).projection)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"dir": "nowhere"}}, "nowhere"),
        ({"train": {"global_batch_size": 5000}}, "larger than the"),
        ({"train": {"precision": "fp16"}}, "fp16 needs a GPU"),
        ({"run": {"device": "cuda"}}, "sees no GPU"),
        ({"data": {"mean": "[0.5]"}}, "1 values for images of 3 channels"),
        ({"data": {"std": "[1, 1, 0]"}}, "data.std.2: should be greater than 0"),
        ({"augment": {"crop_padding": 16}}, "augment.crop_padding=16: at most 15"),
        ({"model": {"name": "models_for_tests:Broken"}}, "ZeroDivisionError"),
        ({"model": {"name": "models_for_tests:Picky"}}, "fails on images [2, 3, 16, 16]"),
        ({"train": {"stop_after": 3}}, "no val split: prepare it with --val-fraction"),
        ({"run": {"dir": "/proc/nowhere"}}, "cannot be written"),
        ({"model": {"name": "nett"}}, "model.name=nett"),
        ({"model": {"name": "torch.nn:Identity"}}, "no trainable parameters"),
        ({"train": {"lrr": 1}}, "did you mean train.lr?"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU some of these are no errors")
def test_a_configuration_that_cannot_run_is_one_message(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", *arguments(tree(small, run, **changes))]) == 78
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("error:") == 1
    assert not run.exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_named(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(tmp_path / "data")
    victim = dataset.root / dataset.split("train").shards[7].name
    content = victim.read_bytes()
    victim.unlink()
    if damage != "missing":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        victim.write_bytes(content[:-512] if damage == "truncated" else flipped)
    assert cli.main(["train", *arguments(tree(dataset, tmp_path / "run"))]) == 78
    error = capsys.readouterr().err
    assert "train/00007.tar" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run/result.json").exists()


def test_weights_that_are_not_finite_are_never_saved_or_evaluated(small: Dataset, tmp_path: Path) -> None:
    # The loss of the only step is finite; its update is not, and no later loss shows it.
    run = tmp_path / "run"
    changes = {"train": {"epochs": None, "max_steps": 1, "lr": 1e38, "schedule": "constant", "weight_decay": 1e3}}
    with pytest.raises(DivergedError, match="the weights are no longer finite at step 1"):
        distrain.train(tree(small, run, **changes))
    assert not (run / "result.json").exists()
    assert not list(run.glob("checkpoints/step-*"))


def test_evaluate_refuses_another_model_than_the_trained_one(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    distrain.train(tree(small, run))
    assert cli.main(["evaluate", str(run), "model.activation=tanh"]) == 78
    assert "model.activation: 'relu' in the checkpoint, 'tanh' now" in capsys.readouterr().err
    assert not (run / "evaluations").exists()
    assert cli.main(["evaluate", str(run), "train.precision=fp64"]) == 0


def test_an_attempt_that_failed_before_its_first_step_does_not_prevent_the_next(small: Dataset, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(tmp_path / "data")
    victim = dataset.root / dataset.split("train").shards[0].name
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + b"x")
    again = arguments(tree(dataset, tmp_path / "run"))
    assert cli.main(["train", *again]) == 78
    victim.write_bytes(content)
    assert cli.main(["train", *again]) == 0


def test_outputs_of_a_wrong_shape_are_an_error(small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"returns \[2, 3\] for 2 images, not \[2, 10\]"):
        distrain.train(tree(small, tmp_path / "run", model={"name": "models_for_tests:ThreeClasses"}))


def test_a_model_with_batch_norm_and_dropout_trains_with_a_warning(
    small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"model": {"name": "models_for_tests:BatchNormAndDropout"}, "train": {"epochs": 1}}
    distrain.train(tree(small, tmp_path / "whole", **changes))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("has Dropout: what it learns depends on the number of processes" in message for message in warnings)
    assert json.loads((tmp_path / "whole/result.json").read_text())["dependent_layers"] == ["Dropout"]
    distrain.train(tree(small, tmp_path / "cut", checkpoint={"every_steps": 5, "keep": 0}, **changes))
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000015")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000010")
    changes["run"] = {"resume": "auto"}
    distrain.train(tree(small, tmp_path / "cut", **changes))
    ends = [load_file(tmp_path / name / "checkpoints/step-00000015/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_saved_model_is_the_ema_of_the_weights(small: Dataset, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 1, "keep": 0}, "train": {"max_steps": 12, "epochs": None}}
    distrain.train(tree(small, tmp_path / "plain", **changes))
    changes["train"] = {**changes["train"], "ema_decay": 0.9}
    distrain.train(tree(small, tmp_path / "run", **changes))
    folders = [f"checkpoints/step-{step:08d}" for step in range(1, 13)]
    expected: dict[str, torch.Tensor] = {}
    for update, folder in enumerate(folders):
        trained = load_file(tmp_path / "plain" / folder / "model.safetensors")
        optimizer = load_file(tmp_path / "run" / folder / "optimizer.safetensors")
        assert all(torch.equal(value, optimizer[f"weights.{name}"]) for name, value in trained.items())
        decay = min(0.9, (1 + update) / (10 + update))
        expected = {name: decay * expected.get(name, value) + (1 - decay) * value for name, value in trained.items()}
        saved = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.allclose(saved[name], value, atol=1e-6) for name, value in expected.items())


def test_fine_tuning_starts_from_the_weights_of_a_file(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distrain.train(tree(small, tmp_path / "first"))
    file = tmp_path / "first/checkpoints/step-00000030/model.safetensors"
    changes: dict[str, Any] = {
        "model": {"init": str(file)},
        "checkpoint": {"every_steps": 1, "keep": 0},
        "train": {"max_steps": 2, "epochs": None, "lr": 1e-9},
    }
    distrain.train(tree(small, tmp_path / "second", **changes))
    start, end = (load_file(path) for path in (file, tmp_path / "second/checkpoints/step-00000002/model.safetensors"))
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)
    assert cli.main(["evaluate", str(tmp_path / "second")]) == 0
    moved = tmp_path / "moved.safetensors"
    shutil.copy(file, moved)
    changes["model"] = {"init": str(moved)}  # the same weights under another name: the same run
    changes["train"] = {**changes["train"], "max_steps": 2}
    distrain.train(tree(small, tmp_path / "second", **changes))
    shutil.copy(tmp_path / "second/checkpoints/step-00000001/model.safetensors", moved)
    with pytest.raises(ConfigError, match=r"model\.init"):
        distrain.train(tree(small, tmp_path / "second", **changes))


def test_steps_are_traced_and_times_are_reported(
    small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    result = distrain.train(tree(small, tmp_path / "run", profile={"steps": 3}))
    trace = json.loads((tmp_path / "run/trace/rank-00000.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])
    assert sum(result.profile.values()) == pytest.approx(1, abs=1e-4)
    assert set(result.profile) == {"start", "data", "copy", "log", "reduce", "compute"}
    assert "time     start" in caplog.text
    assert 0 < result.train_seconds < result.seconds
    assert result.images_per_second * result.train_seconds == pytest.approx(result.steps * 64)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "train/loss" in line):
        assert sum(part for name, part in line.items() if name.startswith("profile/")) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_mixing_needs_two_samples_of_a_lane(key: str, small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"augment.{key} .* raise it to 24"):
        distrain.train(tree(small, tmp_path / "run", augment={key: 0.2}, train={"global_batch_size": 23}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_precisions_train(small: Dataset, tmp_path: Path, precision: str) -> None:
    result = distrain.train(tree(small, tmp_path / "run", train={"precision": precision, "epochs": 1}))
    assert result.precision == precision
    saved = load_file(tmp_path / "run/checkpoints/step-00000015/model.safetensors")
    assert saved["fc1.weight"].dtype == (torch.float64 if precision == "fp64" else torch.float32)


def test_the_identity_in_a_checkpoint_has_no_paths(small: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    distrain.train(tree(small, run))
    state = json.loads((run / "checkpoints/step-00000030/state.json").read_text())
    assert str(tmp_path) not in json.dumps(state)
    assert state["identity"]["data.manifest"] == small.digest
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 2
    assert checkpointing.holds_run(run)
