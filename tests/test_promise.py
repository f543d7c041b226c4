"""The promise, on real processes: the result of training depends on data, configuration and seed alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import make
from group import Group, GroupError, wait_for
from runs import confusion_matrix, ids_by_step
from safetensors.torch import load_file

import distrain
from distrain import models
from distrain.config import from_tree
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset
from distrain.tools.status import format_status, run_status
from distrain.training import augment, optim

pytestmark = pytest.mark.ranks
Groups = Callable[[int], Group]
Weights = dict[str, torch.Tensor]


def configuration(dataset: Dataset, folder: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, dict[str, Any]] = {
        "data": {"dir": str(dataset.root), "audit": True},
        "run": {"dir": str(folder), "seed": 7},
        "train": {"epochs": 1, "global_batch_size": 16, "precision": "fp64", "lr": 0.1},
        "augment": {"flip": True, "crop_padding": 2},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


def weights(run: Path, step: int | None = None) -> Weights:
    folders = sorted((run / "checkpoints").glob("step-*" if step is None else f"step-{step:08d}"))
    return load_file(folders[-1] / "model.safetensors")


def train_and_kill(w: int, config: dict[str, Any], step: int) -> None:
    """Train on a new group, and SIGKILL all its ranks as soon as the checkpoint of a step exists."""
    victims = Group(w)
    try:
        victims.start("train", config)
        wait_for(Path(config["run"]["dir"]) / f"checkpoints/step-{step:08d}")
        victims.kill()
    finally:
        victims.close()


def distance(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def epoch500(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """An epoch of 501 steps of 16; it drops some samples."""
    return make(tmp_path_factory.mktemp("epoch") / "data", 8035, 203, shards=24, lanes=12)


@pytest.fixture(scope="module")
def epoch_on_one_process(epoch500: Dataset, group: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of that epoch on one process."""
    run = tmp_path_factory.mktemp("epoch") / "run"
    group(1).train(configuration(epoch500, run))
    return run


def test_epoch_in_fp64_is_the_same_on_1_to_4_processes(
    epoch500: Dataset, epoch_on_one_process: Path, group: Groups, tmp_path: Path
) -> None:
    results = {1: json.loads((epoch_on_one_process / "result.json").read_text())}
    results |= {w: group(w).train(configuration(epoch500, tmp_path / str(w))) for w in (2, 3, 4)}
    steps = results[1]["steps"]
    assert steps >= 500
    ids = ids_by_step(epoch_on_one_process)
    assert list(ids) == list(range(steps))
    seen = Counter(i for step in ids.values() for i in step)
    assert max(seen.values()) == 1
    assert len(seen) + results[1]["dropped_per_epoch"] == 8035
    torch.manual_seed(7)
    start = models.build("net", "relu", 10, (3, 16, 16)).double().state_dict()
    end = weights(epoch_on_one_process)
    assert all(not torch.equal(start[name], end[name]) for name in end), "a parameter never moved"
    for w in (2, 3, 4):
        assert ids_by_step(tmp_path / str(w)) == ids
        assert distance(weights(tmp_path / str(w)), end) < 1e-10
        assert results[w]["world_size"] == w
        for key in ("correct", "total", "confusion", "dropped_per_epoch", "steps"):
            assert results[w][key] == results[1][key]


