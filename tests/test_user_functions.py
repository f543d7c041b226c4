"""Optimizers, schedules, losses and augmentation of the user, added from a folder beside the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from group import Group
from harness import arguments
from runs import metrics_but_times
from safetensors.torch import load_file
from torch import Tensor, nn

from distrain import cli, config, models
from distrain.config import Train
from distrain.errors import ConfigError
from distrain.tools import doctor
from distrain.training import optim, optimizer_state
from distrain.training.user_functions import Augmentation, Loss, Schedule

PAGE = Path(__file__).parent.parent / "docs/extending.md"
BAD = '''
import random
import torch
from distrain.models.small import Small
from lion import Lion

NUMBER = 3

class Images(Small):
    """Computes its initial weights from images, wrongly."""
    def initialize_from_images(self, images): self.conv1.weight.copy_(images)

def one_argument(module): ...
def nothing(module, settings): ...
def several(module, settings): return [Lion([each], 0.1) for each in module.parameters()]
def forgets(module, settings): return Lion(list(module.parameters())[1:], settings.lr)
def copies(module, settings): return Lion([*module.parameters(), torch.nn.Parameter(torch.zeros(2))], settings.lr)
def needs_closure(module, settings): return torch.optim.LBFGS(module.parameters(), settings.lr)
def raises(module, settings): raise OSError("no such table")

class Base(Lion):
    """A step of the size lr."""
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(self.size(group, parameter))
    def size(self, group, parameter): return group["lr"]

class NoRate(Base):
    def size(self, group, parameter): return 0.1

class Drawing(Base):
    def size(self, group, parameter): return group["lr"] * torch.randn(())

class Hidden(Base):
    count = 0
    def size(self, group, parameter):
        self.count += 1
        return group["lr"] if self.count < 100 else 0.1 * group["lr"]

class Elements(Base):
    def size(self, group, parameter):
        self.history = [*getattr(self, "history", []), {"sum": parameter.sum()}]
        return group["lr"]

class TensorRate(Base):
    def size(self, group, parameter): return group["lr"].item()

def tensor_rate(module, settings): return TensorRate(list(module.parameters()), torch.tensor(settings.lr))

class Listing(Base):
    def size(self, group, parameter):
        self.state[parameter].setdefault("history", []).append(1)
        return group["lr"]

class Elsewhere(Base):
    def size(self, group, parameter):
        self.state["count"] = {"all": torch.ones(())}
        return group["lr"]

class Text(Base):
    def size(self, group, parameter):
        group["phase"] = group.get("phase", "") + "x"
        return group["lr"]

class Modes(Base):
    def train(self): ...
    def eval(self): ...

class NamelessRate(torch.optim.Optimizer):
    def __init__(self, params, lr): super().__init__(params, {"rate": lr})

def half(step, total_steps): return None if step > total_steps / 2 else 1
def negative(step, total_steps): return -1e-9
def infinite(step, total_steps): return float("inf")
def huge(step, total_steps): return 10**400
def clock(step, total_steps): return random.random()
def zero_division(step, total_steps): return 1 / step
def one_step(step): return 1.0

def mean(logits, labels): return torch.nn.functional.cross_entropy(logits, labels)
def column(logits, labels): return logits[:, :1]
def constant(logits, labels): return torch.zeros(len(labels))
def counting(logits, labels): return (logits.argmax(1) != labels).long()
def centred(logits, labels): return (logits - logits.mean(0)).pow(2).sum(1)
def logarithm(logits, labels): return logits[:, 0].log()
def noisy(logits, labels): return logits.sum(1) * torch.rand(())

def floats(images, random_bits): return images / 2
def smaller(images, random_bits): return images[:, 1:]
def equalized(images, random_bits): return (images / images.float().mean() * 60).clamp(0, 255).byte()
def dropped(images, random_bits): return images * (torch.rand(len(images)) > 0.5)[:, None, None, None]
'''


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the examples of docs/extending.md and with functions that cannot be used."""
    for name, text in re.findall(r"^```python file=(\w+\.py)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def small_run(data: Path, run: Path, /, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a run of 12 steps with a schedule, a loss and an augmentation of the user."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"dir": str(data)},
        "run": {"dir": str(run), "device": "cpu"},
        "model": {"name": "small"},
        "augment": {"flip": True, "also": "recipe:brightness"},
        "train": {"max_steps": 12, "global_batch_size": 16, "lr": 0.01, "schedule": "recipe:restarts",
                  "loss": "recipe:focal"},
        "checkpoint": {"every_steps": 5, "keep": 0},
        "eval": {"every_steps": 0},
        "log": {"every_steps": 1, "report": False},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


