"""`prepare folder`: which folders become splits and classes, what is passed over or refused, how archives are read."""

from __future__ import annotations

import io
import logging
import os
import shutil
import stat
import struct
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain import cli
from distrain.errors import DataError
from distrain.preparation.sources import UnreadableError
from distrain.preparation.sources.folder import Folder

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's file systems")


def picture(level: int) -> bytes:
    """A PNG file in one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 7, 7)).save(stream, "png")
    return stream.getvalue()


def write(top: Path, *names: str, equal: bool = False) -> Path:
    """Write files; each has other bytes than all others, unless they are to be equal."""
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bytes" if equal else b"bytes of " + os.fsencode(path))
    return top


def images(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number}.png" for folder in folders for number in range(count)]


CATS_AND_DOGS = images("train/cat", "train/dog", "test/cat", "test/dog")


def opened(tmp_path: Path, *paths: Path) -> Folder:
    work = tmp_path / "out/.partial"
    work.mkdir(parents=True, exist_ok=True)
    return Folder(paths, 8, work)


def counts(folder: Folder) -> dict[str, list[int]]:
    """The number of images of each class, for each split."""
    return {
        split: np.bincount(labels, minlength=len(folder.classes)).tolist() for split, labels in folder.labels.items()
    }


def names(folder: Folder, split: str = "train") -> list[str]:
    return [folder.name(split, index) for index in range(len(folder.labels[split]))]


def refusal(tmp_path: Path, *paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        opened(tmp_path, *paths)
    message = str(caught.value)
    assert message.isprintable(), "it could break a terminal"
    assert len(message) < 2000
    return message


@pytest.fixture(autouse=True)
def _messages(caplog: Log) -> None:
    caplog.set_level(logging.INFO, logger="distrain")


# Splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "Validation", "Testing"),
        ("TRAIN", "VALID", "TEST"),
        ("train", "dev", "test"),
        ("train", "eval", "test"),
        ("training_set", "validation_set", "test_set"),
        ("Train Images", "val-images", "testset"),
    ],
)
@pytest.mark.parametrize("above", ["", "archive/Data/"])
def test_splits_are_recognised_by_their_usual_names_at_any_depth(
    train: str, val: str, test: str, above: str, tmp_path: Path, caplog: Log
) -> None:
    folders = {"train": train, "val": val, "test": test}
    top = write(tmp_path / "top", *(f"{above}{folder}/{name}/1.png" for folder in folders.values() for name in "ab"))
    folder = opened(tmp_path, top)
    assert folder.classes == ["a", "b"]
    assert counts(folder) == {"train": [1, 1], "val": [1, 1], "test": [1, 1]}
    for split, name in folders.items():
        assert f"{split}: 2 images, 1 per class; from {top}/{above}{name}\n" in caplog.text + "\n"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (
            [*CATS_AND_DOGS, *(f"copy/{name}" for name in CATS_AND_DOGS)],
            ["top, ", "top/copy", "give only the right one"],
        ),
        ([f"{version}/{name}" for version in ("v1", "v2") for name in CATS_AND_DOGS], ["top/v1, ", "top/v2"]),
        (images("a/train/cat", "a/train/dog", "b/test/cat", "b/test/dog"), ["top/a, ", "top/b"]),
        (images("cat/train/x", "dog/train/x", "cat/test/x"), ["put the splits above them: train/CLASS/"]),
    ],
    ids=["nested copy", "two versions", "splits apart", "classes above splits"],
)
def test_splits_in_several_folders_are_refused(files: list[str], named: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, write(tmp_path / "top", *files))
    assert "folders have splits" in message
    for text in named:
        assert text in message


@pytest.mark.parametrize("other", ["Train", "training", "train_set"])
def test_two_folders_for_one_split_are_refused(other: str, tmp_path: Path) -> None:
    top = write(tmp_path / "top", *CATS_AND_DOGS, *images(f"{other}/cat", f"{other}/dog"))
    message = refusal(tmp_path, top)
    assert f"{top}/train" in message
    assert f"{top}/{other}" in message
    assert "both names of the split train; merge them" in message


def test_splits_below_the_classes_are_refused(tmp_path: Path) -> None:
    top = write(tmp_path / "top", *images("cat/train", "cat/test", "dog/Training", "dog/test"))
    message = refusal(tmp_path, top)
    assert f"{top}/cat/test, {top}/cat/train, {top}/dog/Training, and 1 more: splits are below the classes" in message


@pytest.mark.parametrize(
    "pair",
    [
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("my-training", "my-testing"),
        ("1_train", "2_val"),
        ("train_2023", "test_2024"),
        ("trainA", "testA"),
        ("PhotosTrain", "PhotosTest"),
    ],
)
@pytest.mark.parametrize("given", ["one", "both"])
def test_folders_that_seem_to_be_splits_do_not_become_classes(
    pair: tuple[str, str], given: str, tmp_path: Path
) -> None:
    top = write(tmp_path / "top", *(name for part in pair for name in images(f"{part}/cat", f"{part}/dog")))
    message = refusal(tmp_path, *([top] if given == "one" else [top / part for part in pair]))
    assert f"{min(pair)}, {max(pair)}" in message
    assert "seem to be splits" in message
    assert "call them train and test" in message


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip", ""])
def test_archives_and_folders_of_classes_are_splits_by_their_names(suffix: str, tmp_path: Path) -> None:
    for split in ("train", "Test"):
        write(tmp_path / split, *images("cat", "dog"))
    paths = [tmp_path / "train", tmp_path / "Test"]
    if suffix:
        paths = [pack(path.with_name(path.name + suffix), path) for path in paths]
    folder = opened(tmp_path, *paths)
    assert folder.classes == ["cat", "dog"]
    assert counts(folder) == {"train": [2, 2], "test": [2, 2]}


def test_a_folder_called_train_that_has_splits_is_no_split(tmp_path: Path) -> None:
    folder = opened(tmp_path, write(tmp_path / "train", *CATS_AND_DOGS))
    assert folder.classes == ["cat", "dog"]
    assert counts(folder) == {"train": [2, 2], "test": [2, 2]}


def test_a_class_in_a_split_may_have_the_name_of_one(tmp_path: Path) -> None:
    top = write(tmp_path / "top", *images("train/bus", "train/train", "test/bus", "test/train"))
    folder = opened(tmp_path, top)
    assert folder.classes == ["bus", "train"]
    assert counts(folder) == {"train": [2, 2], "test": [2, 2]}
    alone = opened(tmp_path / "alone", top / "train")
    assert alone.classes == ["bus", "train"]


def test_a_source_without_splits_beside_one_with_splits_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "first", *CATS_AND_DOGS)
    second = write(tmp_path / "second", *images("cat", "dog"))
    assert f"{second}: has no train/, val/ or test/, as {first} has" in refusal(tmp_path, first, second)


# The same images twice


@pytest.mark.parametrize("second", ["photos/train", "photos/../photos", "link", "linked/train", "photos/extra.zip"])
def test_paths_in_each_other_are_refused(second: str, tmp_path: Path) -> None:
    top = write(tmp_path / "photos", *CATS_AND_DOGS)
    (tmp_path / "link").symlink_to(top)
    (tmp_path / "linked").symlink_to(top)
    pack(top / "extra.zip", write(tmp_path / "extra", *CATS_AND_DOGS))
    for paths in ([top, tmp_path / second], [tmp_path / second, top]):
        assert "would be in the data set twice" in refusal(tmp_path, *paths)


def test_an_archive_given_on_two_paths_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.tar", write(tmp_path / "photos", *CATS_AND_DOGS))
    os.link(archive, tmp_path / "b.tar")
    message = refusal(tmp_path, archive, tmp_path / "b.tar")
    assert f"{tmp_path}/b.tar: is the same as {archive}" in message


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_the_last_member_of_a_path_counts(suffix: str, tmp_path: Path, caplog: Log) -> None:
    members = [(name, picture(10)) for name in CATS_AND_DOGS]
    archive = archive_of(tmp_path / f"photos{suffix}", [*members, ("./train/cat/0.png", picture(200))])
    folder = opened(tmp_path, archive)
    assert counts(folder) == {"train": [2, 2], "test": [2, 2]}
    assert folder.load("train", 0)[0, 0].tolist() == [200, 7, 7]
    assert "a later member of the archive has the same path: 1 (" in caplog.text


def test_equal_files_are_counted_and_named(tmp_path: Path, caplog: Log) -> None:
    top = write(tmp_path / "top", *images("train/cat", "train/dog", "test/cat", "test/dog", count=20))
    for source, copy in [
        ("train/cat/0.png", "test/cat/5.png"),
        ("train/cat/1.png", "test/cat/6.png"),
        ("train/dog/0.png", "train/dog/00.png"),
        ("train/cat/7.png", "train/dog/7.png"),
    ]:
        shutil.copy(top / source, top / copy)
    os.link(top / "test/dog/0.png", top / "test/dog/linked.png")
    opened(tmp_path, top)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    begins = [
        "2 images of test also in train",
        "2 images of train repeated",
        "1 image of train also in another class",
        "1 image of test repeated",
    ]
    assert len(warnings) == len(begins)
    for begin in begins:
        assert [warning for warning in warnings if warning.startswith(begin)], (begin, warnings)
    assert f"{top}/test/cat/5.png equals {top}/train/cat/0.png" in caplog.text
    assert f"{top}/test/dog/linked.png equals {top}/test/dog/0.png" in caplog.text


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz", ".zip"])
def test_files_that_differ_in_one_byte_are_not_equal(suffix: str, tmp_path: Path, caplog: Log) -> None:
    top = tmp_path / "top"
    for number, name in enumerate(CATS_AND_DOGS):
        content = bytearray(20_000)  # the first bytes differ, and the last ones are equal
        content[0] = number
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    opened(tmp_path, pack(tmp_path / f"photos{suffix}", top) if suffix else top)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


# The order of the samples


def test_neither_order_nor_names_of_the_paths_change_the_data_set(tmp_path: Path) -> None:
    manifests = []
    for first, second in (("a", "b"), ("z", "b")):
        top = tmp_path / first
        for number, part in enumerate((first, second)):
            for index, name in enumerate(images("train/cat", "train/dog", "test/cat", "test/dog", count=4)):
                path = top / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(10 + 100 * number + index))
        for order in ((first, second), (second, first)):
            out = top / "-".join(("out", *order))
            paths = [str(top / part) for part in order]
            assert cli.main(["prepare", "folder", *paths, "--image-size", "8", "--lanes", "2", "--out", str(out)]) == 0
            manifests.append((out / "manifest.json").read_bytes())
    assert len(set(manifests)) == 1


# Names


def test_unicode_forms_of_a_class_are_one_class(tmp_path: Path, caplog: Log) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    top = write(tmp_path / "top", *images("train/tee", "test/tee", f"train/{composed}", f"test/{decomposed}"))
    write(top / "train", *images(decomposed))
    folder = opened(tmp_path, top)
    assert folder.classes == [composed, "tee"]
    assert counts(folder) == {"train": [4, 2], "test": [2, 2]}
    assert "class 'café': folders with this name in different Unicode forms are one class" in caplog.text


def test_utf8_names_of_zips_without_the_flag_are_read_as_macos_writes_them(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "photos.zip", [(name.replace("cat", "caf\xe9"), b"x") for name in CATS_AND_DOGS])
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            flags = struct.unpack_from("<H", data, position + offset)[0]
            struct.pack_into("<H", data, position + offset, flags & ~0x800)
            position = data.find(signature, position + 4)
    archive.write_bytes(data)
    assert opened(tmp_path, archive).classes == ["café", "dog"]


def test_a_class_whose_name_begins_with_a_dot_is_passed_over_with_a_warning(tmp_path: Path, caplog: Log) -> None:
    top = write(tmp_path / "top", *images(".net", "java", "csharp", "java/.ipynb_checkpoints"))
    write(top, ".DS_Store", "java/._0.png", ".git/x.png")
    assert opened(tmp_path, top).classes == ["csharp", "java"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        f"{top}/.net: its name begins with a dot, so its images (2) are passed over; rename it"
    )
    assert "passed over, their names begin with a dot: 5 (" in caplog.text


@pytest.mark.parametrize("suffix", ["", ".tar", ".zip"])
def test_files_of_the_operating_system_are_passed_over_and_counted(suffix: str, tmp_path: Path, caplog: Log) -> None:
    top = write(tmp_path / "top", *images("cat", "dog"), "Thumbs.db", "cat/desktop.ini", "dog/ehthumbs.db")
    write(top, "__MACOSX/cat/._0.png", "dog/@eaDir/0.png/thumb.jpg", "lost+found/x", "cat/THUMBS.DB")
    folder = opened(tmp_path, pack(tmp_path / f"photos{suffix}", top) if suffix else top)
    assert folder.classes == ["cat", "dog"]
    assert counts(folder) == {"train": [2, 2]}
    assert "passed over, files of the operating system: 7 (" in caplog.text


def test_what_was_recognised_is_logged(tmp_path: Path, caplog: Log) -> None:
    top = write(
        tmp_path / "top", *images("Training/cat", count=3), *images("Training/dog", "Testing/cat", "Testing/dog")
    )
    write(top, "README.txt", "Training/labels.csv", "Training/dog/more/9.png")
    (top / "empty").mkdir()
    opened(tmp_path, top)
    lines = [line.strip() for line in caplog.records[-1].getMessage().splitlines()]
    assert lines == [
        f"{top}: 2 classes: cat, dog",
        f"train: 6 images, 3 per class; from {top}/Training",
        f"test: 4 images, 2 per class; from {top}/Testing",
        f"images in folders below a class belong to it: 1 ({top}/Training/dog/more/9.png)",
        f"passed over, no images, and outside the class folders: 2 ({top}/README.txt, {top}/Training/labels.csv)",
        f"passed over, empty folders: 1 ({top}/empty)",
    ]


def test_classes_with_one_image_and_similar_classes_are_named(tmp_path: Path, caplog: Log) -> None:
    opened(tmp_path, write(tmp_path / "top", *images("Cat", "cat", "dog", count=1)))
    assert "one image alone cannot be in train and in test; add some to Cat, cat, dog, or a folder test/" in caplog.text
    assert "classes that differ only in capital letters or spaces: 'Cat', 'cat'" in caplog.text


@pytest.mark.parametrize("last", [[], ["dslr/chair"]])
def test_classes_that_have_the_same_folders_are_doubted(last: list[str], tmp_path: Path, caplog: Log) -> None:
    top = write(tmp_path / "top", *images("amazon/chair", "amazon/desk", "webcam/chair", "webcam/desk", *last))
    assert opened(tmp_path, top).classes == sorted({"amazon", "webcam", *(path[:4] for path in last)})
    assert "webcam become the classes, but have the same folders chair, desk; if those are the classes" in caplog.text


PATHS = st.lists(
    st.sampled_from(["train", "Testing", "valid", "cat", "dog", "sub", ".net", "__MACOSX", "seg_train", "images"]),
    max_size=4,
)
FILES = st.sampled_from(["1.png", "2.JPG", "cat.3.png", "x", "x.txt", "x.zip", "._1.png", "Thumbs.db"])


@settings(deadline=None, max_examples=300)
@given(
    files=st.lists(st.tuples(PATHS, FILES), max_size=12),
    folders=st.lists(PATHS, max_size=3),
    name=st.sampled_from(["photos", "train", "test.tar"]),
)
def test_every_file_is_a_sample_or_passed_over_or_an_error(
    files: list[tuple[list[str], str]], folders: list[list[str]], name: str
) -> None:
    from distrain.preparation.sources.archives import File
    from distrain.preparation.sources.layout import OUTSIDE, arrange, describe
    from distrain.preparation.sources.names import is_image, passed_over, split_of
    from distrain.preparation.sources.tree import read_tree

    members = {(*path, file): File("/".join((*path, file)), "", 1) for path, file in files}
    tree = read_tree(name, name, False, [*members.items(), *((tuple(path), None) for path in folders if path)])
    try:
        layout = arrange([tree])
    except DataError:
        return
    assert len(list(describe(layout, [tree]))) < 12
    samples = [image.file.name for images in layout.images.values() for image in images]
    assert len(set(samples)) == len(samples)
    for parts, file in members.items():
        if file.name not in samples:
            assert passed_over(parts)[0] or (
                not is_image(parts[-1]) and f"{name}/{file.name}" in tree.passed_over[OUTSIDE]
            )
    for split in layout.splits:
        assert all(layout.images[split, class_name] for class_name in layout.classes)
    for image in samples:
        split = next(
            split for (split, _), images in layout.images.items() if image in [one.file.name for one in images]
        )
        recognised = [split_of(part) for part in (name, *image.split("/")[:-2]) if split_of(part)]
        assert split in recognised or (split == "train" and not recognised)


# Refusals


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*images("cat", "dog"), "9.png"], "{top}/9.png: is not in a class folder; move or delete it"),
        ([*CATS_AND_DOGS, "train/9.png", "train/8.jpg"], "{top}/train/8.jpg: is not in a class folder (2 such images)"),
        ([*CATS_AND_DOGS, "more/cat/9.png"], "give them: {top}/test {top}/train"),
        ([*CATS_AND_DOGS, "val/1.JPEG", "val/2.JPEG"], "or move val/ away: images without a class cannot be evaluated"),
        ([f"train/{name}.{n}.jpg" for name in ("cat", "dog") for n in range(3)], "folders of the classes (cat/, dog/)"),
        (images("bus", "car", "train"), "{top}/train: has the name of a split, but is beside the classes"),
        (images("cat", "dog", "test"), "{top}/test: has the name of a split, but is beside the classes"),
        (
            [*images("train/images"), "train/labels/0.txt"],
            "class 'labels' has only .txt files; data sets for object detection",
        ),
        ([*images("cat", "dog"), "docs/a.md", "docs/b.csv"], "class 'docs' has no image in train/, only .csv, .md ("),
        (["1.png", "2.png"], "{top}/1.png: no class folders; put images into train/CLASS/ and test/CLASS/ (2 such"),
        (["x.md"], "{top}: no class folders; put images into train/CLASS/ and test/CLASS/"),
        (["a.tar", "b.tar"], "{top}: has archives (a.tar, b.tar), which are not opened; unpack each into a folder"),
        (["manifest.json", "train/00000.tar"], "a prepared data set already; train on it with data.dir={top}"),
        (
            ["0.jpg", "0.cls", "1.jpg", "1.cls"],
            "WebDataset shards have no class folders: use `distrain prepare webdataset`",
        ),
        (images("train/images"), "If the classes are in a table, write a source (prepare source, docs/extending.md)"),
        (images("pets/cat", "pets/dog"), "If cat, dog are the classes, give {top}/pets"),
        (images("train/Cat", "train/dog", "test/cat", "test/dog"), "It differs from 'Cat' only in capital letters"),
        ([*CATS_AND_DOGS, *images("train/emu")], "class 'emu' has no image in test/; add some or delete the folder of"),
        ([*CATS_AND_DOGS, *images("test/emu")], "class 'emu' has no image in train/; add some or delete the folder of"),
        (
            images("test/cat", "test/dog"),
            "{top}: has test but no train/; add it, or rename what is not meant as a split ({top}/test)",
        ),
        (
            images("training_set/training_set/cat", "test/cat"),
            "give the inner folders: {top}/training_set/training_set",
        ),
        (
            images(*(f"train/{split}/{name}" for split in ("train", "test") for name in ("cat", "dog"))),
            "{top}/train: has only folders that are splits themselves; give the inner folders: {top}/train/test {top}/",
        ),
        (images("train", "test"), "{top}/test/0.png: is not in a class folder (4 such images)"),
        ([*images("images/train", "images/val"), "labels/train/0.txt"], "data sets for object detection have their"),
        (
            images(".cat", ".dog"),
            "{top}: no class folders; put images into train/CLASS/ and test/CLASS/ (passed over: ",
        ),
        (images("train/n01", "train/n02", "val/images"), "of this class in val/ too, or move val/ away"),
    ],
)
def test_a_refusal_names_the_cure_that_fits(files: list[str], message: str, tmp_path: Path) -> None:
    top = write(tmp_path / "top", *files)
    assert message.format(top=top) in refusal(tmp_path, top)


def test_a_table_among_the_images_is_named_as_such(tmp_path: Path) -> None:
    folder = opened(tmp_path, write(tmp_path / "top", *images("cat", "dog"), "cat/labels.csv"))
    index = names(folder).index(f"{tmp_path}/top/cat/labels.csv")
    with pytest.raises(UnreadableError, match=r"a \.csv file, no image; move it out of the class folder"):
        folder.load("train", index)


@pytest.mark.parametrize("text", ["https://host/photos.tar", "s3://bucket/photos", "hf://datasets/x"])
def test_addresses_are_refused(text: str, tmp_path: Path) -> None:
    assert "is an address; download it first" in refusal(tmp_path, Path(text))


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert "no such folder or archive (File name too long)" in refusal(tmp_path, tmp_path / ("x" * 5000))


@linux
@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_neither_folder_nor_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    assert "is neither a folder nor an archive, but a pipe, socket or device" in refusal(tmp_path, path)


@linux
@pytest.mark.timeout(30)
def test_pipes_and_huge_files_among_the_images_are_unreadable(tmp_path: Path) -> None:
    top = write(tmp_path / "top", *images("cat", "dog"))
    os.mkfifo(top / "cat/0.jpg")
    os.mkfifo(top / "cat/noname")
    os.truncate(write(top, "dog/0.jpg") / "dog/0.jpg", 2**40)
    folder = opened(tmp_path, top)
    reasons = {}
    for index, name in enumerate(names(folder)):
        with pytest.raises(UnreadableError) as caught:
            folder.load("train", index)
        reasons[name.removeprefix(f"{top}/")] = str(caught.value)
    assert reasons["cat/0.jpg"] == reasons["cat/noname"] == "not a file that can be read (not a regular file)"
    assert reasons["dog/0.jpg"] == "has 1.0 TiB; an image file may have 1.0 GiB"


def test_deep_folders_are_no_fault(tmp_path: Path) -> None:
    top = write(tmp_path / "top", *images("cat", "dog"))
    folder = str(top / "dog")
    for _ in range(1100):
        folder += "/d"
        os.mkdir(folder)
    image = Path(folder, "x.png")
    image.write_bytes(b"x")
    try:
        assert counts(opened(tmp_path, top)) == {"train": [2, 3]}
    finally:  # shutil.rmtree fails on so many levels
        image.unlink()
        os.removedirs(folder)


def test_the_output_folder_may_be_in_the_given_folder(tmp_path: Path) -> None:
    write(tmp_path, *images("cat", "dog"))
    assert opened(tmp_path, tmp_path).classes == ["cat", "dog"]


# Archives


def archive_of(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write an archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:" + path.suffix.removeprefix(".").replace("tar", "")) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def pack(path: Path, folder: Path) -> Path:
    paths = sorted(file for file in folder.rglob("*") if file.is_file())
    return archive_of(path, [(str(file.relative_to(folder)), file.read_bytes()) for file in paths])


PICTURES = [(name, picture(number)) for number, name in enumerate(CATS_AND_DOGS)]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_archives_give_the_same_bytes_as_their_folder(compression: int, tmp_path: Path) -> None:
    for name, content in PICTURES:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(content)
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w", compression) as opened_zip:
        for name, content in PICTURES:
            opened_zip.writestr(f"photos/{name}", content)
    made = []
    for source in (tmp_path / "top", archive):
        out = tmp_path / f"out-{source.name}"
        assert cli.main(["prepare", "folder", str(source), "--image-size", "8", "--lanes", "2", "--out", str(out)]) == 0
        made.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert made[0] == made[1]


@pytest.mark.parametrize("suffix", [".tar", ".zip", ".tar.gz", ".tar.xz", ".tar.bz2"])
def test_only_compressed_tars_are_copied_and_this_is_logged(suffix: str, tmp_path: Path, caplog: Log) -> None:
    archive = archive_of(tmp_path / f"photos{suffix}", PICTURES)
    folder = opened(tmp_path, archive)
    written = [path.name for path in (tmp_path / "out/.partial").iterdir()]
    message = f"{archive} is compressed ("
    assert (written, message in caplog.text) == ((["spool"], True) if "tar." in suffix else ([], False))
    assert [folder.load("train", index)[0, 0, 0] for index in range(4)] == [0, 1, 2, 3]


def test_no_space_for_a_compressed_tar_is_an_error_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(tmp_path / "photos.tar.gz", [*PICTURES, ("train/dog/9.png", bytes(5000))])
    for free in (100, 3000):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**6, 10**6, free))
        message = refusal(tmp_path, archive)
        assert "are copied to --out, where " in message
        assert "choose another --out, or unpack the archive and give the folder" in message


def changed(path: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_that_changes_meanwhile_is_unreadable(suffix: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path / f"photos{suffix}", PICTURES)
    folder = opened(tmp_path, archive)
    archive_of(archive, [(name, picture(99)) for name, _ in [*PICTURES, ("train/cat/7.png", b"")]])
    with pytest.raises(UnreadableError, match="its archive has changed while it was read"):
        folder.load("train", 0)


def test_damage_in_a_zip_is_detected(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "photos.zip", PICTURES)
    changed(archive, lambda data: data.__setitem__(60, data[60] ^ 0x55))
    folder = opened(tmp_path, archive)
    with pytest.raises(UnreadableError, match="damaged in its archive"):
        folder.load("train", 0)
    folder.load("train", 1)
    changed(archive, lambda data: data.__delitem__(slice(len(data) // 2, None)))
    assert f"{archive}: is damaged or truncated" in refusal(tmp_path, archive)


def special_zip(path: Path, name: str, mode: int = stat.S_IFREG, method: int = zipfile.ZIP_STORED) -> Path:
    archive_of(path, PICTURES)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, b"/etc/passwd", method)
    return path


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"name": "train/cat/x.png", "mode": stat.S_IFLNK}, "train/cat/x.png: is a link or a device; refused"),
        ({"name": "train/cat/x.png", "mode": stat.S_IFIFO}, "train/cat/x.png: is a link or a device; refused"),
        ({"name": "../x.png"}, "../x.png: points outside the archive; refused"),
        ({"name": "/train/cat/x.png"}, "/train/cat/x.png: points outside the archive; refused"),
        ({"name": "train/cat/x.png", "method": zipfile.ZIP_LZMA}, "x.png: is compressed by method 14; pack it again"),
    ],
)
def test_members_of_zips_that_no_image_needs_are_refused(member: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(tmp_path, special_zip(tmp_path / "photos.zip", **member))


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    def encrypt(data: bytearray) -> None:
        position = data.index(b"PK\x01\x02")
        data[position + 8] |= 1

    archive = changed(archive_of(tmp_path / "photos.zip", PICTURES), encrypt)
    assert "is encrypted; unpack the archive and give the folder" in refusal(tmp_path, archive)


@pytest.mark.parametrize("start", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x28\xb5\x2f\xfd", picture(1), b"PAR1"])
def test_files_of_other_kinds_are_named(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "photos.bin").write_bytes(start + b"x" * 100)
    message = refusal(tmp_path, tmp_path / "photos.bin")
    assert "photos.bin: is a " in message
    assert "give a folder, or a tar or zip archive of it" in message


def test_a_tar_of_tars_names_the_cure(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "ILSVRC.tar", [("n01.tar", b"x" * 512), ("n02.tar", b"y" * 512)])
    message = refusal(tmp_path, archive)
    assert (
        "has archives (n01.tar, n02.tar), which are not opened; unpack each into a folder with the name of" in message
    )


def test_backslashes_in_an_archive_are_named(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "photos.tar", [(name.replace("/", "\\"), content) for name, content in PICTURES])
    assert "backslashes are not folders" in refusal(tmp_path, archive)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.timeout(60)
def test_a_huge_member_or_header_is_refused_before_it_is_read(suffix: str, tmp_path: Path) -> None:
    for kind, size in ((tarfile.REGTYPE, 2**40), (tarfile.XHDTYPE, 2**36), (tarfile.GNUTYPE_LONGNAME, 2**36)):
        path = archive_of(tmp_path / f"photos{suffix}", [])
        info = tarfile.TarInfo("train/cat/bomb.png")
        info.type, info.size = kind, size
        with tarfile.open(path, "w:gz" if "gz" in suffix else "w") as archive:
            archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))
        message = refusal(tmp_path, path)
        assert "has 1.0 TiB; an image file may have 1.0 GiB" in message or "is damaged or truncated" in message


@pytest.mark.timeout(60)
def test_an_archive_that_expands_endlessly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrain.preparation.sources.archives._RATIO_FROM_BYTES", 2**20)
    for suffix in (".zip", ".tar.gz", ".tar.bz2"):
        bomb = [(f"train/cat/{number}.png", bytes(2**20)) for number in range(8)]
        archive = archive_of(tmp_path / f"photos{suffix}", bomb)
        assert "expands to more than 200 times its size" in refusal(tmp_path, archive)


def test_a_zip_member_that_is_larger_than_declared_is_unreadable(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "photos.zip", [*PICTURES[1:], ("train/cat/0.png", bytes(10**6))])

    def lie(data: bytearray) -> None:
        struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 100)

    folder = opened(tmp_path, changed(archive, lie))
    with pytest.raises(UnreadableError, match="damaged in its archive"):
        folder.load("train", 0)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_names_in_archives_cannot_control_the_terminal(suffix: str, tmp_path: Path, capsys: Capture) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\nline\u202e"
    members = [(name.replace("0.png", f"{evil}.png"), b"no image") for name in CATS_AND_DOGS]
    members += [(f"{evil}.txt", b"x"), (f"{evil}/more.txt", b"x"), (f".{evil}/1.png", b"x"), (f".{evil}", b"x")]
    archive = archive_of(tmp_path / f"photos{suffix}", members)
    assert cli.main(["prepare", "folder", str(archive), "--out", str(tmp_path / "out")]) == 78
    error = capsys.readouterr().err
    assert "line" in error
    assert all(line.isprintable() for line in error.split("\n"))
    evil_class = archive_of(tmp_path / f"class{suffix}", [*PICTURES, (f"train/{evil}/1.png", b"x")])
    assert "has characters that cannot be printed; rename it" in refusal(tmp_path, evil_class)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_long_names_in_archives_are_refused_or_shortened(suffix: str, tmp_path: Path) -> None:
    long = archive_of(tmp_path / f"class{suffix}", [*PICTURES, (f"train/{'é' * 200}/1.png", b"x")])
    assert "has a name of 400 bytes; rename it (255 are allowed)" in refusal(tmp_path, long)
    longer = archive_of(tmp_path / f"path{suffix}", [*PICTURES, ("train/cat/" + "d/" * 3000 + "1.png", b"x")])
    assert "has a path of more than 4096 bytes; rename it" in refusal(tmp_path, longer)
    file = archive_of(tmp_path / f"file{suffix}", [*PICTURES, (f"train/cat/{'f' * 3000}.png", b"x")])
    assert len(names(opened(tmp_path, file))[2]) <= 400
