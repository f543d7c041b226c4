"""The functions of `import distrain`: the same as the commands, with types, and without leftovers in a notebook."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict_export import plain

import distrain
from benchmarks.context import load
from distrain import cli, signals
from distrain.data import manifest
from distrain.data.manifest import Dataset

REPO = Path(__file__).parent.parent


def keys(dataset: Dataset, run: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base: dict[str, dict[str, Any]] = {
        "data": {"dir": dataset.root},
        "run": {"dir": run},
        "train": {"max_steps": 6, "global_batch_size": 32},
        "eval": {"every_steps": 3},
        "log": {"every_steps": 2, "report": False},
    }
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in (*base, *sections)}


@pytest.fixture(scope="module")
def result(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> distrain.TrainingResult:
    """The result of a run of six steps."""
    return distrain.train(keys(small, tmp_path_factory.mktemp("api") / "run", checkpoint={"every_steps": 3}))


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_import_and_its_names_load_neither_torch_nor_pydantic() -> None:
    code = "import sys, distrain; dir(distrain); distrain.DataError, distrain.errors.Stopped; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "distrain" in modules
    assert {"torch", "pydantic", "numpy", "yaml"} & {name.partition(".")[0] for name in modules} == set()


def test_the_public_names_are_declared_for_type_checkers_documented_and_no_submodules() -> None:
    text = (REPO / "distrain/__init__.py").read_text()
    (block,) = [each for each in ast.parse(text).body if isinstance(each, ast.If)]
    declared = {each.names[0].asname: each.module for each in block.body if isinstance(each, ast.ImportFrom)}
    assert declared == distrain._MODULES
    assert set(distrain.__all__) == declared.keys() <= set(dir(distrain))
    modules = {each.name for each in pkgutil.iter_modules(distrain.__path__)}
    assert modules & set(distrain.__all__) == {"errors"}
    pages = "".join((REPO / "docs" / name).read_text() for name in ("api.md", "own-loop.md"))
    for name in distrain.__all__:
        value = getattr(distrain, name)
        assert value.__doc__, name
        assert f"{name}`" in pages or f".{name}(" in pages or f"`{name}(" in pages or name == "SavedCheckpoint", name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = distrain.trian


def test_the_notebook_as_a_script_runs(tmp_path: Path) -> None:
    """The types in it are checked by `make lint`, together with tests/public_types.py."""
    command = [sys.executable, str(REPO / "examples/from_python.py")]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracies = [float(each) for each in re.findall(r"([\d.]+)% on test", done.stdout)]
    assert len(accuracies) == 2
    assert accuracies[1] > 50 > accuracies[0]
    assert "as expected: runs/no-such-run: holds no run" in done.stdout


# --- configuration ----------------------------------------------------------------------------------------------------


def test_a_configuration_is_built_from_files_mappings_texts_and_other_configurations(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("train:\n  lr: 0.3\n  epochs: 2\n")
    config = distrain.Config.load(file, {"train": {"lr": 0.1}, "run": {"dir": tmp_path}})
    assert (config.train.lr, config.train.epochs, config.run.dir) == (0.1, 2, str(tmp_path))
    other = distrain.Config.load(config, ["train.epochs=null", "train.max_steps=7"])
    assert (other.train.lr, other.train.max_steps, other.run.dir) == (0.1, 7, str(tmp_path))
    assert config.train.epochs == 2
    mapping = {"train": {"lr": 0.3}}
    assert distrain.Config.load(mapping, {"train": {"momentum": 0.5}}).train.lr == 0.3
    assert mapping == {"train": {"lr": 0.3}}
    assert "dir" not in distrain.Config.load(distrain.Config.load()).data.model_fields_set  # a default stays one


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        (5, (), "should be the path of a YAML file, nested mappings of the keys, or a Config; got 5"),
        ({"train.lr": 1}, (), r'in Python, {"train": {"lr": …}}'),
        ({"train": 3}, (), "train: should have the keys of section Train"),
        ({1: {}}, (), "Keys should be strings"),
        ({}, "train.lr=1", "overrides: should be nested mappings of the keys, or a list of texts"),
        ({}, 5, "overrides: should be nested mappings"),
        ({"run": {"dir": 5}}, (), "run.dir: should be a valid string; got 5"),
        ("nowhere.yaml", (), "nowhere.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_message(source: Any, overrides: Any, message: str) -> None:
    with pytest.raises(distrain.ConfigError) as caught:
        distrain.Config.load(source, overrides)
    assert message in str(caught.value)


# --- data sets --------------------------------------------------------------------------------------------------------


def test_prepare_writes_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, name, number in ((s, c, n) for s in ("train", "test") for c in ("cat", "dog") for n in range(6)):
        path = tmp_path / "photos" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (9, 12), (20 * number, 60, 200, 100)).save(path)
    monkeypatch.chdir(tmp_path)
    options = ["--image-size", "8", "--background", "black", "--lanes", "2", "--val-fraction", "0.2", "--seed", "3"]
    assert cli.main(["prepare", "folder", "photos", *options, "--out", "one"]) == 0
    source = distrain.Folder("photos", image_size=8, background="#000000")
    assert distrain.prepare(source, "two", lanes=2, val_fraction=0.2, seed=3) == Path("two")
    assert manifest.read("one").digest == manifest.read("two").digest
    distrain.prepare(source, "one", lanes=2, val_fraction=0.2, seed=3)  # there already: not made again
    with pytest.raises(distrain.ConfigError, match="holds another data set|already"):
        distrain.prepare(source, "one", lanes=2, val_fraction=0.2, seed=4)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: distrain.prepare("photos", out), "such as distrain.Folder(\"photos\"); got 'photos'"),
        (lambda out: distrain.prepare(distrain.Synthetic(samples=0), out), "samples: should be greater than or equal"),
        (
            lambda out: distrain.prepare(distrain.Folder("x", image_size="big"), out),
            "image_size: should",
        ),
        (lambda out: distrain.prepare(distrain.Folder(5), out), "paths: "),
        (lambda out: distrain.prepare(distrain.Folder(out / "nowhere"), out), "nowhere"),
        (
            lambda out: distrain.prepare(distrain.Synthetic(), out, lanes=0),
            "lanes: should",
        ),
        (
            lambda out: distrain.prepare(distrain.Synthetic(), out, val_fraction=1.0),
            "val_fraction: should",
        ),
        (lambda out: distrain.prepare(distrain.Synthetic(), "s3://bucket/data"), "--out: s3:// is an address"),
        (lambda out: distrain.prepare(distrain.Synthetic(), None), "--out: should be a path; got None"),
        (
            lambda out: distrain.prepare(distrain.WebDataset("x.tar", image_size=8), out),
            "no effect without --convert",
        ),
        (
            lambda out: distrain.prepare(distrain.WebDataset("x.tar", normalization="mine"), out),
            "normalization: ",
        ),
        (lambda out: distrain.prepare(distrain.SourceClass("no.module:Class"), out), "no.module"),
        (
            lambda out: distrain.prepare(distrain.Folder("x", background="greenish"), out),
            "--background greenish",
        ),
    ],
)
def test_a_mistake_in_a_source_is_one_message(prepare: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(distrain.UserError) as caught:
        prepare(tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(result: distrain.TrainingResult, small: Dataset) -> None:
    run = distrain.open_run(result.run)
    assert run.result == result
    assert (run.state, run.reason, run.steps, run.attempts, run.problems) == ("done", "done", 6, 1, ())
    assert list(run.classes) == result.classes == small.manifest.classes
    assert run.config == distrain.Config.load(keys(small, result.run, checkpoint={"every_steps": 3}))
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics["step"].tolist() == [2, 3, 4, 6]
    assert len({len(column) for column in run.metrics.values()}) == 1
    for name in ("train/loss", "test/accuracy"):
        steps, values = run.series(name)
        assert list(zip(steps.tolist(), values.tolist(), strict=True)) == [
            (line["step"], line[name]) for line in lines if name in line
        ]
    assert np.isnan(run.metrics["test/accuracy"]).tolist() == [True, False, True, False]
    accuracies = dict(zip(*(each.tolist() for each in run.series("test/accuracy")), strict=True))
    assert {saved.step: saved.accuracy for saved in run.checkpoints} == accuracies
    assert [saved.name for saved in run.checkpoints] == ["step-00000003", "step-00000006"]
    with pytest.raises(distrain.DataError, match="has no metric 'loss'; there are: .*train/loss"):
        run.series("loss")


def test_an_evaluation_has_the_counts_of_the_training_and_is_in_the_folder(
    result: distrain.TrainingResult, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = distrain.evaluate(result.run)
    assert (scores.confusion, scores.loss, scores.checkpoint) == (result.confusion, result.loss, result.checkpoint)
    assert scores.confusion_matrix().trace() == scores.correct == result.correct
    early = distrain.evaluate(str(result.run), "train", checkpoint="step-00000003", overrides=["eval.batch_size=9"])
    assert early.total == 1003
    assert distrain.open_run(result.run).evaluations == (scores, early)
    assert capfd.readouterr().out == ""
    file = result.run / "evaluations/test-step-00000006.json"
    file.write_text("{")
    damaged = distrain.open_run(result.run)
    assert damaged.evaluations == (early,)
    assert "damaged" in "".join(damaged.problems)
    file.unlink()


def test_a_loaded_model_computes_as_the_evaluation_does(result: distrain.TrainingResult, small: Dataset) -> None:
    images, labels = load(small, "test", 203)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # the caller's settings do not change it
        model = distrain.load_model(result.run)
    logits = model(images)
    early = next((result.run / "checkpoints").glob("step-*")).name  # the one that `plain` loads
    assert torch.equal(distrain.load_model(result.run, early)(images), plain(result.run, small, images))
    assert int((logits.argmax(1) == labels).sum()) == result.correct
    assert logits.requires_grad
    assert not model.training
    for wrong in (images.float(), images[0], images.permute(0, 3, 1, 2), images[:, :8]):
        with pytest.raises(distrain.DataError, match=r"images: should be uint8 \[N, 16, 16, 3\]"):
            model(wrong)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_an_image_is_read_from_a_file_its_bytes_and_pillow(
    mode: str, result: distrain.TrainingResult, tmp_path: Path
) -> None:
    model = distrain.load_model(result.run)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    through = {"I;16": "L", "CMYK": "RGB", "1": "L"}.get(mode, mode)
    picture = Image.fromarray(noise).convert(through).convert(mode)
    file = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    picture.save(file)
    pixels = model.preprocess(file)
    assert pixels.shape == (16, 16, 3)
    assert torch.equal(model.preprocess(file.read_bytes()), pixels)
    assert torch.equal(model.preprocess(picture), pixels)
    prediction = model.predict(str(file))
    assert list(prediction.values()) == sorted(prediction.values(), reverse=True)
    assert sum(prediction.values()) == pytest.approx(1, abs=1e-5)
    assert prediction == model.by_class(model(pixels[None]).softmax(1)[0])


def test_an_image_of_pillow_is_upright(result: distrain.TrainingResult, tmp_path: Path) -> None:
    model = distrain.load_model(result.run)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(model.preprocess(opened), model.preprocess(tmp_path / "turned.png"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: distrain.train(5), "got 5"),
        (lambda run: distrain.evaluate(run / "nowhere"), "holds no run"),
        (lambda run: distrain.evaluate(5), "run: should be a path; got 5"),
        (lambda run: distrain.evaluate(""), "run: should be a path; got ''"),
        (lambda run: distrain.evaluate(run, "tests"), "split: should be train, val or test; got 'tests'"),
        (lambda run: distrain.evaluate(run, "val"), "has no split 'val'"),
        (lambda run: distrain.evaluate(run, checkpoint="step-9"), "no such checkpoint; there are step-00000006"),
        (
            lambda run: distrain.evaluate(run, checkpoint=6),
            "checkpoints/6: no such checkpoint; there are step-00000006",
        ),  # type: ignore[arg-type]
        (lambda run: distrain.load_model(run, ""), "no such checkpoint"),
        (lambda run: distrain.load_model(run, "../checkpoints/step-00000006"), "no such checkpoint"),
        (lambda run: distrain.evaluate(run, overrides={"model": {"activation": "tanh"}}), "was not trained with"),
        (lambda run: distrain.open_run(run.parent), "holds no run"),
        (lambda run: distrain.load_model(run, device="tpu"), "device: should be auto, cpu or cuda; got 'tpu'"),
        (lambda run: distrain.load_model(run, "best"), "has no best checkpoint"),
        (lambda run: distrain.load_model(run).preprocess(5), "image: should be the path of an image file"),
        (lambda run: distrain.load_model(run).preprocess("no.png"), "no.png: No such file or directory"),
        (lambda run: distrain.load_model(run).preprocess(b"no image"), "the image: not an image of a known format"),
    ],
)
def test_a_mistake_is_one_message(call: Callable[[Path], Any], message: str, result: distrain.TrainingResult) -> None:
    with pytest.raises(distrain.UserError) as caught:
        call(result.run)
    assert message in str(caught.value)


# --- how a run ends, and what it leaves -------------------------------------------------------------------------------


def settings_of_the_process() -> dict[str, Any]:
    """Settings of the process that a notebook would see changed."""
    return {
        "handlers": [signal.getsignal(number) for number in signals.STOP],
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()],
        "kernels": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "generators": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        "gradients": torch.is_grad_enabled(),
    }


def test_nothing_is_left_behind_and_a_second_time_gives_the_same(small: Dataset, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = settings_of_the_process()
        results = []
        for name in ("first", "second"):
            results.append(distrain.train(keys(small, tmp_path / name, train={"max_steps": 2, "virtual_ranks": 2})))
            assert distrain.evaluate(tmp_path / name).confusion == results[-1].confusion
            distrain.load_model(tmp_path / name)
            assert settings_of_the_process() == before
        assert results[0].confusion == results[1].confusion
        assert results[0].loss == results[1].loss
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


def test_ctrl_c_stops_a_run_and_the_next_call_resumes_it(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = keys(small, tmp_path / "run", model={"name": "models_for_tests:Faulty"})
    monkeypatch.setenv("FAULT", "stop:0:4")
    with pytest.raises(distrain.Stopped, match="the same command resumes there") as caught:
        distrain.train(tree)
    run = distrain.open_run(tmp_path / "run")
    assert (run.state, run.result) == ("stopped", None)
    assert run.reason == f"exited with code 75: {caught.value}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setenv("FAULT", "raise:0:5")
    with pytest.raises(RuntimeError):
        distrain.train(tree)
    run = distrain.open_run(tmp_path / "run")
    assert run.state == "failed"
    assert run.reason.startswith("exited with code 1: RuntimeError: ")
    monkeypatch.delenv("FAULT")
    assert distrain.train(tree).steps == 6
    assert (distrain.open_run(tmp_path / "run").state, distrain.open_run(tmp_path / "run").attempts) == ("done", 3)


def test_a_run_whose_process_was_killed_is_known_as_such(result: distrain.TrainingResult, tmp_path: Path) -> None:
    run = Path(shutil.copytree(result.run, tmp_path / "run"))
    (run / "result.json").unlink()
    attempt = json.loads((run / "attempts/000001.json").read_text())
    assert (attempt["code"], attempt["reason"]) == (0, "done")
    for name in ("code", "reason"):
        del attempt[name]
    gone = {**attempt, "ended": None, "process_start": "1"}  # another process has that number now
    (run / "attempts/000001.json").write_text(json.dumps(gone))
    assert distrain.open_run(run).state == "killed"
    (run / "attempts/000001.json").write_text(json.dumps(attempt))
    assert distrain.open_run(run).state == "unknown"
    (run / "result.json").write_text("{")
    damaged = distrain.open_run(run)
    assert damaged.result is None
    assert any("result.json: damaged" in problem for problem in damaged.problems)


SCRIPT = """
import json, os, sys
import distrain

sys.path.insert(0, sys.argv[1])
from runs import as_record

tree = json.loads(sys.argv[2])
first = distrain.train(tree)
scores = distrain.evaluate(first.run)
with open(f"rank-{os.environ['RANK']}.json", "w") as file:
    json.dump([as_record(each) for each in (first, scores)], file)
"""


@pytest.mark.ranks
def test_a_script_under_torchrun_trains_and_then_evaluates(small: Dataset, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    tree = json.dumps(keys(small, Path("first"), log={"report": True}, train={"max_steps": 2}), default=str)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py",
         str(REPO / "tests"), tree],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert [each["world_size"] for each in ours] == [2, 2]
    assert ours[0]["confusion"] == ours[1]["confusion"]
    assert (ours[0].pop("report"), theirs[0].pop("report")) == ("first/report/index.html", None)
    for name in ("images_per_second", "seconds", "train_seconds", "profile", "tflops_per_second"):  # own clocks
        for record in (ours[0], theirs[0]):
            del record[name]
    assert ours == theirs
