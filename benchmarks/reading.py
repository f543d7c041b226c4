"""Reading alone, in one process: distrain's shards beside the usual webdataset pipeline over PNG members.

    python benchmarks/reading.py DATA --work WORK      # DATA as `distrain prepare` wrote it

(a) distrain: one epoch of the train split as a first epoch is read, every shard's digest checked, to uint8 batches.
(b) the same, and each batch made the floats that a model takes, as training does it.
(c) webdataset: the same images, one PNG a sample, shuffled in a buffer of 1,000, decoded by PIL, to float batches.

All start anew for every repeat, in this process, with the files in the page cache, and take turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torchvision import transforms

from distrain import manifest, shards
from distrain.augment import normalize
from distrain.manifest import Dataset
from distrain.order import Order, World
from distrain.stream import TrainingBatches


def write_pngs(dataset: Dataset, folder: Path, limit: int, per_shard: int) -> list[str]:
    """The first images of the train split as tars with a PNG and a class per sample; the tars' paths."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape, classes = dataset.manifest.image_shape, len(dataset.manifest.classes)
    written = 0
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=per_shard, verbose=0) as sink:
        for shard in dataset.split("train").shards:
            for block in shards.read(dataset.root, shard, shape, classes):
                for image, label, number in zip(block.images, block.labels, block.ids, strict=True):
                    if written == limit:
                        return sorted(str(path) for path in folder.glob("*.tar"))
                    sink.write({"__key__": f"{number:08d}", "png": Image.fromarray(image), "cls": int(label)})
                    written += 1
    return sorted(str(path) for path in folder.glob("*.tar"))


def read_distrain(dataset: Dataset, batch_size: int, floats: bool) -> int:
    """Images in the batches of a first epoch."""
    split = dataset.split("train")
    order = Order(len(split.shards), split.lanes, min(shard.samples for shard in split.shards), batch_size, seed=0)
    steps = range(order.steps_per_epoch)
    half = torch.full((dataset.manifest.image_shape[2],), 0.5)
    images = 0
    batches: Any = TrainingBatches(dataset, order, World(0, 1), steps, read_ahead=1, with_words=False, pin=False)
    with closing(batches):
        for batch in batches:
            images += len(normalize(batch.images, half, half) if floats else batch.images)
    return images


def identity(value: Any) -> Any:
    return value


def read_pngs(paths: Sequence[str], batch_size: int) -> int:
    """Images in the batches of the usual webdataset pipeline."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    pipeline = (
        wds.WebDataset(list(paths), shardshuffle=len(paths))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("png", "cls")
        .map_tuple(transform, identity)
        .batched(batch_size)
    )
    return sum(len(labels) for _, labels in pipeline)


def rate(read: Callable[[], int]) -> float:
    """Images per second of one pass."""
    started = time.perf_counter()
    images = read()
    return images / (time.perf_counter() - started)


def report(name: str, rates: Sequence[float]) -> None:
    print(f"{name:<40}{statistics.median(rates):>12,.0f}{min(rates):>12,.0f}{max(rates):>12,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare reading speed with the usual webdataset pipeline.")
    parser.add_argument("data", type=Path, help="folder with manifest.json, as `distrain prepare` wrote it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the PNG tars; they are written anew")
    parser.add_argument("--images", type=int, help="written as PNGs and read by webdataset; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--per-shard", type=int, default=1000, help="images in a PNG tar")
    asked = parser.parse_args()

    torch.set_num_threads(1)
    dataset = manifest.read(asked.data)
    whole = dataset.split("train").samples
    pngs = min(asked.images or whole, whole)
    paths = write_pngs(dataset, asked.work / "png", pngs, asked.per_shard)
    ours, floats, theirs = [], [], []
    for _ in range(asked.repeats):
        ours.append(rate(lambda: read_distrain(dataset, asked.batch_size, floats=False)))
        floats.append(rate(lambda: read_distrain(dataset, asked.batch_size, floats=True)))
        theirs.append(rate(lambda: read_pngs(paths, asked.batch_size)))

    print(f"one process, one thread for tensors, batches of {asked.batch_size}; {asked.repeats} repeats; images/s:\n")
    print(f"{'':<40}{'median':>12}{'lowest':>12}{'highest':>12}")
    report(f"distrain to uint8, {whole:,} images", ours)
    report("distrain to floats, the same", floats)
    report(f"webdataset of PNGs, {pngs:,} images", theirs)
    print()
    for name, rates in (("uint8", ours), ("floats", floats)):
        ratios = [a / b for a, b in zip(rates, theirs, strict=True)]
        medians = statistics.median(rates) / statistics.median(theirs)
        print(
            f"distrain to {name} / webdataset: {medians:.1f} × by the medians ({min(ratios):.1f} to {max(ratios):.1f})"
        )


if __name__ == "__main__":
    main()