MUON: dict[str, Any] = {"optimizer": "muon:muon", "optimizer_args": {"sgd_lr": 0.05}}


def written(run: Path) -> dict[str, Any]:
    """All that a run has computed: tensors of checkpoints, and metrics with digests."""
    tensors = {
        str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("checkpoints/*/*.safetensors"))
    }
    assert len(tensors) == 6
    return {**tensors, "metrics": metrics_but_times(run)}


def cut_back(run: Path, step: int) -> None:
    """Make a run as it was after a step, when it was killed."""
    (run / "result.json").unlink()
    for folder in run.glob("checkpoints/*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


# --- runs with the examples of the page ---


@pytest.mark.parametrize("train", [{"optimizer": "lion:Lion", "lr": 1e-3, "weight_decay": 0.1}, MUON], ids=str)
def test_a_run_with_functions_from_a_folder_is_resumed_to_the_same_bits(
    train: dict[str, Any], data: Path, beside: Path
) -> None:
    tree = small_run(data, beside / "run", train=train)
    command = ["train", *arguments(tree), f"train.optimizer_args={json.dumps(train.get('optimizer_args', {}))}"]
    assert cli.main(command) == 0
    whole = written(beside / "run")
    cut_back(beside / "run", 5)
    assert cli.main(command) == 0
    assert written(beside / "run") == whole
    restarts = sys.modules["recipe"].restarts
    rates = [line["train/lr"] for line in whole["metrics"] if "train/lr" in line]
    assert rates == [tree["train"]["lr"] * restarts(step, 12) for step in range(12)]
    assert rates[4] == rates[8] == rates[0]
    tensors = load_file(beside / "run/checkpoints/step-00000012/optimizer.safetensors")
    assert {name.split(".")[1] for name in tensors if name[0].isdigit()} == {"momentum"}


def train_beside(folder: str, trees: list[dict[str, Any]]) -> None:
    """Train runs one after another in a rank of a group, in the folder of the user."""
    import distrain

    before = os.getcwd()
    os.chdir(folder)
    try:
        for tree in trees:
            distrain.train(tree)
    finally:
        os.chdir(before)


@pytest.mark.ranks
def test_the_bits_do_not_depend_on_the_number_of_processes(
    data: Path, beside: Path, group: Callable[[int], Group]
) -> None:
    """The bits with virtual ranks, also after a resume; without them, fp64 shows that the gradient is exact."""
    exact = {**MUON, "precision": "fp64", "virtual_ranks": None, "micro_batch_size": 3}
    for size in (1, 2):
        trees = [
            small_run(data, beside / f"bits-{size}", augment={"mixup": 0.3}, train={**MUON, "virtual_ranks": 4}),
            small_run(data, beside / f"exact-{size}", augment={"mixup": 0.3}, train=exact),
        ]
        group(size).call("function", train_beside, str(beside), trees)
    assert written(beside / "bits-1") == written(beside / "bits-2")
    ours, theirs = (load_file(beside / f"exact-{size}/checkpoints/step-00000012/model.safetensors") for size in (1, 2))
    assert all(float((ours[name].double() - theirs[name].double()).abs().max()) < 1e-10 for name in ours)
    whole = written(beside / "bits-1")
    cut_back(beside / "bits-1", 5)
    resumed = small_run(data, beside / "bits-1", augment={"mixup": 0.3}, train={**MUON, "virtual_ranks": 4})
    group(2).call("function", train_beside, str(beside), [resumed])
    assert written(beside / "bits-1") == whole


# --- mistakes ---


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.optimizer=nowhere:Lion", "train.optimizer=nowhere:Lion: ModuleNotFoundError: no module nowhere in "),
        ("train.optimizer=lion:Tiger", "module 'lion' has no attribute 'Tiger'"),
        ("train.optimizer=bad:NUMBER", "train.optimizer=bad:NUMBER: is a int, and neither a class nor a function"),
        (
            "train.schedule=bad:clock",
            "train.schedule=bad:clock: returns other numbers for the same (step, total_steps)",
        ),
        ("train.loss=bad:mean", "train.loss=bad:mean: for logits [4, 10] returns [] on cpu, not [4] on cpu"),
        ("model.name=bad:Images", "model.name=bad:Images: initialize_from_images fails on images [403, 3, 8, 8]: "),
        ("augment.also=bad:floats", "augment.also=bad:floats: returns torch.float32, not uint8: round to 0 … 255"),
    ],
)
def test_a_mistake_is_one_message_before_training(
    key: str, message: str, data: Path, beside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments(small_run(data, beside / "run")), key]) == 78
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (beside / "run").exists()


