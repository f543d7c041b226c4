"""Models, augmentation, learning rates and optimizers: torch alone, no data, no processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from distrain import models
from distrain.config import Augment, Model, Train
from distrain.errors import ConfigError
from distrain.models.net import ACTIVATIONS
from distrain.models.whitened import Whitened
from distrain.training import flops, optim, optimizer_state
from distrain.training.augment import augment, normalize
from distrain.training.muon import Muon

TEN = [f"class {k}" for k in range(10)]


class TutorialNet(nn.Module):
    """The shape of PyTorch's CIFAR-10 tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)


def test_net_is_the_network_of_the_tutorial() -> None:
    net = models.build("net", "relu", 10, (3, 32, 32))
    assert sum(parameter.numel() for parameter in net.parameters()) == 62_006
    TutorialNet().load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), ((1, 28, 28), 3), ((3, 64, 48), 100)])
def test_net_takes_other_images_and_classes(activation: str, shape: tuple[int, int, int], classes: int) -> None:
    net = models.build("net", activation, classes, shape)
    assert net(torch.zeros(2, *shape)).shape == (2, classes)


def test_activations_differ() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 32, 32)
    outputs = []
    for activation in ACTIVATIONS:
        torch.manual_seed(0)
        outputs.append(models.build("net", activation, 10, (3, 32, 32))(inputs))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_model_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "from torch import nn\n"
        "class Linear(nn.Sequential):\n"
        "    def __init__(self, num_classes, image_shape):\n"
        "        c, h, w = image_shape\n"
        "        super().__init__(nn.Flatten(), nn.Dropout(0.1), nn.Linear(c * h * w, num_classes))\n"
        "def nothing(num_classes, image_shape):\n"
        "    return nn.Flatten()\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = models.build("mine_for_test:Linear", "relu", 7, (3, 8, 8))
    assert mine(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    assert models.world_size_dependent(mine) == ["Dropout"]
    with pytest.raises(ConfigError, match="no trainable parameters"):
        models.build("mine_for_test:nothing", "relu", 7, (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nett", "unknown"),
        ("no.such:Model", "no module no in .*PYTHONPATH"),
        ("torch.nn:Nothing", "no attribute 'Nothing'"),
    ],
)
def test_an_unknown_model_is_reported(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, "relu", 10, (3, 32, 32))


def test_images_too_small_for_net_are_reported() -> None:
    with pytest.raises(ConfigError, match="at least 16 pixels"):
        models.build("net", "relu", 10, (3, 15, 32))


def test_layers_that_depend_on_the_number_of_processes_are_named() -> None:
    assert models.world_size_dependent(models.build("net", "relu", 10, (3, 32, 32))) == []
    norm = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout2d(0.0))
    assert models.world_size_dependent(norm) == []  # its statistics are taken over all ranks
    assert models.world_size_dependent(norm, accumulates=True) == ["BatchNorm2d"]
    private = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Dropout2d())
    assert models.world_size_dependent(private) == ["BatchNorm2d", "Dropout2d"]
    assert models.world_size_dependent(models.build("convnext_tiny", "relu", 10, (3, 32, 32))) == ["StochasticDepth"]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 8, 17)])
def test_small_takes_small_images(shape: tuple[int, int, int]) -> None:
    small = models.build("small", "relu", 10, shape)
    assert small(torch.zeros(2, *shape)).shape == (2, 10)
    assert models.world_size_dependent(small) == []
    with pytest.raises(ConfigError, match="at least 8 pixels"):
        models.build("small", "relu", 10, (3, 7, 32))


def test_resnet9_is_the_one_of_the_literature() -> None:
    resnet = models.build("resnet9", "relu", 10, (3, 32, 32))
    assert sum(parameter.numel() for parameter in resnet.parameters()) == 6_573_120
    assert resnet(torch.zeros(2, 3, 48, 32)).shape == (2, 10)
    with pytest.raises(ConfigError, match="at least 16 pixels"):
        models.build("resnet9", "relu", 10, (3, 15, 32))


