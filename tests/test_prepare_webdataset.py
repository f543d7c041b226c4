"""`distrain prepare webdataset`: an index of tar files as they are, and blocks of their images."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from tar_files import jpeg, write, write_numbered
from test_prepare import children, files, gone, refused, run
from test_prepare import samples as samples_of_blocks

from distrain.data import index, manifest
from distrain.data.fetch import FetchOptions
from distrain.data.manifest import Dataset, IndexManifest, IndexSplit
from distrain.data.order import Ints
from distrain.data.pillow import Decoding
from distrain.errors import DataError
from distrain.preparation import listing, mixing, pool
from distrain.preparation.blocks import layout
from distrain.preparation.indexing import STRETCH_BYTES, STRETCH_SAMPLES, default_shards
from distrain.preparation.labels import to_classes
from distrain.preparation.tars import Fields

Capture = pytest.CaptureFixture[str]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs forked workers and /proc")

LABELS = np.random.default_rng(0).integers(0, 3, 150).tolist()
TEST_LABELS = LABELS[:30]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tar files of stock webdataset: train of 150 samples in 4, test of 30 in 1."""
    folder = tmp_path_factory.mktemp("tars")
    for name, labels, first in (("train", LABELS, 0), ("test", TEST_LABELS, 1000)):
        with wds.ShardWriter(str(folder / f"{name}-%05d.tar"), maxcount=40, verbose=0) as writer:
            for number, label in enumerate(labels, first):
                picture = jpeg(number, 8 + number % 5, 9)
                writer.write({"__key__": f"{number:06d}", "jpg": picture, "cls": label, "json": {"n": number}})
    return folder


def arguments(tars: Path) -> list[Any]:
    return ["webdataset", tars / "train-{00000..00003}.tar", "--test", tars / "test-*.tar"]


@pytest.fixture(scope="module")
def made(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("made") / "index"
    assert run("prepare", *arguments(tars), "--out", out) == 0
    return manifest.read(out)


@pytest.fixture
def copy(made: Dataset, tars: Path, tmp_path: Path) -> Path:
    """A copy of the index, and of its tar files in `tars` beside it."""
    shutil.copytree(tars, tmp_path / "tars")
    shutil.copytree(made.root, tmp_path / "index")
    (tmp_path / "index/tars.json").write_text(json.dumps({"location": str(tmp_path / "tars")}) + "\n")
    return tmp_path / "index"


def read(dataset: Dataset, split: str) -> tuple[list[bytes], index.Samples]:
    """The images and entries of all virtual shards."""
    samples = index.load(dataset, split)
    shards = dataset.split(split)
    assert isinstance(shards, IndexSplit)
    stretches = [index.read(dataset, split, samples, number, threading.Event()) for number in range(shards.shards)]
    return [bytes(image) for stretch in stretches for image in stretch.images], np.concatenate(
        [stretch.samples for stretch in stretches]
    )


# An index


@pytest.mark.parametrize(("split", "labels"), [("train", LABELS), ("test", TEST_LABELS)])
def test_an_index_has_the_samples_of_stock_webdataset_in_their_order(
    split: str, labels: list[int], made: Dataset, tars: Path
) -> None:
    urls = sorted(str(path) for path in tars.glob(f"{split}-*.tar"))
    stock = list(wds.WebDataset(urls, shardshuffle=False))
    images, samples = read(made, split)
    assert images == [sample["jpg"] for sample in stock]
    assert [made.manifest.classes[label] for label in samples["label"]] == [sample["cls"].decode() for sample in stock]
    assert samples["label"].tolist() == labels
    assert samples["id"].tolist() == list(range(len(labels)))
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    assert samples[["width", "height"]].tolist() == sizes


def test_the_manifest_describes_the_tar_files(made: Dataset, tars: Path, capsys: Capture) -> None:
    content = made.manifest
    assert isinstance(content, IndexManifest)
    assert content.classes == ["0", "1", "2"]
    assert (content.image_shape, content.smallest, content.largest) == (None, [8, 9], [12, 9])
    assert [(tar.name, tar.samples) for tar in content.splits["train"].tars] == [
        ("train-00000.tar", 40), ("train-00001.tar", 40), ("train-00002.tar", 40), ("train-00003.tar", 30)
    ]  # fmt: skip
    assert made.tars == tars
    assert sorted(files(made.root)) == ["manifest.json", "tars.json", "test.npy", "train.npy"]
    assert run("verify", made.root) == 0
    assert "train 150 in 4 tar files, " in capsys.readouterr().out


def test_mean_and_std_are_those_of_the_decoded_images(made: Dataset) -> None:
    images, _ = read(made, "train")
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(image))).reshape(-1, 3) for image in images]) / 255
    assert made.manifest.mean == pytest.approx(pixels.mean(0), abs=1e-9)
    assert made.manifest.std == pytest.approx(pixels.std(0), abs=1e-9)
    assert made.manifest.normalization == "measured on 150 drawn images"


