"""Virtual ranks on real processes: the bits of a run do not depend on their number."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import xxhash
from datasets import make
from group import Group, GroupError
from mutations import MUTATIONS
from runs import metrics_but_times
from safetensors.torch import load_file

import distrain
from distrain import models
from distrain.config import from_tree
from distrain.data.manifest import Dataset
from distrain.environment import Environment
from distrain.errors import ConfigError, DataError
from distrain.tools.hash_runs import check_equal, format_hashes, hash_runs
from distrain.training import optim
from distrain.training.train import train

pytestmark = pytest.mark.ranks
Groups = Callable[[int], Group]
Sections = dict[str, dict[str, Any]]

MIXED: Sections = {"model": {"name": "models_for_tests:Mixed"}}
OPTIONS: dict[str, Sections] = {
    "accumulation": {"train": {"micro_batch_size": 5}},
    "clipping": {"train": {"clip_norm": 0.5}},
    "ema": {"train": {"ema_decay": 0.9}},
    "mixup": {"augment": {"mixup": 0.4}},
    "smoothing": {"train": {"label_smoothing": 0.1}},
    "bf16": {"train": {"precision": "bf16"}},
    "fp64": {"train": {"precision": "fp64"}},
    "adamw": {"train": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1}},
    "uncached": {"data": {"cache": "off"}},
    "net": {"model": {"name": "net"}},
    "other generators": {"model": {"name": "models_for_tests:Drawing"}},
    "random evaluation": {"model": {"name": "models_for_tests:DrawingAlways"}},
    "five": {"train": {"virtual_ranks": 5}},
    "all lanes": {"train": {"virtual_ranks": 12}},
    "together": {
        "train": {
            "micro_batch_size": 5,
            "clip_norm": 0.5,
            "ema_decay": 0.9,
            "label_smoothing": 0.1,
            "lr_scale": {"0.*": 0, "1.*": 0, "head": 2},
        },
        "augment": {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5},
        "data": {"cache": "off"},
    },
    "speedrun": {
        "model": {"name": "models_for_tests:FromImages"},
        "augment": {"flip": "alternating"},
        "train": {"optimizer": "muon", "lr_scale": {"*.bias": 2}, "nesterov": True, "muon_normalize": True},
        "eval": {"flip": True},
    },
    "empty": {"train": {"global_batch_size": 13, "virtual_ranks": 12}, "model": {"name": "net"}},
}
"""Options whose result could depend on the number of processes; local batches are uneven (12 lanes for 8 ranks)."""

_AT_ONCE = ("together", "speedrun", "adamw", "all lanes", "empty")


def configuration(dataset: Dataset, folder: Path, /, *several: Sections) -> Sections:
    tree: Sections = {
        "data": {"dir": str(dataset.root), "audit": True},
        "run": {"dir": str(folder), "seed": 7},
        "train": {"max_steps": 25, "global_batch_size": 50, "lr": 0.05, "virtual_ranks": 8},
        "augment": {"flip": True, "crop_padding": 2, "cutout": 4},
        "eval": {"every_steps": 9},
        "checkpoint": {"every_steps": 10, "keep": 0},
        "log": {"every_steps": 4, "report": False},
    }
    for sections in several:
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
    return tree


def all_bits(run: Path) -> dict[str, Any]:
    """Everything that a run wrote, but for what may differ: times, rates and the number of processes."""
    may_differ = {
        "world_size", "seconds", "train_seconds", "images_per_second", "tflops_per_second", "mfu", "memory_gib",
        "profile", "version", "goodput", "attempt_seconds", "pause_seconds",
    }  # fmt: skip
    result = {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in may_differ}
    weights = {
        str(file.relative_to(run)): file.read_bytes() for file in sorted((run / "checkpoints").glob("*/*.safetensors"))
    }
    assert len(weights) >= 4
    return {"result": result, "metrics": metrics_but_times(run), **weights}


def same_bits(one: Path, other: Path) -> bool:
    return all_bits(one) == all_bits(other)


# One after another they are left to `make faults`.
@pytest.mark.parametrize(
    "option", [name if name in _AT_ONCE else pytest.param(name, marks=pytest.mark.faults) for name in OPTIONS]
)
def test_any_number_of_processes_gives_the_same_bits(
    option: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    for w in (1, 3, 4):
        group(w).train(configuration(small, tmp_path / str(w), MIXED, OPTIONS[option]))
    for w in (3, 4):
        assert same_bits(tmp_path / str(w), tmp_path / "1")
    check_equal(hash_runs([tmp_path / "1", tmp_path / "3", tmp_path / "4"]))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_of_the_order_of_computing_is_seen(
    mutation: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    changes: Sections = {"train": {"clip_norm": 0.1, "max_steps": 10}, "checkpoint": {"every_steps": 5}}
    for w in (1, 3):
        config = configuration(small, tmp_path / str(w), MIXED, changes)
        group(w).call("train_mutated", config, mutation)
    assert not same_bits(tmp_path / "3", tmp_path / "1")


def test_a_run_resumes_on_other_numbers_of_processes(small: Dataset, group: Groups, tmp_path: Path) -> None:
    """Each attempt is cut back to one of its checkpoints, between evaluations and lines."""
    changes: Sections = {
        "checkpoint": {"every_steps": 1},
        "train": {"ema_decay": 0.9, "optimizer": "adamw", "lr": 1e-3},
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    group(1).train(configuration(small, whole, MIXED, changes))
    for w, until in ((3, 5), (1, 11), (4, 18), (2, 25)):
        group(w).train(configuration(small, cut, MIXED, changes))
        for folder in (cut / "checkpoints").glob("step-*"):
            if int(folder.name[5:]) > until:
                shutil.rmtree(folder)
        if until < 25:
            (cut / "result.json").unlink()
    assert same_bits(whole, cut)


def test_hash_names_the_first_line_where_runs_part(small: Dataset, group: Groups, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    group(1).train(configuration(small, a))
    group(2).train(configuration(small, b))
    group(2).train(configuration(small, c, {"train": {"lr": 0.051}}))
    hashes = hash_runs([a, b])
    check_equal(hashes)
    assert f"{b}: equals {a} in 13 lines, up to step 25" in format_hashes(hashes)
    with pytest.raises(DataError) as caught:
        check_equal(hash_runs([a, b, c]))
    message = str(caught.value)
    assert message.startswith(f"{c}: parts from {a} at step 4 (line 1 of the metrics): ")
    assert "train/lr 0.028" in message
    assert "; the trained ids are equal up to step 25\n" in message
    assert "the runs have train.lr 0.05 and 0.051" in message
    assert str(b) not in message


def test_hash_compares_runs_that_log_and_save_at_other_steps(small: Dataset, group: Groups, tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    group(1).train(configuration(small, a))
    group(2).train(configuration(small, b, {"checkpoint": {"every_steps": 8}, "log": {"every_steps": 6}}))
    hashes = hash_runs([a, b])
    check_equal(hashes)
    assert f"{b}: equals {a} in 10 lines, up to step 25" in format_hashes(hashes)
    shutil.copytree(a, c)
    lines = (a / "metrics.jsonl").read_text().splitlines()
    (a / "metrics.jsonl").write_text("\n".join(["damaged", *lines[1:], ""]))
    check_equal(hash_runs([b, a]))
    (c / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] in (10, 20)))
    with pytest.raises(DataError, match="c: has no line about the same step as one of .*b$"):
        check_equal(hash_runs([b, c]))


def test_without_virtual_ranks_ids_are_equal_and_weights_are_not(small: Dataset, group: Groups, tmp_path: Path) -> None:
    for w in (1, 3):
        group(w).train(configuration(small, tmp_path / str(w), MIXED, {"train": {"virtual_ranks": None}}))
    hashes = hash_runs([tmp_path / "1", tmp_path / "3"])
    assert hashes[0]["ids"] == hashes[1]["ids"]
    with pytest.raises(
        DataError, match="the trained ids are equal up to step 25\n.*1 and 3 processes, without train.virtual_ranks"
    ):
        check_equal(hashes)


@pytest.mark.parametrize(
    ("w", "changes", "message"),
    [
        (3, {"virtual_ranks": 2}, "3 processes for train.virtual_ranks=2: each needs one; start 2 at most"),
        (1, {"virtual_ranks": 13}, "train.virtual_ranks=13: more than the 12 lanes of the data set; use 12 at most"),
        (1, {"virtual_ranks": 9, "global_batch_size": 8}, "more than train.global_batch_size=8; use 8 at most"),
        (
            1,
            {"virtual_ranks": 8, "compile": "default"},
            "should divide 12 lanes and train.global_batch_size=50.* try 2",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    w: int, changes: dict[str, Any], message: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    with pytest.raises(GroupError) as caught:
        group(w).train(configuration(small, tmp_path / "run", {"train": changes}))
    assert set(caught.value.kinds) == {"ConfigError"}
    assert re.search(message, caught.value.messages[0])


def test_a_batch_norm_that_is_used_twice_has_the_mean_of_both(small: Dataset, group: Groups, tmp_path: Path) -> None:
    changes: Sections = {"model": {"name": "models_for_tests:Twice"}, "train": {"max_steps": 60}}
    for w in (1, 3):
        group(w).train(configuration(small, tmp_path / str(w), changes))
    assert same_bits(tmp_path / "1", tmp_path / "3")
    weights = load_file(tmp_path / "1/checkpoints/step-00000060/model.safetensors")
    assert 4 < float(weights["norm.running_mean"].mean()) < 6


@pytest.mark.parametrize("virtual_ranks", [None, 4])
def test_sparse_gradients_are_refused(virtual_ranks: int | None, small: Dataset, group: Groups, tmp_path: Path) -> None:
    changes: Sections = {"model": {"name": "models_for_tests:Sparse"}, "train": {"virtual_ranks": virtual_ranks}}
    with pytest.raises(GroupError) as caught:
        group(1).train(configuration(small, tmp_path / "run", changes))
    assert caught.value.kinds == ["ConfigError"]
    assert "the gradients of table.weight are sparse" in caught.value.messages[0]


def test_weights_that_no_seed_determines_are_refused(small: Dataset, group: Groups, tmp_path: Path) -> None:
    changes = {"model": {"name": "models_for_tests:Differing"}}
    with pytest.raises(GroupError) as caught:
        group(2).train(configuration(small, tmp_path / "run", changes))
    assert set(caught.value.kinds) == {"ConfigError"}
    assert "rank 1 begins with other weights than rank 0" in caught.value.messages[0]


def test_no_pass_is_larger_than_a_micro_batch(small: Dataset, group: Groups, tmp_path: Path) -> None:
    changes: Sections = {"model": {"name": "models_for_tests:Limited"}, "train": {"micro_batch_size": 5}}
    group(1).train(configuration(small, tmp_path / "run", {"train": {"virtual_ranks": 4, "max_steps": 2}}, changes))


@pytest.mark.parametrize(
    ("model", "what"), [("Counting", "gives other logits"), ("Codebook", "changes its parameter code")]
)
def test_a_model_that_keeps_more_than_buffers_is_refused(
    model: str, what: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    for w in (1, 2):
        with pytest.raises(GroupError) as caught:
            group(w).train(configuration(small, tmp_path / str(w), {"model": {"name": f"models_for_tests:{model}"}}))
        assert set(caught.value.kinds) == {"ConfigError"}
        assert f"the model {what} when a pass is repeated" in caught.value.messages[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Newborn", "a training pass makes its buffers seen, or changes their shapes; register them in __init__"),
        ("Reshaped", "a training pass makes its buffers newest, or changes their shapes"),
        ("Retyped", "replaces the model's buffer seen by one of another shape or type"),
    ],
)
def test_buffers_whose_shapes_change_are_refused(
    model: str, message: str, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    with pytest.raises(GroupError) as caught:
        group(1).train(configuration(small, tmp_path / "run", {"model": {"name": f"models_for_tests:{model}"}}))
    assert caught.value.kinds == ["ConfigError"]
    assert message in caught.value.messages[0]


def test_a_buffer_that_changes_in_some_passes_only_is_refused(small: Dataset, group: Groups, tmp_path: Path) -> None:
    with pytest.raises(GroupError) as caught:
        group(1).train(configuration(small, tmp_path / "run", {"model": {"name": "models_for_tests:Sometimes"}}))
    assert caught.value.kinds == ["ConfigError"]
    assert "changes its buffer seen in some passes only" in caught.value.messages[0]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("run", "cpu_threads", 2), ("train", "micro_batch_size", 3), ("train", "clip_norm", 9)],
)
def test_what_decides_bits_cannot_change_when_a_run_is_resumed(
    section: str, key: str, value: Any, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    group(1).train(configuration(small, run))
    (run / "result.json").unlink()
    with pytest.raises(GroupError, match=f"{section}.{key}"):
        group(1).train(configuration(small, run, {section: {key: value}}))


def test_a_run_is_evaluated_on_any_number_of_processes(small: Dataset, group: Groups, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = group(2).train(configuration(small, run, MIXED))
    for w in (1, 3):
        (answer, *_) = group(w).call("evaluate", str(run), "test")
        assert (answer["accuracy"], answer["loss"]) == (result["accuracy"], result["loss"])


def test_a_resume_without_virtual_ranks_names_them_alone(small: Dataset, group: Groups, tmp_path: Path) -> None:
    run = tmp_path / "run"
    group(1).train(configuration(small, run))
    with pytest.raises(GroupError) as caught:
        group(1).train(configuration(small, run, {"train": {"virtual_ranks": None}}))
    assert "has\n  train.virtual_ranks: 8 in the checkpoint, None now\nset that back" in caught.value.messages[0]


def test_a_resume_with_other_software_is_a_warning(
    small: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    config = from_tree(configuration(small, run))
    train(config, Environment())
    assert "was saved with" not in caplog.text
    folder = run / "checkpoints/step-00000025"
    content = json.loads((folder / "state.json").read_text())
    content["bits"] |= {"oneDNN": "1.0", "vector instructions": "avx fma"}
    (folder / "state.json").write_text(json.dumps(content))
    digests = json.loads((folder / "digests.json").read_text())
    digests["files"]["state.json"] = xxhash.xxh3_128_hexdigest((folder / "state.json").read_bytes())
    (folder / "digests.json").write_text(json.dumps(digests))
    train(config, Environment())
    expected = "step-00000025 was saved with other software or hardware, so the bits of the weights may differ: oneDNN "
    assert expected in caplog.text
    assert ", before 1.0; vector instructions " in caplog.text


def test_more_lanes_than_samples_of_a_step(group: Groups, tmp_path: Path) -> None:
    dataset = make(tmp_path / "data", 103, lanes=5)
    for w in (1, 2, 4):
        sections: Sections = {"train": {"global_batch_size": 4, "virtual_ranks": 4, "max_steps": 12}}
        group(w).train(configuration(dataset, tmp_path / str(w), sections))
    assert same_bits(tmp_path / "1", tmp_path / "2")
    assert same_bits(tmp_path / "1", tmp_path / "4")


def another_loop(root: str, tree: Sections) -> str:
    """Train with a loop that is not the trainer's; return the digest of weights and buffers."""
    train, data = from_tree(tree).train, distrain.open_data(root)
    module = models.from_config(from_tree(tree).model, 10, (16, 16, 3), 7, torch.float32)
    optimizer = optim.build(train, module)
    number, size, steps = train.virtual_ranks, train.global_batch_size, range(train.max_steps)
    ranks = distrain.VirtualRanks(module, number, size, torch.zeros(2, 3, 16, 16), seed=7)
    batches = distrain.batches(root, global_batch_size=size, steps=steps, seed=7, virtual_ranks=number)
    for step, of_ranks in zip(steps, batches, strict=True):
        optimizer.zero_grad()
        for batch in ranks.in_step(step, of_ranks):
            logits = ranks(distrain.normalize(batch.images, data.mean, data.std))
            (F.cross_entropy(logits, batch.labels, reduction="sum") * (1 / size)).backward()
        optimizer.step()
    return models.digest(module.state_dict())


