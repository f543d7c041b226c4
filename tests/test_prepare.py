"""`distrain prepare` and `distrain verify`: the same options give the same bytes, and errors leave no files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from group import wait_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain import cli
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset
from distrain.data.shards import Block
from distrain.errors import ConfigError, DataError
from distrain.preparation.blocks import DEFAULT_LANES, SHARD_BYTES, Options, choose, layout, stratified
from distrain.preparation.ownership import OutputFolder
from distrain.preparation.sources.folder import Folder
from distrain.preparation.sources.synthetic import Synthetic

Capture = pytest.CaptureFixture[str]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs forked workers and /proc")

SMALL = ["--samples", 203, "--test-samples", 57, "--image-size", 8, "--classes", 7, "--lanes", 6, "--shards", 12]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(dataset: Dataset, split: str) -> Block:
    content = dataset.manifest
    blocks = [
        block
        for shard in dataset.split(split).shards
        for block in shards.read(dataset.root, shard, content.image_shape, len(content.classes))
    ]
    return Block(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))


def refused(capsys: Capture, out: Path, *arguments: Any) -> str:
    """The message of a command that fails with 78 and leaves no `out`."""
    capsys.readouterr()
    assert run("prepare", *arguments, "--out", out) == 78
    assert not out.exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("made") / "data"
    assert run("prepare", "synthetic", *SMALL, "--seed", 3, "--out", out) == 0
    return manifest.read(out)


@pytest.fixture
def copy(made: Dataset, tmp_path: Path) -> Path:
    return shutil.copytree(made.root, tmp_path / "copy")


# The generator


def test_one_seed_gives_the_same_bytes_and_another_seed_others(made: Dataset, tmp_path: Path) -> None:
    assert run("prepare", "synthetic", *SMALL, "--seed", 3, "--out", tmp_path / "same") == 0
    assert run("prepare", "synthetic", *SMALL, "--seed", 4, "--out", tmp_path / "other") == 0
    same, other = files(tmp_path / "same"), files(tmp_path / "other")
    assert same == files(made.root)
    assert sorted(same) == sorted(
        ["manifest.json", *(f"{split}/{n:05d}.tar" for split in ("train", "test") for n in range(12))]
    )
    assert other.keys() == same.keys()
    assert not [name for name in same if same[name] == other[name]]


@pytest.mark.parametrize(("split", "count"), [("train", 203), ("test", 57)])
def test_every_sample_is_there_once_with_its_own_label_and_pixels(split: str, count: int, made: Dataset) -> None:
    source = Synthetic(203, 57, 8, 7, 3)
    sizes = [shard.samples for shard in made.split(split).shards]
    assert len(sizes) == 12
    assert max(sizes) - min(sizes) <= 1
    block = samples(made, split)
    assert sorted(block.ids.tolist()) == list(range(count))
    assert block.ids.tolist() != list(range(count)), "not shuffled"
    assert block.labels.tolist() == source.labels[split][block.ids].tolist()
    for image, index in zip(block.images, block.ids.tolist(), strict=True):
        assert np.array_equal(image, source.load(split, index))


def test_mean_and_std_are_those_of_the_training_images(made: Dataset) -> None:
    pixels = samples(made, "train").images.reshape(-1, 3) / 255
    np.testing.assert_allclose(made.manifest.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.manifest.std, pixels.std(0), rtol=1e-12)


def test_a_finished_folder_is_left_alone(copy: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]}
    assert run("prepare", "synthetic", *SMALL, "--seed", 3, "--out", copy) == 0
    assert "already prepared, not changed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]} == before


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (["--seed", 4], "seed: 3, now 4"),
        (["--seed", 3, "--samples", 204], "samples: 203, now 204"),
        (["--seed", 3, "--shards", 6], "shards: 12, now 6"),
        (["--seed", 3, "--limit", 10], "limit: None, now 10"),
    ],
)
def test_a_data_set_with_other_options_is_refused_and_untouched(
    change: list[Any], differs: str, copy: Path, capsys: Capture
) -> None:
    before = files(copy)
    assert run("prepare", "synthetic", *SMALL, *change, "--out", copy) == 78
    error = capsys.readouterr().err
    assert differs in error
    assert "choose another --out" in error
    assert files(copy) == before


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/thesis.txt").write_text("the only copy")
    before = files(tmp_path)
    assert run("prepare", "synthetic", *SMALL, "--out", tmp_path) == 78
    error = capsys.readouterr().err
    assert f"{tmp_path}: is neither empty nor a data set (it has 'train'); choose another --out" in error
    assert run("prepare", "synthetic", *SMALL, "--out", tmp_path / "train/thesis.txt") == 78
    assert "is a file; choose another --out" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_an_empty_folder_is_used_and_kept_when_there_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "mounted"
    out.mkdir()
    assert run("prepare", "folder", tmp_path / "nowhere", "--out", out) == 78
    assert f"{tmp_path / 'nowhere'}: no such folder or archive" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 0


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (["--lanes", 5, "--shards", 12], "--shards 12 is not a multiple of --lanes 5"),
        (["--lanes", 300], "300 shards for 203 training samples"),
        (["--shards", 204], "204 shards for 203 training samples"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(
    numbers: list[Any], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    error = refused(capsys, tmp_path / "out", "synthetic", "--samples", 203, "--test-samples", 9, *numbers)
    assert reason in error
    assert "choose" in error
    assert error.count("\n") == 1


# Interrupted


def start(out: Path) -> subprocess.Popen[bytes]:
    arguments = ["synthetic", "--samples", "4000", "--test-samples", "50", "--image-size", "16", "--shards", "80"]
    command = [sys.executable, "-m", "distrain", "prepare", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def stat(pid: int) -> list[str]:
    """State, parent, … start time of a process that is there and not just waiting to be reaped; else nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields[0] not in "ZX" else []


