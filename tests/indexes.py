"""Small indexes of real tar files with JPEG images of many sizes, written without the code that they test."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from distrain.data import manifest
from distrain.data.index import SAMPLE, to_bytes
from distrain.data.manifest import Dataset

CLASSES = ["ant", "bee", "cat"]


def jpeg(number: int, smallest: int = 20, largest: int = 60) -> bytes:
    """A JPEG file whose size and content follow from a number; its colours show the class `number % 3`."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(smallest, largest, 2, endpoint=True)
    rough = rng.integers(0, 100, (4, 4, 3))
    rough[..., number % 3] += 120
    image = Image.fromarray(rough.astype(np.uint8)).resize((int(width), int(height)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def build(
    folder: Path, sizes: dict[str, list[int]], lanes: int, shards: int, images: dict[int, bytes] | None = None
) -> Dataset:
    """Write tar files with so many samples each, and an index of them; `images` replaces those of some numbers."""
    tars, out, splits = folder / "tars", folder / "index", {}
    out.mkdir(parents=True)
    number, shapes = 0, []
    for split, counts in sizes.items():
        entries, described = [], []
        for index, count in enumerate(counts):
            name = f"{split}-{index:04}.tar"
            numbers = range(number, number + count)
            number += count
            contents = {each: (images or {}).get(each, jpeg(each)) for each in numbers}
            write_tar(
                tars / name,
                [
                    member
                    for each, content in contents.items()
                    for member in ((f"{each:06}.cls", str(each % 3).encode()), (f"{each:06}.jpg", content))
                ],
            )
            with tarfile.open(tars / name) as tar:
                for member in tar:
                    if not member.name.endswith(".jpg"):
                        continue
                    file = tar.extractfile(member)
                    assert file is not None
                    data, each = file.read(), int(member.name[:6])
                    width, height = Image.open(io.BytesIO(jpeg(each))).size
                    shapes.append((height, width))
                    entries.append(
                        (
                            member.offset_data, xxhash.xxh3_64_intdigest(data), len(entries), len(data),
                            each % 3, height, width,
                        )
                    )  # fmt: skip
            content = (tars / name).read_bytes()
            described.append(
                {
                    "name": name, "bytes": len(content), "samples": count,
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )  # fmt: skip
        samples = np.array(entries, SAMPLE)
        data = to_bytes(samples)
        (out / f"{split}.npy").write_bytes(data)
        splits[split] = {
            "samples": len(samples),
            "bytes": int(samples["bytes"].sum()),
            "lanes": lanes if split == "train" else 1,
            "shards": shards if split == "train" else 2,
            "index": {"name": f"{split}.npy", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
            "tars": described,
        }
    heights, widths = zip(*shapes, strict=True)
    tree = {
        "format": "distrain-index", "version": 1, "source": {"kind": "webdataset"}, "classes": CLASSES,
        "mean": [0.5] * 3, "std": [0.25] * 3, "image_shape": None, "normalization": "chosen",
        "smallest": [min(heights), min(widths)], "largest": [max(heights), max(widths)], "splits": splits,
    }  # fmt: skip
    (out / manifest.NAME).write_text(json.dumps(tree))
    (out / manifest.TARS).write_text(json.dumps({"location": str(tars)}))
    return manifest.read(out)
