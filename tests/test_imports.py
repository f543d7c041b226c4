"""The modules that are imported: never the current folder's in place of Python's or the installed ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from distrain import plugins
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError

REPO = Path(__file__).parent.parent
MODEL = """
import layers
import torch

class Net(torch.nn.Module):
    def __init__(self, num_classes, image_shape):
        super().__init__()
        height, width, channels = image_shape
        self.linear = layers.linear(height * width * channels, num_classes)

    def forward(self, images):
        import late  # noqa: F401 - first here

        return self.linear(images.flatten(1))
"""


def write_hostile_modules(folder: Path) -> None:
    """Write files with the names of modules, and a clone of distrain, that end whoever imports them."""
    names = ("random", "profile", "yaml", "logging", "torch", "queue", "cProfile", "tqdm")
    for name in names:
        folder.joinpath(f"{name}.py").write_text(f"raise SystemExit('the wrong {name} was imported')\n")
    shutil.copytree(REPO / "distrain", folder / "distrain", ignore=shutil.ignore_patterns("__pycache__"))
    folder.joinpath("distrain/cli.py").write_text("raise SystemExit('the wrong distrain was imported')\n")


@pytest.mark.parametrize("launch", [[], ["launch", "--nproc", "1", "--"]], ids=["python -m", "python -m, launch"])
def test_the_current_folder_replaces_no_module_but_has_the_model(
    launch: list[str], small: Dataset, tmp_path: Path
) -> None:
    write_hostile_modules(tmp_path)
    tmp_path.joinpath("mine.py").write_text(MODEL)
    tmp_path.joinpath("layers.py").write_text("import torch\nlinear = torch.nn.Linear\n")
    tmp_path.joinpath("late.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "distrain", *launch, "train", f"data.dir={small.root}", "run.dir=run",
         "model.name=mine:Net", "train.max_steps=2", "train.epochs=null", "train.global_batch_size=24",
         "log.report=false", "run.device=cpu"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2
    assert "the wrong" not in done.stdout + done.stderr


def test_a_clone_that_is_not_installed_can_be_run_from_its_folder(tmp_path: Path) -> None:
    shutil.copytree(REPO / "distrain", tmp_path / "distrain", ignore=shutil.ignore_patterns("__pycache__"))
    # -S: files that installers leave for Python's start, which may name this repository, are not read.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "distrain", "--version"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("distrain, version "), done.stderr


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_a_class_beside_comes_before_an_installed_one_and_the_folder_last_in_the_path(beside: Path) -> None:
    installed = beside / "installed"
    installed.mkdir()
    installed.joinpath("chosen_twice.py").write_text("class Net: where = 'installed'\n")
    beside.joinpath("chosen_twice.py").write_text("class Net: where = 'beside'\n")
    sys.path.insert(0, str(installed))
    assert plugins.make("x", "chosen_twice:Net").where == "beside"
    assert sys.path[-1] == str(beside)
    assert plugins.make("x", "chosen_twice:Net").where == "beside"


def test_packages_beside_are_found(beside: Path) -> None:
    for package, init in (("a_package", True), ("a_namespace", False)):
        (beside / package).mkdir()
        if init:
            (beside / package / "__init__.py").write_text("")
        (beside / package / "module.py").write_text(f"class Net: where = '{package}'\n")
        assert plugins.make("x", f"{package}.module:Net").where == package


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("random", r"x: ImportError: .*/random.py has the name of a module of Python's standard library: rename it"),
        ("numpy", r"x: ImportError: .*/numpy.py has the name of another module that is in use, .*numpy.*: rename it"),
        ("distrain", "x: AttributeError: module 'distrain' has no attribute 'Net'"),
    ],
)
def test_a_class_in_a_file_whose_name_is_taken_is_refused(module: str, message: str, beside: Path) -> None:
    beside.joinpath(f"{module}.py").write_text("class Net: ...\n")
    with pytest.raises(ConfigError, match=message):
        plugins.make("x", f"{module}:Net")


def test_a_module_beside_that_fails_can_be_corrected_and_tried_again(beside: Path) -> None:
    file = beside / "corrected.py"
    file.write_text("raise ValueError('no')\n")
    with pytest.raises(ConfigError, match=r"x: ValueError: no \(.*/corrected.py:1\)"):
        plugins.make("x", "corrected:Net")
    file.write_text("import no_such_module_at_all\n")
    os.utime(file, (1, 1))
    with pytest.raises(ConfigError, match="No module named 'no_such_module_at_all'"):
        plugins.make("x", "corrected:Net")
