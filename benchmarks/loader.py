"""The loader for other training loops, `distrain.batches`, compared with the reading of `distrain train`.

Each sample is a fresh process (`benchmarks.other_loop`) that reads whole epochs: of blocks, to batches of 512; of an
index of generated photos, to batches of 64 random crops of 224×224. Nothing is cached but the files, by the system.

- images/s, and CPU time of an image, of all threads; alone: without `distrain.keep_freed_memory`, which a run on CPUs
  always has
- middle of an epoch (`benchmarks.resume`): seconds from the call of `distrain.batches` to the first batch, after the
  files were removed from the page cache; and the bytes read until then
"""

from __future__ import annotations

from dataclasses import replace

from tqdm import tqdm

from benchmarks import photos
from benchmarks.commands import call_program
from benchmarks.context import Context
from benchmarks.loaders import BATCH as PHOTO_BATCH
from benchmarks.loaders import SIDE, open_index
from benchmarks.reader import BATCH
from benchmarks.table import Row, Table, ratio

_READERS = {"trainer": "distrain train", "batches": "distrain.batches", "plain": "distrain.batches alone"}
_FIGURES = {"images_per_second": "images/s", "cpu_ms": "CPU ms/image"}
_FIRST_BATCH = {"seconds": "s", "read_mib": "MiB read"}


def measure(context: Context) -> Table:
    """Measure both readers, on blocks and on an index."""
    folder = context.out / f"photos-{context.photos}"
    photos.write_tars(folder / "tars", context.photos)
    data_sets = {
        "blocks": (context.dataset.root, BATCH, 0),
        "photos": (open_index(folder).root, PHOTO_BATCH, SIDE),
    }
    epochs = {"blocks": 2 if context.quick else 20, "photos": context.photo_epochs}
    rows: dict[str, list[Row]] = {}
    for data in tqdm([*data_sets] * context.repeats, desc="loader", unit="turn", disable=None, leave=False):
        for reader, name in _READERS.items():
            result = call_program("other_loop", reader, *data_sets[data], epochs[data])
            _add(rows, f"{name}, {data}", _FIGURES, result)
        result = call_program("resume", *data_sets[data])
        _add(rows, f"distrain.batches, {data}, first batch in the middle of an epoch", _FIRST_BATCH, result)
    return Table(
        "The loader for other training loops, one process",
        [row for of_name in rows.values() for row in of_name],
        [
            replace(ratio(numerator, denominator), name=f"{numerator.name} / {_READERS['trainer']}: {numerator.unit}")
            for data in data_sets
            for name in list(_READERS.values())[1:]
            for numerator, denominator in zip(
                rows[f"{name}, {data}"], rows[f"{_READERS['trainer']}, {data}"], strict=True
            )
        ],
    )


def _add(rows: dict[str, list[Row]], name: str, units: dict[str, str], result: dict[str, float]) -> None:
    """Add the figures of a sample to the rows of a name, one for each unit."""
    of_name = rows.setdefault(name, [Row(name, unit, []) for unit in units.values()])
    for row, key in zip(of_name, units, strict=True):
        row.samples.append(result[key])
