"""Every configuration that is shipped, trained to its end on fewer images, reaches an accuracy.

A recipe that diverges ends well, with exit code 0 and the accuracy of guessing: only the accuracy shows it. Those of
large networks need a GPU (tests/gpu/test_gpu_recipes.py). launch/ has no recipe of its own, and tests/test_docs.py
runs the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import large_pictures
import pytest
from datasets import make
from group import Group
from manifests import K8S, job_specs, render

import distrain
from distrain import cli, config
from distrain.data import manifest
from distrain.data.manifest import Dataset

REPO = Path(__file__).parent.parent
DEMO = "k8s/overlays/cpu-demo/config.yaml"
GUESSING = 0.1
# Measured, less six to ten points.
SYNTHETIC = {
    "configs/synthetic.yaml": 0.86,  # 92.1 %
    "configs/cifar10.yaml": 0.80,  # 87.4 %
    "configs/cifar10-quick.yaml": 0.42,  # 51.9 %
    "configs/tutorial.yaml": 0.45,  # 54.7 %
    "k8s/base/config.yaml": 0.68,  # 77.5 %
}
"""Configuration → lowest accuracy, after training on 6,000 generated images."""
CIFAR10 = {
    "configs/cifar10.yaml": 0.44,  # 50.7 %
    "configs/cifar10-quick.yaml": 0.38,  # 45.0 %
    "configs/tutorial.yaml": 0.24,  # 31.2 %
}
"""The same on 6,000 images of CIFAR-10, where they are."""
OF_PAGES = {"configs/imagenet.yaml", "configs/finetune.yaml"}
"""Large networks: tests/test_docs.py trains them for some steps, as docs/data.md and docs/fine-tuning.md print."""
LONG = "configs/imagenet-resnet50.yaml"
"""A large network on an index, with all augmentation: some steps of it with a small one are trained here."""
SPEEDRUN = "configs/speedrun.yaml"
LARGE = {"configs/folder.yaml", "configs/cifar10-resnet9.yaml", SPEEDRUN}
Groups = Callable[[int], Group]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make(tmp_path_factory.mktemp("recipes") / "data", 6000, 1000, image_size=32, lanes=8)


@pytest.fixture(scope="module")
def cifar10(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset | None:
    """6,000 images of each split of CIFAR-10; None where they are missing."""
    try:
        archives = request.getfixturevalue("cifar10_archives")
    except pytest.skip.Exception:
        return None
    out = tmp_path_factory.mktemp("cifar10") / "data"
    assert cli.main(["prepare", "folder", *map(str, archives), "--limit", "6000", "--out", str(out)]) == 0
    return manifest.read(out)


def accuracy(file: str, data: Path, run: Path, train: Callable[[dict], dict], **run_keys: str) -> float:
    keys = {"data.dir": data, "run.dir": run, "log.report": "false", **run_keys}
    resolved = config.load(REPO / file, [f"{key}={value}" for key, value in keys.items()])
    return float(train(resolved.model_dump())["accuracy"])


def test_no_configuration_is_missing_here() -> None:
    files = {*REPO.glob("configs/*.yaml"), *REPO.glob("k8s/**/config.yaml")}
    example = K8S / "overlays/mine/config.yaml"
    assert example.read_text() == (K8S / "base/config.yaml").read_text()
    tried = {*SYNTHETIC, *LARGE, *OF_PAGES, LONG, DEMO, "configs/folder-small.yaml"}
    assert {str(file.relative_to(REPO)) for file in files - {example}} == tried


@pytest.mark.ranks
@pytest.mark.parametrize("file", SYNTHETIC)
def test_a_recipe_learns(file: str, images: Dataset, cifar10: Dataset | None, group: Groups, tmp_path: Path) -> None:
    data, lowest = (images, SYNTHETIC) if cifar10 is None or file not in CIFAR10 else (cifar10, CIFAR10)
    assert accuracy(file, data.root, tmp_path / "run", group(1).train, **{"run.device": "cpu"}) >= lowest[file]


@pytest.mark.ranks
def test_the_recipe_for_few_images_learns_from_200(group: Groups, tmp_path: Path) -> None:
    options = ["--samples", "200", "--test-samples", "1000", "--classes", "4", "--lanes", "8"]
    assert cli.main(["prepare", "synthetic", *options, "--out", str(tmp_path / "data")]) == 0
    train = group(1).train
    reached = accuracy("configs/folder-small.yaml", tmp_path / "data", tmp_path / "run", train, **{"run.device": "cpu"})
    assert reached >= 0.70  # 79.2 %


def test_the_recipe_for_imagenet_trains_1000_classes_to_its_end(tmp_path: Path) -> None:
    """The images and the network are small here; the images begin even smaller, and grow."""
    large_pictures.write(tmp_path / "tars", classes=1000, per_class=2, size=(80, 60))
    splits = [f"{tmp_path}/tars/train-*.tar", "--test", f"{tmp_path}/tars/test-*.tar", "--lanes", "8"]
    assert cli.main(["prepare", "webdataset", *splits, "--out", str(tmp_path / "data")]) == 0
    keys = {
        "data": {"dir": tmp_path / "data", "image_size": 64, "start_size": 32},
        "run": {"dir": tmp_path / "run", "device": "cpu"},
        "model": {"name": "models_for_tests:FaultyAtAnySize"},
        "train": {"epochs": None, "max_steps": 40, "global_batch_size": 64, "lr": 0.05},
        "eval": {"crop": 80, "resize": 84},
        "log": {"report": False, "every_steps": 20},
    }
    result = distrain.train(config.load(REPO / LONG, keys))
    assert (result.steps, result.total) == (40, 1000)
    losses = distrain.open_run(tmp_path / "run").series("train/loss")[1]
    assert losses[-1] < losses[0]


def test_the_speedrun_learns_on_small_images(tmp_path: Path) -> None:
    """Images of 32×32 pixels, which it is made for, would take minutes on a CPU."""
    data = make(tmp_path / "data", 1600, 200, image_size=16, lanes=8)
    keys = {
        "data": {"dir": data.root, "cache": "ram"},
        "run": {"dir": tmp_path / "run", "device": "cpu"},
        "train": {"epochs": 2, "global_batch_size": 100, "compile": "off"},
        "log": {"report": False},
    }
    assert distrain.train(config.load(REPO / SPEEDRUN, keys)).accuracy >= 0.4


@pytest.mark.ranks
def test_the_demo_of_kubernetes_learns_what_its_pods_generate(group: Groups, tmp_path: Path) -> None:
    (spec,) = job_specs(render(K8S / "overlays/cpu-demo"))
    (container,) = spec["template"]["spec"]["initContainers"]
    prepare = [argument.replace("/data/train", str(tmp_path / "data")) for argument in container["args"]]
    assert cli.main(prepare) == 0
    assert sum(split.samples for split in manifest.read(tmp_path / "data").manifest.splits.values()) == 9000
    assert accuracy(DEMO, tmp_path / "data", tmp_path / "run", group(1).train) >= 0.90  # 94.7 %
