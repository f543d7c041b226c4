"""`distrain prepare` and `distrain verify`: the same request gives the same bytes, and errors leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from group import wait_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain import cli
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset
from distrain.data.prepare import DEFAULT_LANES, SHARD_BYTES, Options, choose, layout, stratified
from distrain.data.shards import Block
from distrain.data.sources.folder import Folder
from distrain.data.sources.synthetic import Synthetic
from distrain.errors import ConfigError, DataError

Capture = pytest.CaptureFixture[str]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs forked workers and /proc")

SMALL = ["--samples", 203, "--test-samples", 57, "--image-size", 8, "--classes", 7, "--lanes", 6, "--shards", 12]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(dataset: Dataset, split: str) -> Block:
    found = dataset.manifest
    blocks = [
        block
        for shard in dataset.split(split).shards
        for block in shards.read(dataset.root, shard, found.image_shape, len(found.classes))
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
        (["--seed", 4], "seed: 3, asked for 4"),
        (["--seed", 3, "--samples", 204], "samples: 203, asked for 204"),
        (["--seed", 3, "--shards", 6], "shards: 12, asked for 6"),
        (["--seed", 3, "--limit", 10], "limit: None, asked for 10"),
    ],
)
def test_a_folder_prepared_otherwise_is_refused_and_untouched(
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
    assert f"{tmp_path}: is neither empty nor a data set; choose another --out" in capsys.readouterr().err
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
        (["--lanes", 5, "--shards", 12], "--lanes 5 does not divide --shards 12"),
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
    found = {int(path.name): stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    return {pid: fields[19] for pid, fields in found.items() if fields and int(fields[1]) == parent}


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
        wait_for(out / ".partial/train/00001.tar")
        workers = children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stderr.close()
    assert workers
    assert not (out / "manifest.json").exists(), "killed too late to prove anything"
    assert run("verify", out) == 78
    assert "holds no data set (no manifest.json)" in capsys.readouterr().err
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
        wait_for(out / ".partial/train/00001.tar")
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
            wanted = colour(split, CLASSES[label], index % count)
            assert np.abs(image.astype(int) - wanted).max() <= 4, (split, index)


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
    asked = ["--test-fraction", 0.2, "--val-fraction", 0.25, "--lanes", 1]
    assert run("prepare", "folder", pets, *asked, "--out", out) == 0
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
    """What `prepare` makes of one image."""
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
    found = load(tmp_path / "image.png", tmp_path, 10)
    assert found.shape == (10, 10, 3)
    assert (found[1:9, 1:4] == (0, 0, 255)).all()
    assert (found[1:9, 6:9] == (0, 255, 0)).all()
    assert (found[..., 0] < 40).all(), "more of outside the middle than a filter takes in"


@pytest.mark.parametrize(
    ("mode", "suffix", "fill", "wanted"),
    [
        ("L", "png", 90, (90, 90, 90)),
        ("L", "jpg", 90, (90, 90, 90)),
        ("LA", "png", (90, 10), (90, 90, 90)),
        ("1", "png", 1, (255, 255, 255)),
        ("P", "gif", None, (200, 100, 50)),
        ("P", "png", None, (200, 100, 50)),
        ("RGBA", "png", (200, 100, 50, 10), (200, 100, 50)),
        ("RGBA", "webp", (200, 100, 50, 200), (200, 100, 50)),
        ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", "png", 90 * 257, (90, 90, 90)),
        ("I;16", "tif", 90 * 257, (90, 90, 90)),
    ],
)
def test_other_kinds_of_pixels_become_rgb(
    mode: str, suffix: str, fill: Any, wanted: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    if mode == "P":
        Image.new("RGB", (12, 12), wanted).quantize(4).save(path)
    else:
        draw(path, fill, mode)
    with Image.open(path) as image:
        assert suffix == "gif" or image.mode == mode
    found = load(path, tmp_path)
    assert found.shape == (12, 12, 3)
    assert np.abs(found.astype(int) - wanted).max() <= 3


def test_pixels_without_a_scale_are_refused_not_guessed(tmp_path: Path, capsys: Capture) -> None:
    draw(tree(tmp_path / "images") / "train/bee/depth.tif", 7.5, "F")
    error = refused(capsys, tmp_path / "out", "folder", tmp_path / "images")
    assert "train/bee/depth.tif" in error
    assert "8 bits" in error


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_camera_held_askew_is_put_right(orientation: int, turn: int, tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.rot90(upright, -turn))
    image.save(tmp_path / "image.jpg", exif=exif, quality=95, subsampling=0)
    found = load(tmp_path / "image.jpg", tmp_path, 32)
    # Orientation 6 is mended by a quarter turn clockwise, 8 by one anticlockwise.
    assert np.abs(found.astype(int) - np.rot90(np.rot90(upright, -turn), {0: 0, 2: 2, 3: -1, 1: 1}[turn])).max() <= 8


def test_a_channel_that_is_the_same_everywhere_can_be_normalized(tmp_path: Path) -> None:
    for number in range(8):
        draw(tmp_path / f"images/train/{number % 2}/{number}.png", (number, 0, 70))
        draw(tmp_path / f"images/test/{number % 2}/{number}.png", (number, 0, 70))
    assert run("prepare", "folder", tmp_path / "images", "--lanes", 2, "--out", tmp_path / "out") == 0
    found = manifest.read(tmp_path / "out").manifest
    assert found.mean[1:] == [0, 70 / 255]
    assert found.std[1:] == [1, 1]
    assert found.std[0] == pytest.approx(np.arange(8).std() / 255)


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
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("train/bee/link.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device; refused"),
        (member("train/bee", tarfile.SYMTYPE, "/etc"), "is a link or a device; refused"),
        (member("train/bee/link.png", tarfile.LNKTYPE, "train/bee/0.png"), "is a link or a device; refused"),
        (member("train/bee/null.png", tarfile.CHRTYPE), "is a link or a device; refused"),
        (member("train/bee/disk.png", tarfile.BLKTYPE), "is a link or a device; refused"),
        (member("train/bee/fifo.png", tarfile.FIFOTYPE), "is a link or a device; refused"),
        (member("../bee.png"), "leads out of the archive's folder; refused"),
        (member("train/bee/../../../bee.png"), "leads out of the archive's folder; refused"),
        (member("/train/bee/bee.png"), "leads out of the archive's folder; refused"),
        (member("train/.."), "leads out of the archive's folder; refused"),
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
        return [found.offset for found in tar]


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
    assert f"{archive}: is damaged or cut short" in error
    assert "copy or download it again" in error
    assert error.count("\n") == 1


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
def test_an_unreadable_image_is_named_or_left_out(kind: str, tmp_path: Path, capsys: Capture) -> None:
    top = tree(tmp_path / "images")
    BAD[kind](top / "train/bee/33.png")
    error = refused(capsys, tmp_path / "out", "folder", top)
    assert "1 unreadable among the sources, 0 allowed" in error
    assert f"{top}/train/bee/33.png: " in error
    assert "0x" not in error, "an address is no reason"
    assert "leave them out with --skip-bad 1" in error
    assert run("prepare", "folder", top, "--skip-bad", 1, "--lanes", 1, "--out", tmp_path / "out") == 0
    out, error = capsys.readouterr()
    assert "1 unreadable dropped" in out
    assert f"warning: 1 unreadable left out:\n  {top}/train/bee/33.png: " in error
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


def test_the_cure_that_is_told_works_with_a_limit_too(tmp_path: Path, capsys: Capture) -> None:
    # What takes the place of an unreadable image may be unreadable as well: it shows a round later.
    top = tree(tmp_path / "images", {"train": 4, "test": 2})
    for file in sorted((top / "train").rglob("*.*")):
        if int(file.stem) >= 2:
            BAD["text"](file)
    told = 0
    while run("prepare", "folder", top, "--limit", 3, "--lanes", 1, "--skip-bad", told, "--out", tmp_path / "out"):
        before, told = told, int(capsys.readouterr().err.rpartition("--skip-bad ")[2])
        assert told > before
    dataset = manifest.read(tmp_path / "out")
    assert dataset.manifest.source["skipped"] == told
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
    ("place", "reason"),
    [
        ("train/stray.png", "lies in no class folder; move or delete it"),
        ("valid/bee/stray.png", "lies outside train/, val/ and test/; move or delete it"),
    ],
)
def test_a_stray_image_is_named(place: str, reason: str, tmp_path: Path, capsys: Capture) -> None:
    draw(tree(tmp_path / "images") / place, "red")
    assert f"{tmp_path}/images/{place}: {reason}" in refused(capsys, tmp_path / "out", "folder", tmp_path / "images")


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
    assert "one class alone, 'pets'" in refused(capsys, tmp_path / "out", "folder", path)


@linux
@pytest.mark.parametrize("pixels", [300, 100], ids=["warning", "error"])
def test_a_decompression_bomb_is_refused(
    pixels: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tree(tmp_path / "images")
    draw(top / "train/bee/bomb.png", "red", size=(24, 24))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * pixels if pixels == 100 else pixels)
    error = refused(capsys, tmp_path / "out", "folder", top)
    assert "1 unreadable among the sources" in error
    assert "bomb.png: " in error
    assert "pixels" in error


def test_fractions_that_leave_nothing_are_refused(tmp_path: Path, capsys: Capture) -> None:
    pets = (tree(tmp_path / "all", {"train": 1}) / "train").rename(tmp_path / "pets")
    assert "no samples are left for test" in refused(capsys, tmp_path / "out", "folder", pets)
    asked = ["--test-fraction", 0.9]
    assert "no training samples are left" in refused(capsys, tmp_path / "out", "folder", pets, *asked)


# A class of the user's own

OWN = """\
import json
import sys
from pathlib import Path