def test_whitened_begins_with_uncorrelated_channels_of_equal_variance() -> None:
    whitened = models.build("whitened", "relu", 10, (3, 32, 32))
    assert isinstance(whitened, Whitened)
    assert sum(each.numel() for each in whitened.parameters() if each.requires_grad) == 1_971_352
    images = F.avg_pool2d(torch.randn(100, 3, 34, 34), 3, stride=1)  # neighbours are alike, as in photos
    whitened.initialize_from_images(images)
    half = F.conv2d(images, whitened.whitening.weight)[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(half @ half.T / half.shape[1], torch.eye(12), atol=0.1)
    signs = whitened.whitening.weight.flatten(1)
    assert torch.equal(signs[:12], -signs[12:])
    assert whitened(torch.zeros(2, 3, 9, 40)).shape == (2, 10)
    with pytest.raises(ConfigError, match="at least 9 pixels"):
        models.build("whitened", "relu", 10, (3, 8, 32))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 96, 96)])
def test_torchvisions_models_take_images_of_any_size(name: str, shape: tuple[int, int, int]) -> None:
    built = models.build(name, "relu", 7, shape)
    models.check_output(name, built, torch.zeros(2, *shape), 7)
    first = next(layer for layer in built.modules() if isinstance(layer, nn.Conv2d))
    assert first.in_channels == shape[0]
    assert (first.stride == (1, 1)) == (shape[1] < 64)


def test_muon_steps_along_orthogonal_matrices_and_leaves_other_parameters_to_sgd() -> None:
    torch.manual_seed(0)
    matrix, bias = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.randn(5))
    before = matrix.detach().clone(), bias.detach().clone()
    matrix.grad, bias.grad = torch.randn(4, 3, 2, 2), torch.randn(5)
    groups = [{"params": [matrix], "orthogonal": True}, {"params": [bias]}]
    Muon(groups, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1).step()
    step = (before[0] * (1 - 0.5 * 0.1) - matrix.detach()) / 0.5
    u, _, vh = torch.linalg.svd(matrix.grad.flatten(1), full_matrices=False)
    assert float(torch.linalg.svdvals(step.flatten(1)).min()) > 0.6
    assert 0.6 < float((u.T @ step.flatten(1) @ vh.T).diag().min()) < 1.3  # the same singular vectors
    gradient = bias.grad + 0.1 * before[1]
    assert torch.allclose(bias.detach(), before[1] - 0.5 * 1.9 * gradient)
    zeros = nn.Parameter(torch.zeros(4, 6))
    zeros.grad = torch.ones(4, 6)
    Muon([{"params": [matrix, zeros], "orthogonal": True}], lr=1e-9, momentum=0.9, normalize=True).step()
    assert float(matrix.detach().norm()) == pytest.approx(2.0)  # (4 rows)^½
    assert 0 < float(zeros.detach().norm()) < 2e-9


def test_a_model_may_keep_layers_in_evaluation_mode_by_a_train_of_its_own() -> None:
    fixed = models.from_config(Model(name="models_for_tests:FixedNorm"), 4, (16, 16, 3), 0)
    assert [name for name, layer in fixed.named_modules() if not layer.training] == ["1"]
    assert [name for name, _ in models.norms_of_one_value(fixed, torch.zeros(1, 3, 16, 16))] == ["6"]
    assert [name for name, layer in fixed.named_modules() if not layer.training] == ["1"]
    fixed[6].momentum = 0.1  # type: ignore[index, union-attr]  # without it, a pass reads a counter: nothing is counted
    assert flops.of_model(fixed, (16, 16, 3)) is not None


