"""Loaders of encoded images, all to batches of random crops of 224×224; as a program, measure one in a fresh process.

    python -m benchmarks.loaders NAME FOLDER EPOCHS

FOLDER has the photos as tar files, in FOLDER/tars. A loader whose library has a format of its own writes it beside them
when it is missing. Prints a JSON object: `images_per_second`, from the first batch on; `cpu_ms` for each image, of the
process and its workers, user and system; `first_batch`, the seconds to the first batch after the libraries were
imported. Or only `missing`: why a library cannot be imported.

Each loader uses all cores that this process may use, by threads or by as many worker processes, as its documentation
shows it. Images are uint8 or floats as each makes them.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import photos
from benchmarks.commands import call
from benchmarks.reader import decoded_batches, training_order
from distrain import machine
from distrain.config import Augment
from distrain.data import manifest
from distrain.data.manifest import Dataset
from distrain.training import augment

BATCH, SIDE = 64, 224
_SHUFFLE_BUFFER = 1000

Epochs = Callable[[int], Iterator[int]]
"""Reads so many epochs, and yields the number of images of each batch."""


# distrain


def open_index(folder: Path) -> Dataset:
    """Return the index of the photos, written if it is missing."""
    index = folder / "index"
    if not (index / manifest.NAME).exists():
        program = [sys.executable, "-m", "distrain", "prepare", "webdataset"]
        call([*program, str(folder / "tars" / "*.tar"), "--out", str(index)])
    return manifest.read(index).with_image_size(SIDE)


def _distrain(folder: Path) -> Epochs:
    dataset = open_index(folder)
    settings, unused = Augment(flip=True), torch.zeros(3, dtype=torch.uint8)
    machine.keep_freed_memory()  # as `distrain train`

    def epochs(count: int) -> Iterator[int]:
        steps = range(count * training_order(dataset, BATCH).steps_per_epoch)
        with closing(decoded_batches(dataset, BATCH, steps, machine.cores())) as batches:
            for (batch,) in batches:
                yield len(augment.augment(batch.images, batch.random_bits, settings, unused))

    return epochs


# webdataset


def _pil_transform() -> Any:
    from torchvision import transforms  # not for distrain's process, which does not use it

    crop = transforms.RandomResizedCrop(SIDE)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def _tensor_transform() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])


def _decode(transform: Any, data: bytes) -> Tensor:
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    from torchvision.io import ImageReadMode, decode_jpeg

    image: Tensor = transform(decode_jpeg(file, mode=ImageReadMode.RGB))
    return image


def _decode_sample(transform: Any, sample: tuple[bytes, int]) -> tuple[Tensor, int]:
    return _decode(transform, sample[0]), sample[1]


def _webdataset(folder: Path, decoded: Callable[[Any], Any]) -> Epochs:
    tars = photos.tars(folder / "tars")

    def epochs(count: int) -> Iterator[int]:
        pipeline = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(_SHUFFLE_BUFFER)
        batches = decoded(pipeline).batched(BATCH).repeat(count)
        return _sizes(DataLoader(batches, batch_size=None, num_workers=machine.cores()))

    return epochs


def _webdataset_pil(folder: Path) -> Epochs:
    transform = _pil_transform()
    return _webdataset(
        folder, lambda pipeline: pipeline.decode("pil").to_tuple("jpg", "cls").map_tuple(transform, lambda label: label)
    )


def _webdataset_torchvision(folder: Path) -> Epochs:
    transform = partial(_decode, _tensor_transform())
    return _webdataset(folder, lambda pipeline: pipeline.to_tuple("jpg", "cls").map_tuple(transform, int))


# Other libraries


def _timm(folder: Path) -> Epochs:
    from timm.data import create_dataset, create_loader

    tars = photos.tars(folder / "tars")
    first, last = (Path(path).stem.removeprefix("train-") for path in (tars[0], tars[-1]))
    dataset = create_dataset(
        "wds/", root=str(folder / "tars"), split=f"train-{{{first}..{last}}}.tar|{_count(folder)}",
        is_training=True, batch_size=BATCH,
    )  # fmt: skip
    loader = create_loader(
        dataset, (3, SIDE, SIDE), BATCH, is_training=True, color_jitter=0.0, num_workers=machine.cores(),
        device=torch.device("cpu"),
    )  # fmt: skip
    return lambda count: (size for _ in range(count) for size in _sizes(loader))


def _litdata(folder: Path) -> Epochs:
    import litdata

    written = folder / "litdata"
    if not (written / "index.json").exists():
        litdata.optimize(
            _identity, list(_samples(folder)), str(written), chunk_bytes="64MB", num_workers=1, start_method="fork"
        )  # fmt: skip
    transform = partial(_decode_sample, _tensor_transform())
    loader = litdata.StreamingDataLoader(
        litdata.StreamingDataset(str(written), shuffle=True, transform=transform),
        batch_size=BATCH,
        num_workers=machine.cores(),
        persistent_workers=True,
    )
    return lambda count: (size for _ in range(count) for size in _sizes(loader))


def _mosaicml(folder: Path) -> Epochs:
    import streaming

    transform = _pil_transform()

    class Photos(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    written = folder / "mosaicml"
    if not (written / "index.json").exists():
        with streaming.MDSWriter(columns={"image": "bytes", "label": "int"}, out=str(written)) as writer:
            for data, label in _samples(folder):
                writer.write({"image": data, "label": label})
    loader: Any = DataLoader(
        Photos(local=str(written), batch_size=BATCH, shuffle=True),
        BATCH, num_workers=machine.cores(), persistent_workers=True,
    )  # fmt: skip
    return lambda count: (size for _ in range(count) for size in _sizes(loader))


def _spdl(folder: Path) -> Epochs:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def images(epochs: int) -> Iterator[bytes]:
        for _ in range(epochs):
            for path in photos.tars(folder / "tars"):
                with Path(path).open("rb") as tar:
                    yield from (bytes(data) for name, data in spdl.io.iter_tarfile(tar) if name.endswith(".jpg"))

    def decode(data: bytes) -> Any:
        from torchvision import transforms

        top, left, height, width = transforms.RandomResizedCrop.get_params(
            torch.empty(3, photos.HEIGHT, photos.WIDTH, device="meta"), [0.08, 1], [3 / 4, 4 / 3]
        )
        flip = "hflip," if random.random() < 0.5 else ""  # noqa: S311
        chain = f"crop={width}:{height}:{left}:{top},{flip}scale={SIDE}:{SIDE}:flags=bilinear,format=pix_fmts=rgb24"
        return spdl.io.decode_packets(spdl.io.demux_image(data), filter_desc=chain)

    try:
        decode(photos.photo(0))
    except RuntimeError as error:
        raise ImportError("needs the shared libraries of FFmpeg") from error

    def batch(frames: list[Any]) -> Tensor:
        tensor: Tensor = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return tensor

    def epochs(count: int) -> Iterator[int]:
        threads = machine.cores()
        builder = PipelineBuilder().add_source(images(count)).pipe(decode, concurrency=threads)
        pipeline = builder.aggregate(BATCH).pipe(batch).add_sink(2).build(num_threads=threads)
        with pipeline.auto_stop():
            yield from map(len, pipeline)

    return epochs


# Decoding alone: encoded images in memory, whole, in the program's threads


def _decode_alone(folder: Path, decode: Callable[[bytes], Any]) -> Epochs:
    batches = _batches_of(photo for photo, _ in _samples(folder))

    def decode_all(images: list[bytes]) -> int:
        for image in images:
            decode(image)
        return len(images)

    def epochs(count: int) -> Iterator[int]:
        with ThreadPoolExecutor(machine.cores()) as pool:
            yield from pool.map(decode_all, batches * count)

    return epochs


def _torchvision_alone(folder: Path) -> Epochs:
    return _decode_alone(folder, partial(_decode, _identity))


def _simplejpeg_alone(folder: Path) -> Epochs:
    import simplejpeg

    return _decode_alone(folder, simplejpeg.decode_jpeg)


LOADERS: dict[str, Callable[[Path], Epochs]] = {
    "distrain": _distrain,
    "webdataset, PIL": _webdataset_pil,
    "webdataset, torchvision": _webdataset_torchvision,
    "timm": _timm,
    "litdata": _litdata,
    "mosaicml-streaming": _mosaicml,
    "spdl": _spdl,
    "decoding alone, torchvision": _torchvision_alone,
    "decoding alone, simplejpeg": _simplejpeg_alone,
}
"""Functions that import the libraries, and return what reads."""


def _identity(item: Any) -> Any:
    return item


def _samples(folder: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the photos and labels as they are in the tar files."""
    for data, label in wds.WebDataset(photos.tars(folder / "tars"), shardshuffle=False).to_tuple("jpg", "cls"):
        yield data, int(label)


