"""`train.lr_scale` and `train.decay_biases`: which parameters are frozen, and the groups of the optimizers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from group import Group, GroupError
from models_for_tests import Normed
from safetensors.torch import load_file
from torch import nn

import distrain
from distrain import models
from distrain.config import Config, Train, from_tree, identity
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError
from distrain.training import optim, parameter_groups

SHAPE = (3, 16, 16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Normed(4, SHAPE)  # 0 convolution, 1 BatchNorm, 5 linear, 6 BatchNorm, 8 the head


def by_rate(train: Train, module: nn.Module) -> dict[tuple[float, float], list[str]]:
    """Names of the parameters in each group of the optimizer, by its learning rate and weight decay."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        (group["lr"], group["weight_decay"]): [names[id(each)] for each in group["params"]]
        for group in optim.build(train, module).param_groups
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "torch.optim:NAdam"])
def test_groups_have_their_own_rates_and_as_few_as_possible(optimizer: str) -> None:
    keys: dict[str, Any] = {"optimizer": optimizer, "lr": 0.5, "weight_decay": 0.25}
    everything = [name for name, _ in network().named_parameters()]
    assert by_rate(Train(**keys), network()) == {(0.5, 0.25): everything}
    head = ["8.weight", "8.bias"]
    assert by_rate(Train(**keys, lr_scale={"backbone": 0.5}), network()) == {
        (0.25, 0.25): everything[:-2],
        (0.5, 0.25): head,
    }
    scale = {"backbone": 0.5, "[01].*": 0.25, "head": 2}  # the last key that matches counts
    module = network()
    assert by_rate(Train(**keys, lr_scale=scale, decay_biases=False), module) == {
        (0.125, 0.25): ["0.weight"],
        (0.125, 0.0): ["0.bias", "1.weight", "1.bias"],
        (0.25, 0.25): ["5.weight"],
        (0.25, 0.0): ["5.bias", "6.weight", "6.bias"],
        (1.0, 0.25): ["8.weight"],
        (1.0, 0.0): ["8.bias"],
    }
    built = optim.build(Train(**keys, lr_scale=scale), module)
    optim.set_learning_rate(built, 0.1, 0.5)
    assert [group["lr"] for group in built.param_groups] == pytest.approx([0.025, 0.05, 0.2])


def frozen(module: nn.Module) -> tuple[list[str], list[str]]:
    """The parameters without gradients, and the layers in evaluation mode."""
    parameters = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return parameters, [name for name, layer in module.named_modules() if not layer.training]