def test_a_similar_name_is_suggested() -> None:
    with pytest.raises(ConfigError, match="did you mean resnet18"):
        models.build("resnet_18", "relu", 10, (3, 32, 32))


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_weights_from_a_file(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, path = models.build("resnet18", "relu", 5, (3, 32, 32)), tmp_path / f"weights.{form}"
    state = trained.state_dict()
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    same = models.build("resnet18", "relu", 5, (3, 32, 32))
    five = [f"class {k}" for k in range(5)]
    assert models.initialise(same, path, five) == [
        "fc is kept: the file does not name its classes, but has 5 too",
    ]
    assert models.digest(same.state_dict()) == models.digest(trained.state_dict())
    tuned = models.build("resnet18", "relu", 9, (3, 32, 32))
    head = tuned.state_dict()["fc.weight"].clone()
    nine = [f"class {k}" for k in range(9)]
    assert models.initialise(tuned, path, nine) == ["fc is re-initialised: 5 classes in the file, 9 in the data set"]
    assert torch.equal(tuned.state_dict()["fc.weight"], head)
    assert torch.equal(tuned.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    with pytest.raises(ConfigError, match="weights of another model; they differ in"):
        models.initialise(models.build("resnet34", "relu", 5, (3, 32, 32)), path, five)
    with pytest.raises(ConfigError, match="weights of another model; they differ in"):
        models.initialise(models.build("resnet18", "relu", 5, (1, 32, 32)), path, five)


def test_files_without_weights_are_reported(tmp_path: Path) -> None:
    net = models.build("net", "relu", 10, (3, 32, 32))
    with pytest.raises(ConfigError, match="cannot be read"):
        models.initialise(net, tmp_path / "missing.safetensors", TEN)
    for name in ("text.safetensors", "text.pt"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ConfigError, match="has no weights"):
            models.initialise(net, tmp_path / name, TEN)
    torch.save(net, tmp_path / "whole.pt")  # a pickled model, which could run code
    with pytest.raises(ConfigError, match="has no weights"):
        models.initialise(net, tmp_path / "whole.pt", TEN)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="not a state dict"):
        models.initialise(net, tmp_path / "list.pt", TEN)


def test_normalize_is_the_textbook_formula() -> None:
    images = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.5, 0.6, 0.7]).double()
    normalized = normalize(images, mean, std)
    expected = (images.double() / 255 - mean) / std
    assert normalized.shape == (4, 3, 5, 6)
    assert torch.allclose(normalized, expected.permute(0, 3, 1, 2), atol=1e-14)


@given(st.booleans(), st.integers(0, 5), st.integers(0, 2**32))
def test_augmentation_depends_only_on_the_random_bits_of_each_image(flip: bool, padding: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, 9, 8, 3), dtype=torch.uint8, generator=random)
    bits = torch.randint(-(2**63), 2**63 - 1, (6, 2), generator=random)
    cutout = int(torch.randint(0, 8, (), generator=random))
    blank = torch.tensor([1, 2, 3], dtype=torch.uint8)
    settings = Augment(flip=flip, crop_padding=padding, cutout=cutout)
    together = augment(images, bits, settings, blank)
    for number in range(6):
        here = slice(number, number + 1)
        alone = augment(images[here], bits[here], settings, blank)
        assert torch.equal(alone[0], together[number])
        expected = by_hand(images[number], bits[number].tolist(), flip, padding, cutout, blank)
        assert torch.equal(together[number], expected)


def by_hand(
    image: torch.Tensor, bits: list[int], flip: bool, padding: int, cutout: int, blank: torch.Tensor
) -> torch.Tensor:
    """Reflect-pad, crop, flip, with torch's own functions; then a square."""
    first, second = (each % 2**64 for each in bits)
    down, right = ((first >> at & 0xFFFFF) * (2 * padding + 1) >> 20 for at in (8, 28))
    padded = nn.functional.pad(image.permute(2, 0, 1).float()[None], [padding] * 4, mode="reflect")[0]
    height, width, _ = image.shape
    cropped = padded[:, down : down + height, right : right + width].permute(1, 2, 0).to(torch.uint8)
    out = (cropped.flip(1) if flip and first & 1 else cropped).clone()
    for y in range(height) if cutout else ():
        for x in range(width):
            top, left = ((second & 0xFFFFF) * height >> 20, (second >> 20 & 0xFFFFF) * width >> 20)
            if 0 <= y - top + cutout // 2 < cutout and 0 <= x - left + cutout // 2 < cutout:
                out[y, x] = blank
    return out


def test_all_shifts_and_both_sides_are_equally_likely() -> None:
    from distrain.data.order import augmentation_bits

    bits = torch.from_numpy(augmentation_bits(0, np.array([0]), np.arange(20_000)).view("int64"))
    image = torch.arange(8 * 8, dtype=torch.uint8).reshape(1, 8, 8, 1).expand(20_000, 8, 8, 1)
    changed = augment(image, bits, Augment(flip=True, crop_padding=1), image[0, 0, 0])
    centre = changed[:, 4, 4, 0]
    values, counts = centre.unique(return_counts=True)
    assert len(values) == 12  # 3 shifts down × (3 shifts × 2 sides; the middle columns 3 and 4 meet 4 places)
    assert counts.min() > 900


