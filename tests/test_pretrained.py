"""Pretrained weights by name: of torchvision and timm, through their caches, without a network."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from datasets import make
from group import Group, GroupError
from safetensors.torch import save_file
from torch import Tensor, nn

import distrain
from distrain import models
from distrain.errors import ConfigError
from distrain.models import downloads, from_timm, pretrained
from distrain.models.batch_norm import LocalBatchNorm, sync_batch_norm

SHAPE = (3, 64, 64)
THREE = ["ant", "bee", "cat"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NO_NETWORK = "http://127.0.0.1:9"
"""A proxy to which nothing connects."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, "" if name == "no_proxy" else NO_NETWORK)
    return tmp_path / "cache/hub/checkpoints"


def lay_into(cache: Path, weights: Any, state: dict[str, Tensor]) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / weights.url.rpartition("/")[2]
    torch.save(state, path)
    return path


def file_of(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save(weights, path)
    return path


def test_weights_of_torchvision_are_read_from_its_cache(cache: Path) -> None:
    torch.manual_seed(1)
    weights = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    state = torchvision.models.mobilenet_v3_small().state_dict()
    path = lay_into(cache, weights, state)
    for name in ("IMAGENET1K_V1", "DEFAULT", "MobileNet_V3_Small_Weights.IMAGENET1K_V1"):
        assert pretrained.fetch(f"torchvision:{name}", "mobilenet_v3_small") == path
    file = pretrained.read("torchvision:DEFAULT", "mobilenet_v3_small", SHAPE)
    assert (file.mean, file.std) == (MEAN, STD)
    assert file.classes is not None
    assert file.classes[:2] == ["tench", "goldfish"]
    assert [note.startswith(f"{path} is not the published file") for note in file.notes] == [True]
    model = models.build("mobilenet_v3_small", "relu", 3, SHAPE)
    head = model.classifier[3].weight.clone()
    note = models.load_weights(model, "model.init", file, THREE)[-1]
    assert note == "classifier.3 is re-initialised: 1000 classes in the file, 3 in the data set"
    assert torch.equal(model.classifier[3].weight, head)
    assert torch.equal(model.features[0][0].weight, state["features.0.0.weight"])
    other = models.build("mobilenet_v3_small", "relu", 1000, SHAPE)
    note = models.load_weights(other, "model.init", file, [f"n{number:08}" for number in range(1000)])[-1]
    assert note.startswith("classifier.3 is re-initialised: the classes have other names in the file: tench, goldfish")
    models.load_weights(other, "model.init", file, file.classes)
    assert torch.equal(other.classifier[3].weight, state["classifier.3.weight"])


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 the beginning alone"])
def test_a_damaged_file_in_the_cache_is_not_the_published_one(content: bytes, cache: Path) -> None:
    path = lay_into(cache, torchvision.models.ResNet18_Weights.DEFAULT, {})
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=f"^model.init=torchvision:DEFAULT: {path} is not the published file: .*delete"
    ):
        pretrained.read("torchvision:DEFAULT", "resnet18", SHAPE)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=f"^model.init={path}: is not a regular file"):
        pretrained.read("torchvision:DEFAULT", "resnet18", SHAPE)