def _count(folder: Path) -> int:
    return sum(1 for _ in _samples(folder))


def _batches_of(images: Iterator[bytes]) -> list[list[bytes]]:
    everything = list(images)
    return [everything[start : start + BATCH] for start in range(0, len(everything), BATCH)]


def _sizes(loader: Any) -> Iterator[int]:
    """Yield the number of images of each batch of a loader that returns images and labels."""
    for images, _ in loader:
        yield len(images)


# One loader, measured


def _cpu_seconds() -> float:
    """Return the CPU time of this process, and of its workers that run or have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = [child.cpu_times() for child in psutil.Process().children()]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(
        times.user + times.system + times.children_user + times.children_system for times in running
    )


def measure(epochs: Epochs, count: int) -> dict[str, float]:
    """Read so many epochs."""
    cpu, started = _cpu_seconds(), time.perf_counter()
    sizes = epochs(count)
    first = next(sizes)
    arrived = time.perf_counter()
    images = sum(sizes)
    seconds, cpu = time.perf_counter() - arrived, _cpu_seconds() - cpu
    return {
        "images_per_second": images / seconds,
        "cpu_ms": 1000 * cpu / (first + images),
        "first_batch": arrived - started,
    }


def main() -> None:
    """Measure, and print the result."""
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    name, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with open(os.devnull, "w") as silent:  # libraries print
        output, sys.stdout = sys.stdout, silent
        try:
            epochs = LOADERS[name](folder)
        except ImportError as error:
            result: dict[str, Any] = {"missing": str(error)}
        else:
            result = measure(epochs, count)
        print(json.dumps(result), file=output)


if __name__ == "__main__":
    main()
