"""`train.compile`: which graphs are compiled and when, and that no pass overwrites what an earlier one has left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graphs import simulated
from datasets import make
from group import Group
from indexes import build
from safetensors.torch import load_file
from torch._inductor import metrics

import distrain
from distrain.config import Augment
from distrain.data.manifest import Dataset
from distrain.distributed.compilation import Compilation
from distrain.errors import ConfigError
from distrain.training import augment

Groups = Callable[[int], Group]
Sections = dict[str, dict[str, Any]]

STEPS = 6


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Five lanes: on two processes, steps of two images have local batches of 0, 1 and 2."""
    return make(tmp_path_factory.mktemp("odd") / "data", 103, 40, image_size=8, shards=5, lanes=5)


def configuration(data: Path, folder: Path, /, *several: Sections) -> Sections:
    tree: Sections = {
        "data": {"dir": str(data)},
        "run": {"dir": str(folder), "seed": 7},
        "model": {"name": "models_for_tests:Attentive"},
        "train": {"max_steps": STEPS, "global_batch_size": 18, "precision": "fp64", "lr": 0.1},
        "eval": {"every_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 0},
        "log": {"report": False},
    }
    for sections in several:
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
    return tree


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{STEPS:08d}/model.safetensors")


def differences(one: Path, other: Path) -> list[str]:
    """Names of the weights and buffers that differ."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def cut(run: Path) -> None:
    """Leave what a run that was killed after three steps leaves."""
    (run / "result.json").unlink()
    shutil.rmtree(run / f"checkpoints/step-{STEPS:08d}")


CUDA_GRAPHS: Sections = {"train": {"compile": "reduce-overhead"}}
ACCUMULATION: dict[str, tuple[Sections, int]] = {
    "micro-batches": ({"train": {"micro_batch_size": 4, "ema_decay": 0.9}}, 5),
    "virtual ranks": ({"train": {"micro_batch_size": 4, "virtual_ranks": 2}}, 6),
}
"""Options with which a process makes several passes in a step, and their number."""


@pytest.mark.parametrize("option", ACCUMULATION)
def test_no_pass_overwrites_what_a_step_still_needs(option: str, data: Path, tmp_path: Path) -> None:
    model: Sections = {"model": {"name": "models_for_tests:NormedPixels"}}
    sections, number = ACCUMULATION[option]
    distrain.train(configuration(data, tmp_path / "plain", model, sections))
    with simulated() as recorder:
        distrain.train(configuration(data, tmp_path / "graphs", model, sections, CUDA_GRAPHS))
    assert differences(tmp_path / "graphs", tmp_path / "plain") == []
    assert recorder.gradients_after_warm_up == 0
    assert recorder.events_of_training == ["begin", "forward", "backward"] * number * STEPS


def test_what_virtual_ranks_see_of_a_model_is_known_when_it_is_compiled(data: Path, tmp_path: Path) -> None:
    sections: Sections = {"model": {"name": "models_for_tests:Twice"}, "train": {"virtual_ranks": 2}}
    with simulated() as recorder:
        distrain.train(configuration(data, tmp_path / "run", sections, {"train": {"compile": "default"}}))
    assert recorder.graphs
    assert set(recorder.events_of_training) == {"forward", "backward"}


@pytest.mark.ranks
def test_nor_under_ddp(data: Path, group: Groups, tmp_path: Path) -> None:
    sections: Sections = {"train": {"micro_batch_size": 4}}
    group(2).train(configuration(data, tmp_path / "plain", sections))
    group(2).call("train_with_cuda_graphs", configuration(data, tmp_path / "graphs", sections, CUDA_GRAPHS))
    assert differences(tmp_path / "graphs", tmp_path / "plain") == []


def test_a_model_that_replaces_its_buffers_cannot_use_cuda_graphs(data: Path, tmp_path: Path) -> None:
    sections: Sections = {"model": {"name": "models_for_tests:Mixed"}}
    with (
        simulated(),
        pytest.raises(ConfigError, match=r"reduce-overhead: a training pass replaces the buffers 9\.replaced of"),
    ):
        distrain.train(configuration(data, tmp_path / "run", sections, CUDA_GRAPHS))


def compiler_settings() -> tuple[Any, ...]:
    dynamo = torch._dynamo.config
    return dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit, torch._inductor.config.deterministic


def test_what_is_compiled_for_one_size_is_not_dynamic(data: Path, tmp_path: Path) -> None:
    settings = compiler_settings()
    with simulated() as recorder:
        result = distrain.train(configuration(data, tmp_path / "run", {"train": {"compile": "default"}}))
    assert compiler_settings() == settings
    assert recorder.graphs == ["compile forward 18"]
    assert recorder.events_of_training == ["forward", "backward"] * STEPS
    assert 0 < result.compile_seconds < result.seconds
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["compile_seconds"] == result.compile_seconds


def test_all_sizes_of_images_are_compiled_before_the_first_step(tmp_path: Path) -> None:
    dataset = build(tmp_path, {"train": [60], "test": [12]}, lanes=4, shards=4)
    growing: Sections = {
        "data": {"image_size": 64, "start_size": 32, "growth": [0, 0.7]},
        "train": {"compile": "default", "global_batch_size": 8},
    }
    with simulated() as recorder:
        distrain.train(configuration(dataset.root, tmp_path / "run", growing))
    assert recorder.graphs == ["compile forward 8"] * 2
    assert recorder.events_of_training == ["forward", "backward"] * STEPS


@pytest.mark.ranks
def test_what_is_compiled_does_not_depend_on_where_an_attempt_begins(
    odd: Dataset, group: Groups, tmp_path: Path
) -> None:
    """Local batches of two images are compiled for any size; torch compiles one image and none separately."""
    config = configuration(odd.root, tmp_path / "run", {"train": {"compile": "default", "global_batch_size": 2}})
    whole = group(2).call("train_with_cuda_graphs", config)
    cut(tmp_path / "run")
    resumed = group(2).call("train_with_cuda_graphs", config)
    for events in (*whole, *resumed):
        assert set(events[events.index("warm") :]) == {"warm", "forward", "backward"}
        compiled = [event for event in events if event.startswith("compile forward")]
        assert compiled == ["compile forward dynamic 2", "compile forward 1", "compile forward 0"]


def test_augmentation_is_one_kernel_for_all_sizes() -> None:
    settings, fill = Augment(flip=True, crop_padding=2, cutout=3), torch.tensor([1, 2, 3], dtype=torch.uint8)
    compiled = Compilation("default", (4, 3)).function(augment.shift_and_cut, batches=2)
    torch.compiler.reset()
    metrics.reset()
    for size in (4, 3, 9):
        images = torch.randint(256, (size, 8, 8, 3), dtype=torch.uint8)
        bits = torch.randint(-(2**63), 2**63 - 1, (size, 2))
        expected = augment.augment(images, bits, settings, fill)
        assert torch.equal(augment.augment(images, bits, settings, fill, compiled=compiled), expected)
        assert metrics.generated_kernel_count == 1


def test_a_model_that_counts_its_passes_is_refused_with_cuda_graphs_too(data: Path, tmp_path: Path) -> None:
    sections: Sections = {"model": {"name": "models_for_tests:CountingTensor"}, "train": {"virtual_ranks": 2}}
    with simulated(), pytest.raises(ConfigError, match="gives other logits when a pass is repeated"):
        distrain.train(configuration(data, tmp_path / "run", sections, CUDA_GRAPHS))


@pytest.mark.ranks
def test_a_compiled_model_trains_the_same_and_resumes_to_the_same_bits(
    data: Path, group: Groups, tmp_path: Path
) -> None:
    """Local batches have 3 or 4 images; after three steps there are 4 where there were 3 at first."""
    augmented = {"flip": True, "crop_padding": 2, "cutout": 3}
    sections: Sections = {"train": {"global_batch_size": 7}, "augment": augmented}
    compiled: Sections = {"train": {"compile": "default"}}
    group(2).train(configuration(data, tmp_path / "plain", sections))
    group(2).train(configuration(data, tmp_path / "whole", sections, compiled))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut(tmp_path / "cut")
    group(2).train(configuration(data, tmp_path / "cut", sections, compiled))
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
    assert differences(tmp_path / "whole", tmp_path / "plain")  # compiled code has other last bits
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "plain")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-10
