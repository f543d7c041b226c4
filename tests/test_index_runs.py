"""The promise for anybody's WebDataset: real processes train on tar files as stock webdataset and `tar` write them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import stock_shards
import torch
import torch.nn.functional as F
from group import Group, GroupError
from object_stores import faulty_store
from PIL import Image
from runs import as_record, ids_by_step
from test_promise import distance, same_bits, train_and_kill, weights
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

import distrain
from distrain import cli, models
from distrain.config import Config
from distrain.data import images, index, manifest
from distrain.data.manifest import Dataset
from distrain.data.pillow import ImageWarning
from distrain.tools.export import export, export_bundle
from distrain.tools.hash_runs import check_equal, hash_runs
from distrain.tools.predict import predict
from distrain.training import from_images, inputs

pytestmark = pytest.mark.ranks
Groups = Callable[[int], Group]
Sections = dict[str, dict[str, Any]]

BATCH, SIZE = 48, 16


def configuration(data: str | Path, run: Path, /, *several: Sections) -> Sections:
    tree: Sections = {
        "data": {"dir": str(data), "audit": True, "image_size": SIZE},
        "run": {"dir": str(run), "seed": 7},
        "model": {"name": "small"},
        "train": {"epochs": 1, "global_batch_size": BATCH, "lr": 0.05, "virtual_ranks": 4},
        "augment": {"crop_scale": [0.3, 1], "flip": True},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "log": {"report": False},
    }
    for sections in several:
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
    return tree


def prepare(out: Path, *arguments: str | Path) -> int:
    """Run `distrain prepare webdataset`; return its exit code."""
    return cli.main(["prepare", "webdataset", *map(str, arguments), "--out", str(out)])


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tar files of 3 to 2,000 samples: train/ of 2,200 samples by four programs, and test/ of 90."""
    folder = tmp_path_factory.mktemp("tars")
    train, test = folder / "train", folder / "test"
    stock_shards.write_stock(train, "a", range(2000))
    stock_shards.write_stock(train, "b", range(2000, 2003), largest=1200)
    stock_shards.write_by_tar(train / "c.tar", folder / "gnu", range(2003, 2073), "--format=gnu")
    stock_shards.write_by_tar(train / "d.tar", folder / "pax", range(2073, 2113), "--format=posix")
    stock_shards.write_by_tarfile(train / "e.tar", range(2113, 2173), tarfile.PAX_FORMAT, global_header=True)
    stock_shards.write_by_tarfile(train / "f.tar", range(2173, 2200), tarfile.GNU_FORMAT)
    stock_shards.write_stock(test, "a", range(3000, 3076), maxcount=40)
    stock_shards.write_stock(test, "b", range(3076, 3078), largest=1200)
    stock_shards.write_by_tarfile(test / "c.tar", range(3078, 3092), tarfile.PAX_FORMAT)
    return folder


