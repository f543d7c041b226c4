"""`python -m benchmarks`: each part on little data, the options that it refuses, and the files that it writes."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from setuptools.config.pyprojecttoml import read_configuration

from benchmarks import (
    accuracy,
    decoding,
    evaluation,
    launches,
    loader,
    loaders,
    memory,
    other_loop,
    photos,
    reader,
    restarts,
    saved_run,
    scaling,
    startup,
    training,
    tutorial,
    virtual_ranks,
)
from benchmarks.__main__ import main
from benchmarks.commands import CommandError, call
from benchmarks.context import Context
from benchmarks.image_files import write_folders
from benchmarks.table import Row, Table, ratio
from distrain.data.manifest import Dataset

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four shards and lanes: few files to open."""
    return make(tmp_path_factory.mktemp("bench") / "data", 1100, 100, image_size=32, shards=4, lanes=4)


@pytest.fixture
def context(images: Dataset, tmp_path: Path) -> Context:
    return Context(
        dataset=images,
        work=tmp_path,
        out=tmp_path / "out",
        images=None,
        repeats=1,
        quick=True,
        device="cpu",
        models=("net",),
        recipe=Path("configs/cifar10.yaml"),
        batches=(128,),
    )


def bench(*arguments: Any) -> int:
    return main([*map(str, arguments)])


def medians(table: Table) -> dict[str, float]:
    rows = [*table.rows, *table.ratios]
    values = {(row.name, row.unit): row.as_dict()["median"] for row in rows}
    assert len(values) == len(rows)
    assert all(math.isfinite(value) and value >= 0 for value in values.values())
    assert all(value > 0 for (_, unit), value in values.items() if unit != "%")
    return {name: value for (name, _), value in values.items()}


# Files that it writes


def test_parts_are_printed_and_written_with_all_samples(images: Dataset, tmp_path: Path, capsys: Capture) -> None:
    assert bench("evaluation", "reading", "--data", images.root, "--out", tmp_path, "--repeats", 2, "--quick") == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["finished"]
    assert list(result["parts"]) == ["reading", "evaluation"]
    assert result["data"]["splits"] == {"train": 1100, "test": 100}
    assert {"torch", "distrain", "python"} <= set(result["versions"])
    reading = {row["name"]: row for row in result["parts"]["reading"]["rows"]}
    assert len(reading) == 10
    for row in reading.values():
        assert len(row["samples"]) == 2
        assert 0 < row["lowest"] <= row["median"] <= row["highest"]
    assert len(result["parts"]["reading"]["ratios"]) == 10
    assert reading["distrain, first epoch"]["median"] > reading["webdataset, PNG"]["median"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in reading)


