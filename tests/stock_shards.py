"""Tar files of a WebDataset as people have them: written by stock webdataset, by `tar` and by tarfile."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

CLASSES = 3
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_OTHERS = {11: "grey", 23: "palette", 31: "16 bits", 41: "cmyk", 53: "turned", 67: "progressive"}
"""Kinds of the images whose number, divided by 71, has this remainder; all others are JPEG files of colour images."""

_SCAN = b"\xff\xda"
"""Marker in a JPEG file, before the pixels."""


def image_file(number: int, largest: int = 100) -> tuple[str, bytes]:
    """Extension and content of an image file, 60 to `largest` pixels wide; its colour mostly shows the class."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(60, largest, 2, endpoint=True))
    rough = rng.integers(0, 200, (4, 4, 3))
    rough[..., number % CLASSES] += 40
    image = Image.fromarray(rough.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    kind = _OTHERS.get(number % 71)
    if kind == "palette":
        return "png", _encoded(image.quantize(32), "PNG")
    if kind == "16 bits":
        return "png", _encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return "jpg", _encoded(image, "JPEG", exif=exif)
    modes = {"grey": "L", "cmyk": "CMYK"}
    return "jpg", _encoded(image.convert(modes.get(kind or "", "RGB")), "JPEG", progressive=kind == "progressive")


def label_of(number: int) -> int:
    """The class of an image."""
    return number % CLASSES


def write_stock(
    folder: Path,
    name: str,
    numbers: Sequence[int],
    largest: int = 100,
    maxcount: int = 100_000,
    bad: Sequence[int] = (),
) -> None:
    """Write samples with webdataset's ShardWriter, `maxcount` in each tar file: NAME-000.tar …

    The images of `bad` are truncated: their headers can be read, their pixels cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(f"{folder}/{name}-%03d.tar", maxcount=maxcount, verbose=0) as writer:
        for number in numbers:
            extension, content = image_file(number, largest)
            content = content[: content.index(_SCAN) + 30] if number in bad else content
            writer.write({"__key__": f"{number:06}", extension: content, "cls": label_of(number)})


def write_by_tar(path: Path, work: Path, numbers: Sequence[int], *options: str) -> None:
    """Write samples with the program `tar`: folders, dots, upper case, long names, and members that no sample uses."""
    for position, number in enumerate(numbers):
        extension, content = image_file(number)
        folder = work / ("photos.v1", "B/deep", "B/" + "long" * 30)[position % 3]
        folder.mkdir(parents=True, exist_ok=True)
        upper = position % 5 == 0
        name, label = f"IMG_{number:06}", str(label_of(number))
        for suffix, data in ((extension, content), ("cls", label.encode() + b"\n")):
            (folder / f"{name}.{suffix.upper() if upper else suffix}").write_bytes(data)
        if position == 0:
            os.link(folder / f"{name}.{extension.upper()}", folder / f"{name}-hard.jpg")
            (folder / f"{name}-soft.jpg").symlink_to(f"{name}.{extension.upper()}")
            (folder / f"{name}.json").write_text("{}")
            (folder / f"{name}-dotted.first.jpg").write_bytes(content)
            (folder / f"{name}-dotted.first.cls").write_text(label)
            (folder / f"{name}-alone.jpg").write_bytes(content)
            (folder / f"{name}-empty.cls").write_text(label)
            (folder / "README").write_text("no member of a sample")
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", *options, "--sort=name", "-cf", str(path), "-C", str(work), "."], check=True)


def write_by_tarfile(path: Path, numbers: Iterable[int], format: int, global_header: bool = False) -> None:
    """Write samples with Python's tarfile, with long names; labels are before images in half of them."""
    headers = {"comment": "a global header"} if global_header else {}
    with tarfile.open(path, "w", format=format, pax_headers=headers) as tar:
        for number in numbers:
            extension, content = image_file(number)
            key = f"{'Ünïcode-' * (number % 2) * 20}{number}"
            members = [(f"{key}.{extension}", content), (f"{key}.cls", b" %d\r\n" % label_of(number))]
            for name, data in members[:: 1 if number % 2 else -1]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def stock_samples(tars: Sequence[Path]) -> Iterator[tuple[str, bytes, int]]:
    """Yield extension, content and label of the samples of tar files as stock webdataset reads them."""
    for sample in wds.WebDataset([str(path) for path in tars], shardshuffle=False):
        extension = next((each for each in EXTENSIONS if each in sample), None)
        if extension is not None and "cls" in sample:
            yield extension, sample[extension], int(sample["cls"])


def _encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