@pytest.mark.parametrize(
    ("train", "bound"),
    [
        ({"precision": "fp32"}, 1e-5),
        ({"precision": "fp32", "micro_batch_size": 3}, 1e-5),
        # Here rounding errors of fp32 grow beyond the bound within 50 steps; Adam divides by the gradient's size, which
        # enlarges those near 0: fp64.
        ({"clip_norm": 0.5, "nesterov": True}, 1e-10),
        ({"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}, 1e-10),
    ],
    ids=["sgd", "accumulated", "clipped", "adamw"],
)
def test_50_steps_are_the_same_on_1_to_4_processes(
    train: dict[str, Any], bound: float, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    changes = {"epochs": None, "max_steps": 50, "lr": 0.05, **train}
    for w in (1, 2, 3, 4):
        group(w).train(configuration(small, tmp_path / str(w), train=changes))
    for w in (2, 3, 4):
        assert ids_by_step(tmp_path / str(w)) == ids_by_step(tmp_path / "1")
        assert distance(weights(tmp_path / str(w)), weights(tmp_path / "1")) < bound


EVERYTHING: dict[str, dict[str, Any]] = {
    "model": {"name": "models_for_tests:Normed"},
    "augment": {"flip": "alternating", "cutout": 5, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
    "train": {
        "epochs": None,
        "max_steps": 60,
        "global_batch_size": 30,
        "label_smoothing": 0.1,
        "ema_decay": 0.95,
        "weight_decay": 1e-3,
    },
}
"""Every option whose result could depend on the number of processes."""


def test_every_option_keeps_the_promise(small: Dataset, group: Groups, tmp_path: Path) -> None:
    for w in (1, 2, 3, 4):
        cache = {"cache": "ram" if w % 2 else "off"}
        result = group(w).train(configuration(small, tmp_path / str(w), **EVERYTHING, data=cache))
        assert result["dependent_layers"] == []
    for w in (2, 3, 4):
        assert ids_by_step(tmp_path / str(w)) == ids_by_step(tmp_path / "1")
        assert distance(weights(tmp_path / str(w)), weights(tmp_path / "1")) < 1e-10


def test_every_option_resumes_to_the_same_bits(small: Dataset, group: Groups, tmp_path: Path) -> None:
    tree = {
        **EVERYTHING,
        "train": {**EVERYTHING["train"], "precision": "fp32"},
        "checkpoint": {"every_steps": 20, "keep": 0},
    }
    for name in ("whole", "cut"):
        group(3).train(configuration(small, tmp_path / name, **tree))
    (tmp_path / "cut/result.json").unlink()
    for step in (40, 60):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}")
    group(3).train(configuration(small, tmp_path / "cut", **tree, data={"cache": "off"}))
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    last_weights = [
        load_file(tmp_path / name / "checkpoints/step-00000060/optimizer.safetensors") for name in ("whole", "cut")
    ]
    assert same_bits(*last_weights)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_with_another_memory_layout_resume_to_the_same_bits(
    optimizer: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    tree = {
        "model": {"name": "models_for_tests:ChannelsLast"},
        "train": {"optimizer": optimizer, "lr": 0.01, "precision": "fp32", "max_steps": 20, "epochs": None},
        "checkpoint": {"every_steps": 10, "keep": 0},
    }
    for name in ("whole", "cut"):
        group(1).train(configuration(small, tmp_path / name, **tree))
    (tmp_path / "cut/result.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoints/step-00000020")
    group(1).train(configuration(small, tmp_path / "cut", **tree))
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("model", ["net", "models_for_tests:Normed"])
def test_ranks_with_an_empty_local_batch_take_part(model: str, tmp_path: Path, group: Groups) -> None:
    # 5 lanes on 4 ranks: rank 0 owns two, and steps of 4 leave some rank without a sample.
    dataset = make(tmp_path / "data", 103, lanes=5)
    for w in (1, 4):
        sections = {"train": {"global_batch_size": 4}, "model": {"name": model}}
        group(w).train(configuration(dataset, tmp_path / str(w), **sections))
    lines = [json.loads(line) for line in (tmp_path / "4/audit/rank-00003.jsonl").read_text().splitlines()]
    assert any(not line["ids"] for line in lines)
    assert ids_by_step(tmp_path / "4") == ids_by_step(tmp_path / "1")
    assert distance(weights(tmp_path / "4"), weights(tmp_path / "1")) < 1e-12


def test_one_checkpoint_evaluates_alike_on_1_to_4_processes(small: Dataset, group: Groups, tmp_path: Path) -> None:
    run = tmp_path / "run"
    group(2).train(configuration(small, run, train={"epochs": 3, "precision": "fp32"}))
    answers_of = {w: group(w).call("evaluate", str(run), "test") for w in (1, 2, 3, 4)}
    for w, answers in answers_of.items():
        for answer in answers:
            assert answer["confusion"] == answers_of[1][0]["confusion"], w
            assert answer["loss"] == answers_of[1][0]["loss"]
    # A plain loop over the images of the source.
    from distrain.preparation.sources.synthetic import Synthetic

    source = Synthetic(1003, 203, 16, 10, 0)
    net = models.build("net", "relu", 10, (3, 16, 16))
    net.load_state_dict(weights(run))
    mean, std = (torch.tensor(values) for values in (small.manifest.mean, small.manifest.std))
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for index in range(203):
        image = torch.from_numpy(source.load("test", index)).float().permute(2, 0, 1) / 255
        logits = net(((image - mean[:, None, None]) / std[:, None, None])[None])
        confusion[source.labels["test"][index], logits.argmax()] += 1
    assert confusion.tolist() == confusion_matrix(answers_of[1][0])
    assert answers_of[1][0]["total"] == 203


# tests/faults kills one and two processes in many more ways, and the next test kills four: `make faults` kills these.
@pytest.mark.parametrize("w", [*(pytest.param(w, marks=pytest.mark.faults) for w in (1, 2, 4)), 3])
def test_killed_twice_in_an_epoch_ends_with_the_same_bits(
    w: int, epoch500: Dataset, group: Groups, tmp_path: Path
) -> None:
    changes = {
        "train": {"precision": "fp32", "momentum": 0.9, "micro_batch_size": 5},
        "checkpoint": {"every_steps": 50, "keep": 0},
        "run": {"resume": "auto"},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    group(w).train(configuration(epoch500, whole, **changes))
    for step in (100, 250):
        train_and_kill(w, configuration(epoch500, killed, **changes), step)
        assert not (killed / "result.json").exists(), "killed too late to prove anything"
    group(w).train(configuration(epoch500, killed, **changes))
    assert same_bits(weights(killed), weights(whole))
    assert ids_by_step(killed) == ids_by_step(whole)
    metrics = [[json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] for run in (whole, killed)]
    assert metrics[0] == metrics[1]
    check_goodput(killed)


def check_goodput(run: Path) -> None:
    """The times of a run that was killed fit together: those in its result, its status and its attempts."""
    result, status = json.loads((run / "result.json").read_text()), run_status(run)
    assert 0 < result["goodput"] == result["train_seconds"] / result["attempt_seconds"] < 1
    assert result["train_seconds"] < result["seconds"] <= result["attempt_seconds"]
    assert status["goodput"]["fraction"] == distrain.open_run(run).goodput == result["goodput"]
    assert "in steps that counted, of" in format_status(status)
    files = [json.loads(path.read_text()) for path in sorted((run / "attempts").iterdir())]
    spent = sum(each["seconds"] + each["startup_seconds"] for each in files)
    assert len(files) == 3
    assert spent <= result["attempt_seconds"] + 5  # it released the folder after its result


def test_resumed_on_other_numbers_of_processes(
    epoch500: Dataset, epoch_on_one_process: Path, group: Groups, tmp_path: Path
) -> None:
    run = tmp_path / "elastic"
    for w, killed_at in ((2, 100), (4, 200), (1, 300), (3, None)):
        changes = {"checkpoint": {"every_steps": 50}, "run": {"resume": "auto"}}
        if killed_at is None:
            group(w).train(configuration(epoch500, run, **changes))
            break
        train_and_kill(w, configuration(epoch500, run, **changes), killed_at)
    assert ids_by_step(run) == ids_by_step(epoch_on_one_process)
    assert distance(weights(run), weights(epoch_on_one_process)) < 1e-10


def test_plain_loop_fed_with_the_audit_gives_the_same_weights_step_by_step(
    small: Dataset, group: Groups, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = {
        "train": {"max_steps": 40, "epochs": None, "schedule": "one_cycle", "weight_decay": 0.01},
        "augment": {"flip": False, "crop_padding": 0},
        "checkpoint": {"every_steps": 1, "keep": 0},
    }
    group(3).train(configuration(small, run, **changes))
    images, labels = by_id(small)
    settings = from_tree(configuration(small, run, **changes)).train
    torch.manual_seed(7)
    net = models.build("net", "relu", 10, (3, 16, 16)).double()
    sgd = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9, weight_decay=0.01)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (small.manifest.mean, small.manifest.std))
    for step, ids in ids_by_step(run).items():
        rate = optim.learning_rate(step, 40, settings.schedule, settings.lr, settings.warmup_fraction)
        sgd.param_groups[0]["lr"] = rate
        inputs = augment.normalize(images[ids], mean, std)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), labels[ids]).backward()
        sgd.step()
        assert distance(weights(run, step + 1), dict(net.state_dict())) < 1e-12, f"step {step}"


def by_id(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = [
        block
        for shard in dataset.split("train").shards
        for block in shards.read(dataset.root, shard, dataset.manifest.image_shape, 10)
    ]
    images = torch.zeros(dataset.split("train").samples, *dataset.manifest.image_shape, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for block in blocks:
        images[block.ids.copy()] = torch.from_numpy(block.images.copy())
        labels[block.ids.copy()] = torch.from_numpy(block.labels.copy())
    return images, labels


def test_swapped_ids_inside_a_shard_show_in_the_audit(small: Dataset, group: Groups, tmp_path: Path) -> None:
    swapped = tmp_path / "data"
    shutil.copytree(small.root, swapped)
    dataset = manifest.read(swapped)
    entries = list(dataset.split("train").shards)
    (block,) = shards.read(swapped, entries[3], dataset.manifest.image_shape, 10)
    ids = block.ids.copy()
    ids[[0, 1]] = ids[[1, 0]]
    shards.write(swapped / entries[3].name, shards.Block(block.images, block.labels, ids))
    entries[3] = shards.describe(swapped / entries[3].name, entries[3].name, entries[3].samples)
    splits = {**dataset.manifest.splits, "train": dataset.split("train").model_copy(update={"shards": entries})}
    again = dataset.manifest.model_copy(update={"splits": splits})
    (swapped / manifest.NAME).write_text(manifest.to_json(again))
    for data, name in ((small, "before"), (manifest.read(swapped), "after")):
        group(2).train(configuration(data, tmp_path / name, train={"global_batch_size": 8}))
    before, after = ids_by_step(tmp_path / "before"), ids_by_step(tmp_path / "after")
    differ = [step for step in before if before[step] != after[step]]
    assert len(differ) in (1, 2)
    swapped_ids = {i for step in differ for i in set(before[step]) ^ set(after[step])}
    assert swapped_ids == set(block.ids[:2].tolist())


def test_a_diverging_run_stops_on_every_rank(small: Dataset, group: Groups, tmp_path: Path) -> None:
    changes = {
        "train": {"lr": 1e6, "precision": "fp32", "epochs": 5, "schedule": "constant"},
        "checkpoint": {"every_steps": 1, "keep": 0},
    }
    with pytest.raises(GroupError) as caught:
        group(3).train(configuration(small, tmp_path / "run", **changes))
    assert caught.value.kinds == ["DivergedError"] * 3
    message = caught.value.messages[0]
    assert "learning rate 1e+06" in message
    named = Path(message.split("last good checkpoint: ")[1].split(". Lower")[0])
    assert all(value.isfinite().all() for value in load_file(named / "model.safetensors").values())
    group(3).train(configuration(small, tmp_path / "next", train={"max_steps": 2, "epochs": None}))


def test_batch_norm_is_evaluated_with_the_saved_statistics(small: Dataset, group: Groups, tmp_path: Path) -> None:
    # Each rank has the statistics of its local batches; the model that is evaluated is the one in the checkpoint.
    run = tmp_path / "run"
    changes = {"model": {"name": "models_for_tests:BatchNormAndDropout"}, "train": {"precision": "fp32", "epochs": 2}}
    result = group(3).train(configuration(small, run, **changes))
    (answer,) = group(1).call("evaluate", str(run), "test")
    assert answer["confusion"] == result["confusion"]


def test_processes_of_different_configurations_are_refused(small: Dataset, group: Groups, tmp_path: Path) -> None:
    one = configuration(small, tmp_path / "run", train={"epochs": None, "max_steps": 2})
    other = configuration(small, tmp_path / "run", train={"epochs": None, "max_steps": 2, "lr": 0.2})
    with pytest.raises(GroupError) as caught:
        group(2).call("train_each", [one, other])
    assert caught.value.kinds == ["ConfigError"] * 2
    assert all("rank 1" in message and "train.lr (0.2, on rank 0 0.1)" in message for message in caught.value.messages)
    assert not (tmp_path / "run").exists()


def test_a_model_that_one_process_cannot_build_is_an_error_on_all(
    small: Dataset, group: Groups, tmp_path: Path
) -> None:
    config = configuration(small, tmp_path / "run", model={"name": "models_for_tests:OnlyOnRank0"})
    with pytest.raises(GroupError) as caught:
        group(2).train(config)
    assert caught.value.kinds == ["ConfigError"] * 2
    assert all("not on this node" in message for message in caught.value.messages)


@pytest.mark.parametrize("size", [1, 2])
def test_a_layer_that_is_never_used_is_named(size: int, small: Dataset, group: Groups, tmp_path: Path) -> None:
    config = configuration(small, tmp_path / "run", model={"name": "models_for_tests:Idle"})
    with pytest.raises(GroupError) as caught:
        group(size).train(config)
    assert caught.value.kinds == ["ConfigError"] * size
    assert all("does not depend on head.weight, head.bias; use" in message for message in caught.value.messages)


def test_too_many_processes_are_refused(tmp_path: Path, group: Groups) -> None:
    dataset = make(tmp_path / "data", 50, lanes=3)
    with pytest.raises(GroupError) as caught:
        group(4).train(configuration(dataset, tmp_path / "run"))
    assert "4 processes for 3 lanes" in caught.value.messages[0]
    with pytest.raises(GroupError) as caught:
        group(3).train(configuration(dataset, tmp_path / "run", train={"global_batch_size": 2}))
    assert "smaller than the number of processes" in caught.value.messages[0]
    assert not (tmp_path / "run").exists()