@pytest.fixture(scope="module")
def data(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of these tar files."""
    out = tmp_path_factory.mktemp("index") / "data"
    assert prepare(out, tars / "train/*.tar", "--test", tars / "test/*.tar", "--lanes", "12") == 0
    return out


@pytest.fixture(scope="module")
def on_one_process(data: Path, group: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with virtual ranks on one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    group(1).train(configuration(data, run))
    return run


def test_an_index_has_the_samples_of_stock_webdataset(tars: Path, data: Path) -> None:
    dataset = manifest.read(data)
    for split in ("train", "test"):
        expected = list(stock_shards.stock_samples(sorted((tars / split).glob("*.tar"))))
        samples, described = index.load(dataset, split), dataset.indexed(split)
        seen = []
        for number, sample in enumerate(samples):
            assert sample["id"] == number
            tar = described.tars[int(index.tars_of(described, number, number + 1)[0])]
            seen.append((index.read_image(dataset.tars, tar, samples[number : number + 1]), sample["label"]))
        assert seen == [(content, label) for _, content, label in expected]
    # One of each hundred that `tar` packed is a hard link: webdataset does not read it either.
    assert len(index.load(dataset, "train")) == 2200 - 2


def test_an_epoch_is_the_same_on_1_to_4_processes(
    data: Path, on_one_process: Path, group: Groups, tmp_path: Path
) -> None:
    ids, one = ids_by_step(on_one_process), json.loads((on_one_process / "result.json").read_text())
    seen = Counter(each for step in ids.values() for each in step)
    assert max(seen.values()) == 1
    assert len(seen) + one["dropped_per_epoch"] == 2198
    assert list(ids) == list(range(one["steps"]))
    for w in (2, 3, 4):
        result = group(w).train(configuration(data, tmp_path / str(w)))
        assert ids_by_step(tmp_path / str(w)) == ids
        assert same_bits(weights(tmp_path / str(w)), weights(on_one_process))
        for key in ("loss", "correct", "total", "confusion", "dropped_per_epoch", "unreadable"):
            assert result[key] == one[key]
    check_equal(hash_runs([on_one_process, *(tmp_path / str(w) for w in (2, 3, 4))]))


@pytest.mark.parametrize("others", [(3,), pytest.param((2, 4), marks=pytest.mark.faults)])
def test_without_virtual_ranks_weights_are_equal_up_to_rounding(
    others: tuple[int, ...], data: Path, on_one_process: Path, group: Groups, tmp_path: Path
) -> None:
    changes: Sections = {"train": {"virtual_ranks": None, "precision": "fp64"}}
    for w in (1, *others):
        group(w).train(configuration(data, tmp_path / str(w), changes))
        assert ids_by_step(tmp_path / str(w)) == ids_by_step(on_one_process)
    for w in others:
        assert distance(weights(tmp_path / str(w)), weights(tmp_path / "1")) < 1e-9


# Interruptions


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars/ of 243 samples of train and 41 of test, and the index in data/."""
    folder = tmp_path_factory.mktemp("few")
    build(folder)
    return folder


def build(folder: Path, **arguments: Any) -> None:
    write_few(folder / "tars", **arguments)
    assert prepare_few(folder / "data", folder / "tars", "--normalization", "imagenet") == 0


def write_few(tars: Path, numbers: list[int] | None = None, bad: tuple[int, ...] = ()) -> None:
    numbers = numbers or list(range(243))
    for name, part in (("a", numbers[:3]), ("b", numbers[3:153]), ("c", numbers[153:])):
        stock_shards.write_stock(tars, f"train-{name}", part, bad=bad)
    stock_shards.write_stock(tars, "test-a", range(5000, 5041), bad=bad)


def prepare_few(out: Path, tars: Path | str, *arguments: str) -> int:
    patterns = (f"{tars}/train-{{a,b,c}}-000.tar", "--test", f"{tars}/test-a-000.tar")
    return prepare(out, *patterns, "--lanes", "6", *arguments)


EPOCHS: Sections = {
    "data": {"image_size": 96, "start_size": 32, "growth": [0.2, 0.8]},
    "model": {"name": "models_for_tests:FaultyAtAnySize"},
    "augment": {"trivial_augment": True, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
    "train": {"epochs": 4, "global_batch_size": 16, "label_smoothing": 0.1, "ema_decay": 0.9},
}
"""Every kind of augmentation at once, on images of 32, 64 and 96 pixels."""


@pytest.fixture(scope="module")
def undisturbed(few: Path, group: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of four epochs of 15 steps on one process."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    group(1).train(configuration(few / "data", run, EPOCHS))
    return run


def set_environ(values: dict[str, str]) -> None:
    os.environ.update(values)


@contextlib.contextmanager
def fault(group: Group, fault: str, file: str = "") -> Iterator[None]:
    """Runs of the block have this fault (`models_for_tests.Faulty`)."""
    group.call("function", set_environ, {"FAULT": fault, "FAULT_FILE": file})
    try:
        yield
    finally:
        group.call("function", set_environ, {"FAULT": "none:0:0"})


def last_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize(("w", "then"), [(3, 2), pytest.param(2, 4, marks=pytest.mark.faults)])
def test_a_run_that_is_killed_resumes_on_another_number_of_processes(
    w: int, then: int, few: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    config = configuration(few / "data", tmp_path / "run", EPOCHS, {"checkpoint": {"every_steps": 7}})
    victims = Group(w)
    try:
        victims.call("function", set_environ, {"FAULT": "kill:0:50"})
        with pytest.raises((AssertionError, GroupError)):
            victims.call("train", config)
        victims.kill()
    finally:
        victims.close()
    assert 0 < last_step(tmp_path / "run") < 60
    assert last_step(tmp_path / "run") % 15
    result = group(then).train(config)
    assert result["steps"] == 60
    assert ids_by_step(tmp_path / "run") == ids_by_step(undisturbed)
    assert same_bits(weights(tmp_path / "run"), weights(undisturbed))


@pytest.mark.parametrize(("w", "at", "then"), [(2, 41, 3), pytest.param(4, 22, 1, marks=pytest.mark.faults)])
def test_a_run_that_is_stopped_resumes_on_another_number_of_processes(
    w: int, at: int, then: int, few: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    config = configuration(few / "data", tmp_path / "run", EPOCHS, {"checkpoint": {"every_steps": 4}})
    with fault(group(w), f"terminate:1:{at}"), pytest.raises(GroupError) as caught:
        group(w).train(config)
    assert set(caught.value.kinds) == {"Stopped"}
    assert 15 < last_step(tmp_path / "run") < 30
    group(then).train(config)
    assert ids_by_step(tmp_path / "run") == ids_by_step(undisturbed)
    assert same_bits(weights(tmp_path / "run"), weights(undisturbed))


@pytest.mark.faults
def test_a_run_without_virtual_ranks_that_is_killed_resumes_to_the_same_weights_up_to_rounding(
    data: Path, group: Groups, tmp_path: Path
) -> None:
    changes: Sections = {"train": {"virtual_ranks": None, "precision": "fp64"}, "checkpoint": {"every_steps": 10}}
    train_and_kill(2, configuration(data, tmp_path / "cut", changes), 20)
    assert not (tmp_path / "cut/result.json").exists()
    group(3).train(configuration(data, tmp_path / "cut", changes))
    group(1).train(configuration(data, tmp_path / "whole", changes))
    assert ids_by_step(tmp_path / "cut") == ids_by_step(tmp_path / "whole")
    assert distance(weights(tmp_path / "cut"), weights(tmp_path / "whole")) < 1e-9


# Addresses


class _Handler(SimpleHTTPRequestHandler):
    """Sends files, and ranges of them if the server is to."""

    ranges = False
    requested: list[str | None]

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.requested.append(requested)
        if requested is None or not self.ranges:
            with contextlib.suppress(ConnectionError):
                super().do_GET()
            return
        first, last = map(int, requested.removeprefix("bytes=").split("-"))
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path, ranges: bool) -> Iterator[tuple[str, list[str | None]]]:
    """Serve a folder on the loopback; yield its address and the header `Range` of each request."""
    requested: list[str | None] = []
    handler = type("Handler", (_Handler,), {"ranges": ranges, "requested": requested})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requested
        server.shutdown()


def check_remote(address: str, undisturbed: Path, group: Groups, folder: Path) -> None:
    """Index tar files at an address, and train from there, with both kinds of caches."""
    assert prepare_few(folder / "data", address, "--normalization", "imagenet") == 0
    for w, name, cache in ((2, "disk", "off"), (1, "ram", "ram")):
        changes: Sections = {"data": {"cache": cache, "cache_dir": str(folder / f"cache-{name}")}}
        group(w).train(configuration(folder / "data", folder / name, EPOCHS, changes))
        assert ids_by_step(folder / name) == ids_by_step(undisturbed)
        assert same_bits(weights(folder / name), weights(undisturbed))


@pytest.mark.parametrize("ranges", [True, pytest.param(False, marks=pytest.mark.faults)])
def test_a_run_from_a_server_has_the_bits_of_a_local_one(
    ranges: bool, few: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    with served(few / "tars", ranges) as (address, requested):
        check_remote(address, undisturbed, group, tmp_path)
        assert any(requested)
        sizes = {path.stat().st_size for path in (tmp_path / "cache-disk").iterdir()}
        whole = {path.stat().st_size for path in (few / "tars").iterdir()}
        assert ranges or whole <= sizes
        before = len(requested)
        changes: Sections = {"data": {"cache": "off", "cache_dir": str(tmp_path / "cache-disk")}}
        group(2).train(configuration(tmp_path / "data", tmp_path / "again", EPOCHS, changes))
        assert len(requested) == before  # all from the cache
    assert same_bits(weights(tmp_path / "again"), weights(undisturbed))


def test_a_run_from_s3_has_the_bits_of_a_local_one(
    few: Path, undisturbed: Path, group: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    with faulty_store() as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        for w in (1, 2):
            group(w).call("function", set_environ, server.environ)
        s3fs.S3FileSystem(skip_instance_cache=True).put(str(few / "tars"), "bucket/some/tars", recursive=True)
        check_remote("s3://bucket/some/tars", undisturbed, group, tmp_path)


# Evaluation


def plain_pixels(content: bytes, is_jpeg: bool, resize: int) -> torch.Tensor:
    """Decode, resize and crop an image as a plain torchvision script does: uint8 [3, SIZE, SIZE]."""
    image: Any = Image.open(io.BytesIO(content))
    if is_jpeg and image.mode != "CMYK":
        file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        pixels = decode_jpeg(file, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    else:
        grey_16 = image.mode.startswith("I;16")
        array = np.stack([np.asarray(image) // 257] * 3, -1) if grey_16 else np.asarray(image.convert("RGB"))
        pixels = torch.from_numpy(array.astype(np.uint8)).permute(2, 0, 1)
    return v2.CenterCrop(SIZE)(v2.Resize(resize, antialias=True)(pixels))


def plain_members(tars: Path) -> dict[str, tuple[bytes, int]]:
    """Return the images and labels of the tar files of a folder, by name; read by tarfile."""
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".cls"):
                    labels[f"{path.stem}/{Path(member.name).stem}"] = int(file.read())
                else:
                    images[f"{path.stem}/{member.name}"] = file.read()
    return {name: (content, labels[name.rpartition(".")[0]]) for name, content in images.items()}


class Plain(NamedTuple):
    """The evaluation of a run by a plain loop."""

    correct: int
    loss: float
    classes: dict[str, int]


def plain_evaluation(run: Path, data: Path, tars: Path, resize: int) -> tuple[torch.Tensor, torch.Tensor, Plain]:
    """Evaluate a run on the tar files of a folder: the pixels [N, 3, SIZE, SIZE], the logits and the scores."""
    members = plain_members(tars)
    pixels = torch.stack(
        [plain_pixels(content, not name.endswith("png"), resize) for name, (content, _) in members.items()]
    )
    description = json.loads((data / "manifest.json").read_text())
    mean, std = (torch.tensor(description[key])[:, None, None] for key in ("mean", "std"))
    model = models.build("small", "relu", stock_shards.CLASSES, (3, SIZE, SIZE)).eval()
    model.load_state_dict(weights(run))
    truth = torch.tensor([label for _, label in members.values()])
    with torch.no_grad():
        logits = model((pixels / 255 - mean) / std)
    predicted = logits.argmax(1)
    loss = float(F.cross_entropy(logits.double(), truth))
    return (
        pixels,
        logits,
        Plain(int((predicted == truth).sum()), loss, dict(zip(members, predicted.tolist(), strict=True))),
    )


def evaluate(run: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate a run as `distrain evaluate` does."""
    return as_record(distrain.evaluate(run, overrides=overrides))


def test_evaluation_equals_a_plain_loop(
    tars: Path, data: Path, on_one_process: Path, group: Groups, tmp_path: Path
) -> None:
    result = json.loads((on_one_process / "result.json").read_text())
    _, _, plain = plain_evaluation(on_one_process, data, tars / "test", resize=18)
    assert result["total"] == len(plain.classes) == 92
    assert result["correct"] == plain.correct
    assert result["loss"] == pytest.approx(plain.loss, abs=1e-5)
    _, _, larger = plain_evaluation(on_one_process, data, tars / "test", resize=40)
    assert abs(larger.loss - plain.loss) > 1e-3
    for w in (1, 2, 3):
        (scores, *_) = group(w).call("function", evaluate, on_one_process)
        assert {key: scores[key] for key in ("correct", "total", "loss", "confusion")} == {
            key: result[key] for key in ("correct", "total", "loss", "confusion")
        }
        (scores, *_) = group(w).call("function", evaluate, on_one_process, "eval.resize=40")
        assert (scores["total"], scores["correct"]) == (92, larger.correct)
        assert scores["loss"] == pytest.approx(larger.loss, abs=1e-5)


def test_predictions_of_the_extracted_files_are_those_of_the_evaluation(
    tars: Path, data: Path, on_one_process: Path, tmp_path: Path
) -> None:
    _, _, plain = plain_evaluation(on_one_process, data, tars / "test", resize=18)
    files = []
    for name, (content, _) in plain_members(tars / "test").items():
        files.append(tmp_path / name)
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_bytes(content)
    of_run = list(predict(on_one_process, files, None, "cpu"))
    predictions = {str(Path(each["file"]).relative_to(tmp_path)): int(next(iter(each["classes"]))) for each in of_run}
    assert predictions == plain.classes
    export_bundle(on_one_process, tmp_path / "bundle", None)
    assert list(predict(tmp_path / "bundle", files, None, "cpu")) == of_run


@pytest.mark.faults
def test_an_exported_model_agrees(tars: Path, data: Path, on_one_process: Path, tmp_path: Path) -> None:
    export(on_one_process, tmp_path / "model.pt2", None, force=False)
    pixels, logits, _ = plain_evaluation(on_one_process, data, tars / "test", resize=18)
    exported = torch.export.load(tmp_path / "model.pt2").module()(pixels / 255)
    torch.testing.assert_close(exported, logits, atol=1e-4, rtol=1e-4)


# Sorted tar files


def test_tar_files_that_are_sorted_by_class_are_refused_and_train_well_once_they_are_converted(
    few: Path, group: Groups, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_few(tmp_path / "tars", sorted(range(243), key=stock_shards.label_of))
    assert prepare_few(tmp_path / "data", tmp_path / "tars") == 78
    message = capsys.readouterr().err
    assert "sorted by class" in message
    assert "--convert" in message
    assert "--accept-order" in message
    assert prepare_few(tmp_path / "accepted", tmp_path / "tars", "--accept-order") == 0
    assert prepare_few(tmp_path / "blocks", tmp_path / "tars", "--convert", "--image-size", str(SIZE)) == 0
    no_crop: Sections = {"augment": {"crop_scale": None}, "train": {"epochs": 6, "global_batch_size": 16}}
    accuracies = [
        group(1).train(configuration(data, tmp_path / name, no_crop))["accuracy"]
        for name, data in (("shuffled", few / "data"), ("converted", tmp_path / "blocks"))
    ]
    assert min(accuracies) > 0.8
    assert abs(accuracies[0] - accuracies[1]) < 0.1


# Images that cannot be decoded


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `few`, but one image of train and the last one of test cannot be decoded."""
    folder = tmp_path_factory.mktemp("bad")
    build(folder, bad=(BAD, 5040))
    return folder


BAD = 115
"""Number of the sample, which is its id too."""


def name_of_bad(folder: Path, split: str, number: int) -> str:
    dataset = manifest.read(folder / "data")
    return index.describe(dataset.indexed(split), number, int(index.load(dataset, split)[number]["offset"]))


def test_an_image_that_cannot_be_decoded_ends_a_run_and_no_step_with_its_substitute_is_saved(
    with_bad: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    (step,) = [step for step, ids in ids_by_step(undisturbed).items() if BAD in ids and step < 15]
    config = configuration(with_bad / "data", tmp_path / "run", EPOCHS, {"checkpoint": {"every_steps": 1, "keep": 0}})
    with pytest.raises(GroupError) as caught:
        group(2).train(config)
    assert caught.value.kinds == ["UnreadableImagesError"] * 2
    for message in caught.value.messages:
        assert name_of_bad(with_bad, "train", BAD) in message
        assert "data.skip_bad=1" in message
    assert last_step(tmp_path / "run") <= step
    (message,) = {*caught.value.messages}
    assert message.startswith("1 image cannot be decoded, 0 allowed:")


def test_an_image_of_an_evaluation_that_cannot_be_decoded_ends_a_run_and_its_steps_are_saved(
    with_bad: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    """One is allowed: that of train, which is trained before."""
    keys: Sections = {"data": {"skip_bad": 1}, "eval": {"every_steps": 15}, "checkpoint": {"every_steps": 0}}
    with pytest.raises(GroupError) as caught:
        group(2).train(configuration(with_bad / "data", tmp_path / "run", EPOCHS, keys))
    assert caught.value.kinds == ["DataError"] * 2
    assert name_of_bad(with_bad, "test", 40) in caught.value.messages[0]
    assert last_step(tmp_path / "run") == 15
    keys["data"] = {"skip_bad": 2}
    group(1).train(configuration(with_bad / "data", tmp_path / "run", EPOCHS, keys))
    assert ids_by_step(tmp_path / "run").keys() == ids_by_step(undisturbed).keys()


def test_bad_images_that_are_allowed_are_replaced_the_same_on_any_number_of_processes_and_counted_once(
    with_bad: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    """The bad image of test is the only one of its batch."""
    allowed: Sections = {
        "data": {"skip_bad": 2},
        "eval": {"batch_size": 1},
        "checkpoint": {"every_steps": 4, "keep": 0},
    }
    results = {w: group(w).train(configuration(with_bad / "data", tmp_path / str(w), EPOCHS, allowed)) for w in (1, 2)}
    one = ids_by_step(tmp_path / "1")
    assert ids_by_step(tmp_path / "2") == one
    assert not any(BAD in ids for ids in one.values())
    assert any(BAD in ids for ids in ids_by_step(undisturbed).values())
    assert same_bits(weights(tmp_path / "1"), weights(tmp_path / "2"))
    for result in results.values():
        names = [line.partition(": ")[0] for line in result["unreadable"]]
        assert names == sorted([name_of_bad(with_bad, "train", BAD), name_of_bad(with_bad, "test", 40)])
        assert result["total"] == 40
        assert result["loss"] == results[1]["loss"]
    # A resume after the last step with the image: its name is in the checkpoint.
    after = max(step for step, ids in ids_by_step(undisturbed).items() if BAD in ids) + 1
    shutil.copytree(tmp_path / "2", tmp_path / "cut")
    (tmp_path / "cut/result.json").unlink()
    for step in range(-(-after // 4) * 4 + 1, 61):
        shutil.rmtree(tmp_path / f"cut/checkpoints/step-{step:08d}", ignore_errors=True)
    assert after <= last_step(tmp_path / "cut") < 60
    result = group(1).train(configuration(with_bad / "data", tmp_path / "cut", EPOCHS, allowed))
    assert result["unreadable"] == results[1]["unreadable"]
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "1"))
    (scores, *_) = group(2).call("function", evaluate, tmp_path / "1")
    assert (scores["total"], scores["loss"]) == (40, results[1]["loss"])


# Tar files that are damaged, gone or elsewhere


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """A copy of `few`, to be damaged; its index names the tar files of the copy."""
    shutil.copytree(few, tmp_path / "copy")
    (tmp_path / "copy/data" / manifest.TARS).write_text(json.dumps({"location": str(tmp_path / "copy/tars")}))
    return tmp_path / "copy"


def refusal(group: Group, config: Sections) -> str:
    """Train; return the error, which all ranks raise."""
    with pytest.raises(GroupError) as caught:
        group.train(config)
    assert set(caught.value.kinds) <= {"DataError", "ShardError", "ConfigError"}
    (message,) = set(caught.value.messages)
    return message


def test_an_image_that_changed_after_indexing_ends_the_run_on_all_ranks(
    copy: Path, group: Groups, tmp_path: Path
) -> None:
    dataset = manifest.read(copy / "data")
    offset = int(index.load(dataset, "train")[BAD]["offset"])
    with (copy / "tars/train-b-000.tar").open("r+b") as file:
        file.seek(offset + 300)
        byte = file.read(1)[0]
        file.seek(offset + 300)
        file.write(bytes([byte ^ 1]))
    message = refusal(group(2), configuration(copy / "data", tmp_path / "run", EPOCHS))
    assert f"train-b-000.tar: changed since it was indexed (the image at byte {offset:,} differs)" in message


@pytest.mark.faults
def test_a_tar_file_that_vanishes_during_a_run_ends_it_saved_and_it_resumes_with_the_file(
    copy: Path, group: Groups, tmp_path: Path
) -> None:
    lost = copy / "tars/train-b-000.tar"
    backup = shutil.copy(lost, tmp_path)
    # Images so large that no more than seven steps are decoded ahead; an epoch has five.
    large: Sections = {
        "data": {"cache": "off", "image_size": 256, "start_size": None},
        "train": {"epochs": 6, "global_batch_size": 48},
    }
    config = configuration(copy / "data", tmp_path / "run", EPOCHS, large)
    with fault(group(2), "lose:0:8", str(lost)):
        message = refusal(group(2), config)
    assert "train-b-000.tar: No such file or directory; bring the file back" in message
    assert 0 < last_step(tmp_path / "run") < 30
    assert "train-b-000.tar" in refusal(group(2), config)  # before the first step
    shutil.copy(backup, lost)
    group(3).train(config)
    ids = ids_by_step(tmp_path / "run")
    assert list(ids) == list(range(30))
    for epoch in range(6):
        assert len({each for step in range(5 * epoch, 5 * epoch + 5) for each in ids[step]}) == 240


def test_tar_files_that_were_moved_are_named_and_found_by_data_tars(
    copy: Path, undisturbed: Path, group: Groups, tmp_path: Path
) -> None:
    (copy / "tars").rename(tmp_path / "moved")
    message = refusal(group(2), configuration(copy / "data", tmp_path / "run", EPOCHS))
    assert "train-a-000.tar: No such file or directory" in message
    assert "data.tars" in message
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.glob("[cm]o*/**/*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    group(2).train(configuration(copy / "data", tmp_path / "run", EPOCHS, {"data": {"tars": str(tmp_path / "moved")}}))
    assert same_bits(weights(tmp_path / "run"), weights(undisturbed))
    # Nothing is written beside the data.
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.glob("[cm]o*/**/*")}


# Configurations that cannot be trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"image_size": None}}, "its images have sizes from 60×60 to 100×100: set data.image_size, such as"),
        ({"data": {"cache": "device"}}, "data.cache=device: the images of an index are encoded; use ram, auto or off"),
        ({"eval": {"resize": 8}}, "eval.resize=8: is smaller than the crop of 16×16; raise it"),
        ({"model": {"name": "small"}, "eval": {"crop": 8}}, "eval.crop=8: if it needs images of 16×16, set eval.crop"),
        ({"data": {"image_size": 64, "start_size": 32}}, "if it needs images of 64×64, set data.start_size=null"),
        (
            {"data": {"image_size": 64, "start_size": 32}, "augment": {"cutout": 40}},
            "augment.cutout=40: at most 32 for images of data.start_size=32",
        ),
    ],
)
def test_keys_that_do_not_fit_an_index_are_refused(
    changes: Sections, message: str, few: Path, group: Groups, tmp_path: Path
) -> None:
    assert message in refusal(group(2), configuration(few / "data", tmp_path / "run", changes))
    assert not (tmp_path / "run").exists()


def test_images_for_initial_weights_do_not_depend_on_the_section_eval(few: Path, tmp_path: Path) -> None:
    def images(**keys: int) -> Tensor:
        tree = configuration(few / "data", tmp_path / "run", {"data": {"image_size": 32}, "eval": keys})
        config = Config.load(tree)
        dataset = inputs.read_data(config)
        return from_images._first_images(config, dataset, inputs.preprocessing(config, dataset, 1))

    assert torch.equal(images(), images(crop=48, resize=64))


def test_keys_of_an_index_are_refused_with_blocks(small: Dataset, group: Groups, tmp_path: Path) -> None:
    keys = {"data": {"tars": "tars", "skip_bad": 1}, "augment": {"crop_ratio": [1, 1], "trivial_augment": True}}
    message = refusal(group(2), configuration(small.root, tmp_path / "run", keys))
    assert message.startswith(
        "data.tars, data.skip_bad, augment.crop_scale, augment.crop_ratio, augment.trivial_augment: "
    )
    assert "`distrain prepare webdataset`" in message


def test_a_tar_file_outside_of_their_folder_is_refused(copy: Path, group: Groups, tmp_path: Path) -> None:
    path = copy / "data/manifest.json"
    path.write_text(path.read_text().replace('"train-b-000.tar"', '"../train-b-000.tar"'))
    message = refusal(group(2), configuration(copy / "data", tmp_path / "run"))
    assert "a tar file's name is not a path below their location" in message


def test_a_resume_under_another_decoder_is_a_warning(
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    config = configuration(few / "data", tmp_path / "run", {"train": {"virtual_ranks": None}})
    with monkeypatch.context() as patch:
        patch.setattr(images, "decoder_version", lambda: "torchvision 0.1")
        distrain.train(config)
    assert "was saved with other" not in caplog.text
    distrain.train(config)
    assert re.search(
        r"step-\d+ was saved with other software or hardware, .*: image decoder .*before torchvision 0.1", caplog.text
    )
    assert not [each for each in recwarn if issubclass(each.category, ImageWarning)]  # of images of 16 bits