def test_what_is_frozen_has_fixed_statistics_and_is_in_no_group() -> None:
    module = network()
    parameter_groups.freeze(module, {"backbone": 0, "5.*": 0.1, "6.bias": 1})
    assert frozen(module) == (["0.weight", "0.bias", "1.weight", "1.bias", "6.weight"], ["1"])
    assert [len(group["params"]) for group in optim.build(Train(lr_scale={"6.bias": 0.1}), module).param_groups] == [
        4,
        1,
    ]
    without_parameters = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3))
    parameter_groups.freeze(without_parameters, {"backbone": 0})
    assert frozen(without_parameters) == (["0.weight", "0.bias"], ["1"])
    as_it_was = network()
    as_it_was[0].requires_grad_(False)
    parameter_groups.freeze(as_it_was, {"backbone": 0.1})
    assert frozen(as_it_was) == (["0.weight", "0.bias"], [])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"head": 1, "0.wieght": 0.1}, "0.wieght matches no parameter of the model; did you mean 0.weight"),
        ({"layer4.*": 0.1}, r"layer4\.\* matches no parameter of the model; .* 0.weight, 0.bias"),
        ({"head": 2, "*": 0.1}, "head has no effect: later keys match all of its parameters"),
        ({"5": 0.1}, r"5 matches no parameter of the model; did you mean 5\.\*$"),
        ({"*": 0}, "all parameters are frozen"),
        ({"backbone": 0, "head": 0}, "all parameters are frozen"),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(scale: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.lr_scale: .*{message}"):
        parameter_groups.check(network(), scale, 4)


def test_what_the_model_has_frozen_itself_is_described_as_frozen_and_gets_no_factor() -> None:
    module = network()
    module[0].requires_grad_(False)
    assert parameter_groups.describe(module, {"head": 2}) == [
        "frozen: 0.weight, 0.bias",
        "learning rate × 1: 1.weight, 1.bias, 5.weight, and 3 more",
        "learning rate × 2: 8.weight, 8.bias",
    ]
    with pytest.raises(ConfigError, match=r"0\.\* has no effect: .* the model has frozen them itself"):
        parameter_groups.check(module, {"0.*": 0.5}, 4)


def test_a_last_layer_that_is_not_the_head_is_named() -> None:
    parameter_groups.check(network(), {"head": 1, "backbone": 0}, 4)
    with pytest.raises(ConfigError, match="head is not known: the model's last layer, 8, does not compute the logits"):
        parameter_groups.check(network(), {"head": 1}, 5)


@pytest.mark.parametrize("value", ["0.1", "{head: -1}", "{head: x}", "{head: .inf}", "[head]"])
def test_values_that_are_no_factors_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_scale"):
        Config.load(None, [f"train.lr_scale={value}"])


@pytest.mark.parametrize("value", ["0.1", "null", "[head]", "{head:0.1}", "{head: null}"])
def test_what_is_no_mapping_of_factors_is_answered_with_one(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_scale: should be a mapping .*such as \{backbone: 0\.1"):
        Config.load(None, [f"train.lr_scale={value}"])


def test_muon_without_weights_that_it_is_for_is_refused() -> None:
    module = network()
    optim.build(Train(optimizer="muon"), module)
    parameter_groups.freeze(module, {"backbone": 0})
    with pytest.raises(ConfigError, match="^train.optimizer=muon: .*outside the last layer.* set train.optimizer=sgd$"):
        optim.build(Train(optimizer="muon", lr_scale={"backbone": 0}), module)


def test_factors_are_read_from_the_command_line_and_their_order_is_part_of_the_identity() -> None:
    one, other = (
        Config.load(None, [f"train.lr_scale={{{keys}}}"]) for keys in ("'*': 1, head: 1e-1", "head: 1e-1, '*': 1")
    )
    assert one.train.lr_scale == other.train.lr_scale == {"*": 1.0, "head": 0.1}
    assert identity(one)["train.lr_scale"] == "{*: 1.0, head: 0.1}"
    assert identity(one) != identity(other)
    assert from_tree(one.model_dump()) == one


def my_sgd(module: nn.Module, settings: optim.OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in module.parameters() if each.requires_grad], settings.lr)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_scale": {"backbone": 0.1, "head": 1}}, "train.lr_scale of backbone would have no effect"),
        ({"decay_biases": False}, "train.decay_biases=false would have no effect"),
    ],
)
def test_a_function_makes_its_own_groups(keys: dict[str, Any], message: str) -> None:
    name = "test_parameter_groups:my_sgd"
    with pytest.raises(ConfigError, match=f"{message}: set lr and weight_decay in its groups"):
        optim.build(Train(optimizer=name, **keys), network())
    module = network()
    parameter_groups.freeze(module, {"backbone": 0})
    built = optim.build(Train(optimizer=name, lr_scale={"backbone": 0}), module)
    assert len(built.param_groups[0]["params"]) == 2


@pytest.mark.ranks
def test_a_partly_frozen_model_keeps_the_promise_and_resumes(
    small: Dataset, group: Callable[[int], Group], tmp_path: Path
) -> None:
    def train(w: int) -> dict[str, torch.Tensor]:
        run = tmp_path / str(w)
        group(w).train(
            {
                "data": {"dir": str(small.root)},
                "run": {"dir": str(run), "seed": 7},
                "model": {"name": "models_for_tests:Normed"},
                "train": {
                    "max_steps": 20, "global_batch_size": 30, "lr": 0.1, "weight_decay": 1e-3,
                    "precision": "fp64", "lr_scale": {"[01].*": 0, "5.*": 0.1}, "decay_biases": False,
                },
                "eval": {"every_steps": 5},  # an evaluation changes the modes of layers
                "checkpoint": {"every_steps": 10, "keep": 0},
            }
        )  # fmt: skip
        return load_file(run / "checkpoints/step-00000020/model.safetensors")

    one, two = train(1), train(2)
    torch.manual_seed(7)
    start = models.build("models_for_tests:Normed", "relu", 10, SHAPE).double()
    unchanged = [name for name, value in start.state_dict().items() if torch.equal(value, one[name])]
    assert unchanged == [name for name in start.state_dict() if name.startswith(("0.", "1."))]
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-10
    (tmp_path / "2/result.json").unlink()
    shutil.rmtree(tmp_path / "2/checkpoints/step-00000020")
    resumed = train(2)
    assert all(torch.equal(value, resumed[name]) for name, value in two.items())


def train_in_another_order(config: dict[str, Any]) -> None:
    keys = ["head", "*"] if os.environ["RANK"] == "0" else ["*", "head"]
    distrain.train({**config, "train": {"lr_scale": dict.fromkeys(keys, 2.0)}})


@pytest.mark.ranks
def test_another_order_of_the_factors_is_another_configuration(
    small: Dataset, group: Callable[[int], Group], tmp_path: Path
) -> None:
    config = {"data": {"dir": str(small.root)}, "run": {"dir": str(tmp_path / "run")}, "model": {"name": "small"}}
    with pytest.raises(GroupError, match=r"rank 1 has another configuration than rank 0: train.lr_scale \("):
        group(2).call("function", train_in_another_order, config)