def model() -> nn.Module:
    torch.manual_seed(0)
    return models.build("small", "relu", 3, (3, 8, 8))


def check(name: str, module: nn.Module, **keys: Any) -> None:
    """Build and check an optimizer, as the set-up of a run does."""
    train = Train(optimizer=name, **keys)
    optimizer_state.check_resumable(train, module, lambda: optim.build(train, module))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "one_argument",
            r"called with \(module, settings\): TypeError: .*takes 1 positional argument but 2 were given",
        ),
        ("nothing", "returns a NoneType, not one torch.optim.Optimizer"),
        ("several", "returns a list, not one torch.optim.Optimizer"),
        ("forgets", r"does not have the parameters \S+weight; put them into one of its groups, or freeze them"),
        ("copies", "has parameters that the model does not have"),
        ("needs_closure", "fails in a step: TypeError: .*missing 1 required positional argument: 'closure'"),
        ("raises", r"OSError: no such table \(.*bad.py:\d+\)"),
        ("NamelessRate", "group 0 has no number lr"),
        ("NoRate", r"a step with half of group\[\"lr\"\] changes the weights in the same way"),
        ("Drawing", "a step after a resume differs from the same step without one: it draws random numbers"),
        ("Hidden", "a step changes attribute 'count', a int, which is not saved: keep it in state"),
        ("Elements", "a step changes attribute 'history', a list, which is not saved"),
        ("tensor_rate", "fails in a step: AttributeError: 'float' object has no attribute 'item'"),
        ("Listing", r"has a list in state\[parameter\]\['history'\], which is not saved: keep tensors and numbers"),
        ("Elsewhere", r"has state\['count'\], which is not saved"),
        ("Text", r"a step changes group 0\['phase'\], a str, which is not saved"),
        ("Modes", r"Modes has two modes, train\(\) and eval\(\)"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(name: str, message: str, beside: Path) -> None:
    module = model()
    before = [each.clone() for each in module.parameters()]
    with pytest.raises(ConfigError, match=f"^train.optimizer=bad:{name}: .*{message}"):
        check(f"bad:{name}", module)
    assert all(map(torch.equal, module.parameters(), before))
    assert all(each.grad is None for each in module.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "returns None for step 7 of 12, not a finite number of at least 0"),
        ("negative", "returns -1e-09 for step 0 of 12"),
        ("infinite", "returns inf for step 0 of 12"),
        ("huge", "returns 1000.* for step 0 of 12"),
        ("zero_division", r"called with \(step, total_steps\): ZeroDivisionError: division by zero \(.*bad.py:\d+\)"),
        ("one_step", r"TypeError: one_step\(\) takes 1 positional argument"),
    ],
)
def test_a_schedule_that_cannot_be_used_is_refused(name: str, message: str, beside: Path) -> None:
    with pytest.raises(ConfigError, match=f"^train.schedule=bad:{name}: .*{message}"):
        Schedule(f"bad:{name}").check(12)