def test_remarks_on_the_measured_images_are_reported(tmp_path: Path, capsys: Capture) -> None:
    flat = io.BytesIO()
    Image.new("P", (8, 8)).save(flat, "PNG", transparency=b"\x00")
    samples = [(str(number), {"jpg": jpeg(number), "cls": b"%d" % (number % 2)}) for number in range(20)]
    write(tmp_path / "a.tar", [*samples, ("20", {"png": flat.getvalue(), "cls": b"0"})])
    assert run("prepare", "webdataset", tmp_path / "a.tar", "--test-fraction", 0, "--out", tmp_path / "out") == 0
    output = capsys.readouterr().err
    assert "1 of 21 images have one flat colour: a.tar, the image at byte " in output
    assert "remarks on the 21 images:\n  " in output


def test_a_full_disk_is_one_message_and_what_was_read_is_retained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refuse(path: Path, _: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    write_numbered(tmp_path / "tars", "all", LABELS, 1)
    monkeypatch.setattr(listing, "_save", refuse)
    assert run("prepare", "webdataset", tmp_path / "tars/*.tar", "--out", tmp_path / "out") == 78
    error = capsys.readouterr().err
    assert error.endswith("No space left on device; free some space, and run the same command again: it continues\n")


def test_what_was_recognised_is_logged(tars: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("prepare", *arguments(tars), "--normalization", "imagenet", "--out", tmp_path / "out") == 0
    output = capsys.readouterr().err
    assert "train: 150 samples in 4 tar files of 1.0 MiB" in output
    assert "images: 8×9 to 12×9, median 10×9" in output
    assert "3 classes from labels (cls): 0, 1, 2" in output
    assert "180 × field .json: train-00000.tar: 000000.json, train-00000.tar: 000001.json …" in output
    assert "30 images of test also in train" not in output
    assert manifest.read(tmp_path / "out").manifest.mean == [0.485, 0.456, 0.406]


def test_val_and_test_are_drawn_by_class_and_the_order_stays(tmp_path: Path) -> None:
    write_numbered(tmp_path / "tars", "all", LABELS, 3)
    command = ["webdataset", tmp_path / "tars/*.tar", "--val-fraction", 0.2, "--test-fraction", 0.1]
    assert run("prepare", *command, "--out", tmp_path / "out") == 0
    dataset = manifest.read(tmp_path / "out")
    ids = {split: index.load(dataset, split)["id"] for split in ("train", "val", "test")}
    assert sorted(np.concatenate(list(ids.values())).tolist()) == list(range(150))
    for split, count in (("train", 108), ("val", 27), ("test", 15)):
        assert len(ids[split]) == count
        assert (np.diff(ids[split]) > 0).all()
        in_class = np.bincount(np.array(LABELS)[ids[split]])
        assert in_class == pytest.approx(np.bincount(LABELS) * count / 150, abs=1)
        images, samples = read(dataset, split)
        assert images == [jpeg(number) for number in samples["id"]]
    assert run("verify", tmp_path / "out") == 0


@pytest.fixture
def address(tars: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tars)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(30)


def test_tar_files_at_an_address_give_the_same_index(
    address: str, made: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    command = ["webdataset", f"{address}/train-{{00000..00003}}.tar", "--test", f"{address}/test-00000.tar?a=b"]
    assert run("prepare", *command, "--out", out) == 78, "two queries"
    command[-1] = f"{address}/test-00000.tar"
    assert run("prepare", *command, "--out", out) == 0
    assert json.loads((out / "tars.json").read_text()) == {"location": address}
    for name in ("train.npy", "test.npy"):
        assert (out / name).read_bytes() == (made.root / name).read_bytes()
    assert run("verify", out) == 0


# Prepared again


def test_the_same_request_changes_nothing_and_another_is_refused(copy: Path, tmp_path: Path, capsys: Capture) -> None:
    before, command = files(copy), arguments(tmp_path / "tars")
    assert run("prepare", *command, "--out", copy) == 0
    assert "already prepared, not changed" in capsys.readouterr().out
    for more in (["--limit", 9], ["--label", "json:n"], ["--image", "jpg"], ["--convert", "--image-size", 8]):
        assert run("prepare", *command, *more, "--out", copy) == 78
        assert f"{more[0].strip('-').replace('-', '_')}" in capsys.readouterr().err
    assert files(copy) == before
    with (tmp_path / "tars/train-00001.tar").open("ab") as file:
        file.write(bytes(512))
    assert run("prepare", *command, "--out", copy) == 78
    assert "prepared with other options (tars: " in capsys.readouterr().err
    assert files(copy) == before


def test_tar_files_that_were_moved_are_recorded_where_they_are(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").rename(tmp_path / "moved")
    assert run("verify", copy) == 78
    assert run("verify", copy, "--tars", tmp_path / "moved") == 0
    assert run("prepare", *arguments(tmp_path / "moved"), "--out", copy) == 0
    assert run("verify", copy) == 0


# Interrupted


def start(tars: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "distrain", "prepare", "webdataset", str(tars / "*.tar"), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def wait_for_first(folder: Path) -> None:
    """Wait until the first tar file was read."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.npz")):
        assert time.monotonic() < deadline, "no tar file was read"
        time.sleep(0.005)


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_one_is_continued(number: signal.Signals, tmp_path: Path, capsys: Capture) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    write_numbered(tars, "all", LABELS * 2, 100)
    process = start(tars, out)
    try:
        wait_for_first(out / ".partial/tars")
        workers = children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    assert gone(workers), "workers outlive the command"
    read_before = len(list((out / ".partial/tars").glob("*.npz")))
    assert 0 < read_before < 100, "interrupted too late to prove anything"
    assert run("verify", out) == 78
    capsys.readouterr()
    assert run("prepare", "webdataset", tars / "*.tar", "--out", out) == 0
    assert f"{read_before} of 100 tar files: read by an earlier attempt" in capsys.readouterr().err
    assert run("prepare", "webdataset", tars / "*.tar", "--out", tmp_path / "undisturbed") == 0
    assert files(out) == files(tmp_path / "undisturbed")


def fail_or_wait(_shared: None, task: int, _progress: Any) -> None:
    if task == 0:
        raise DataError("the first task")
    threading.Event().wait(120)


@linux
def test_an_error_ends_the_other_workers_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match="the first task"):
        list(pool.run(fail_or_wait, None, [0, 1], 2))
    assert time.monotonic() - begin < 60


@linux
def test_of_two_at_once_one_makes_the_index(tmp_path: Path, capsys: Capture) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    write_numbered(tars, "all", LABELS, 50)
    process = start(tars, out)
    try:
        wait_for_first(out / ".partial/tars")
        process.send_signal(signal.SIGSTOP)
        assert run("prepare", "webdataset", tars / "*.tar", "--out", out) == 75
        assert "is preparing a data set there" in capsys.readouterr().err
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert run("verify", out) == 0


def test_a_damaged_tar_file_is_named_and_the_others_are_not_read_again(tmp_path: Path, capsys: Capture) -> None:
    paths, out = write_numbered(tmp_path / "tars", "all", LABELS, 4), tmp_path / "out"
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[:5000])
    command = ["webdataset", tmp_path / "tars/*.tar", "--out", out]
    assert run("prepare", *command) == 78
    error = capsys.readouterr().err
    assert f"error: {paths[3]}: is truncated" in error
    assert f"{out}/.partial/tars has what was read so far" in error
    paths[3].write_bytes(whole)
    (out / ".partial/tars/.0.npz.partial").write_bytes(b"left by a killed worker")
    assert run("prepare", *command) == 0
    assert "3 of 4 tar files: read by an earlier attempt" in capsys.readouterr().err
    assert sorted(files(out)) == ["manifest.json", "tars.json", "test.npy", "train.npy"]


def test_what_was_read_is_not_used_for_other_fields_or_changed_files(tmp_path: Path, capsys: Capture) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    paths = write_numbered(tars, "all", sorted(LABELS), 4)
    command = ["webdataset", tars / "*.tar", "--out", out]
    assert run("prepare", *command) == 78  # sorted
    os.utime(paths[0], ns=(1, 1))
    capsys.readouterr()
    assert run("prepare", *command) == 78
    assert "3 of 4 tar files: read by an earlier attempt" in capsys.readouterr().err
    next((out / ".partial/tars").glob("*.npz")).write_bytes(b"damaged")
    assert run("prepare", *command) == 78
    output = capsys.readouterr().err
    assert "is damaged; its tar file is read again" in output
    assert "3 of 4 tar files: read by an earlier attempt" in output
    assert run("prepare", *command, "--image", "jpg", "--accept-order") == 0
    assert "earlier attempt" not in capsys.readouterr().err


def test_another_command_removes_what_was_read(tmp_path: Path) -> None:
    write_numbered(tmp_path / "tars", "all", sorted(LABELS), 4)
    assert run("prepare", "webdataset", tmp_path / "tars/*.tar", "--out", tmp_path / "out") == 78
    assert (tmp_path / "out/.partial/tars").is_dir()
    small = ["synthetic", "--samples", 20, "--test-samples", 5, "--classes", 2, "--image-size", 8]
    assert run("prepare", *small, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "test", "train"]


def test_a_tar_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (path,) = write_numbered(tmp_path / "tars", "all", LABELS[:5], 1)
    fetching = FetchOptions(None, 0, 0, 1.0)
    (tar,) = listing.find(str(tmp_path / "tars"), [path.name], fetching)
    os.utime(path, ns=(1, 1))
    request = listing.Request(str(tmp_path / "tars"), fetching, Fields.parse("jpg", "cls"), Decoding(), tmp_path)
    with pytest.raises(DataError, match="changed while it was read; wait until it is complete"):
        listing.read_one(request, tar, lambda _: None)
    path.unlink()
    with pytest.raises(DataError, match="all-00000.tar: No such file or directory; bring it back"):
        listing.read_one(request, tar, lambda _: None)


# The order of the classes


def test_a_sorted_set_is_refused_and_blocks_of_it_are_shuffled(tmp_path: Path, capsys: Capture) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    write_numbered(tars, "all", sorted(LABELS), 4)
    command = ["webdataset", tars / "*.tar", "--test-fraction", 0.2, "--lanes", 10, "--out", out]
    assert run("prepare", *command) == 78
    error = capsys.readouterr().err
    assert "sorted by class" in error
    assert "a stretch of 12 samples has 1.2 of 3 classes on average, 3.0 if their order were random" in error
    assert "--convert" in error
    assert not (out / "manifest.json").exists()
    assert run("prepare", *command, "--convert") == 0
    assert "4 of 4 tar files: read by an earlier attempt" in capsys.readouterr().err
    blocks = samples_of_blocks(manifest.read(out), "train")
    assert blocks.labels.tolist() == np.array(sorted(LABELS))[blocks.ids].tolist()
    assert mixing.measure(blocks.labels, np.arange(0, 121, 8)).rho < 0.1
    assert run("prepare", *command[:-1], tmp_path / "accepted", "--accept-order") == 0
    accepted = manifest.read(tmp_path / "accepted").manifest
    assert accepted.source["mixing"] > 0.8
    assert run("prepare", *command, "--convert") == 0
    assert "already prepared" in capsys.readouterr().out


def test_blocks_have_the_pixels_that_a_folder_of_the_same_images_gives(tmp_path: Path) -> None:
    folder, samples = tmp_path / "folder", []
    for number, label in enumerate(LABELS[:30]):
        picture = jpeg(number, 20 + number % 7, 30)
        for split in ("train", "test"):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
            (folder / split / str(label) / f"{number:03d}.jpg").write_bytes(picture)
        samples.append((f"{number:03d}", {"jpg": picture, "cls": str(label).encode()}))
    tar = write(tmp_path / "a.tar", samples)
    (tmp_path / "b").mkdir()
    also = shutil.copy(tar, tmp_path / "b/a.tar")
    options = ["--image-size", 16]
    assert run("prepare", "webdataset", tar, "--test", also, "--convert", *options, "--out", tmp_path / "1") == 0
    assert run("prepare", "folder", folder, *options, "--out", tmp_path / "2") == 0
    first, second = (samples_of_blocks(manifest.read(tmp_path / name), "test") for name in ("1", "2"))
    pairs = [
        sorted((label, image.tobytes()) for label, image in zip(block.labels.tolist(), block.images, strict=True))
        for block in (first, second)
    ]
    assert pairs[0] == pairs[1]
    one, two = (manifest.read(tmp_path / name).manifest for name in ("1", "2"))
    assert (one.mean, one.std, one.classes) == (two.mean, two.std, two.classes)


def test_rho_of_random_order_is_within_its_error_and_that_of_sorted_data_is_1() -> None:
    for labels, shards in (
        (np.arange(130) % 2, 64),
        (np.arange(1000) % 10, 60),
        (np.arange(5000) % 300, 64),
        ((np.arange(4000) % 10 == 0).astype(np.int64), 64),  # one class has nine tenths
    ):
        starts: Ints = np.arange(shards + 1) * len(labels) // shards
        draws = [mixing.measure(np.random.default_rng(seed).permutation(labels), starts) for seed in range(200)]
        rhos = np.array([draw.rho for draw in draws])
        assert abs(rhos.mean()) < 4 * draws[0].error / 200**0.5
        assert rhos.std() == pytest.approx(draws[0].error, rel=0.25)
        assert not any(draw.exceeds(mixing.SORTED) for draw in draws)
    blocks = np.repeat(np.arange(10), 64)
    measured = mixing.measure(blocks, np.arange(0, 641, 64))
    assert (measured.rho, measured.classes) == (1.0, 1.0)
    assert measured.exceeds(mixing.SORTED)
    assert mixing.measure(blocks, np.arange(641)).rho == 0, "shards of one sample"
    assert mixing.measure(np.zeros(20, np.int64), np.arange(0, 21, 5)).rho == 0, "one class"


@pytest.mark.parametrize("samples", [3, 64, 100, 500, 4096, 10_000, 1_281_167])
@pytest.mark.parametrize("sample_bytes", [700.0, 65_000.0, 1e8])
def test_virtual_shards_are_long_enough_and_an_epoch_drops_few_samples(samples: int, sample_bytes: float) -> None:
    shards, lanes = layout(samples, sample_bytes, None, None, default_shards)
    assert shards % lanes == 0
    assert samples % shards <= 0.03 * samples
    stretch = samples / shards
    enough = stretch >= STRETCH_SAMPLES and stretch * sample_bytes >= STRETCH_BYTES
    assert enough or shards == lanes
    if samples >= 2 * 64 * max(STRETCH_SAMPLES, STRETCH_BYTES / sample_bytes):
        assert lanes == 64
        assert stretch < 2 * max(STRETCH_SAMPLES, STRETCH_BYTES / sample_bytes)


# Labels


def classes(labels: dict[str, list[Any]], names: list[str] | None = None) -> tuple[list[str], list[list[int]]]:
    result, numbers = to_classes(labels, names, lambda split, number: f"{split} {number}")
    return result, [of_split.tolist() for of_split in numbers.values()]


def test_labels_become_classes() -> None:
    assert classes({"train": [2, 0, 1], "test": [1]}) == (["0", "1", "2"], [[2, 0, 1], [1]])
    assert classes({"train": ["b", "a"], "val": ["a"]}) == (["a", "b"], [[1, 0], [0]])
    assert classes({"train": ["b", "a"]}, ["b", "a", "c"]) == (["b", "a", "c"], [[0, 1]])
    assert classes({"train": [1, 0]}, ["cat", "dog"]) == (["cat", "dog"], [[1, 0]])


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ({"train": [0, "cat"]}, None, "partly numbers and partly names: train 0 has 0, train 1 has 'cat'"),
        ({"train": [0, 1], "test": ["cat"]}, None, "train 0 has 0, test 0 has 'cat'"),
        ({"train": [0, -1]}, None, r"train 1 has -1 as its label; .* 0 …"),
        ({"train": [0, 10**9]}, None, "train 1 has 1000000000 as its label"),
        (
            {"train": [0, 1], "test": [2, 3, 0]},
            None,
            r"2 labels of test \(2, 3\) have no sample in train: test 0 has 2",
        ),
        ({"train": ["a"], "test": ["b"]}, None, r"1 label of test \('b'\) have no sample in train"),
        ({"train": ["a", "b"]}, ["a"], r"1 label of train \('b'\): not in --classes: train 1 has 'b'"),
        ({"train": [0, 3]}, ["a", "b"], r"\(3\): not in --classes, whose classes are 0 … 1: train 1 has 3"),
        ({"train": [1, 2]}, ["a", "b"], "if labels are counted from 1, add a first line to it"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Any, names: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes(labels, names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has no line"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\na\n", "lines 1 and 3 are both 'a'"),
        (b"\xff\n", "is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_damaged_file_of_class_names_is_refused(
    text: bytes | None, message: str, tars: Path, tmp_path: Path, capsys: Capture
) -> None:
    if text is not None:
        (tmp_path / "names").write_bytes(text)
    error = refused(capsys, tmp_path / "out", *arguments(tars), "--classes", tmp_path / "names")
    assert message in error
    assert "--classes" in error


def test_names_of_classes_come_from_a_file(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "names").write_text("cat\r\ndog\r\nbird \r\n\r\n")
    assert run("prepare", *arguments(tars), "--classes", tmp_path / "names", "--out", tmp_path / "out") == 0
    assert manifest.read(tmp_path / "out").manifest.classes == ["cat", "dog", "bird"]


def test_numbers_that_no_label_has_are_a_remark(tmp_path: Path, capsys: Capture) -> None:
    write_numbered(tmp_path / "tars", "one", [label + 1 for label in LABELS], 2)
    write_numbered(tmp_path / "tars", "gap", [2 * label for label in LABELS], 2)
    assert run("prepare", "webdataset", tmp_path / "tars/one-*.tar", "--out", tmp_path / "out") == 0
    assert "are the labels counted from 1?" in capsys.readouterr().err
    assert manifest.read(tmp_path / "out").manifest.classes == ["0", "1", "2", "3"]
    assert run("prepare", "webdataset", tmp_path / "tars/gap-*.tar", "--out", tmp_path / "gap") == 0
    message = "no training sample has the label of 2 classes (1, 3), which the model never learns"
    assert message in capsys.readouterr().err
    write_numbered(tmp_path / "tars", "same", [1] * 20, 2)
    assert run("prepare", "webdataset", tmp_path / "tars/same-*.tar", "--out", tmp_path / "same") == 78


# What cannot be used


def test_fields_that_no_sample_has_are_named_with_those_there_are(tars: Path, tmp_path: Path, capsys: Capture) -> None:
    error = refused(capsys, tmp_path / "out", *arguments(tars), "--image", "tiff")
    assert "train-00000.tar: has no sample with an image (tiff) and a label (cls), but 40 field .jpg" in error
    assert "40 field .json" in error
    assert "Choose --image and --label" in error
    error = refused(capsys, tmp_path / "out", *arguments(tars), "--label", "txt")
    assert "40 samples without a label (000000 (no .txt)" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", 8], "--image-size has no effect without --convert"),
        (["--convert", "--image-size", 8, "--accept-order"], "--accept-order has no effect with --convert"),
        (["--convert"], "--convert: the images have several sizes; choose one with --image-size"),
        (["--test-fraction", 0.5], "--test-fraction 0.5 has no effect, as the source has a test split"),
        (["--lanes", 151], "151 shards for 150 training samples"),
        (["--val", "missing.tar"], "missing.tar: No such file or directory"),
        (["--label", "json"], "has no sample"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: list[Any], message: str, tars: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run("prepare", *arguments(tars), *options, "--out", tmp_path / "out") == 78
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()


def test_unreadable_images_are_named_or_dropped(tmp_path: Path, capsys: Capture) -> None:
    samples = [(f"{number:03d}", {"jpg": jpeg(number), "cls": b"%d" % label}) for number, label in enumerate(LABELS)]
    samples[3] = ("003", {"jpg": b"no image", "cls": b"0"})
    samples[7] = ("007", {"jpg": jpeg(7, 40, 40)[:900], "cls": b"0"})  # its header can be read
    path = write(tmp_path / "a.tar", samples)
    command = ["webdataset", path, "--test-fraction", 0, "--out", tmp_path / "out"]
    assert run("prepare", *command) == 78
    assert "1 unreadable among the sources, 0 allowed" in capsys.readouterr().err
    assert run("prepare", *command, "--skip-bad", 1) == 78
    error = capsys.readouterr().err
    assert "2 unreadable among the sources, 1 allowed" in error
    assert "a.tar, 003: not an image" in error
    assert "a.tar, the image at byte" in error
    assert "--skip-bad 2" in error
    assert run("prepare", *command, "--skip-bad", 2) == 0
    dataset = manifest.read(tmp_path / "out")
    assert dataset.manifest.source["skipped"] == 2
    images, samples_read = read(dataset, "train")
    assert images == [jpeg(number) for number in range(150) if number not in (3, 7)]
    assert samples_read["id"].tolist() == [number for number in range(149) if number != 6]


def test_a_split_without_a_readable_image_is_refused(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path / "a.tar", [(f"{number}", {"jpg": b"no image", "cls": b"0"}) for number in range(20)])
    assert run("prepare", "webdataset", path, "--skip-bad", 20, "--out", tmp_path / "out") == 78
    error = capsys.readouterr().err
    assert "no image of train can be read:\n  a.tar, 0: not an image of a known format" in error
    assert error.endswith("and 10 more\n")


def test_repeated_samples_are_reported(tmp_path: Path, capsys: Capture) -> None:
    paths = write_numbered(tmp_path / "tars", "all", LABELS[:40], 2)
    again = shutil.copy(paths[0], tmp_path / "again.tar")
    test = shutil.copy(paths[1], tmp_path / "test.tar")
    assert run("prepare", "webdataset", *paths, again, "--test", test, "--out", tmp_path / "out") == 0
    output = capsys.readouterr().err
    assert "20 keys of train repeated" in output
    assert "20 images of test also in train" in output


# Verified


@pytest.mark.parametrize("what", ["tar", "header", "missing", "truncated", "index"])
def test_verify_names_what_is_wrong(what: str, copy: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "tars/train-00002.tar"
    content = bytearray(path.read_bytes())
    sample = index.load(manifest.read(copy), "train")[80]
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(content[:-512])
    elif what == "index":
        path = copy / "train.npy"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        content[int(sample["offset"]) + 100 if what == "tar" else 0] ^= 1
        path.write_bytes(content)
    assert run("verify", copy) == 78
    error = capsys.readouterr().err
    assert f"1 found wrong:\n  {path}: " in error
    reason = {
        "tar": f"1 image changed since it was indexed (at byte {sample['offset']:,})",
        "header": "its sha256 differs, the images are the same",
        "missing": "No such file or directory",
        "truncated": f"{len(content) - 512:,} bytes instead of {len(content):,}",
        "index": "changed since it was written (its sha256 differs)",
    }
    assert reason[what] in error
