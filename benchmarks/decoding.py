"""Decoding: photos in tar files to batches of random crops; compared with other loaders of the same tar files.

The photos are generated, 375×500 JPEG files of 65 kB (`benchmarks.photos`), and stay in OUT/photos. Each loader runs in
a process of its own (`benchmarks.loaders`) and uses all cores that it may use. Loaders whose library is not installed
(`pip install -e '.[bench]'`) are named in the table.

- CPU time of an image: of the process and its workers. It holds while other programs use the machine too
- images/s after the first batch, and seconds to the first batch
- memory: the largest sum over the process and its workers, sampled in one more turn, which is not timed: of their PSS,
  in which memory that processes have in common counts once, and of their RSS
- limit: decoding alone, of images in memory, which are not resized
- waiting: fraction of the time that steps of `distrain train` wait for data, where a step is slower than decoding
- resume: a new reader in the middle of an epoch, in a fresh process: seconds to its first batch, and bytes read
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import photos
from benchmarks.commands import call_program, speed_after_warm_up, timed_keys, train
from benchmarks.context import Context
from benchmarks.loaders import BATCH, LOADERS, SIDE, open_index
from benchmarks.reader import decoded_batches, training_order
from benchmarks.table import Row, Table, ratio
from distrain import machine
from distrain.data.manifest import Dataset

_DISTRAIN = "distrain"
_FIGURES = {"cpu_ms": "CPU ms/image", "images_per_second": "images/s", "first_batch": "s to the first batch"}
_SLOW_BATCH = 16
"""Batch size of the run that may wait for data: on a core, `net` takes some tenths of a second for a step."""

_MEMORY_INTERVAL = 0.1
"""Seconds between two samples of a process's memory."""

_MEMORY = ("PSS", "RSS")

_THREADS = (1, 2, 7)
"""Numbers of threads whose batches must be the same."""


def measure(context: Context) -> Table:
    """Measure all loaders that are installed."""
    folder = context.out / f"photos-{context.photos}"
    photos.write_tars(folder / "tars", context.photos)
    dataset = open_index(folder)
    rows, missing = _take_turns(context, folder)
    peaks = {name: _peak_memory(context, folder, name) for name in rows["cpu_ms"]}
    memory = {
        kind: {name: Row(name, f"MiB ({kind})", [peak[kind]]) for name, peak in peaks.items()} for kind in _MEMORY
    }
    return Table(
        f"Decoding of photos: batches of {BATCH} of {SIDE}×{SIDE}, {machine.cores()} cores",
        [
            *(row for of_unit in rows.values() for row in of_unit.values()),
            *(row for of_kind in memory.values() for row in of_kind.values()),
            _waiting(context, dataset),
            *_resume(context, dataset),
        ],
        _ratios(rows, memory),
        [*(f"not measured: {name} ({reason})" for name, reason in missing.items()), _same_batches(dataset)],
    )


def _take_turns(context: Context, folder: Path) -> tuple[dict[str, dict[str, Row]], dict[str, str]]:
    """Measure each loader in turn; return rows by figure and loader, and why each of the others cannot run."""
    names = list(context.loaders or LOADERS)
    rows: dict[str, dict[str, Row]] = {key: {} for key in _FIGURES}
    missing: dict[str, str] = {}
    for name in tqdm(names * context.repeats, desc="decoding", unit="sample", disable=None, leave=False):
        if name in missing:
            continue
        result = call_program("loaders", name, folder, context.photo_epochs)
        if "missing" in result:
            missing[name] = result["missing"]
            continue
        for key, unit in _FIGURES.items():
            rows[key].setdefault(name, Row(name, unit, [])).samples.append(result[key])
    return rows, missing


def _ratios(rows: Mapping[str, Mapping[str, Row]], memory: Mapping[str, Mapping[str, Row]]) -> list[Row]:
    """Divide distrain's CPU time, turn by turn, its best images/s and its memory by those of each other loader."""
    best = {name: replace(row, samples=[max(row.samples)]) for name, row in rows["images_per_second"].items()}
    compared = {"CPU time": rows["cpu_ms"], "best images/s": best}
    compared |= {f"memory ({kind})": of_kind for kind, of_kind in memory.items()}
    return [
        replace(ratio(of_loader[_DISTRAIN], row), name=f"{what}: {_DISTRAIN} / {name}")
        for what, of_loader in compared.items()
        for name, row in of_loader.items()
        if name != _DISTRAIN
    ]


def _peak_memory(context: Context, folder: Path, name: str) -> dict[str, float]:
    """Return the largest PSS and RSS of a loader's process and its workers together, in MiB."""
    peaks, ended = dict.fromkeys(_MEMORY, 0), threading.Event()

    def sample() -> None:
        while not ended.wait(_MEMORY_INTERVAL):
            processes = [_memory(process) for process in psutil.Process().children(recursive=True)]
            for kind, *sizes in zip(_MEMORY, *processes, strict=True):
                peaks[kind] = max(peaks[kind], sum(sizes))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        call_program("loaders", name, folder, context.photo_epochs)
    finally:
        ended.set()
        sampler.join()
    return {kind: peak / 2**20 for kind, peak in peaks.items()}


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Return the PSS and RSS of a process in bytes: `_MEMORY`."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0, 0  # it has ended
    return int(memory.pss), int(memory.rss)


def _waiting(context: Context, dataset: Dataset) -> Row:
    """Return the percentage of the time that a run waits for data whose steps are slower than decoding."""
    row = Row("distrain train: waits for data", "%", [])
    context = replace(context, dataset=dataset, precision="fp32")
    steps, run = 5 if context.quick else 50, context.work / "photos"
    keys = {
        **timed_keys(context, "net", _SLOW_BATCH),
        "train.max_steps": steps,
        "log.every_steps": steps // 5,
        "data.image_size": SIDE,
        "augment.crop_scale": "[0.08, 1]",
    }
    for _ in range(context.repeats):
        train(context, run, keys)
        row.samples.append(100 * speed_after_warm_up(run).waiting)
    return row


def _resume(context: Context, dataset: Dataset) -> list[Row]:
    """Return seconds to the first batch in the middle of an epoch, and the mebibytes read until then."""
    results = [call_program("resume", dataset.root, BATCH, SIDE) for _ in range(context.repeats)]
    return [
        Row("distrain, resume in the middle of an epoch", "s", [result["seconds"] for result in results]),
        Row("distrain, read until its first batch", "MiB read", [result["read_mib"] for result in results]),
    ]


def _same_batches(dataset: Dataset) -> str:
    """Compare the batches of an epoch decoded by 1, 2 and 7 threads."""
    digests = {threads: _digest(dataset, threads) for threads in _THREADS}
    same = len(set(digests.values())) == 1
    numbers = ", ".join(map(str, _THREADS))
    return f"batches of {numbers} threads: {'the same' if same else 'DIFFERENT'} sha256 {digests[1][:16]}"


def _digest(dataset: Dataset, threads: int) -> str:
    digest, steps = hashlib.sha256(), range(training_order(dataset, BATCH).steps_per_epoch)
    with closing(decoded_batches(dataset, BATCH, steps, threads)) as batches:
        for (batch,) in batches:
            for part in (batch.images.numpy(), batch.labels.numpy(), batch.ids, batch.positions):
                digest.update(part.tobytes())
    return digest.hexdigest()