DEPENDS = "depends on the other samples of the batch, or on random numbers of its own"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", r"for logits \[4, 3\] returns \[4, 1\] on cpu, not \[4\] on cpu"),
        ("constant", "its losses have no gradient"),
        ("counting", "returns torch.int64, not floating-point losses"),
        ("logarithm", r"returns \[.*nan.*\] for random logits, which are not all finite"),
        ("centred", f"the loss of a sample {DEPENDS}"),
        ("noisy", f"the loss of a sample {DEPENDS}"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(name: str, message: str, beside: Path) -> None:
    def try_it(each_alone: bool) -> None:
        Loss(f"bad:{name}").check(3, torch.device("cpu"), torch.float32, each_alone)

    with pytest.raises(ConfigError, match=f"^train.loss=bad:{name}: {message}"):
        try_it(True)
    if DEPENDS in message:
        try_it(False)  # with virtual ranks, batches do not depend on the number of processes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smaller", r"for images \[4, 8, 6, 3\] returns \[4, 7, 6, 3\] on cpu, not \[4, 8, 6, 3\] on cpu"),
        ("equalized", f"an image {DEPENDS}"),
        ("dropped", f"an image {DEPENDS}"),
    ],
)
def test_an_augmentation_that_cannot_be_used_is_refused(name: str, message: str, beside: Path) -> None:
    torch.manual_seed(1)

    def try_it(each_alone: bool) -> None:
        Augmentation(f"bad:{name}").check((8, 6, 3), torch.device("cpu"), each_alone)

    with pytest.raises(ConfigError, match=f"^augment.also=bad:{name}: {message}"):
        try_it(True)
    if DEPENDS in message:
        try_it(False)


# --- optimizers ---


