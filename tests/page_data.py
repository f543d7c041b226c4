"""The files that a reader of docs/data.md has, in small: `python page_data.py` writes them into the current folder."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import webdataset
from indexes import jpeg, write_tar

CLASSES = ["apple", "leaf", "sky"]
WORDNET = ["n01440764", "n01443537", "n01484850"]


def write(folder: Path) -> None:
    """Write all of them: tar files of a WebDataset, class folders of photos, ImageNet's files, and one more photo."""
    write_webdataset(folder / "shards")
    write_photos(folder / "photos")
    write_imagenet(folder)
    (folder / "photo.jpg").write_bytes(jpeg(0, 300, 300))


def write_webdataset(folder: Path) -> None:
    """Two tar files of train and one of val, by webdataset itself, shuffled."""
    folder.mkdir(parents=True)
    numbers = random.Random(0).sample(range(240), 240)
    for split, part, maxcount in (("train", numbers[:192], 100), ("val", numbers[192:], 100)):
        with webdataset.ShardWriter(f"{folder}/{split}-%04d.tar", maxcount=maxcount, verbose=0) as tars:
            for number in part:
                tars.write({"__key__": f"{number:06}", "jpg": jpeg(number, 40, 120), "cls": number % 3})


def write_photos(folder: Path) -> None:
    """A folder for each class, with photos of all sizes."""
    for number in range(120):
        path = folder / CLASSES[number % 3] / f"IMG {number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, 40, 300))


def write_imagenet(folder: Path) -> None:
    """The tar of tars of train, the tar of val, and the labels of val, as they are published."""
    inner = []
    for wordnet in WORDNET:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(WORDNET.index(wordnet), 120, 3):
                content = jpeg(number, 40, 120)
                info = tarfile.TarInfo(f"{wordnet}_{number}.JPEG")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        inner.append((f"{wordnet}.tar", file.getvalue()))
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    val = [(f"ILSVRC2012_val_{number:08}.JPEG", jpeg(1000 + number, 40, 120)) for number in range(1, 31)]
    write_tar(folder / "ILSVRC2012_img_val.tar", val)
    labels = "".join(f"{WORDNET[(1000 + number) % 3]}\n" for number in range(1, 31))
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text(labels)


if __name__ == "__main__":
    write(Path())
