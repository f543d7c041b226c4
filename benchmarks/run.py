"""One run of the benchmarks: check the options, prepare the data, measure part by part and write after each part."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import DEFAULT_PARTS, PARTS, plot
from benchmarks.context import Context
from benchmarks.table import Table
from distrain import config, files, machine, models
from distrain.data import manifest
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError
from distrain.preparation import blocks
from distrain.preparation.sources.folder import Folder
from distrain.preparation.sources.synthetic import Synthetic

RESULT, PLOT = "bench.json", "bench.png"
_MIN_TRAINING_IMAGES = 512
"""The largest batch of the parts."""

_QUICK_PHOTOS = 200


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    parts: tuple[str, ...]
    images: Path | None
    data: Path | None
    out: Path
    repeats: int
    quick: bool
    device: str
    precision: str
    models: tuple[str, ...]
    recipe: Path
    target: float | None
    photos: int


def run(options: Options) -> None:
    """Measure, print a table for each part, and write OUT/bench.json and OUT/bench.png.

    Raises:
        ConfigError: an option is invalid; nothing was measured or written.
        DataError: the data cannot be read.
    """
    check(options)
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    dataset = _open_dataset(options)
    _check_dataset(dataset)
    (options.out / PLOT).unlink(missing_ok=True)  # it would show the figures of another run
    tables: dict[str, Table] = {}
    parts = [part for part in PARTS if part in (options.parts or DEFAULT_PARTS)]
    with tempfile.TemporaryDirectory(prefix="work-", dir=options.out) as work, _one_thread():
        context = Context(
            dataset=dataset,
            work=Path(work),
            out=options.out,
            images=options.images,
            repeats=options.repeats,
            quick=options.quick,
            device=device,
            precision=options.precision,
            models=options.models or (("net", "resnet9") if device == "cuda" else ("net",)),
            recipe=options.recipe,
            target=options.target,
            photos=_QUICK_PHOTOS if options.quick else options.photos,
        )
        description = _describe(context)
        _write(options.out, description, tables, finished=False)
        for part in parts:
            tables[part] = importlib.import_module(f"benchmarks.{part}").measure(context)
            print(f"\n{tables[part].text()}", flush=True)
            _write(options.out, description, tables, finished=part == parts[-1])
    plot.draw(tables, options.out / PLOT)
    print(f"\n{options.out / RESULT}, {options.out / PLOT}", flush=True)


def check(options: Options) -> None:
    """Check the options before anything is written.

    Raises:
        ConfigError: naming the invalid option.
    """
    if options.images is not None and options.data is not None:
        raise ConfigError("give --images or --data, not both")
    if options.images is not None and not all((options.images / split).is_dir() for split in ("train", "test")):
        raise ConfigError(f"--images {options.images}: should be a folder with train/CLASS/ and test/CLASS/")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is a file; choose a folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; use --device cpu, or check the driver")
    for name in options.models:
        models.build(name, "relu", 10, (3, 32, 32))
    if {"accuracy", "launches"} & set(options.parts):
        config.load(options.recipe)
    if options.data is not None:
        _check_dataset(manifest.read(options.data))


def _check_dataset(dataset: Dataset) -> None:
    channels, training_images = dataset.image_shape[2], dataset.split("train").samples
    dataset.split("test")  # raises if there is none
    if channels != 3:
        raise ConfigError(f"{dataset.root}: images of {channels} channels; the benchmarks need 3")
    if training_images < _MIN_TRAINING_IMAGES:
        raise ConfigError(
            f"{dataset.root}: {training_images} training images; the benchmarks need {_MIN_TRAINING_IMAGES}"
        )


def _open_dataset(options: Options) -> Dataset:
    """Return the data set given by --data, or prepare one in OUT/data."""
    if options.data is not None:
        return manifest.read(options.data)
    images, side = options.images, 32
    request: dict[str, Any] = {"image_size": side}
    if images is not None:
        kind = "folder"

        def open_source(work: Path) -> Any:
            return Folder([images], side, work)
    else:
        kind, classes = "synthetic", 10
        train, test = (2_000, 500) if options.quick else (20_000, 4_000)
        request |= {"samples": train, "test_samples": test, "classes": classes}

        def open_source(work: Path) -> Any:
            return Synthetic(train, test, side, classes, 0)

    return blocks.prepare(options.out / "data", kind, request, open_source, blocks.Options())[0]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one torch thread in this process, as each process of a run does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _describe(context: Context) -> dict[str, Any]:
    """Describe the machine, the versions, the options and the data, for bench.json."""
    data = context.dataset.manifest
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "format": "distrain-bench",
        "version": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine.describe(), "gpus": gpus, "load_before": list(os.getloadavg())},
        "versions": machine.versions(),
        "options": {
            "repeats": context.repeats,
            "quick": context.quick,
            "device": context.device,
            "precision": context.precision,
            "models": list(context.models),
        },
        "data": {
            "source": data.source,
            "image_shape": data.image_shape,
            "splits": {str(name): split.samples for name, split in data.splits.items()},
        },
    }


def _write(out: Path, description: Mapping[str, Any], tables: Mapping[str, Table], finished: bool) -> None:
    """Write the parts measured so far; `finished` tells a complete file from that of an interrupted run."""
    parts = {name: table.as_dict() for name, table in tables.items()}
    content = {**description, "finished": finished, "parts": parts}
    files.replace(out / RESULT, json.dumps(content, indent=1, allow_nan=False) + "\n")