import numpy as np

from distrain.data.sources import UnreadableError


class Dots:
    classes = ["dark", "light"]
    image_shape = (4, 6, 1)

    def __init__(self, samples="40", fault="", api_key=""):
        self.labels = {"train": np.arange(int(samples)) % 2, "test": np.arange(10) % 2}
        self.fault = fault

    def name(self, split, index):
        return f"{split} dot {index}"

    def load(self, split, index):
        if (split, index) == ("train", 7):
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


def tuples(**own):
    found = Dots()
    vars(found).update(own)
    return found


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
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, where the command is typed."""
    (tmp_path / "dots_for_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "dots_for_test", raising=False)  # another test's
    return tmp_path


def prepare_own(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """As the user does it: a process of its own, started in the folder."""
    command = [Path(sys.executable).with_name("distrain"), "prepare", "source", f"dots_for_test:{name}", "--out", "out"]
    words = [str(word) for word in [*command, *arguments]]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def own_line(text: str) -> int:
    return OWN[: OWN.index(text)].count("\n") + 1


def test_a_class_of_the_users_own_is_a_source(own: Path) -> None:
    done = prepare_own("Dots", "samples=60", "--lanes", 3)
    assert done.returncode == 0, done.stderr
    dataset = manifest.read(own / "out")
    found = dataset.manifest
    assert (found.classes, found.image_shape) == (["dark", "light"], [4, 6, 1])
    assert found.source["kind"] == "source"
    assert found.source["class"] == "dots_for_test:Dots"
    assert found.source["arguments"] == {"samples": "60"}
    for split, count in (("train", 60), ("test", 10)):
        block = samples(dataset, split)
        assert sorted(block.ids.tolist()) == list(range(count))
        assert (block.labels == block.ids % 2).all()
        assert (block.images == (100 * (block.ids % 2) + block.ids)[:, None, None, None]).all()
    assert run("verify", own / "out") == 0
    assert "not changed" in prepare_own("Dots", "samples=60", "--lanes", 3).stdout
    other = prepare_own("Dots", "samples=80", "--lanes", 3)
    assert other.returncode == 78
    assert "arguments: {'samples': '60'}, asked for {'samples': '80'}" in other.stderr


def test_what_is_unreadable_in_a_source_of_ones_own_is_named_or_left_out(own: Path) -> None:
    done = prepare_own("Dots", "fault=unreadable")
    assert done.returncode == 78
    assert "1 unreadable among the sources, 0 allowed:\n  train dot 7: smudged\n" in done.stderr
    assert not (own / "out").exists()
    assert prepare_own("Dots", "fault=unreadable", "--skip-bad", 1).returncode == 0
    assert sorted(samples(manifest.read(own / "out"), "train").ids.tolist()) == [i for i in range(40) if i != 7]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "load() raises JSONDecodeError: Expecting property name enclosed in double quotes"),
        ("exits", "load() raises SystemExit: 0"),
        ("shape", "load() gives uint8 [4, 6], should give uint8 [4, 6, 1]"),
        ("dtype", "load() gives float64 [4, 6, 1], should give uint8 [4, 6, 1]"),
        ("kind", "load() gives NoneType, should give uint8 [4, 6, 1]"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_one_line_with_the_sample(fault: str, told: str, own: Path) -> None:
    done = prepare_own("Dots", f"fault={fault}")
    assert done.returncode == 78
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("distrain")]
    assert message.startswith(f"distrain: error: prepare source dots_for_test:Dots: train dot 7: {told}")
    assert "Traceback" not in done.stderr
    if fault == "raises":
        assert message.endswith(f"({own}/dots_for_test.py:{own_line('json.loads')})")
    assert not (own / "out").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_train", ["labels: has no split 'train'", "labels: has a split 'valid'; there are train, val and test"]),
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
        ("twice", ["classes: 'dark' stands there twice"]),
        ("nothing", ["has no classes, image_shape, labels, name, load"]),
        ("not_picklable", ["cannot be sent to worker processes (TypeError: ", "open files in load(), not before"]),
        ("too_high", ["labels should be 0 … 1", "train dot 2: label 2; 12 more in train", "test dot 5: label -1\n"]),
        ("leaves", ["SystemExit: not a script"]),
        ("Missing", ["AttributeError: module 'dots_for_test' has no attribute 'Missing'"]),
        ("", ["should be package.module:Class"]),
    ],
)
def test_a_class_that_does_not_fit_is_told(name: str, told: list[str], own: Path, capsys: Capture) -> None:
    error = refused(capsys, own / "out", "source", f"dots_for_test:{name}")
    assert "Traceback" not in error
    for text in told:
        assert text in error


def test_the_place_in_the_users_code_is_told(own: Path, capsys: Capture) -> None:
    error = refused(capsys, own / "out", "source", "dots_for_test:Raises")
    place = f"({own}/dots_for_test.py:{own_line('nowhere.csv')})"
    assert error.endswith(f"FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.csv' {place}\n")
    error = refused(capsys, own / "out", "source", "dots_for_test:Dots", "sample=3")
    assert "unexpected keyword argument 'sample'" in error
    error = refused(capsys, own / "out", "source", "dots_for_test:Careless", "fault=raises")
    assert "train sample 7 (its name() raises AttributeError: 'Careless' object has no attribute 'nothing'" in error


def test_arguments_that_are_no_pairs_are_told_and_secrets_not_kept(own: Path, capsys: Capture) -> None:
    for words, told in [(["samples"], "samples: should be key=value"), (["a=1", "a=2"], "a is given twice")]:
        assert told in refused(capsys, own / "out", "source", "dots_for_test:Dots", *words)
    assert run("prepare", "source", "dots_for_test:Dots", "fault=https://me:secret@host/x?k=y", "--out", "out") == 0
    assert manifest.read("out").manifest.source["arguments"] == {"fault": "https://host/x"}
    assert run("prepare", "source", "dots_for_test:Dots", "api_key=hush", "--out", "keyed") == 0
    assert manifest.read("keyed").manifest.source["arguments"] == {"api_key": "hidden"}
    assert not [path for path in Path("keyed").rglob("*.json") if "hush" in path.read_text()]


def test_a_path_where_a_source_is_meant_is_told(tmp_path: Path, capsys: Capture) -> None:
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
    assert message.startswith(f"distrain: error: CIFAR-10 is not under {root} and cannot be downloaded")
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
    found = dataset.split("train").shards
    first, last = (shards.read(folder, entry, dataset.manifest.image_shape, 7)[0] for entry in (found[0], found[-1]))
    ids = last.ids.copy()
    ids[0] = first.ids[0]
    shards.write(folder / found[-1].name, Block(last.images, last.labels, ids))
    entry = shards.describe(folder / found[-1].name, found[-1].name, found[-1].samples).model_dump()
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
        (lambda folder: edit(folder, lambda t: t.update(image_shape=[8, 4, 3])), "wanted uint8 [N, 8, 4, 3]"),
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
    repeat_an_id_of = copy / "train/00005.tar"
    cut(repeat_an_id_of, 1000)
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
        found_shards, found_lanes = layout(samples, sample_bytes, num_shards, lanes)
    except ConfigError:
        assert (num_shards or lanes or 0) > samples or (num_shards and lanes and num_shards % lanes)
        return
    assert found_shards % found_lanes == 0
    assert 1 <= found_lanes <= found_shards <= samples
    assert num_shards in (None, found_shards)
    assert lanes in (None, found_lanes)
    if num_shards is None and lanes is None:
        assert found_lanes == min(DEFAULT_LANES, samples)
    if num_shards is None:
        # The largest shard has 32 MiB and one sample, or there are nearly as many shards as samples.
        assert (samples // found_shards) * sample_bytes <= SHARD_BYTES or found_shards > samples - found_lanes
    elif lanes is None:
        assert not [n for n in range(found_lanes + 1, DEFAULT_LANES + 1) if found_shards % n == 0]


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
    found = np.bincount(labels[taken], minlength=len(sizes))
    assert (np.abs(found - exact) < 1).all()
    remainder = count * sizes % max(1, len(labels))
    up = found * len(labels) > count * sizes
    down = (remainder > 0) & ~up
    assert not up.any() or not down.any() or remainder[up].min() >= remainder[down].max(), "a smaller one rounded up"


def test_the_draw_depends_on_the_seed_and_takes_every_sample_alike() -> None:
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
        wanted = list(range(7)) if limit is None else None
        found = sorted(chosen["test"].ids.tolist())
        assert found == wanted or (limit is not None and len(set(found)) == min(limit, 7))
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
def test_names_that_nobody_can_write_down_are_told_first(name: bytes, tmp_path: Path) -> None:
    for folder in (name, b"plain"):
        os.makedirs(os.path.join(os.fsencode(tmp_path / "photos"), folder))
        with open(os.path.join(os.fsencode(tmp_path / "photos"), folder, b"1.png"), "wb") as file:
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "png")
    with pytest.raises(DataError, match="rename it"):
        Folder([tmp_path / "photos"], 8, tmp_path)
