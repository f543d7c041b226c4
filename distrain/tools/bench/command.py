"""`distrain bench`: check what was asked, prepare the data, measure part by part, write after each."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distrain import config, files, machine, models
from distrain.data import manifest
from distrain.data.manifest import Dataset
from distrain.data.prepare import Options, prepare
from distrain.data.sources.folder import Folder
from distrain.data.sources.synthetic import Synthetic
from distrain.errors import ConfigError
from distrain.tools.bench import CHEAP, PARTS, plot
from distrain.tools.bench.context import Context
from distrain.tools.bench.table import Table

RESULT, PLOT = "bench.json", "bench.png"
_FEWEST = 512
"""Training images: a batch of every part."""


@dataclass(frozen=True)
class Asked:
    """The command line."""

    parts: Sequence[str]
    images: Path | None
    data: Path | None
    out: Path
    repeats: int
    quick: bool
    device: str
    models: Sequence[str]
    recipe: Path
    target: float | None


def run(asked: Asked) -> None:
    """Measure, print a table for each part, and write OUT/bench.json and OUT/bench.png.

    Raises:
        ConfigError: before anything is measured or written: what was asked for cannot be had.
        DataError: the data cannot be read.
    """
    check(asked)
    device = "cuda" if asked.device != "cpu" and torch.cuda.is_available() else "cpu"
    asked.out.mkdir(parents=True, exist_ok=True)
    dataset = _dataset(asked)
    _check_dataset(dataset)
    (asked.out / PLOT).unlink(missing_ok=True)  # it would show another run's figures
    tables: dict[str, Table] = {}
    # In this order: parts that train here change how the process allocates, and reading comes before them.
    parts = [part for part in PARTS if part in (asked.parts or CHEAP)]
    with tempfile.TemporaryDirectory(prefix="work-", dir=asked.out) as work, _one_thread():
        assert isinstance(dataset.root, Path)
        context = Context(
            data=dataset.root.resolve(),
            dataset=dataset,
            work=Path(work).resolve(),
            images=asked.images.resolve() if asked.images is not None else None,
            repeats=asked.repeats,
            quick=asked.quick,
            device=device,
            models=tuple(asked.models) or (("net", "resnet9") if device == "cuda" else ("net",)),
            recipe=asked.recipe,
            target=asked.target,
        )
        found = describe(asked, context)
        _write(asked.out, found, tables, finished=False)
        for part in parts:
            measured: Table = importlib.import_module(f"distrain.tools.bench.{part}").measure(context)
            tables[part] = measured
            print(f"\n{measured.text()}", flush=True)
            _write(asked.out, found, tables, finished=part == parts[-1])
    plot.draw(tables, asked.out / PLOT)
    print(f"\n{asked.out / RESULT}, {asked.out / PLOT}", flush=True)


def check(asked: Asked) -> None:
    """Refuse what cannot be had, before anything is written.

    Raises:
        ConfigError: naming it.
    """
    if asked.images is not None and asked.data is not None:
        raise ConfigError("give --images or --data, not both")
    if asked.images is not None and not all((asked.images / split).is_dir() for split in ("train", "test")):
        raise ConfigError(f"--images {asked.images}: should be a folder with train/CLASS/ and test/CLASS/")
    if asked.out.exists() and not asked.out.is_dir():
        raise ConfigError(f"--out {asked.out}: is a file; choose another")
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this process sees no GPU; use --device cpu, or mend the driver")
    for name in asked.models:
        models.build(name, "relu", 10, (3, 32, 32))
    if "accuracy" in asked.parts:
        config.load(asked.recipe)
    if asked.data is not None:
        _check_dataset(manifest.read(asked.data))


def _check_dataset(dataset: Dataset) -> None:
    shape, train = dataset.manifest.image_shape, dataset.split("train").samples
    dataset.split("test")
    if shape[2] != 3:
        raise ConfigError(f"{dataset.root}: images of {shape[2]} channels; the parts need 3")
    if train < _FEWEST:
        raise ConfigError(f"{dataset.root}: {train} training images; the parts need {_FEWEST}")


def _dataset(asked: Asked) -> Dataset:
    """The data set that was given, or made in OUT/data."""
    if asked.data is not None:
        return manifest.read(asked.data)
    train, test = (2_000, 500) if asked.quick else (20_000, 4_000)
    request: dict[str, Any] = {"image_size": 32}
    if asked.images is None:
        request |= {"samples": train, "test_samples": test, "classes": 10}

    def source(work: Path) -> Any:
        return Folder([asked.images], 32, work) if asked.images is not None else Synthetic(train, test, 32, 10, 0)

    kind = "synthetic" if asked.images is None else "folder"
    return prepare(asked.out / "data", kind, request, source, Options())[0]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """What is measured in this process has one thread, as each process of a run has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(asked: Asked, context: Context) -> dict[str, Any]:
    """Where and of what the figures are."""
    found = context.dataset.manifest
    return {
        "format": "distrain-bench",
        "version": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine.describe(), "gpus": _gpus(), "load_before": list(os.getloadavg())},
        "versions": machine.versions(),
        "options": {
            "repeats": asked.repeats,
            "quick": asked.quick,
            "device": context.device,
            "models": list(context.models),
        },
        "data": {
            "source": found.source,
            "image_shape": found.image_shape,
            "splits": {str(name): split.samples for name, split in found.splits.items()},
        },
    }


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _write(out: Path, found: Mapping[str, Any], tables: Mapping[str, Table], finished: bool) -> None:
    """What there is so far; an interrupted run's file says that it is not finished."""
    parts = {name: table.as_dict() for name, table in tables.items()}
    content = {**found, "finished": finished, "parts": parts}
    files.replace(out / RESULT, json.dumps(content, indent=1, allow_nan=False) + "\n")