def children(parent: int) -> dict[int, str]:
    """Process id → start time: together they name a process for good."""
    fields_of = {int(path.name): stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {pid: fields[19] for pid, fields in fields_of.items() if fields and int(fields[1]) == parent}


def gone(processes: dict[int, str], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while any((stat(pid) or [""] * 20)[19] == born for pid, born in processes.items()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@linux
def test_killed_leaves_nothing_that_looks_finished_and_is_made_good_by_running_again(
    tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    process = start(out)
    try:
        wait_for(out / ".partial/attempt-0/train/00001.tar")
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stderr.close()
    assert workers
    assert not (out / "manifest.json").exists(), "killed too late to prove anything"
    assert run("verify", out) == 78
    assert "is not a data set (no manifest.json)" in capsys.readouterr().err
    assert gone(workers), "workers outlive the command"
    again = ["synthetic", "--samples", 4000, "--test-samples", 50, "--image-size", 16, "--shards", 80]
    assert run("prepare", *again, "--out", out) == 0
    assert run("prepare", *again, "--out", tmp_path / "undisturbed") == 0
    assert files(out) == files(tmp_path / "undisturbed")
    assert run("verify", out) == 0


@linux
def test_ctrl_c_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(out)
    try:
        wait_for(out / ".partial/attempt-0/train/00001.tar")
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode == 130
    assert not out.exists()
    assert workers
    assert gone(workers)
    assert b"stopped" in error
    assert b"Traceback" not in error


# People's own images

CLASSES = ["Ant", "bee", "cat"]
SUFFIXES = ["png", "jpg", "bmp", "gif", "webp"]
PER_CLASS = {"train": 10, "test": 5}


def colour(split: str, name: str, number: int) -> tuple[int, int, int]:
    """Each image of `images` has its own, far from all others."""
    return 20 + 20 * number, 30 + 90 * CLASSES.index(name), 60 if split == "train" else 180


def draw(path: Path, fill: Any, mode: str = "RGB", size: tuple[int, int] = (12, 12), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, fill)
    options = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(path.suffix, {}) | options
    image.save(path, **options)


def tree(top: Path, splits: dict[str, int] = PER_CLASS) -> Path:
    for split, count in splits.items():
        for name in reversed(CLASSES):
            for number in range(count):
                file = top / split / name / f"{number}.{SUFFIXES[number % len(SUFFIXES)]}"
                draw(file, colour(split, name, number))
    return top


def pack(archive: Path, folder: Path, mode: str, inside: str = ".") -> Path:
    with tarfile.open(archive, mode) as tar:
        tar.add(folder, inside)
    return archive


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def from_folder(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("folder") / "data"
    assert run("prepare", "folder", images, "--image-size", 8, "--lanes", 2, "--out", out) == 0
    return manifest.read(out)


def test_images_are_numbered_by_class_and_name_and_keep_label_and_colour(from_folder: Dataset) -> None:
    assert from_folder.manifest.classes == CLASSES
    assert from_folder.manifest.image_shape == [8, 8, 3]
    assert list(from_folder.manifest.splits) == ["train", "test"]
    for split, count in PER_CLASS.items():
        block = samples(from_folder, split)
        assert sorted(block.ids.tolist()) == list(range(3 * count))
        for image, label, index in zip(block.images, block.labels.tolist(), block.ids.tolist(), strict=True):
            assert label == index // count
            expected = colour(split, CLASSES[label], index % count)
            assert np.abs(image.astype(int) - expected).max() <= 4, (split, index)


@pytest.mark.parametrize(
    ("mode", "suffix", "inside"),
    [("w", "tar", "."), ("w:gz", "tar.gz", "."), ("w:gz", "tgz", "pictures"), ("w:xz", "tar.xz", ".")],
)
def test_archives_give_the_same_bytes_as_their_folder(
    mode: str, suffix: str, inside: str, images: Path, from_folder: Dataset, tmp_path: Path
) -> None:
    archive = pack(tmp_path / f"images.{suffix}", images, mode, inside)
    assert run("prepare", "folder", archive, "--image-size", 8, "--lanes", 2, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(from_folder.root)


@pytest.mark.parametrize("archived", [(), ("test",), ("train", "test")])
def test_splits_may_be_named_one_by_one(
    archived: tuple[str, ...], images: Path, from_folder: Dataset, tmp_path: Path
) -> None:
    paths = [
        pack(tmp_path / f"{split}.tar.gz", images / split, "w:gz", split) if split in archived else images / split
        for split in ("train", "test")
    ]
    assert run("prepare", "folder", *paths, "--image-size", 8, "--lanes", 2, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(from_folder.root)


def test_classes_alone_give_a_stratified_test_split(tmp_path: Path) -> None:
    pets = tree(tmp_path / "all", {"train": 10}) / "train"
    pets = pets.rename(tmp_path / "pets")
    out = tmp_path / "out"
    options = ["--test-fraction", 0.2, "--val-fraction", 0.25, "--lanes", 1]
    assert run("prepare", "folder", pets, *options, "--out", out) == 0
    dataset = manifest.read(out)
    assert dataset.manifest.classes == CLASSES
    blocks = {split: samples(dataset, split) for split in ("train", "val", "test")}
    # 20 % of 30 are 6, a quarter of the other 24 are 6.
    assert {split: dict(Counter(block.labels.tolist())) for split, block in blocks.items()} == {
        "train": {0: 6, 1: 6, 2: 6},
        "val": {0: 2, 1: 2, 2: 2},
        "test": {0: 2, 1: 2, 2: 2},
    }
    ids = np.concatenate([block.ids for block in blocks.values()])
    assert sorted(ids.tolist()) == list(range(30))
    for block in blocks.values():
        assert (block.labels == block.ids // 10).all()


def test_limit_takes_as_many_of_each_class_from_each_split(images: Path, tmp_path: Path) -> None:
    assert run("prepare", "folder", images, "--limit", 6, "--lanes", 1, "--out", tmp_path / "out") == 0
    for split in ("train", "test"):
        block = samples(manifest.read(tmp_path / "out"), split)
        assert Counter(block.labels.tolist()) == {0: 2, 1: 2, 2: 2}
        assert (block.labels == block.ids // PER_CLASS[split]).all()


def load(path: Path, tmp_path: Path, size: int = 12) -> np.ndarray:
    """The result of `prepare` for one image."""
    top = tmp_path / "one"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (top / split / name).mkdir(parents=True)
            shutil.copy(path, top / split / name)
    assert run("prepare", "folder", top, "--image-size", size, "--lanes", 1, "--out", tmp_path / "out") == 0
    return samples(manifest.read(tmp_path / "out"), "train").images[0]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (400, 200)], ids=["wide", "tall", "large"])
def test_images_are_resized_and_cropped_to_their_middle(size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.new("RGB", size, "red")
    middle = (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    image.paste((0, 255, 0), (*middle, middle[0] + min(size), middle[1] + min(size)))
    image.paste((0, 0, 255), (*middle, middle[0] + min(size) // 2, middle[1] + min(size)))
    image.save(tmp_path / "image.png")
    loaded = load(tmp_path / "image.png", tmp_path, 10)
    assert loaded.shape == (10, 10, 3)
    assert (loaded[1:9, 1:4] == (0, 0, 255)).all()
    assert (loaded[1:9, 6:9] == (0, 255, 0)).all()
    assert (loaded[..., 0] < 40).all(), "more of the image's sides than the filter can add"


@pytest.mark.parametrize(
    ("mode", "suffix", "fill", "expected"),
    [
        ("L", "png", 90, (90, 90, 90)),
        ("L", "jpg", 90, (90, 90, 90)),
        ("LA", "png", (90, 0), (255, 255, 255)),
        ("LA", "png", (90, 255), (90, 90, 90)),
        ("1", "png", 1, (255, 255, 255)),
        ("P", "gif", None, (200, 100, 50)),
        ("P", "png", None, (200, 100, 50)),
        ("RGBA", "png", (200, 100, 50, 51), (244, 224, 214)),
        ("RGBA", "webp", (200, 100, 50, 204), (211, 131, 91)),
        ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", "png", 90 * 257, (90, 90, 90)),
        ("I;16", "tif", 90 * 257, (90, 90, 90)),
    ],
)
def test_other_kinds_of_pixels_become_rgb(
    mode: str, suffix: str, fill: Any, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    if mode == "P":
        Image.new("RGB", (12, 12), expected).quantize(4).save(path)
    else:
        draw(path, fill, mode)
    with Image.open(path) as image:
        assert suffix == "gif" or image.mode == mode
    loaded = load(path, tmp_path)
    assert loaded.shape == (12, 12, 3)
    assert np.abs(loaded.astype(int) - expected).max() <= 3


def test_pixels_without_a_scale_are_refused_not_guessed(tmp_path: Path, capsys: Capture) -> None:
    draw(tree(tmp_path / "images") / "train/bee/depth.tif", 7.5, "F")
    error = refused(capsys, tmp_path / "out", "folder", tmp_path / "images")
    assert "train/bee/depth.tif" in error
    assert "8 bits" in error


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_the_orientation_of_the_camera_is_corrected(orientation: int, turn: int, tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.rot90(upright, -turn))
    image.save(tmp_path / "image.jpg", exif=exif, quality=95, subsampling=0)
    loaded = load(tmp_path / "image.jpg", tmp_path, 32)
    # A quarter turn clockwise corrects orientation 6; an anticlockwise one, 8.
    assert np.abs(loaded.astype(int) - np.rot90(np.rot90(upright, -turn), {0: 0, 2: 2, 3: -1, 1: 1}[turn])).max() <= 8


def test_a_constant_channel_can_be_normalized(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / f"images/train/{number % 2}/{number}.png", (number, 0, 70))
        draw(tmp_path / f"images/test/{number % 2}/{number}.png", (number, 0, 70))
    assert run("prepare", "folder", tmp_path / "images", "--lanes", 2, "--out", tmp_path / "out") == 0
    content = manifest.read(tmp_path / "out").manifest
    assert content.mean[1:] == [0, 70 / 255]
    assert content.std[1:] == [1, 1]
    assert content.std[0] == pytest.approx(np.arange(8).std() / 255)


@pytest.mark.parametrize("what", ["train/bee", "train", "train/bee/more"])
def test_a_linked_folder_is_refused_not_passed_over(what: str, tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    target = tree(tmp_path / "elsewhere") / "train/bee"
    shutil.rmtree(top / what, ignore_errors=True)
    (top / what).symlink_to(target)
    assert f"{top / what}: is a link, which is not followed" in refused(capsys, tmp_path / "out", "folder", top)


@linux
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "broken link", "linked device"])
def test_what_is_no_file_is_unreadable_and_never_waited_for(kind: str, tmp_path: Path, capsys: Capture) -> None:
    odd = tree(tmp_path / "images") / "train/bee/odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero" if kind == "linked device" else tmp_path / "nowhere")
    error = refused(capsys, tmp_path / "out", "folder", tmp_path / "images")
    assert "1 unreadable among the sources" in error
    assert f"{odd}: not a file" in error


def test_a_linked_image_is_read(tmp_path: Path, from_folder: Dataset) -> None:
    top = tree(tmp_path / "images")
    file = top / "train/bee/0.png"
    file.symlink_to(file.rename(tmp_path / "elsewhere.png"))
    assert run("prepare", "folder", top, "--image-size", 8, "--lanes", 2, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(from_folder.root)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("train/bee/link.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device; refused"),
        (member("train/bee", tarfile.SYMTYPE, "/etc"), "is a link or a device; refused"),
        (member("train/bee/link.png", tarfile.LNKTYPE, "train/bee/0.png"), "is a link or a device; refused"),
        (member("train/bee/null.png", tarfile.CHRTYPE), "is a link or a device; refused"),
        (member("train/bee/disk.png", tarfile.BLKTYPE), "is a link or a device; refused"),
        (member("train/bee/fifo.png", tarfile.FIFOTYPE), "is a link or a device; refused"),
        (member("../bee.png"), "points outside the archive; refused"),
        (member("train/bee/../../../bee.png"), "points outside the archive; refused"),
        (member("/train/bee/bee.png"), "points outside the archive; refused"),
        (member("train/.."), "points outside the archive; refused"),
    ],
    ids=lambda value: value.name.replace("/", "_") + value.type.decode() if isinstance(value, tarfile.TarInfo) else "",
)
def test_members_that_no_image_needs_are_refused(
    bad: tarfile.TarInfo, reason: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    archive = pack(tmp_path / "images.tar", images, "w")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(bad)
    error = refused(capsys, tmp_path / "out", "folder", archive)
    assert f"{archive}: {bad.name}: {reason}" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.tar"]


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


@pytest.mark.parametrize(
    ("mode", "damage"),
    [
        ("w:gz", lambda path: cut(path, path.stat().st_size // 2)),
        ("w:gz", lambda path: cut(path, path.stat().st_size - 4)),
        ("w:xz", lambda path: cut(path, path.stat().st_size // 2)),
        ("w", lambda path: cut(path, headers(path)[40] + 700)),
        ("w", lambda path: cut(path, headers(path)[40] + 100)),
        ("w", lambda path: cut(path, headers(path)[40])),
        ("w", lambda path: damage(path, headers(path)[40])),
        ("w:gz", lambda path: damage(path, path.stat().st_size - 6)),
        ("w:gz", lambda path: damage(path, path.stat().st_size // 2)),
        ("w:xz", lambda path: damage(path, path.stat().st_size // 2)),
        ("w", lambda path: cut(path, 0)),
        ("w", lambda path: path.write_text("no archive" * 1000)),
    ],
    ids=[
        "gz cut",
        "gz cut at the end",
        "xz cut",
        "cut in a file",
        "cut in a header",
        "cut between files",
        "damaged header",
        "gz checksum",
        "gz damaged",
        "xz damaged",
        "empty",
        "text",
    ],
)
def test_a_damaged_archive_is_refused_never_read_in_part(
    mode: str, damage: Callable[[Path], Any], images: Path, tmp_path: Path, capsys: Capture
) -> None:
    archive = pack(tmp_path / "images.tar", images, mode)
    damage(archive)
    error = refused(capsys, tmp_path / "out", "folder", archive)
    assert f"{archive}: is damaged or truncated" in error
    assert "copy or download it again" in error
    assert error.count("error: ") == 1


def damage(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


BAD: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("Thumbs"),
    "cut": lambda path: (draw(path, "red", size=(99, 99)), cut(path, path.stat().st_size // 2)),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_image_is_named_or_dropped(kind: str, tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    BAD[kind](top / "train/bee/33.png")
    error = refused(capsys, tmp_path / "out", "folder", top)
    assert "1 unreadable among the sources, 0 allowed" in error
    assert f"{top}/train/bee/33.png: " in error
    assert "0x" not in error, "an address is no reason"
    assert "drop them with --skip-bad 1" in error
    assert run("prepare", "folder", top, "--skip-bad", 1, "--lanes", 1, "--out", tmp_path / "out") == 0
    out, error = capsys.readouterr()
    assert "1 unreadable dropped" in out
    assert f"warning: 1 unreadable dropped:\n  {top}/train/bee/33.png: " in error
    dataset = manifest.read(tmp_path / "out")
    assert dataset.manifest.source["skipped"] == 1
    # Train is ant 0 … 9, then bee 0, 1, 2, 3, 33, 4, …: the bad one is number 14.
    assert sorted(samples(dataset, "train").ids.tolist()) == [i for i in range(31) if i != 14]
    assert sorted(samples(dataset, "test").ids.tolist()) == list(range(15))


def test_all_unreadable_images_count_whichever_split_they_are_in(tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    for name in ("train/bee/x.png", "train/cat/y.jpg", "test/Ant/z.gif"):
        BAD["text"](top / name)
    error = refused(capsys, tmp_path / "out", "folder", top, "--skip-bad", 2)
    assert "3 unreadable among the sources, 2 allowed" in error
    for name in ("train/bee/x.png", "train/cat/y.jpg", "test/Ant/z.gif"):
        assert f"{top}/{name}: " in error
    assert run("prepare", "folder", top, "--skip-bad", 3, "--lanes", 1, "--out", tmp_path / "out") == 0


def test_the_suggested_cure_works_with_a_limit_too(tmp_path: Path, capsys: Capture) -> None:
    # The image that replaces an unreadable one may be unreadable too, which shows in the next attempt.
    top = tree(tmp_path / "images", {"train": 4, "test": 2})
    for file in sorted((top / "train").rglob("*.*")):
        if int(file.stem) >= 2:
            BAD["text"](file)
    suggested = 0
    while run("prepare", "folder", top, "--limit", 3, "--lanes", 1, "--skip-bad", suggested, "--out", tmp_path / "out"):
        before, suggested = suggested, int(capsys.readouterr().err.rpartition("--skip-bad ")[2])
        assert suggested > before
    dataset = manifest.read(tmp_path / "out")
    assert dataset.manifest.source["skipped"] == suggested
    assert all(index % 4 < 2 for index in samples(dataset, "train").ids)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_an_image_is_named(split: str, tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    shutil.rmtree(top / split / "bee")
    for source in (top, pack(tmp_path / "images.tar", top, "w")):
        error = refused(capsys, tmp_path / "out", "folder", source)
        assert f"class 'bee' has no image in {split}/" in error
    (top / split / "bee").mkdir()
    error = refused(capsys, tmp_path / "out", "folder", top)
    assert f"class 'bee' has no image in {split}/; add some or delete the folder" in error


def test_an_empty_class_folder_is_named(tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    for split in ("train", "test"):
        (top / split / "dog").mkdir()
    assert "class 'dog' has no image in train/" in refused(capsys, tmp_path / "out", "folder", top)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("train/stray.png", "is not in a class folder; move or delete it"),
        ("extra/bee/stray.png", "is not in train/, val/ or test/; move or delete it"),
    ],
)
def test_a_stray_image_is_named(path: str, reason: str, tmp_path: Path, capsys: Capture) -> None:
    draw(tree(tmp_path / "images") / path, "red")
    assert f"{tmp_path}/images/{path}: {reason}" in refused(capsys, tmp_path / "out", "folder", tmp_path / "images")


def test_hidden_files_are_passed_over(tmp_path: Path, from_folder: Dataset) -> None:
    top = tree(tmp_path / "images")
    for name in (".DS_Store", "train/bee/._0.png", "train/.cache/x/0.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text("no image")
    assert run("prepare", "folder", top, "--image-size", 8, "--lanes", 2, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == files(from_folder.root)


@pytest.mark.parametrize("empty", ["nothing", "loose files", "test only"])
def test_folders_without_what_is_needed_are_refused(empty: str, tmp_path: Path, capsys: Capture) -> None:
    top = tmp_path / "images"
    top.mkdir()
    if empty == "loose files":
        draw(top / "1.png", "red")
    if empty == "test only":
        tree(top, {"test": 2})
    error = refused(capsys, tmp_path / "out", "folder", top)
    assert ("has test but no train/" if empty == "test only" else "no class folders; put images into") in error


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_one_class_alone_is_refused(source: str, tmp_path: Path, capsys: Capture) -> None:
    # An archive of classes that lie in one folder looks like this: pictures/ant/1.png, pictures/bee/1.png.
    pets = tree(tmp_path / "all", {"train": 3}) / "train"
    path = pets.rename(tmp_path / "pets").parent / "pets"
    if source == "archive":
        path = pack(tmp_path / "pets.tar", path, "w", "pets")
    else:
        path = path.rename(tmp_path / "top")
        (tmp_path / "outer").mkdir()
        path = path.rename(tmp_path / "outer/pets").parent
    assert "has only one class, 'pets'" in refused(capsys, tmp_path / "out", "folder", path)


@linux
@pytest.mark.parametrize("limit", [300, 200], ids=["warning", "error"])  # Pillow's, beyond its limit and its double
def test_an_image_with_more_pixels_than_allowed_is_refused(limit: int, tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    draw(top / "train/bee/bomb.png", "red", size=(24, 24))
    error = refused(capsys, tmp_path / "out", "folder", top, "--max-pixels", limit)
    assert "1 unreadable among the sources" in error
    assert f"bomb.png: has 576 pixels, more than --max-pixels {limit}" in error
    assert run("prepare", "folder", top, "--max-pixels", 576, "--lanes", 1, "--out", tmp_path / "out") == 0


def test_fractions_that_leave_nothing_are_refused(tmp_path: Path, capsys: Capture) -> None:
    pets = (tree(tmp_path / "all", {"train": 1}) / "train").rename(tmp_path / "pets")
    assert "no samples are left for test" in refused(capsys, tmp_path / "out", "folder", pets)
    options = ["--test-fraction", 0.9]
    assert "no training samples are left" in refused(capsys, tmp_path / "out", "folder", pets, *options)


def test_classes_that_a_drawn_split_lacks_are_named_with_the_cure(tmp_path: Path, capsys: Capture) -> None:
    pets = (tree(tmp_path / "all", {"train": 2}) / "train").rename(tmp_path / "pets")
    error = refused(capsys, tmp_path / "out", "folder", pets, "--test-fraction", 0.5, "--limit", 2)
    assert re.search(r"train has no image of 1 class \(\w+\); use more images or a smaller --test-fraction or a", error)
    error = refused(capsys, tmp_path / "out", "folder", pets, "--test-fraction", 0.7)
    assert re.search(r"train has no image of 1 class \(\w+\); use more images or a smaller --test-fraction\n", error)
    assert run("prepare", "folder", pets, "--test-fraction", 0.2, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert re.search(r"test has no image of 2 classes \(\w+, \w+\), which are not scored there; use more", error)
    assert error.rstrip().endswith("a larger --test-fraction")


# The user's own class

USER_MODULE = """\
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from distrain.preparation.sources import UnreadableError


class Dots:
    classes = ["dark", "light"]
    image_shape = (4, 6, 1)

    def __init__(self, samples="40", fault="", api_key=""):
        self.labels = {"train": np.arange(int(samples)) % 2, "test": np.arange(10) % 2}
        self.fault = fault

    def name(self, split, index):
        return f"{split} dot {index}"

    def load(self, split, index):
        if self.fault == "counts":
            with open("loads.txt", "a") as file:
                file.write(f"{split}-{index} ")
        if (split, index) == ("train", 7):
            if self.fault == "counts":
                raise UnreadableError("smudged")
            if self.fault == "writes":
                target = Path(Path("appears.txt").read_text())
                target.parent.mkdir(exist_ok=True)
                target.write_text("mine")
            if self.fault.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.fault))
            if self.fault == "leaves":
                os._exit(0)
            if self.fault == "memory":
                raise MemoryError
            if self.fault == "unreadable":
                raise UnreadableError("smudged")
            if self.fault == "raises":
                return json.loads("{")
            if self.fault == "exits":
                sys.exit(0)
            if self.fault == "shape":
                return np.zeros((4, 6), np.uint8)
            if self.fault == "dtype":
                return np.zeros((4, 6, 1))
            if self.fault == "kind":
                return None
        return np.full((4, 6, 1), 100 * self.labels[split][index] + index, np.uint8)


def tuples(**attributes):
    source = Dots()
    vars(source).update(attributes)
    return source


def no_train():
    return tuples(labels={"test": np.arange(10) % 2, "valid": np.arange(3)})


def no_integers():
    return tuples(labels={"train": np.arange(40.0), "test": np.zeros((10, 2), int)})


def no_mapping():
    return tuples(labels=np.arange(40))


def no_names():
    return tuples(classes=("dark", "light"))


def no_shape():
    return tuples(image_shape=(4, 6))


def twice():
    return tuples(classes=["dark", "dark"])


def nothing():
    return object()


def not_picklable():
    return tuples(file=Path(__file__).open())


def too_high():
    return tuples(labels={"train": np.arange(40) % 3, "test": np.where(np.arange(10) == 5, -1, 0)})


def huge():
    return tuples(image_shape=(1000000, 1000000, 1))


def leaves():
    sys.exit("not a script")


class Raises:
    def __init__(self):
        self.file = Path("nowhere.csv").open()


class Careless(Dots):
    def name(self, split, index):
        return self.nothing
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's module, where commands are run."""
    (tmp_path / "dots_for_test.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "dots_for_test", raising=False)  # another test's
    return tmp_path


def line_of(text: str) -> int:
    return USER_MODULE[: USER_MODULE.index(text)].count("\n") + 1


def test_a_class_of_the_users_own_is_a_source(user_folder: Path, capsys: Capture) -> None:
    arguments = ["prepare", "source", "dots_for_test:Dots", "--lanes", "3", "--out", "out"]
    installed = Path(sys.executable).with_name("distrain")
    subprocess.run([installed, *arguments, "samples=60"], timeout=120, check=True)
    dataset = manifest.read(user_folder / "out")
    content = dataset.manifest
    assert (content.classes, content.image_shape) == (["dark", "light"], [4, 6, 1])
    assert content.source["kind"] == "source"
    assert content.source["class"] == "dots_for_test:Dots"
    assert content.source["arguments"] == {"samples": "60"}
    for split, count in (("train", 60), ("test", 10)):
        block = samples(dataset, split)
        assert sorted(block.ids.tolist()) == list(range(count))
        assert (block.labels == block.ids % 2).all()
        assert (block.images == (100 * (block.ids % 2) + block.ids)[:, None, None, None]).all()
    assert run("verify", user_folder / "out") == 0
    assert run(*arguments, "samples=60") == 0
    assert "not changed" in capsys.readouterr().out
    assert run(*arguments, "samples=80") == 78
    assert "arguments: {'samples': '60'}, now {'samples': '80'}" in capsys.readouterr().err


def test_an_unreadable_sample_of_the_users_class_is_named_or_dropped(user_folder: Path, capsys: Capture) -> None:
    arguments = ["source", "dots_for_test:Dots", "fault=unreadable"]
    error = refused(capsys, user_folder / "out", *arguments)
    assert "1 unreadable among the sources, 0 allowed:\n  train dot 7: smudged\n" in error
    assert run("prepare", *arguments, "--skip-bad", 1, "--out", user_folder / "out") == 0
    assert sorted(samples(manifest.read(user_folder / "out"), "train").ids.tolist()) == [i for i in range(40) if i != 7]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "load() raises JSONDecodeError: Expecting property name enclosed in double quotes"),
        ("exits", "load() raises SystemExit: 0"),
        ("shape", "load() returns uint8 [4, 6], should return uint8 [4, 6, 1]"),
        ("dtype", "load() returns float64 [4, 6, 1], should return uint8 [4, 6, 1]"),
        ("kind", "load() returns NoneType, should return uint8 [4, 6, 1]"),
    ],
)
def test_an_error_in_a_worker_is_one_line_with_the_sample(
    fault: str, reason: str, user_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(capfd, user_folder / "out", "source", "dots_for_test:Dots", f"fault={fault}")
    (message,) = [line for line in error.splitlines() if line.startswith("distrain")]
    assert message.startswith(f"distrain: error: prepare source dots_for_test:Dots: train dot 7: {reason}")
    assert "Traceback" not in error
    if fault == "raises":
        assert message.endswith(f"({user_folder}/dots_for_test.py:{line_of('json.loads')})")


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        (
            "no_train",
            ["labels: has no split 'train'", "labels: has a split 'valid', should have only train, val and test"],
        ),
        (
            "no_integers",
            [
                "labels['train']: should be numbers of classes, int64 [N], are float64 [40]",
                "labels['test']: should be numbers of classes, int64 [N], are int64 [10, 2]",
            ],
        ),
        ("no_mapping", ["labels: should map each split to its samples' labels, is array("]),
        ("no_names", ["classes: should be a list of names (str), is ('dark', 'light')"]),
        ("no_shape", ["image_shape: should be (height, width, channels), is (4, 6)"]),
        ("twice", ["classes: 'dark' is listed twice"]),
        ("nothing", ["has no classes, image_shape, labels, name, load"]),
        ("not_picklable", ["cannot be sent to worker processes (TypeError: ", "open files in load(), not before"]),
        ("too_high", ["labels should be 0 … 1", "train dot 2: label 2; 12 more in train", "test dot 5: label -1\n"]),
        ("leaves", ["SystemExit: not a script"]),
        ("Missing", ["AttributeError: module 'dots_for_test' has no attribute 'Missing'"]),
        ("", ["should be package.module:Class"]),
    ],
)
def test_all_problems_of_a_class_are_reported(
    name: str, messages: list[str], user_folder: Path, capsys: Capture
) -> None:
    error = refused(capsys, user_folder / "out", "source", f"dots_for_test:{name}")
    assert "Traceback" not in error
    for text in messages:
        assert text in error


def test_the_line_in_the_users_code_is_reported(user_folder: Path, capsys: Capture) -> None:
    error = refused(capsys, user_folder / "out", "source", "dots_for_test:Raises")
    location = f"({user_folder}/dots_for_test.py:{line_of('nowhere.csv')})"
    assert error.endswith(f"FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.csv' {location}\n")
    error = refused(capsys, user_folder / "out", "source", "dots_for_test:Dots", "sample=3")
    assert "unexpected keyword argument 'sample'" in error
    error = refused(capsys, user_folder / "out", "source", "dots_for_test:Careless", "fault=raises")
    assert "train sample 7 (its name() raises AttributeError: 'Careless' object has no attribute 'nothing'" in error


def test_arguments_that_are_not_pairs_are_reported_and_secrets_are_not_recorded(
    user_folder: Path, capsys: Capture
) -> None:
    for arguments, message in [(["samples"], "samples: should be key=value"), (["a=1", "a=2"], "a is given twice")]:
        assert message in refused(capsys, user_folder / "out", "source", "dots_for_test:Dots", *arguments)
    assert run("prepare", "source", "dots_for_test:Dots", "fault=https://me:secret@host/x?k=y", "--out", "out") == 0
    assert manifest.read("out").manifest.source["arguments"] == {"fault": "https://host/x"}
    assert run("prepare", "source", "dots_for_test:Dots", "api_key=hush", "--out", "keyed") == 0
    assert manifest.read("keyed").manifest.source["arguments"] == {"api_key": "hidden"}
    assert not [path for path in Path("keyed").rglob("*.json") if "hush" in path.read_text()]


def test_the_error_for_a_path_instead_of_a_source_has_the_command(tmp_path: Path, capsys: Capture) -> None:
    error = refused(capsys, tmp_path / "out", tmp_path)
    assert f"{tmp_path} is a path: distrain prepare folder {tmp_path} --out" in error


# CIFAR-10


def test_cifar10_without_files_and_network_says_so_in_one_line(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    root, out = tmp_path / "root", tmp_path / "out"
    command = [sys.executable, "-m", "distrain", "prepare", "cifar10", "--root", str(root), "--out", str(out)]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 78, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line]
    assert message.startswith(f"distrain: error: CIFAR-10 is not in {root} and cannot be downloaded")
    assert "cifar-10-python.tar.gz" in message
    assert "--root" in message
    assert not out.exists()
    assert files(tmp_path) == {}


# verify


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    text = json.loads((folder / manifest.NAME).read_text())
    change(text)
    (folder / manifest.NAME).write_text(json.dumps(text))


def repeat_an_id(folder: Path) -> None:
    """The last shard of train repeats an id of the first, with digests that fit."""
    dataset = manifest.read(folder)
    entries = dataset.split("train").shards
    first, last = (
        shards.read(folder, entry, dataset.manifest.image_shape, 7)[0] for entry in (entries[0], entries[-1])
    )
    ids = last.ids.copy()
    ids[0] = first.ids[0]
    shards.write(folder / entries[-1].name, Block(last.images, last.labels, ids))
    entry = shards.describe(folder / entries[-1].name, entries[-1].name, entries[-1].samples).model_dump()
    edit(folder, lambda text: text["splits"]["train"]["shards"].__setitem__(-1, entry))


def test_verify_passes_what_is_as_written(made: Dataset, capsys: Capture) -> None:
    before = files(made.root)
    assert run("verify", made.root) == 0
    assert "all as written" in capsys.readouterr().out
    assert files(made.root) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "train/00003.tar").unlink(), "train/00003.tar: No such file"),
        (lambda folder: damage(folder / "test/00002.tar", 3000), "test/00002.tar: changed since it was prepared"),
        (lambda folder: cut(folder / "train/00011.tar", 512), "train/00011.tar: 512 bytes instead of"),
        (
            lambda folder: edit(folder, lambda t: t["splits"]["test"]["shards"][4].update(sha256="0" * 64)),
            "test/00004.tar: changed since it was prepared (its sha256 differs)",
        ),
        (
            lambda folder: edit(folder, lambda t: t["splits"]["test"]["shards"][4].update(xxh3_128="0" * 32)),
            "test/00004.tar: changed since it was prepared (its xxh3_128 differs)",
        ),
        (lambda folder: edit(folder, lambda t: t.update(classes=t["classes"][:-1])), "the data set has 6 classes"),
        (lambda folder: edit(folder, lambda t: t.update(image_shape=[8, 4, 3])), "expected uint8 [N, 8, 4, 3]"),
        (repeat_an_id, "occurs 2 times"),
    ],
    ids=["missing", "flipped", "cut", "sha256", "xxh3", "labels", "shape", "repeated id"],
)
def test_verify_names_what_is_wrong(change: Callable[[Path], Any], named: str, copy: Path, capsys: Capture) -> None:
    change(copy)
    assert run("verify", copy) == 78
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_verify_names_the_repeated_id_and_its_split(copy: Path, capsys: Capture) -> None:
    dataset = manifest.read(copy)
    first = shards.read(copy, dataset.split("train").shards[0], [8, 8, 3], 7)[0].ids[0]
    repeat_an_id(copy)
    assert run("verify", copy) == 78
    assert f"{copy}/train: id {first} occurs 2 times" in capsys.readouterr().err


def test_verify_names_all_that_is_wrong_at_once(copy: Path, capsys: Capture) -> None:
    (copy / "train/00000.tar").unlink()
    damage(copy / "test/00011.tar", 5000)
    cut(copy / "train/00005.tar", 1000)
    assert run("verify", copy) == 78
    error = capsys.readouterr().err
    assert "3 found wrong" in error
    for name in ("train/00000.tar", "train/00005.tar", "test/00011.tar"):
        assert name in error


# Arithmetic


@given(
    samples=st.integers(1, 10**7),
    sample_bytes=st.integers(1, 10**6),
    num_shards=st.none() | st.integers(1, 5000),
    lanes=st.none() | st.integers(1, 500),
)
def test_layouts_fit_or_say_why(samples: int, sample_bytes: int, num_shards: int | None, lanes: int | None) -> None:
    try:
        actual_shards, actual_lanes = layout(samples, sample_bytes, num_shards, lanes)
    except ConfigError:
        assert (num_shards or lanes or 0) > samples or (num_shards and lanes and num_shards % lanes)
        return
    assert actual_shards % actual_lanes == 0
    assert 1 <= actual_lanes <= actual_shards <= samples
    assert num_shards in (None, actual_shards)
    assert lanes in (None, actual_lanes)
    if num_shards is None and lanes is None:
        assert actual_lanes <= min(DEFAULT_LANES, samples)
        assert samples % actual_shards <= 0.03 * samples, "an epoch drops too many samples"
        assert actual_lanes >= min(8, samples)
    if num_shards is None:
        # The largest shard has 32 MiB and one sample, or there are nearly as many shards as samples.
        assert (samples // actual_shards) * sample_bytes <= SHARD_BYTES or actual_shards > samples - actual_lanes
    elif lanes is None:
        assert not [n for n in range(actual_lanes + 1, DEFAULT_LANES + 1) if actual_shards % n == 0]


SKEWED = np.repeat(np.arange(100), [1000] + [1] * 99)
labels_of = st.lists(st.integers(0, 40), min_size=1, max_size=8).map(lambda n: np.repeat(np.arange(len(n)), n))


@settings(deadline=None)
@given(labels=labels_of, fraction=st.floats(0, 1), seed=st.integers(0, 99))
@example(labels=SKEWED, fraction=0.1, seed=0)
@example(labels=np.array([], np.int64), fraction=0.0, seed=0)
def test_each_class_is_drawn_in_proportion(labels: np.ndarray, fraction: float, seed: int) -> None:
    count = round(fraction * len(labels))
    taken = stratified(labels, count, seed, 0)
    assert len(set(taken.tolist())) == len(taken) == count
    assert taken.tolist() == stratified(labels, count, seed, 0).tolist()
    sizes = np.bincount(labels)
    exact = count * sizes / max(1, len(labels))
    counts = np.bincount(labels[taken], minlength=len(sizes))
    assert (np.abs(counts - exact) < 1).all()
    remainder = count * sizes % max(1, len(labels))
    up = counts * len(labels) > count * sizes
    down = (remainder > 0) & ~up
    assert not up.any() or not down.any() or remainder[up].min() >= remainder[down].max(), "a smaller one rounded up"


def test_the_draw_depends_on_the_seed_and_every_sample_is_equally_likely() -> None:
    labels = np.repeat(np.arange(10), 10)
    drawn = Counter(index for seed in range(200) for index in stratified(labels, 5, seed, 0).tolist())
    # Each of 100 samples is drawn with probability 1/20: 10 times of 200, give or take 3.1.
    assert len(drawn) == 100
    assert max(drawn.values()) < 30


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    with_test=st.booleans(),
    test_fraction=st.floats(0, 0.5),
    val_fraction=st.floats(0, 0.5),
    limit=st.none() | st.integers(1, 60),
    seed=st.integers(0, 99),
    bad=st.sets(st.integers(0, 5), max_size=2),
)
def test_splits_are_disjoint_and_lose_nothing(
    sizes: list[int],
    with_test: bool,
    test_fraction: float,
    val_fraction: float,
    limit: int | None,
    seed: int,
    bad: set[int],
) -> None:
    train = np.repeat(np.arange(len(sizes)), sizes)
    bad = {index for index in bad if index < len(train)}
    labels = {"train": train} | ({"test": np.arange(7) % len(sizes)} if with_test else {})
    options = Options(seed=seed, limit=limit, val_fraction=val_fraction, test_fraction=test_fraction)
    chosen = choose(labels, {"train": bad}, options)
    assert {part.source_split for part in chosen.values()} <= labels.keys()
    if with_test:
        ids_of_test = sorted(chosen["test"].ids.tolist())
        if limit is None:
            assert ids_of_test == list(range(7))
        else:
            assert len(set(ids_of_test)) == min(limit, 7)
    drawn = [part.ids for part in chosen.values() if part.source_split == "train"]
    ids = np.concatenate(drawn).tolist()
    assert len(set(ids)) == len(ids), "a sample in two splits"
    assert not set(ids) & bad
    if limit is None:
        assert len(ids) == len(train) - len(bad)
        left = len(ids)
        if not with_test and test_fraction > 0:
            assert len(chosen["test"].ids) == round(test_fraction * left)
            left -= len(chosen["test"].ids)
        if val_fraction > 0:
            assert len(chosen["val"].ids) == round(val_fraction * left)
    else:
        assert all(len(part.ids) <= limit for part in chosen.values())


def test_the_order_of_a_split_depends_on_the_seed() -> None:
    labels = {"train": np.arange(50) % 5}
    orders = [choose(labels, {}, Options(seed=seed, test_fraction=0.0))["train"].ids.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(50))


@pytest.mark.parametrize("name", [b"caf\xe9", b"line\nbreak"])
def test_names_that_cannot_be_written_down_are_reported_first(name: bytes, tmp_path: Path) -> None:
    for folder in (name, b"plain"):
        os.makedirs(os.path.join(os.fsencode(tmp_path / "photos"), folder))
        with open(os.path.join(os.fsencode(tmp_path / "photos"), folder, b"1.png"), "wb") as file:
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")
    with pytest.raises(DataError, match="rename it"):
        Folder([tmp_path / "photos"], 8, tmp_path)


# One owner of OUT, who removes only what it wrote


def test_a_folder_that_another_process_fills_is_left_to_it(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    owner = OutputFolder(out)
    (owner.work / "attempt-0").mkdir()
    (owner.work / "attempt-0/00000.tar").write_text("half")
    before = files(out)
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 75
    error = capsys.readouterr().err
    assert f"{out}: process {os.getpid()} on {socket.gethostname()} is preparing a data set there" in error
    assert "run this again" in error
    assert files(out) == before
    owner.discard()
    assert not out.exists()
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 0


@linux
def test_of_two_at_once_one_makes_the_data_set_and_the_other_removes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(out)
    try:
        wait_for(out / ".partial/attempt-0/train/00001.tar")
        again = ["synthetic", "--samples", 4000, "--test-samples", 50, "--image-size", 16, "--shards", 80]
        process.send_signal(signal.SIGSTOP)
        assert run("prepare", *again, "--out", out) == 75
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()
    assert run("verify", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "test", "train"]


def killed_owner(out: Path) -> OutputFolder:
    """An owner whose process is gone: the kernel has closed its files, so the lock is free."""
    owner = OutputFolder(out)
    os.close(owner._lock)
    return owner


def test_what_a_killed_one_had_moved_already_is_removed_and_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    owner = killed_owner(out)
    for split in ("train", "val"):
        (owner.work / "attempt-0" / split).mkdir(parents=True)
        (owner.work / "attempt-0" / split / "00000.tar").write_text("whole")
    inodes = {split: (owner.work / "attempt-0" / split).stat().st_ino for split in ("train", "val")}
    (owner.work / "moved.json").write_text(json.dumps(inodes))
    (owner.work / "attempt-0/train").rename(out / "train")
    (out / "val").mkdir()  # the user's
    (out / "val/thesis.txt").write_text("the only copy")
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 78
    assert "is neither empty nor a data set (it has 'val')" in capsys.readouterr().err
    assert files(out) == {"val/thesis.txt": b"the only copy"}
    shutil.rmtree(out / "val")
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "test", "train"]


def test_files_of_the_user_are_kept_whatever_happens_to_the_data_set(user_folder: Path, capsys: Capture) -> None:
    for out, appears in (("a", "notes.txt"), ("b", "train/thesis.txt")):
        (user_folder / "appears.txt").write_text(f"{out}/{appears}")
        finished = run("prepare", "source", "dots_for_test:Dots", "fault=writes", "--out", out) == 0
        assert finished == (out == "a")
        assert files(user_folder / out)[appears] == b"mine"
        if not finished:
            assert not (user_folder / out / "manifest.json").exists()
    (user_folder / "foreign/.partial").mkdir(parents=True)
    (user_folder / "foreign/.partial/thesis.txt").write_text("mine")
    assert run("prepare", "source", "dots_for_test:Dots", "--out", "foreign") == 78
    assert files(user_folder / "foreign") == {".partial/thesis.txt": b"mine"}
    (user_folder / "foreign/.partial/owner").write_text("mine")
    (user_folder / "linked").mkdir()
    (user_folder / "linked/.partial").symlink_to("../foreign/.partial")
    assert run("prepare", "source", "dots_for_test:Dots", "--out", "linked") == 78
    assert files(user_folder / "foreign") == {".partial/thesis.txt": b"mine", ".partial/owner": b"mine"}


@pytest.mark.parametrize("out", ["new/below/out", "https://host/set", "s3://bucket/set"])
def test_a_command_that_fails_leaves_no_folder(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("prepare", "folder", "missing", "--out", out) == 78
    assert run("prepare", "synthetic", *SMALL, "--shards", 7, "--out", out) == 78
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_leftover_is_named_and_never_taken(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on some network file systems
    out = tmp_path / "out"
    assert run("prepare", "synthetic", *SMALL, "--out", tmp_path / "first") == 0
    owner = killed_owner(out)
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 78
    error = capsys.readouterr().err
    assert f"process {os.getpid()} on {socket.gethostname()} is preparing a data set there, or was killed" in error
    assert f"delete {owner.work} if it is not running any more" in error
    shutil.rmtree(owner.work)
    assert run("prepare", "synthetic", *SMALL, "--out", out) == 0


# Workers that die, disks that are full


@linux
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("SIGKILL", 75, "a worker process was killed by SIGKILL while it read train dot 7; nothing was kept"),
        ("SIGTERM", 75, "a worker process was killed by SIGTERM"),
        ("SIGSEGV", 1, "error: a worker process crashed (SIGSEGV) while it read train dot 7; nothing was kept"),
        ("leaves", 1, "error: a worker process crashed (exit code 0) while it read train dot 7; nothing was kept"),
        ("memory", 75, "train dot 7: there is not enough memory to decode it; nothing was kept"),
    ],
)
def test_a_worker_that_dies_is_one_message_and_leaves_nothing(
    fault: str, code: int, message: str, user_folder: Path, capsys: Capture
) -> None:
    assert run("prepare", "source", "dots_for_test:Dots", f"fault={fault}", "--out", "out") == code
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("distrain: ")]
    assert message in line
    assert "Traceback" not in error
    assert not (user_folder / "out").exists()


def test_a_data_set_that_does_not_fit_on_the_disk_is_refused_before_any_work(
    user_folder: Path, capsys: Capture
) -> None:
    error = refused(capsys, user_folder / "out", "source", "dots_for_test:huge")
    free = shutil.disk_usage(user_folder).free
    needed, available = (float(text.replace(",", "")) for text in re.findall(r"([\d,.]+) MiB", error))
    assert needed == pytest.approx(1.02 * 50 * 10**12 / 2**20, rel=0.01)
    assert available == pytest.approx(free / 2**20, rel=0.2)
    assert "choose another --out" in error


@linux
def test_a_disk_that_becomes_full_is_one_message_and_leaves_nothing(user_folder: Path, capsys: Capture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # a shard has more, the files of Python have not
    try:
        code = run("prepare", "synthetic", "--samples", 900, "--test-samples", 9, "--lanes", 2, "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 78
    assert "distrain: error: out: File too large; nothing was kept in out\n" in capsys.readouterr().err
    assert not (user_folder / "out").exists()


# Unreadable samples cost little


def test_readable_samples_are_decoded_once_even_if_others_are_dropped(user_folder: Path) -> None:
    assert run("prepare", "source", "dots_for_test:Dots", "fault=counts", "--skip-bad", 1, "--out", "out") == 0
    loads = Counter((user_folder / "loads.txt").read_text().split())
    assert len(loads) == 50
    assert set(loads.values()) == {1}
    for split in ("train", "test"):
        block = samples(manifest.read("out"), split)
        assert sorted(block.ids.tolist()) == [
            n for n in range(40 if split == "train" else 10) if (split, n) != ("train", 7)
        ]
        assert (block.images == (100 * (block.ids % 2) + block.ids)[:, None, None, None]).all()
    (user_folder / "loads.txt").unlink()
    limited = ["--skip-bad", 1, "--limit", 30]
    assert run("prepare", "source", "dots_for_test:Dots", "fault=counts", *limited, "--out", "limited") == 0
    assert len(samples(manifest.read("limited"), "train").ids) == 30
    assert set(Counter((user_folder / "loads.txt").read_text().split()).values()) == {1}


# Options without effect, and other images for a finished data set


def test_a_fraction_of_a_split_that_the_source_has_is_refused(images: Path, tmp_path: Path, capsys: Capture) -> None:
    error = refused(capsys, tmp_path / "out", "folder", images, "--test-fraction", 0.1)
    assert "--test-fraction 0.1 has no effect, as the source has a test split of 15; leave the option out" in error
    draw(tree(tmp_path / "more", {"train": 3, "val": 2}) / "val/bee/9.png", "red")
    error = refused(capsys, tmp_path / "out", "folder", tmp_path / "more", "--val-fraction", 0.3)
    assert "--val-fraction 0.3 has no effect, as the source has a val split of 7; leave the option out" in error
    assert run("prepare", "folder", tmp_path / "more", "--test-fraction", 0.3, "--out", tmp_path / "out") == 0
    assert manifest.read(tmp_path / "out").manifest.source["test_fraction"] == 0.3


def test_limits_that_are_not_reached_are_reported(images: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("prepare", "folder", images, "--limit", 31, "--lanes", 16, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "warning: --limit 31 has no effect: the largest split has 30 samples" in error
    assert "test has only 15 samples: 15 lanes instead of 16" in error
    assert run("prepare", "folder", images, "--limit", 30, "--lanes", 15, "--out", tmp_path / "fits") == 0
    assert "effect" not in capsys.readouterr().err


def test_a_finished_data_set_of_other_images_is_refused_and_untouched(
    images: Path, from_folder: Dataset, tmp_path: Path, capsys: Capture
) -> None:
    out = shutil.copytree(from_folder.root, tmp_path / "out")
    before = files(out)
    options = ["--image-size", 8, "--lanes", 2, "--out", out]
    assert run("prepare", "folder", images, *options) == 0
    text = capsys.readouterr().out
    assert "already prepared, not changed; the options, classes and numbers of images are the same" in text
    others = {
        "train: 30 images, now 33": tree(tmp_path / "more", {"train": 11, "test": 5}),
        "test: 15 images, now 0": tree(tmp_path / "no-test", {"train": 10}),
        "images per class differ": shutil.copytree(images, tmp_path / "moved"),
        "now without class 'Ant', now with class 'ape'": shutil.copytree(images, tmp_path / "renamed"),
    }
    (tmp_path / "moved/train/bee/9.png").unlink(missing_ok=True)
    (tmp_path / "moved/train/bee/9.webp").rename(tmp_path / "moved/train/Ant/99.webp")
    for split in ("train", "test"):
        (tmp_path / f"renamed/{split}/Ant").rename(tmp_path / f"renamed/{split}/ape")
    for difference, top in others.items():
        assert run("prepare", "folder", top, *options) == 78
        error = capsys.readouterr().err
        assert f"{out}: already has a data set that was prepared from other images (" in error
        assert difference in error
    assert run("prepare", "folder", tmp_path / "mistyped", *options) == 78
    assert "no such folder or archive" in capsys.readouterr().err
    assert files(out) == before


# Keys and lanes


def test_keys_are_unique_in_the_data_set_and_merged_tars_read_whole(tmp_path: Path) -> None:
    arguments = ["--samples", 2500, "--test-samples", 30, "--image-size", 8, "--lanes", 2]
    assert run("prepare", "synthetic", *arguments, "--out", tmp_path / "data") == 0
    paths = sorted((tmp_path / "data").rglob("*.tar"))
    names = []
    with tarfile.open(tmp_path / "merged.tar", "w") as merged:
        for path in paths:
            with tarfile.open(path) as shard:
                for entry in shard:
                    names.append(entry.name)
                    merged.addfile(entry, shard.extractfile(entry))
    assert len(set(names)) == len(names)
    assert "train-00001-00001024.images.npy" in names
    for urls in ([str(tmp_path / "merged.tar")], [str(path) for path in paths]):
        records = list(wds.WebDataset(urls, shardshuffle=False).decode())
        assert sum(len(record["labels.npy"]) for record in records) == 2530
        assert len({record["__key__"] for record in records}) == len(records)


@pytest.mark.parametrize(
    ("count", "lanes"),
    [(162, 32), (120, 8), (180, 16), (103, 51), (12, 12), (1, 1), (640, 64), (1000, 32), (2134, 64), (50_000, 64)],
)
def test_small_sets_get_as_many_lanes_as_drop_few_samples(count: int, lanes: int) -> None:
    assert layout(count, 3072, None, None)[1] == lanes