class Counting(torch.optim.Optimizer):
    """Has all kinds of state that can be saved; its order of parameters differs each time."""

    builds = 0

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        Counting.builds += 1
        super().__init__(params[:: (-1) ** Counting.builds], {"lr": lr, "k": 0, "scale": 1.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["scale"] *= 0.9
            group["sum"] = group.get("sum", torch.zeros(())) + group["k"]
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["odd"] = not state.get("odd", False)
                state["half"] = (state.get("half", torch.zeros_like(parameter)) + parameter.grad / 3).bfloat16()
                state["first"], state["none"] = parameter.flatten()[:1].double() / 3, None
                factor = group["lr"] * group["scale"] * (state["count"] + group["sum"] + state["odd"])
                parameter.sub_(factor * (state["half"] + state["first"]).to(parameter.dtype))


def test_tensors_numbers_and_values_of_groups_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    check("test_user_functions:Counting", model())
    optimizer = optim.build(Train(optimizer="test_user_functions:Counting"), module := model())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_state.state_tensors(optimizer, module)
    assert saved["0.count#"].item() == saved["group.0.k#"].item() == 1
    restored = optim.build(Train(optimizer="test_user_functions:Counting"), module)
    optimizer_state.load_state_tensors(restored, module, saved)
    state = restored.state[next(module.parameters())]
    assert (type(state["count"]), type(state["odd"]), restored.param_groups[0]["scale"]) == (int, bool, 0.9)
    assert (state["half"].dtype, state["first"].dtype) == (torch.bfloat16, torch.float64)
    monkeypatch.setattr(restored, "state_dict", lambda: {"state": {}, "param_groups": []})
    with pytest.raises(ConfigError, match=r"has other parameters or groups than when the .* \(group\.0\.k#\); bring"):
        optimizer_state.load_state_tensors(restored, module, saved)


OF_TORCH = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"]
OF_TORCH += ["Rprop", "SGD"]


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_optimizers_of_torch_are_used_by_name(name: str, dtype: torch.dtype) -> None:
    module = model().to(dtype)
    schedule = "constant" if name == "Rprop" else "cosine"  # it uses the learning rate of the first step alone
    check(f"torch.optim:{name}", module, lr=0.01, schedule=schedule)
    optimizer = optim.build(Train(optimizer=f"torch.optim:{name}", lr=0.01), module)
    assert type(optimizer) is getattr(torch.optim, name)


def test_a_class_gets_the_keys_that_are_among_its_arguments() -> None:
    keys = Train(optimizer="torch.optim:RMSprop", momentum=0.8, weight_decay=0.1, optimizer_args={"alpha": 0.9})
    optimizer = optim.build(keys, model())
    assert {name: optimizer.defaults[name] for name in ("momentum", "weight_decay", "alpha", "lr")} == {
        "momentum": 0.8, "weight_decay": 0.1, "alpha": 0.9, "lr": 0.05
    }  # fmt: skip
    assert optim.describe(optimizer).startswith("RMSprop, lr 0.05, momentum 0.8, alpha 0.9, ")
    with pytest.raises(ConfigError, match="called with the parameters and lr, .*: TypeError: .*argument 'alfa'"):
        optim.build(Train(optimizer="torch.optim:NAdam", optimizer_args={"alfa": 1}), model())


def test_groups_keep_the_ratio_of_their_learning_rates(beside: Path) -> None:
    optimizer = optim.build(Train(optimizer="muon:muon", lr=0.3, optimizer_args={"sgd_lr": 0.1}), model())
    optim.set_learning_rate(optimizer, 0.15, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, pytest.approx(0.05)]
    for name in ("sgd", "adam", "adamw"):
        optimizer = optim.build(Train(optimizer=name, lr=0.3), model())
        for step in range(50):
            rate = optim.learning_rate(step, 50, "one_cycle", 0.3, 0.25)
            optim.set_learning_rate(optimizer, rate, 0.3)
            assert optimizer.param_groups[0]["lr"] == rate  # the same bits


@pytest.mark.parametrize(
    ("keys", "states"), [({}, 1), ({"momentum": 0}, 0), ({"optimizer": "adamw"}, 2), ({"optimizer": "lion:Lion"}, 1)]
)
def test_doctor_counts_the_state_that_an_optimizer_has(keys: dict[str, Any], states: int, beside: Path) -> None:
    module, settings = model(), config.from_tree({"train": keys})
    module(torch.zeros(2, 3, 8, 8)).sum().backward()
    parameters = 4 * sum(each.numel() for each in module.parameters())
    buffers = sum(each.numel() * each.element_size() for each in module.buffers())
    with pytest.raises(StopIteration) as returned:
        next(doctor._checkpoint_size(settings, module))
    few = 16 * (len(list(module.parameters())) + 8)  # numbers, such as Adam's step
    assert 0 <= returned.value.value - buffers - (1 + states) * parameters <= few


def test_doctor_names_an_optimizer_that_fails(beside: Path) -> None:
    module = model()
    (finding,) = doctor._checkpoint_size(config.from_tree({"train": {"optimizer": "bad:needs_closure"}}), module)
    assert finding.level == "bad"
    assert "train.optimizer=bad:needs_closure: fails in a step: TypeError" in finding.message


# --- losses and augmentation ---


def test_a_loss_is_the_sum_over_the_samples_also_of_an_empty_batch(beside: Path) -> None:
    (beside / "no_empty.py").write_text(
        "from recipe import focal\n"
        "def loss(logits, labels):\n"
        "    assert labels.max() < 3  # an empty batch has no maximum\n"
        "    return focal(logits, labels)\n"
    )
    loss, logits = Loss("no_empty:loss"), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    parts = loss(logits[:2], labels[:2]) + loss(logits[2:], labels[2:]) + loss(logits[5:], labels[5:])
    assert torch.allclose(parts, loss(logits, labels), rtol=1e-14)
    (gradient,) = torch.autograd.grad(loss(logits[:0], labels[:0]), logits)
    assert torch.equal(gradient, torch.zeros_like(logits))
    probabilities = logits.softmax(1)[torch.arange(5), labels]
    assert torch.allclose(loss(logits, labels), -((1 - probabilities) ** 2 * probabilities.log()).sum())
    assert not torch.allclose(loss(logits, labels), F.cross_entropy(logits, labels, reduction="sum"))


def test_a_schedule_that_fails_in_a_step_that_was_not_tried_is_one_message(beside: Path) -> None:
    schedule = Schedule("bad:zero_division")
    with pytest.raises(ConfigError, match=r"^train.schedule=bad:zero_division: .*ZeroDivisionError"):
        schedule(0, 12)


def test_losses_of_fp16_are_added_in_fp32(beside: Path) -> None:
    (beside / "large.py").write_text("def loss(logits, labels): return logits[:, 0]\n")
    logits = torch.full((1000, 3), 100.0, dtype=torch.float16, requires_grad=True)
    loss = Loss("large:loss")(logits, torch.zeros(1000, dtype=torch.int64))
    assert loss.item() == 100_000
    assert torch.equal(torch.autograd.grad(loss, logits)[0][:, 0], torch.ones(1000, dtype=torch.float16))


def test_a_loss_of_a_wrong_shape_during_training_is_reported(beside: Path) -> None:
    (beside / "late.py").write_text(
        "def late(logits, labels): return logits[:, :1 if len(labels) == 7 else 0].sum(1)[:6]\n"
    )
    with pytest.raises(ConfigError, match=r"train.loss=late:late: for logits \[7, 3\] returns \[6\] on cpu, not \[7\]"):
        Loss("late:late")(torch.zeros(7, 3), torch.zeros(7, dtype=torch.int64))


def test_augmentation_gets_random_bits_of_its_own(beside: Path) -> None:
    (beside / "record.py").write_text("got = []\ndef record(images, bits):\n    got.append(bits)\n    return images\n")
    augmentation, bits = Augmentation("record:record"), torch.arange(-4000, 4000).view(-1, 2)
    images = torch.zeros(len(bits), 1, 1, 3, dtype=torch.uint8)
    assert torch.equal(augmentation(images, bits), images)
    assert augmentation(images[:0], bits[:0]).shape == (0, 1, 1, 3)
    (got,) = sys.modules["record"].got
    assert len(got.unique()) == bits.numel()
    ones = torch.stack([(got >> bit & 1).double().mean() for bit in range(64)])
    assert (ones - 0.5).abs().max() < 0.03
    together = torch.stack([(got >> bit & 1 ^ bits & 1).double().mean() for bit in range(64)])
    assert (together - 0.5).abs().max() < 0.03  # independent of the bit that flips
    assert torch.equal(Augmentation("record:record")(images[3:5], bits[3:5]), images[3:5])
    assert torch.equal(sys.modules["record"].got[-1], got[3:5])


def test_an_augmentation_in_place_leaves_the_images_that_are_trained(data: Path, beside: Path) -> None:
    """The pictures of the report are made of the first local batch, before it is trained."""
    (beside / "darker.py").write_text(
        "def in_place(images, random_bits): return images.floor_divide_(2)\n"
        "def a_copy(images, random_bits): return images // 2\n"
    )
    losses = []
    for name in ("in_place", "a_copy"):
        augment = {"flip": False, "also": f"darker:{name}"}
        tree = small_run(data, beside / name, augment=augment, train={"max_steps": 1})
        assert cli.main(["train", *arguments(tree)]) == 0
        losses.append([line["train/loss"] for line in metrics_but_times(beside / name) if "train/loss" in line])
    assert losses[0] == losses[1]


def test_the_brightness_of_the_page_changes_images_as_it_says(beside: Path) -> None:
    images = torch.full((1000, 2, 2, 3), 100, dtype=torch.uint8)
    bits = torch.randint(-(2**63), 2**63 - 1, (1000, 2), generator=torch.Generator().manual_seed(0))
    values: Tensor = Augmentation("recipe:brightness")(images, bits)[:, 0, 0, 0]
    assert (int(values.min()), int(values.max())) == (80, 119)