def test_random_erasing_has_the_rectangles_of_torchvision() -> None:
    """The rest of an image stays; what is done to it does not depend on the others."""
    from distrain.data.order import augmentation_bits

    bits = torch.from_numpy(augmentation_bits(0, np.array([3]), np.arange(20_000)).view("int64"))
    images = torch.randint(10, 255, (20_000, 16, 20, 3), dtype=torch.uint8)
    settings, fill = Augment(erasing=0.4), torch.tensor([1, 2, 3], dtype=torch.uint8)
    erased = augment(images, bits, settings, fill)
    inside = (erased == fill).all(3)
    assert torch.equal(erased[~inside], images[~inside])
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(inside.sum((1, 2)), rows * columns)
    changed = rows > 0
    area, ratio = inside.float().mean((1, 2))[changed], (rows / columns)[changed].log()
    assert abs(float(changed.float().mean()) - 0.4) < 0.02
    assert float(area.min()) > 0.005
    assert float(area.max()) < 0.37
    assert abs(float(area.mean()) - (0.02 + 0.33) / 2) < 0.01
    assert abs(float(ratio.mean())) < 0.03  # log 0.3 … log 3.3, rounded to pixels
    where = inside.float().mean(0)
    assert abs(float(where[:8].mean() - where[8:].mean())) < 0.01
    assert abs(float(where[:, :10].mean() - where[:, 10:].mean())) < 0.01
    flipped = (bits[:, 0] & 1).bool()
    assert abs(float(changed[flipped].float().mean() - changed[~flipped].float().mean())) < 0.03
    alone = [augment(images[at : at + 1], bits[at : at + 1], settings, fill) for at in range(50)]
    assert torch.equal(torch.cat(alone), erased[:50])


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@given(st.integers(1, 500), st.floats(0, 0.9))
def test_schedules_rise_to_the_peak_and_fall_to_zero(schedule: str, total: int, warmup: float) -> None:
    rates = [optim.learning_rate(step, total, schedule, 2.0, warmup) for step in range(total)]
    assert all(0 < rate <= 2.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if total > 100:
        assert max(rates) > 1.9
        assert rates[-1] < 0.2


def test_a_constant_rate_is_constant() -> None:
    assert {optim.learning_rate(step, 10, "constant", 0.3, 0.5) for step in range(10)} == {0.3}


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert math.isclose(optim.learning_rate(50, 101, "cosine", 1.0, 0.0), 0.5, abs_tol=1e-9)


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimizer_state_is_the_same_after_saving_and_loading(name: str, kind: str) -> None:
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for number in range(count):
            optimizer.zero_grad()
            net(torch.full((1, 3), number + 1.0)).sum().backward()
            optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, optim.build(Train(optimizer=name, lr=0.1, betas=[0.9, 0.99], weight_decay=0.01), net)

    net, optimizer = fresh()
    assert type(optimizer).__name__ == kind
    steps(net, optimizer, 3)
    other, restored = fresh()
    other.load_state_dict(net.state_dict())
    saved = {k: v.clone() for k, v in optimizer_state.state_tensors(optimizer, net).items()}
    optimizer_state.load_state_tensors(restored, other, saved)
    steps(net, optimizer, 2)
    steps(other, restored, 2)
    assert torch.equal(net.weight, other.weight)


def test_only_the_head_may_be_re_initialised(tmp_path: Path) -> None:
    def model(width: int) -> nn.Module:
        layers = nn.Module()
        layers.fc1, layers.fc = nn.Linear(4, width), nn.Linear(width, 3)
        return layers

    torch.save(model(5).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="weights of another model; they differ in fc1"):
        models.initialise(model(6), tmp_path / "weights.pt", list("abc"))
    torch.save({f"backbone.{name}": value for name, value in model(6).state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"differ in fc1\.weight, .*; the file alone has backbone\.fc1\.weight, "):
        models.initialise(model(6), tmp_path / "other.pt", list("abc"))
