"""Silent wrong results of training: averages, initial weights, collapses, counts, and what a caller has set."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import make
from group import Group
from safetensors.torch import load_file, save_file
from torch import nn

import distrain
from distrain import cli, config, models
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.errors import ConfigError, DataError
from distrain.runs.results import Confusion
from distrain.training import health, meters, optim

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """2,000 samples with 200 for test: an epoch of 62 steps of 32."""
    return make(tmp_path_factory.mktemp("easy") / "data", 2000, 200)


def tree(dataset: Dataset, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "data": {"dir": str(dataset.root)},
        "run": {"dir": str(folder)},
        "train": {"max_steps": 3, "global_batch_size": 32},
        "log": {"report": False},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return base


HEALTHY: dict[str, Any] = {"train": {"max_steps": 200}, "model": {"name": "small"}}


@pytest.fixture(scope="module")
def healthy(easy: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, distrain.TrainingResult]:
    """A run that ends well above chance: its data, folder and result."""
    run = tmp_path_factory.mktemp("healthy") / "run"
    result = distrain.train(tree(easy, run, **HEALTHY))
    assert result.accuracy > 0.4
    assert result.warnings == ()
    return easy, run, result


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- the average of the weights ---------------------------------------------------------------------------------------


def test_the_ema_of_a_short_run_is_about_as_accurate_as_the_trained_weights(
    healthy: tuple[Dataset, Path, distrain.TrainingResult], tmp_path: Path
) -> None:
    dataset, _, plain = healthy
    train = {**HEALTHY["train"], "ema_decay": 0.999}
    ema = distrain.train(tree(dataset, tmp_path / "ema", train=train, model=HEALTHY["model"]))
    assert ema.accuracy > plain.accuracy - 0.05


def test_the_decay_of_the_ema_rises_to_its_limit() -> None:
    decays = [optim.ema_decay(0.999, updates) for updates in range(20_000)]
    assert decays[:2] == [0.1, 2 / 11]
    assert decays == sorted(decays)
    assert decays[-1] == 0.999


# --- initial weights --------------------------------------------------------------------------------------------------


def trained(path: Path, classes: list[str] | None, **changes: Any) -> dict[str, torch.Tensor]:
    """Save weights of `small` for three classes."""
    torch.manual_seed(5)
    state = models.build("small", "relu", 3, SHAPE).state_dict() | changes
    save_file(state, path, {"classes": json.dumps(classes)} if classes is not None else None)
    return state


@pytest.mark.parametrize(
    ("names", "retained", "message"),
    [
        (["ant", "bee", "cat"], True, "fc is kept: the file has the same classes"),
        (["bee", "ant", "cat"], False, "fc is re-initialised: the file has the same classes in another order"),
        (["ant", "bee", "dog"], False, "fc is re-initialised: the classes have other names in the file: dog"),
        (None, True, "fc is kept: the file does not name its classes, but has 3 too"),
    ],
)
def test_the_head_is_kept_only_for_the_same_classes(
    names: list[str] | None, retained: bool, message: str, tmp_path: Path
) -> None:
    state = trained(tmp_path / "weights.safetensors", names)
    torch.manual_seed(6)
    model = models.build("small", "relu", 3, SHAPE)
    assert models.initialise(model, tmp_path / "weights.safetensors", ["ant", "bee", "cat"]) == [message]
    after = model.state_dict()
    assert torch.equal(after["conv1.weight"], state["conv1.weight"])
    assert torch.equal(after["fc.weight"], state["fc.weight"]) == retained
    assert torch.equal(after["fc.bias"], state["fc.bias"]) == retained


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int8]
)
def test_weights_that_are_no_usual_floats_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.build("small", "relu", 3, SHAPE)
    state = {**model.state_dict(), "conv1.bias": torch.ones(16).to(dtype)}
    torch.save(state, tmp_path / "weights.pt")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"weights should be dense.* conv1\.bias \({name}\); convert"):
        models.initialise(model, tmp_path / "weights.pt", list("abc"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_with_a_message(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models.build("small", "relu", 3, SHAPE)
    save_file({name: value.to(dtype) for name, value in model.state_dict().items()}, tmp_path / "weights.safetensors")
    messages = models.initialise(model, tmp_path / "weights.safetensors", list("abc"))
    assert messages[0] == f"weights are converted from {str(dtype).removeprefix('torch.')} to float32"


def test_initial_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "nan.safetensors", None, **{"conv2.bias": torch.full((64,), float("nan"))})
    trained(tmp_path / "huge.safetensors", None, **{"conv2.bias": torch.full((64,), 1e300, dtype=torch.float64)})
    for name in ("nan", "huge"):  # the second one is infinite in fp32
        with pytest.raises(DataError, match=r"weights are NaN or infinite: conv2\.bias"):
            models.initialise(models.build("small", "relu", 3, SHAPE), tmp_path / f"{name}.safetensors", list("abc"))


@pytest.mark.parametrize("statistic", ["running_mean", "running_var", "weight"])
def test_statistics_of_batch_norm_must_be_finite_and_masks_need_not(statistic: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    assert models.not_finite(model) == []
    with torch.no_grad():
        getattr(model[0], statistic)[1] = torch.inf
    assert models.not_finite(model) == [f"0.{statistic}"]


def test_commands_refuse_checkpoints_whose_weights_are_not_finite(
    easy: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import xxhash

    run = tmp_path / "run"
    distrain.train(tree(easy, run))
    folder = run / "checkpoints/step-00000003"
    state = load_file(folder / "model.safetensors")
    state["fc2.bias"][7] = torch.nan
    save_file(state, folder / "model.safetensors")
    digests = (folder / "digests.json").read_text()
    old = json.loads(digests)
    old = (old.get("files") or old)["model.safetensors"]
    new = xxhash.xxh3_128_hexdigest((folder / "model.safetensors").read_bytes())
    (folder / "digests.json").write_text(digests.replace(old, new))
    capsys.readouterr()
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.new("RGB", (16, 16)).save(picture)
    for command in (["evaluate", str(run)], ["predict", str(run), str(picture)],
                    ["export", str(run), "--out", str(tmp_path / "model.pt2")],
                    ["train", *arguments(tree(easy, tmp_path / "next", model={"init": str(run)}))]):  # fmt: skip
        assert cli.main(command) == 78
        captured = capsys.readouterr()
        assert "weights are NaN or infinite: fc2.bias" in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert not (run / "evaluations").exists()
    assert not (tmp_path / "model.pt2").exists()


def arguments(sections: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]


def test_a_run_names_its_classes_and_its_folder_initialises_another(
    easy: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    first = tmp_path / "first"
    distrain.train(tree(easy, first))
    frozen = {"max_steps": 1, "lr": 1e-12, "schedule": "constant"}
    for source in (first, first / "checkpoints/step-00000003", first / "checkpoints/step-00000003/model.safetensors"):
        caplog.clear()
        out = tmp_path / f"next-{source.name}"
        distrain.train(tree(easy, out, train=frozen, model={"init": str(source)}))
        start = load_file(first / "checkpoints/step-00000003/model.safetensors")
        end = load_file(out / "checkpoints/step-00000001/model.safetensors")
        assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in start)
        assert "fc3 is kept: the file has the same classes" in caplog.text
        assert ("step-00000003 is taken" in caplog.text) == (source == first)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("prefixes", "suffix"),
    [(["module."], ".pth"), (["_orig_mod."], ".ckpt"), (["module.", "_orig_mod."], ".pth.tar"),
     (["_orig_mod.", "module."], ".bin"), (["model."], ".pkl"), ([], ".weights")],
)  # fmt: skip
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_prefixes_and_entries_of_training_checkpoints_are_removed_and_named(
    prefixes: list[str], suffix: str, entry: str | None, tmp_path: Path
) -> None:
    source, model = Nested(), Nested()
    content: dict[str, Any] = {"".join(prefixes) + name: value for name, value in source.state_dict().items()}
    if entry is not None:
        content = {"epoch": 3, entry: content, "optimizer": {"state": {}}}
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path)
    messages = " | ".join(models.initialise(model, path, list("abc")))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(f"{prefix} " in messages for prefix in prefixes)
    assert ("removed from its names" in messages) == bool(prefixes)
    assert (f"of its entries, {entry} is taken, not epoch, optimizer" in messages) == (entry is not None)


def test_averaged_models_and_compiled_layers_are_understood(tmp_path: Path) -> None:
    source, model = Nested(), Nested()
    averaged = torch.optim.swa_utils.AveragedModel(source)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    models.initialise(model, tmp_path / "averaged.pt", list("abc"))
    assert torch.equal(model.head.weight, source.head.weight)
    compiled = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in source.state_dict().items()}
    torch.save(compiled, tmp_path / "compiled.pt")
    model = Nested()
    messages = models.initialise(model, tmp_path / "compiled.pt", list("abc"))
    assert torch.equal(model.backbone.weight, source.backbone.weight)
    assert "_orig_mod." in messages[0]


def test_names_of_a_model_that_begin_with_a_prefix_stay(tmp_path: Path) -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 3)

    source, model = Wrapping(), Wrapping()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    assert models.initialise(model, tmp_path / "weights.pt", list("abc")) == [
        "module is kept: the file does not name its classes, but has 3 too"
    ]
    assert torch.equal(model.module.weight, source.module.weight)


class Settings:
    """A class that is not a tensor."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is neither a safetensors file nor"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"\x1f\x8b\x08\x00" + bytes(100), "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (bytes(4000), "is neither a safetensors file nor"),
        (b"PK\x03\x04" + bytes(100), "torch.load cannot read it"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{\"a\": [1, 2, 3]}", "is a damaged safetensors file"),
        ({"state_dict": {}}, "is not a state dict"),
        ({}, r"is not a state dict \(it is empty\)"),
        ({"epoch": 3, "fc.weight": torch.ones(2)}, r"is not a state dict \(it holds epoch\)"),
        ({"state_dict": {"w": torch.ones(1)}, "x": Settings()}, "holds Python objects .*Settings.* save its state"),
    ],
)  # fmt: skip
def test_files_that_are_no_weights_are_described(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as caught:
        models.initialise(Nested(), path, list("abc"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is not a regular file"):
            models.initialise(Nested(), path, list("abc"))


def test_a_file_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.truncate(2**43)
    with pytest.raises(ConfigError, match="8,192.0 GiB, more than the memory"):
        models.initialise(Nested(), tmp_path / "huge.safetensors", list("abc"))


# --- training that collapses ------------------------------------------------------------------------------------------


def confusion(accuracy: float, samples: int = 4000, classes: int = 10) -> Confusion:
    """Equal classes, and mistakes of each that are predicted as the next one."""
    truth = np.arange(samples) % classes
    predicted = np.where(np.arange(samples) < accuracy * samples, truth, (truth + 1) % classes)
    return Confusion.of_codes(truth * classes + predicted, np.ones(samples, np.int64), classes)


@pytest.mark.parametrize(
    ("best", "now", "collapsed"),
    [
        (0.93, 0.10, True),
        (0.93, 0.15, True),
        (0.93, 0.40, False),
        (0.93, 0.80, False),
        (0.30, 0.10, True),
        (0.12, 0.10, False),  # was hardly above chance
        (0.10, 0.10, False),
    ],
)
def test_a_collapse_is_a_fall_to_chance_from_well_above(best: float, now: float, collapsed: bool) -> None:
    assert health.has_collapsed(confusion(now), best) == collapsed


@pytest.mark.parametrize(("best", "now", "collapsed"), [(0.7, 0.4, False), (0.7, 0.35, False), (0.95, 0.25, True)])
def test_the_noise_of_a_small_split_is_no_collapse(best: float, now: float, collapsed: bool) -> None:
    assert health.has_collapsed(confusion(now, samples=20, classes=4), best) == collapsed


def test_chance_is_the_share_of_the_largest_class() -> None:
    # 90 % of the samples are of one class: 90.5 % is chance, and small test splits say little.
    counts = Confusion.of_codes(np.array([0, 2]), np.array([900, 100]), 2)
    assert health.chance(counts) == 0.9
    assert not health.has_collapsed(counts, 0.92)
    assert health.has_collapsed(counts, 0.98)
    few = Confusion.of_codes(np.array([0, 2]), np.array([5, 5]), 2)
    assert not health.has_collapsed(few, 0.7)


def test_a_collapse_is_in_the_log_the_result_and_survives_a_restart(
    healthy: tuple[Dataset, Path, distrain.TrainingResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, good, _ = healthy
    settings: dict[str, Any] = {
        "model": {"name": "models_for_tests:Collapsing", "init": str(good)},
        "train": {"max_steps": 40, "lr": 1e-4, "schedule": "constant"},
        "eval": {"every_steps": 10},
        "checkpoint": {"every_steps": 10, "keep": 0},
    }
    result = distrain.train(tree(dataset, tmp_path / "run", **settings))
    (collapse, drop) = result.warnings
    assert "training collapsed: after step 30 the accuracy on test is 10.0 % (10.0 % is chance; all images" in collapse
    assert "Lower train.lr" in collapse
    assert "the last weights reach 10.0 % on test" in drop
    assert "--val-fraction" in drop
    assert warnings_of(caplog).count(collapse) == 2  # when it happens, and at the end
    assert json.loads((tmp_path / "run/result.json").read_text())["warnings"] == list(result.warnings)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000040")
    assert distrain.train(tree(dataset, tmp_path / "run", **settings)).warnings == result.warnings


def test_a_run_that_stays_at_chance_says_so(easy: Dataset, tmp_path: Path) -> None:
    result = distrain.train(tree(easy, tmp_path / "run", train={"lr": 1e-9}))
    (warning,) = result.warnings
    assert "of 200 images, is not clearly above chance (10.0 %, always" in warning


def test_the_start_and_the_end_name_the_checkpoint_of_the_accuracy(
    easy: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    distrain.train(tree(easy, tmp_path / "run"))
    assert "there is no val split: the result is that of the last weights; test is scored once an epoch" in caplog.text
    assert "result   of the checkpoint of step 3 (the last)" in caplog.text
    caplog.clear()
    dataset = make(tmp_path / "data", 600, 100, val_fraction=0.2)
    settings = {"train": {"max_steps": 12, "lr": 0.4, "schedule": "constant"}, "eval": {"every_steps": 4}}
    result = distrain.train(tree(dataset, tmp_path / "val", **settings))
    step = int(result.checkpoint.removeprefix("step-"))
    assert step < 12  # with this learning rate
    assert "val every 4 steps; the result is that of the best checkpoint on val" in caplog.text
    assert f"result   of the checkpoint of step {step} (the best on val, " in caplog.text
    assert cli.main(["status", str(tmp_path / "val")]) == 0
    assert f"on test after step {step} (the best on val)" in capsys.readouterr().out
    distrain.train(tree(dataset, tmp_path / "next", model={"init": str(tmp_path / "val")}, train={"max_steps": 1}))
    assert f"{result.checkpoint} is taken, the checkpoint of the run's result" in caplog.text


# --- many classes -----------------------------------------------------------------------------------------------------


def test_counts_are_exact_for_any_parts_of_a_split() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 7, 500), random.integers(0, 7, 500)
    whole = Confusion.of_codes(truth * 7 + predicted, np.ones(500, np.int64), 7)
    parts = [
        Confusion.of_codes((truth * 7 + predicted)[part], np.ones(len(truth[part]), np.int64), 7)
        for part in (slice(0, 100), slice(100, 101), slice(101, 101), slice(101, 500))
    ]
    dense = np.zeros((7, 7), np.int64)
    np.add.at(dense, (truth, predicted), 1)
    for counts in (whole, parts[0].plus(parts[1:])):
        assert (counts.matrix(range(7)) == dense).all()
        assert (counts.matrix([5, 2]) == dense[np.ix_([5, 2], [5, 2])]).all()
        assert (counts.total, counts.correct) == (500, np.trace(dense))
        assert counts.samples_by_class().tolist() == dense.sum(1).tolist()
        assert counts.correct_by_class().tolist() == dense.diagonal().tolist()
    again = Confusion.of_result({"confusion": whole.as_rows(), "accuracy_by_class": dict.fromkeys(range(7))})
    assert again.as_rows() == whole.as_rows()
    off = dense - np.diag(dense.diagonal())
    assert whole.most_frequent_mistakes(1)[0][2] == off.max()


def test_the_size_of_a_result_grows_with_the_samples_not_with_the_square_of_the_classes(tmp_path: Path) -> None:
    from distrain.preparation.blocks import Options, prepare
    from distrain.preparation.sources.synthetic import Synthetic

    classes = 1500  # a matrix of them as JSON takes 13 MB
    source = Synthetic(classes, classes, 8, classes, 0)
    dataset, _ = prepare(tmp_path / "data", "synthetic", {}, lambda _: source, Options(lanes=2))
    result = distrain.train(tree(dataset, tmp_path / "run", model={"name": "small"}))
    assert (result.total, len(result.accuracy_by_class)) == (classes, classes)
    assert (tmp_path / "run/result.json").stat().st_size < 200_000


# --- what a caller has set, memory, BatchNorm -------------------------------------------------------------------------


def test_training_does_not_depend_on_what_the_caller_has_set(easy: Dataset, tmp_path: Path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        distrain.train(tree(easy, tmp_path / name))
        return load_file(tmp_path / name / "checkpoints/step-00000003/model.safetensors")

    expected = weights("plain")
    with torch.no_grad():
        without_gradients = weights("no_grad")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            otherwise = weights("everything")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(without_gradients[name], value) for name, value in expected.items())
    assert all(torch.equal(otherwise[name], value) for name, value in expected.items())


def test_losses_and_audit_do_not_stay_in_memory_where_nothing_is_logged_or_saved(
    easy: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending: list[int] = []
    add = meters.LossMeter.add

    def counted(meter: meters.LossMeter, loss: torch.Tensor) -> None:
        add(meter, loss)
        pending.append(len(meter._pending))

    monkeypatch.setattr(meters, "_MAX_PENDING", 8)
    monkeypatch.setattr(meters.LossMeter, "add", counted)
    quiet: dict[str, Any] = {
        "train": {"max_steps": 50},
        "log": {"every_steps": 10**9},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0, "every_minutes": 0},
    }
    distrain.train(tree(easy, tmp_path / "run", data={"audit": True}, **quiet))
    assert max(pending) == 8
    assert len((tmp_path / "run/audit/rank-00000.jsonl").read_text().splitlines()) == 50


@pytest.mark.parametrize(
    ("batch", "micro", "refused"),
    [(1, None, "raise train.global_batch_size"), (3, 2, "raise train.micro_batch_size"), (4, 2, None), (2, None, None)],
)
def test_batch_norm_of_single_values_is_refused_before_training(
    easy: Dataset, tmp_path: Path, batch: int, micro: int | None, refused: str | None
) -> None:
    settings = {
        "model": {"name": "models_for_tests:BatchNormAndDropout"},
        "train": {"global_batch_size": batch, "micro_batch_size": micro, "max_steps": 2},
    }
    if refused is None:
        distrain.train(tree(easy, tmp_path / "run", **settings))
        return
    with pytest.raises(ConfigError, match=rf"can have one image, and BatchNorm 2 gets 1×1 pixels .*{refused}"):
        distrain.train(tree(easy, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "frozen"), [("NormedPixels", {}), ("BatchNormAndDropout", {"[12].*": 0})])
def test_batch_norm_of_many_pixels_or_with_fixed_statistics_takes_batches_of_one(
    easy: Dataset, tmp_path: Path, name: str, frozen: dict[str, float]
) -> None:
    settings = {
        "model": {"name": f"models_for_tests:{name}"},
        "train": {"global_batch_size": 1, "max_steps": 2, "lr_scale": frozen},
    }
    assert distrain.train(tree(easy, tmp_path / "run", **settings)).steps == 2


def test_the_smallest_micro_batches_are_counted() -> None:
    assert Order(12, 12, 10, 16, 0).smallest_micro_batches(1, 1) == (16, 16)
    assert Order(12, 12, 10, 3, 0).smallest_micro_batches(1, 2) == (1, 1)
    assert Order(12, 12, 10, 4, 0).smallest_micro_batches(2, 1) == (2, 4)
    assert Order(3, 3, 10, 2, 0).smallest_micro_batches(2, 2) == (1, 1)  # one image of each rank, in two parts


@pytest.mark.ranks
def test_a_micro_batch_that_is_empty_on_all_processes_changes_no_statistics(
    group: Callable[[int], Group], tmp_path: Path
) -> None:
    # Local batches of 1 and 1, then of 2 and 0, in two parts each: the first part of a step is empty everywhere.
    dataset = make(tmp_path / "data", 60, 20, shards=3, lanes=3)
    settings = {
        "model": {"name": "models_for_tests:NormedPixels"},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 6},
    }
    result = group(2).train(tree(dataset, tmp_path / "run", **settings))
    assert result["steps"] == 6
    saved = load_file(tmp_path / "run/checkpoints/step-00000006/model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


# --- few images -------------------------------------------------------------------------------------------------------


def test_few_steps_are_warned_of_with_values_that_make_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(tmp_path / "data", 200, 20, lanes=4)
    settings = {"train": {"max_steps": None, "epochs": 2, "global_batch_size": 128, "lr": 0.05}}
    distrain.train(tree(dataset, tmp_path / "run", **settings))
    (warning,) = [line for line in warnings_of(caplog) if "an epoch" in line]
    assert warning.startswith("1 step an epoch, 2 in all: ")
    typed = warning.partition("; try ")[2].split()
    assert typed == ["train.global_batch_size=16", "train.lr=0.0063", "train.epochs=84"]
    better = config.load(None, typed).train
    assert optim.advice(better, 200, 1) is None
    assert 12 * 84 >= 1000


@pytest.mark.parametrize(
    ("train", "images", "fewest", "advice"),
    [
        ({"epochs": 30}, 100_000, 1, None),
        ({"epochs": 30}, 1280, 1, None),
        ({"epochs": 500}, 160, 1, None),  # one step an epoch, but 500 of them
        ({"epochs": 30}, 1279, 1, "train.global_batch_size=64 train.lr=0.025 train.epochs=53"),
        ({"epochs": 30, "optimizer": "adamw"}, 100, 1, "train.global_batch_size=8 train.epochs=84"),
        ({"epochs": 30, "global_batch_size": 8}, 20, 1, "train.epochs=500"),
        ({"max_steps": 20}, 160, 1, "train.global_batch_size=16 train.lr=0.0063 train.max_steps=1000"),
        ({"epochs": 30}, 160, 128, "train.epochs=1000"),  # 64 lanes and mixup, or 128 processes
    ],
)
def test_advice_about_few_steps(train: dict[str, Any], images: int, fewest: int, advice: str | None) -> None:
    settings = config.Train(**{"global_batch_size": 128, "lr": 0.05, **train})
    assert optim.advice(settings, images, fewest) == advice


def test_few_steps_are_enough_for_pretrained_weights() -> None:
    train = config.load(Path(__file__).parent.parent / "configs/finetune.yaml").train
    for classes in (2, 3, 4):  # 100 photos of each, without a tenth for test and for val
        assert optim.advice(train, 81 * classes, 1, pretrained=True) is None
    assert optim.advice(train, 65, 1, pretrained=True) == "train.global_batch_size=8 train.lr=0.005 train.epochs=25"


def test_recipes_for_few_and_many_images_are_valid_and_say_for_how_many() -> None:
    folder = Path(__file__).parent.parent / "configs"
    for name, images in (("folder-small.yaml", 100), ("folder-small.yaml", 5000), ("folder.yaml", 5000)):
        settings = config.load(folder / name)
        assert optim.advice(settings.train, images, 1) is None, (name, images)
        assert "5,000 images" in (folder / name).read_text()