FEW: Sections = {"train": {"global_batch_size": 9}, "model": {"name": "net"}}
"""Options with fewer samples than lanes: some virtual ranks have none in some steps."""


@pytest.mark.parametrize("sections", [MIXED, FEW], ids=["mixed", "few"])
def test_another_loop_gives_the_bits_of_the_trainer(
    sections: Sections, small: Dataset, group: Groups, tmp_path: Path
) -> None:
    tree = configuration(small, tmp_path / "run", sections, {"train": {"schedule": "constant"}})
    tree["augment"] = {}
    group(3).train(tree)
    expected = models.digest(load_file(tmp_path / "run/checkpoints/step-00000025/model.safetensors"))
    for w in (1, 3):
        assert group(w).call("function", another_loop, str(small.root), tree) == [expected] * w


def virtual_ranks_of(name: str, number: int) -> None:
    """Make virtual ranks of a model for tests."""
    module = models.from_config(from_tree({"model": {"name": name}}).model, 10, (16, 16, 3), 0, torch.float32)
    distrain.VirtualRanks(module, number, 50, torch.zeros(2, 3, 16, 16))


def test_virtual_ranks_that_are_impossible_are_refused_by_all_processes(
    group: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GroupError) as caught:
        group(3).call("function", virtual_ranks_of, "net", 2)
    assert len(caught.value.messages) == 3
    assert all("3 processes for 2 virtual ranks; start at most 2" in message for message in caught.value.messages)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"there is no process group: call torch.distributed.init_process_group\(\)"):
        virtual_ranks_of("net", 2)