@pytest.mark.parametrize(
    ("name", "model", "shape", "message"),
    [
        ("IMAGENET1K_V3", "resnet50", SHAPE, "did you mean IMAGENET1K_V.* IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("IMAGENET1K_V1", "small", SHAPE, "model.name=small is not a model of torchvision; set model.name too"),
        ("IMAGENET1K_V1", "resnet18", (3, 32, 64), "at least 64 pixels, not 32×64×3, .* prepare larger images"),
        ("IMAGENET1K_V1", "resnet18", (1, 64, 64), "images of 3 channels"),
        ("IMAGENET1K_V1", "resnet18", SHAPE, r"https://.*/resnet18-f37072fd.pth cannot be fetched: .*; .*copy it to /"),
    ],
)
def test_weights_of_torchvision_that_cannot_be_had(
    name: str, model: str, shape: tuple[int, int, int], message: str, cache: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^model.init=torchvision:{name}: .*{message}"):
        pretrained.read(f"torchvision:{name}", model, shape)
    assert list(cache.glob("*")) == []


def test_files_of_older_models_are_converted_as_torchvision_does(cache: Path) -> None:
    densenet = models.build("densenet121", "relu", 3, SHAPE)
    torch.manual_seed(1)
    state = torchvision.models.densenet121().state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    assert len(old.keys() - state.keys()) > 100
    lay_into(cache, torchvision.models.DenseNet121_Weights.DEFAULT, old)
    models.load_weights(densenet, "", pretrained.read("torchvision:DEFAULT", "densenet121", SHAPE), THREE)
    differing = [name for name, value in densenet.state_dict().items() if not torch.equal(value, state[name])]
    assert differing == ["classifier.weight", "classifier.bias"]


def test_auxiliary_heads_are_dropped_and_their_models_expect_other_pixels(cache: Path) -> None:
    state = {"conv1.conv.weight": torch.zeros(1), "aux1.fc1.weight": torch.zeros(1), "aux2.fc2.bias": torch.zeros(1)}
    lay_into(cache, torchvision.models.GoogLeNet_Weights.DEFAULT, state)
    file = pretrained.read("torchvision:DEFAULT", "googlenet", SHAPE)
    assert list(file.weights) == ["conv1.conv.weight"]
    # torchvision's own model converts pixels that were normalised with MEAN and STD: to -1 … 1.
    googlenet = torchvision.models.googlenet(transform_input=True, init_weights=False)
    pixels = torch.rand(2, 3, 4, 4)
    normalised = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert file.mean == file.std == [0.5] * 3
    assert torch.allclose(googlenet._transform_input(normalised), (pixels - 0.5) / 0.5, atol=1e-6)


def test_a_file_without_a_head_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, state = models.build("small", "relu", 3, SHAPE), models.build("small", "relu", 3, SHAPE).state_dict()
    head = models.head_of(model)
    features = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
    path = file_of(features, tmp_path / "weights.pt")
    assert models.initialise(model, path, THREE) == [f"{head} is re-initialised: the file does not have it"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in features.items())


class _Files(http.server.BaseHTTPRequestHandler):
    """Serves a file under any name: half of it as `cut` and, without an end, as `silent`. As a proxy it refuses all."""

    content = b""
    refused = 0

    def do_GET(self) -> None:
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        half = "cut" in self.path or "silent" in self.path
        self.wfile.write(self.content[: len(self.content) // (2 if half else 1)])
        if "silent" in self.path:
            self.rfile.read(1)  # until the client has left

    def do_CONNECT(self) -> None:
        type(self).refused += 1
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    monkeypatch.setattr(_Files, "content", buffer.getvalue())
    monkeypatch.setattr(_Files, "refused", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_only_a_whole_file_with_the_digest_of_its_name_gets_into_the_cache(
    server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(_Files.content).hexdigest()[:8]
    for name in (f"missing-{digest}.pth", f"cut-{digest}.pth", f"silent-{digest}.pth", "whole-00000000.pth"):
        monkeypatch.setattr(downloads, "_SILENCE_SECONDS", 0.2 if "silent" in name else 60)
        with pytest.raises(ConfigError, match=rf"^subject: .*cannot be fetched: .*\(curl -O .*copy it to .*/{name}"):
            downloads.fetch("subject", f"{server}/{name}")
        assert list(cache.glob("*")) == []
    path = downloads.fetch("subject", f"{server}/whole-{digest}.pth")
    assert path == cache / f"whole-{digest}.pth"
    assert path.read_bytes() == _Files.content
    assert downloads.remarks(path) == []
    assert downloads.fetch("subject", f"{NO_NETWORK}/{path.name}") == path


def train_without_network(config: dict[str, Any], home: str, proxy: str) -> None:
    with mock.patch.dict(os.environ, TORCH_HOME=home, https_proxy=proxy, no_proxy=""):
        distrain.train(config)


@pytest.mark.ranks
def test_one_process_fetches_weights_and_all_end_if_it_cannot(
    group: Callable[[int], Group], tmp_path: Path, cache: Path, server: str
) -> None:
    data = make(tmp_path / "data", 40, 20, image_size=64, lanes=2)
    config = {
        "data": {"dir": str(data.root)},
        "run": {"dir": str(tmp_path / "run")},
        "model": {"name": "mobilenet_v3_small", "init": "torchvision:DEFAULT"},
        "train": {"global_batch_size": 4},
    }
    with pytest.raises(GroupError) as caught:
        group(2).call("function", train_without_network, config, str(tmp_path / "cache"), server)
    assert _Files.refused == 1
    assert caught.value.kinds == ["ConfigError"] * 2
    first, second = caught.value.messages
    assert first == second
    assert "mobilenet_v3_small-047dcff4.pth cannot be fetched" in first
    assert list(cache.glob("*")) == []


def test_models_and_weights_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"timm has no such model; did you mean .*timm:resnet10t"):
        models.build("timm:resnet10", "relu", 3, SHAPE)
    with pytest.raises(ConfigError, match="set model.name=timm:resnet10t and model.init=timm:c3_in1k"):
        models.build("timm:resnet10t.c3_in1k", "relu", 3, SHAPE)
    with pytest.raises(ConfigError, match="unknown; did you mean c3_in1k.* has the weights c3_in1k, DEFAULT"):
        pretrained.fetch("timm:c4_in1k", "timm:resnet10t")
    with pytest.raises(ConfigError, match=r"set model.name=timm:… too"):
        pretrained.fetch("timm:c3_in1k", "resnet18")
    with pytest.raises(ConfigError, match=r"hf download timm/resnet10t.c3_in1k model.safetensors.* copy .*to /"):
        pretrained.fetch("timm:c3_in1k", "timm:resnet10t")
    torch.manual_seed(1)
    state = timm.create_model("resnet10t").state_dict()
    folder = tmp_path / "models--timm--resnet10t.c3_in1k"
    for name, content in (("refs/main", b"0" * 40), (f"snapshots/{'0' * 40}/model.safetensors", b"")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^model.init=timm:c3_in1k: timm cannot load /"):
        pretrained.read("timm:c3_in1k", "timm:resnet10t", SHAPE)
    save_file(state, folder / f"snapshots/{'0' * 40}/model.safetensors")
    for channels in (3, 1):
        shape = (channels, 32, 32)
        model = models.build("timm:resnet10t", "relu", 3, shape)
        file = pretrained.read("timm:DEFAULT", "timm:resnet10t", shape)
        assert file.mean == MEAN
        note = models.load_weights(model, "model.init", file, THREE)[-1]
        assert note == "fc is re-initialised: 1000 classes in the file, 3 in the data set"
        assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])
        models.check_output("timm:resnet10t", model, torch.zeros(2, *shape), 3)
    assert models.world_size_dependent(nn.Sequential(timm.layers.DropPath(0.1))) == ["DropPath"]


def test_batch_norm_of_timm_keeps_its_activation_over_several_processes() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        expected = model(images)
        converted = sync_batch_norm(model)
        assert torch.allclose(converted(images), expected, atol=1e-5)
    assert {type(each).__name__ for each in converted.modules() if isinstance(each, LocalBatchNorm)} == {
        "_GlobalBatchNormAct"
    }


def test_timm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for action in (lambda: models.build("timm:resnet10t", "relu", 3, SHAPE), lambda: from_timm.fetch("a", "timm:b")):
        with pytest.raises(ConfigError, match=r"needs the package timm: pip install 'distrain\[timm\]'"):
            action()


def test_what_is_a_name_of_weights_and_what_a_path() -> None:
    names = ["torchvision:DEFAULT", "timm:a1_in1k", "runs/first", "./timm:a1_in1k", "other:thing", "torchvision"]
    assert [pretrained.is_name(name) for name in names] == [True, True, False, False, False, False]
    with pytest.raises(ConfigError, match=r"^model.init=torchvison:DEFAULT: .* a name such as torchvision:DEFAULT$"):
        models.initialise(torch.nn.Linear(1, 1), Path("torchvison:DEFAULT"), THREE)