def test_an_interrupted_run_keeps_its_parts_and_is_not_finished(
    images: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Context) -> Table:
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "measure", lambda _: Table("t", [Row("a", "s", [1.0])]))
    monkeypatch.setattr(startup, "measure", interrupted)
    arguments = ("scaling", "startup", "--data", images.root, "--out", tmp_path)
    (tmp_path / "bench.png").write_bytes(b"of another run")
    assert bench(*arguments) == 130
    result = json.loads((tmp_path / "bench.json").read_text())
    assert not result["finished"]
    assert list(result["parts"]) == ["scaling"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_image_files_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(
        make(tmp_path / "source", 600, 40, image_size=32, shards=2, lanes=2), tmp_path / "files", 600
    )
    monkeypatch.setattr(scaling, "measure", lambda context: Table(str(context.images), [Row("a", "s", [1.0])]))
    for _ in range(2):
        assert bench("scaling", "--images", source, "--out", tmp_path / "out") == 0
    result = json.loads((tmp_path / "out/bench.json").read_text())
    assert result["data"]["splits"] == {"train": 600, "test": 40}
    assert result["parts"]["scaling"]["title"] == str(source)


# Options and data that it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "'speed' is not one of"),
        (["--repeats", "0"], "--repeats"),
        (["--images", ".", "--data", "."], "not both"),
        (["--images", "missing"], "train/CLASS/"),
        (["--data", "missing"], "missing"),
        (["--models", "net,nett"], "did you mean net"),
        (["accuracy", "--recipe", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_an_invalid_option_is_one_message_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments, "--out", "out") == 78
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_too_few_images_are_refused(tmp_path: Path, capsys: Capture) -> None:
    make(tmp_path / "data", 100, 20, image_size=8, shards=2, lanes=2)
    assert bench("--data", tmp_path / "data", "--out", tmp_path / "out") == 78
    assert "100 training images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_error_of_a_failed_command_has_its_exit_code_and_output() -> None:
    with pytest.raises(CommandError, match=r"(?s)exit code 3:\nso it goes"):
        call(["sh", "-c", "echo so it goes >&2; exit 3"])


def test_ratios_are_taken_repeat_by_repeat() -> None:
    quotients = ratio(Row("a", "s", [2.0, 8.0, 9.0]), Row("b", "s", [1.0, 2.0, 9.0]))
    assert quotients.samples == [2.0, 4.0, 1.0]
    assert quotients.as_dict()["median"] == 2.0


def test_the_wheel_contains_the_package_without_the_benchmarks() -> None:
    project = read_configuration(Path(__file__).parent.parent / "pyproject.toml")
    packages = set(project["tool"]["setuptools"]["packages"])
    assert {"distrain", "distrain.tools.report"} <= packages
    assert all(package.partition(".")[0] == "distrain" for package in packages)


# The parts


def test_evaluation(context: Context) -> None:
    assert set(medians(evaluation.measure(context))) == {
        "net: distrain",
        "net: bare loop in memory",
        "net: distrain / net: bare loop in memory",
    }


def test_world_sizes_are_limited_by_machine_lanes_and_data(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "max_processes", property(lambda _: 6))
    assert scaling.world_sizes(context, 128) == [1, 2, 4]  # 4 lanes
    assert scaling.world_sizes(context, 512) == [1, 2]  # 1,100 images
    wide = replace(context, dataset=make(context.work / "wide", 600, 20, image_size=8, shards=8, lanes=8))
    assert scaling.world_sizes(wide, 64) == [1, 2, 4, 6]


@pytest.mark.ranks
@pytest.mark.faults
def test_training(context: Context) -> None:
    values = medians(training.measure(replace(context, precision="bf16")))
    assert len(values) == 4
    assert values["net, batch 128: distrain from shards: waits for data"] <= 100


def test_loaders_read_all_photos(tmp_path: Path) -> None:
    photos.write_tars(tmp_path / "tars", 150)
    dataset = loaders.open_index(tmp_path)
    steps = reader.training_order(dataset, loaders.BATCH).steps_per_epoch
    assert list(loaders.LOADERS["distrain"](tmp_path)(2)) == [loaders.BATCH] * steps * 2
    theirs = loaders.LOADERS["webdataset, torchvision"](tmp_path)
    assert sum(theirs(2)) == 2 * 150
    assert all(value > 0 for value in loaders.measure(theirs, 1).values())


def test_other_loops_read_what_the_trainer_reads(images: Dataset) -> None:
    arguments = (str(images.root), 128, 0, 2)
    assert list(other_loop.by_batches(*arguments)) == list(other_loop.by_trainer(*arguments)) == [128] * 16


@pytest.mark.ranks
@pytest.mark.faults
def test_loader(context: Context) -> None:
    table = loader.measure(replace(context, photos=150))
    values = {(row.name, row.unit): row.as_dict()["median"] for row in [*table.rows, *table.ratios]}
    assert all(value > 0 for value in values.values())
    assert {name for name, unit in values if unit == "×"} == {
        f"{name}, {data} / distrain train: {unit}"
        for name in ("distrain.batches", "distrain.batches alone")
        for data in ("blocks", "photos")
        for unit in ("images/s", "CPU ms/image")
    }


@pytest.mark.ranks
@pytest.mark.faults
def test_decoding(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    context.work.joinpath("litdata.py").write_text("raise ImportError('is not installed')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(context.work), os.environ.get("PYTHONPATH", "")]))
    theirs = "webdataset, torchvision"
    table = decoding.measure(replace(context, photos=150, loaders=("distrain", "litdata", theirs)))
    values = {(row.name, row.unit): row.as_dict()["median"] for row in [*table.rows, *table.ratios]}
    units = ("CPU ms/image", "images/s", "s to the first batch", "MiB (PSS)", "MiB (RSS)")
    assert all(values.pop((name, unit)) > 0 for name in ("distrain", theirs) for unit in units)
    ratios = ("CPU time", "best images/s", "memory (PSS)", "memory (RSS)")
    assert all(values.pop((f"{what}: distrain / {theirs}", "×")) > 0 for what in ratios)
    assert 0 <= values.pop(("distrain train: waits for data", "%")) <= 100
    assert 0 < values.pop(("distrain, resume in the middle of an epoch", "s")) < 100
    assert 0 < values.pop(("distrain, read until its first batch", "MiB read")) < 100
    assert not values
    missing, digests = table.notes
    assert missing == "not measured: litdata (is not installed)"
    assert digests.startswith("batches of 1, 2, 7 threads: the same sha256 ")


@pytest.mark.ranks
@pytest.mark.faults
def test_tutorial(context: Context) -> None:
    assert set(medians(tutorial.measure(context))) == {
        "plain PyTorch script",
        "distrain",
        "distrain / plain PyTorch script",
    }


@pytest.mark.ranks
@pytest.mark.faults
def test_scaling(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "max_processes", property(lambda _: 2))
    assert set(medians(scaling.measure(context))) == {
        "batch 128 × 1",
        "batch 128 × 2",
        "batch 128, 2 runs at once",
        "batch 128 × 2 / batch 128 × 1",
        "batch 128 × 2 / batch 128, 2 runs at once",
    }


def test_launches_of_a_recipe(context: Context) -> None:
    values = medians(launches.measure(context))
    assert values["augment"] < 10  # the recipe only flips
    assert values["all operations"] == sum(values.values()) - values["all operations"] - values["host"]


@pytest.mark.ranks
@pytest.mark.faults
def test_virtual_ranks(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "max_processes", property(lambda _: 1))
    plain = "net, batch 128, 1 process"
    with_one, with_four = (f"{plain}, {number} virtual ranks" for number in (1, 4))  # 4 lanes
    assert set(medians(virtual_ranks.measure(context))) == {
        *(plain, with_one, with_four),
        *(f"{name} / {plain}" for name in (with_one, with_four)),
    }


@pytest.mark.ranks
@pytest.mark.faults
def test_startup(context: Context) -> None:
    values = medians(startup.measure(context))
    assert values["distrain train, fresh"] > values["import torch, accelerate"] / 2
    assert 0 < values["distrain train, resumed"] < 300


@pytest.mark.ranks
@pytest.mark.faults
def test_restarts(context: Context) -> None:
    values = medians(restarts.measure(context))
    assert all(0 < seconds < 300 for seconds in values.values())


@pytest.mark.ranks
def test_memory_does_not_grow_with_the_data(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = memory._cases(quick=True)[:3]
    monkeypatch.setattr(memory, "_cases", lambda _: cases)
    monkeypatch.setattr(memory, "_TIMED", (10**4,))
    values = medians(memory.measure(context))
    small, large, shared = (values[str(case)] for case in cases)
    assert large < 1.5 * small
    assert shared < small
    assert small > 0.5 * values[f"its buffers: {cases[0]}"]


@pytest.mark.ranks
@pytest.mark.faults
def test_accuracy(context: Context) -> None:
    recipe = context.work / "recipe.yaml"
    shutil.copy(Path(__file__).parent.parent / "configs/cifar10.yaml", recipe)
    table = accuracy.measure(replace(context, recipe=recipe))
    assert [row.unit for row in table.rows[:3]] == ["%", "%", "s"]
    assert table.notes or len(table.rows) == 5

    table = accuracy.measure(replace(context, recipe=recipe, target=0.5))
    assert [row.unit for row in table.rows] == ["%", "s", "s"]
    assert table.ratios == []


def test_the_costs_of_saves_are_the_time_beyond_that_of_other_steps() -> None:
    seconds = [5.0, 1.0, 1.0, 3.0, 1.5, 1.0, 2.0, 1.0, 1.0]  # the first step is slow; saves after 3 and 6
    times = [sum(seconds[:step]) for step in range(len(seconds) + 1)]
    assert saved_run.costs(times, 3) == {"step": 1.0, "stalls": [2.0, 1.0], "costs": [2.5, 1.0]}
