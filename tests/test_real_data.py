"""Real images: training and evaluation give the results of a plain loop over the JPEG files."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from group import Group
from PIL import Image
from runs import confusion_matrix, ids_by_step
from safetensors.torch import load_file

from distrain import cli, config, models
from distrain.data import manifest
from distrain.data.manifest import Dataset

pytestmark = [pytest.mark.ranks, pytest.mark.real_data]
Groups = Callable[[int], Group]
TUTORIAL = Path(__file__).parent.parent / "configs" / "tutorial.yaml"


@pytest.fixture(scope="module")
def cifar10(cifar10_archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """10,000 training images, drawn evenly from the classes, and all test images."""
    out = tmp_path_factory.mktemp("cifar10") / "data"
    assert cli.main(["prepare", "folder", *map(str, cifar10_archives), "--limit", "10000", "--out", str(out)]) == 0
    return manifest.read(out)


@pytest.fixture(scope="module")
def jpegs(cifar10_archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """All files of each split, class by class: a sample's id is its index in this list."""
    folder = tmp_path_factory.mktemp("jpeg")
    for archive in cifar10_archives:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return {split: sorted((folder / split).glob("*/*.jpg")) for split in ("train", "test")}


def read_image(path: Path) -> torch.Tensor:
    """Read an image as the tutorial does: float64 [3, 32, 32] in -1 … 1."""
    with Image.open(path) as image:
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 - 0.5) / 0.5


def test_the_tutorial_step_by_step_against_a_plain_loop(
    cifar10: Dataset, jpegs: dict[str, list[Path]], group: Groups, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = 150
    overrides = [
        f"data.dir={cifar10.root}", f"run.dir={run}", "data.audit=true", "train.precision=fp64", "train.epochs=null",
        f"train.max_steps={steps}", "checkpoint.every_steps=50", "checkpoint.keep=0", "eval.every_steps=0",
    ]  # fmt: skip
    result = group(2).train(config.load(TUTORIAL, overrides).model_dump())
    ids = ids_by_step(run)
    torch.manual_seed(0)
    net = models.build("net", "relu", 10, (3, 32, 32)).double()
    sgd = torch.optim.SGD(net.parameters(), 0.001, momentum=0.9)
    classes = cifar10.manifest.classes
    for step in range(steps):
        files = [jpegs["train"][i] for i in ids[step]]
        labels = torch.tensor([classes.index(file.parent.name) for file in files])
        assert len(files) == 4
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.stack([read_image(file) for file in files])), labels).backward()
        sgd.step()
        saved = run / f"checkpoints/step-{step + 1:08d}/model.safetensors"
        if saved.exists():
            ours, plain = load_file(saved), net.state_dict()
            assert max(float((ours[name] - plain[name]).abs().max()) for name in plain) < 1e-12, f"step {step}"
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    with torch.no_grad():
        for file in jpegs["test"]:
            confusion[classes.index(file.parent.name), net(read_image(file)[None]).argmax()] += 1
    assert confusion.tolist() == confusion_matrix(result)
    assert result["total"] == 10_000


def test_one_checkpoint_evaluates_alike_on_1_to_4_processes(cifar10: Dataset, group: Groups, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"data.dir={cifar10.root}", f"run.dir={run}", "train.global_batch_size=64", "train.lr=0.02"]
    result = group(3).train(config.load(TUTORIAL, overrides).model_dump())
    assert result["accuracy"] > 0.2
    for w in (1, 2, 3, 4):
        for answer in group(w).call("evaluate", str(run), "test"):
            assert answer["confusion"] == result["confusion"]
            assert answer["loss"] == pytest.approx(result["loss"], abs=1e-12)
