"""`distrain prepare` makes a data set from a source; `distrain verify` checks that it has not changed.

1. Choose the samples of each split (limit, stratified val and test) and shuffle them. This depends only on the seed.
2. Distribute them to shards whose sizes differ by at most one.
3. Worker processes load, decode and write one shard at a time.
4. Move the shards to their final folders and write the manifest last.

Everything is written to OUT/.partial, so that an interrupted run never looks like a data set.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distrain import files, machine
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset, Manifest, Shard, Split
from distrain.data.order import Ints, split_permutation
from distrain.data.sources import Source, UnreadableError
from distrain.errors import ConfigError, DataError
from distrain.progress import Bar
from distrain.text import plural, printable, shortened

log = logging.getLogger("distrain")

DEFAULT_LANES = 64
SHARD_BYTES = 32 * 2**20
"""Target size of the largest shard, if the number of shards is not given."""

SplitName = Literal["train", "val", "test"]
_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_TEST_DRAW, _VAL_DRAW, _LIMIT_DRAW, _SHUFFLE_DRAW = 0, 1, 10, 20


@dataclass(frozen=True)
class Options:
    """Options of `prepare` that do not depend on the source."""

    seed: int = 0
    shards: int | None = None
    lanes: int | None = None
    limit: int | None = None
    val_fraction: float = 0.0
    test_fraction: float = 0.1
    skip_bad: int = 0


@dataclass(frozen=True)
class _Selection:
    """The samples of an output split: their split in the source, and their ids in final order."""

    source_split: str
    ids: Ints


@dataclass(frozen=True)
class _ShardResult:
    """A worker's result for one shard: its entry and a histogram per channel, or the samples that are unreadable."""

    split: SplitName
    shard: Shard | None
    histogram: Ints | None
    unreadable: list[tuple[int, str]]


def prepare(
    out: Path, kind: str, source_options: Mapping[str, Any], open_source: Callable[[Path], Source], options: Options
) -> tuple[Dataset, bool]:
    """Make a data set in `out`, or return the one that is already there.

    Args:
        out: the folder of the data set.
        kind: the name of the source.
        source_options: options of the source, for the manifest. Paths do not belong here: the manifest must not depend
            on the machine.
        open_source: opens the source. It may write files to the folder that it receives.
        options: the other options.

    Returns:
        The data set, and whether it was made by this call.

    Raises:
        ConfigError: `out` has other content, or the options contradict each other.
        DataError: the source cannot be read.
    """
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 0 or more and below 1")
    request = {"kind": kind, **source_options, **{k: v for k, v in vars(options).items() if k != "skip_bad"}}
    if (out / manifest.NAME).exists():
        return _existing(out, request), False
    created = not out.exists()
    work = _start(out)
    try:
        source = open_source(work)
        content, skipped = _write(source, work, options)
        new_manifest = Manifest(
            format="distrain-blocks",
            version=1,
            source={**request, "skipped": skipped},
            classes=source.classes,
            image_shape=list(source.image_shape),
            mean=content.mean,
            std=content.std,
            splits=content.splits,
        )
        _finish(out, work, new_manifest)
    except OSError as error:
        _remove(out, work, created)
        raise DataError(f"{error.filename or out}: {error.strerror or error}; nothing was kept in {out}") from error
    except BaseException:
        _remove(out, work, created)
        raise
    return manifest.read(out), True


def verify(dataset: Dataset) -> Iterator[str]:
    """Read all shards of a data set; yield one line for each error."""
    content = dataset.manifest
    entries = [(name, shard) for name, split in content.splits.items() for shard in split.shards]
    ids: dict[str, list[Ints]] = {}
    for name, shard in Bar("verify", entries):
        try:
            blocks = shards.read(dataset.root, shard, content.image_shape, len(content.classes), ("sha256", "xxh3_128"))
        except DataError as error:
            yield str(error)
            continue
        ids.setdefault(name, []).extend(block.ids for block in blocks)
    for split_name, parts in ids.items():
        values, counts = np.unique(np.concatenate(parts), return_counts=True)
        if (counts > 1).any():
            yield f"{dataset.root}/{split_name}: id {values[counts > 1][0]} occurs {counts[counts > 1][0]} times"


def choose(
    labels: Mapping[str, NDArray[np.int64]], excluded: Mapping[str, Collection[int]], options: Options
) -> dict[SplitName, _Selection]:
    """Choose and shuffle the samples of each split. Val and test are drawn from train if the source has none."""
    chosen: dict[SplitName, _Selection] = {}
    for split in _SPLITS:
        if split in labels:
            everything = np.arange(len(labels[split]), dtype=np.int64)
            dropped = np.array(sorted(excluded.get(split, ())), np.int64)
            chosen[split] = _Selection(split, np.setdiff1d(everything, dropped))
    draws: list[tuple[SplitName, float, int]] = [
        ("test", options.test_fraction, _TEST_DRAW),
        ("val", options.val_fraction, _VAL_DRAW),
    ]
    for split, fraction, draw in draws:
        if split not in labels and fraction > 0:
            train = chosen["train"].ids
            count = round(fraction * len(train))
            taken = stratified(labels["train"][train], count, options.seed, draw)
            chosen[split] = _Selection("train", train[taken])
            chosen["train"] = _Selection("train", np.delete(train, taken))
    for number, (split, part) in enumerate(sorted(chosen.items())):
        ids = part.ids
        if options.limit is not None and options.limit < len(ids):
            labels_here = labels[part.source_split][ids]
            ids = ids[np.sort(stratified(labels_here, options.limit, options.seed, _LIMIT_DRAW + number))]
        ids = ids[split_permutation(len(ids), options.seed, _SHUFFLE_DRAW + number)]
        chosen[split] = _Selection(part.source_split, ids)
    return chosen


def stratified(labels: NDArray[np.int64], count: int, seed: int, draw: int) -> Ints:
    """Return the indices of `count` random samples with the classes in proportion: int64 [count]."""
    shuffled = split_permutation(len(labels), seed, draw)
    _, first, sizes = np.unique(labels[shuffled], return_index=True, return_counts=True)
    taken, remainder = np.divmod(count * sizes, max(1, len(labels)))
    # Classes with the largest remainders get one more sample; ties go to the class that comes first after shuffling.
    taken[np.lexsort((first, -remainder))[: count - taken.sum()]] += 1
    by_class = np.argsort(labels[shuffled], kind="stable")
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return shuffled[np.sort(by_class[rank_in_class < np.repeat(taken, sizes)])]


def layout(samples: int, sample_bytes: int, num_shards: int | None, lanes: int | None) -> tuple[int, int]:
    """Return the number of shards and of lanes of a train split.

    Raises:
        ConfigError: the number of shards is not a multiple of the lanes, or above the number of samples.
    """
    if num_shards is None:
        lanes = lanes or min(DEFAULT_LANES, samples)
        per_lane = max(1, -(-samples * sample_bytes // (lanes * SHARD_BYTES)))
        num_shards = lanes * min(per_lane, max(1, samples // lanes))
    elif lanes is None:
        lanes = max(n for n in range(1, DEFAULT_LANES + 1) if num_shards % n == 0)
    if num_shards % lanes:
        raise ConfigError(f"--shards {num_shards} is not a multiple of --lanes {lanes}; choose a multiple of the lanes")
    if num_shards > samples:
        raise ConfigError(
            f"{plural(num_shards, 'shard')} for {plural(samples, 'training sample')};"
            " choose smaller --lanes or --shards"
        )
    return num_shards, lanes


@dataclass(frozen=True)
class _Content:
    """The manifest's entries that depend on the samples."""

    splits: dict[SplitName, Split]
    mean: list[float]
    std: list[float]


def _write(source: Source, work: Path, options: Options) -> tuple[_Content, int]:
    """Write all shards; return their description and the number of unreadable samples.

    If samples are unreadable, all samples are chosen again without them. With a limit, the samples that replace them
    may be unreadable too, so this repeats.
    """
    _check_labels(source)
    unreadable: dict[str, dict[int, str]] = {}
    while True:
        chosen = choose(source.labels, unreadable, options)
        if "train" not in chosen or not len(chosen["train"].ids):
            raise DataError("no training samples are left; use more images or smaller fractions")
        for split, part in chosen.items():
            if not len(part.ids):
                raise DataError(f"no samples are left for {split}; use more images or a larger --{split}-fraction")
            (work / split).mkdir(exist_ok=True)
        train = chosen["train"]
        present = np.bincount(source.labels[train.source_split][train.ids], minlength=len(source.classes))
        if not present.all():
            raise DataError(
                f"class {source.classes[int(present.argmin())]!r} has no training sample; use more images or a"
                " larger --limit"
            )
        lanes, tasks = _assign(source, chosen, work, options)
        results = list(_run(source, tasks))
        newly_unreadable = [(result.split, index, reason) for result in results for index, reason in result.unreadable]
        if not newly_unreadable:
            _warn_of_dropped(source, unreadable)
            return _describe(lanes, results, source), sum(len(reasons) for reasons in unreadable.values())
        for split, index, reason in newly_unreadable:
            unreadable.setdefault(chosen[split].source_split, {})[index] = reason
        if sum(len(reasons) for reasons in unreadable.values()) > options.skip_bad:
            _refuse(source, unreadable, options.skip_bad)
        for split in chosen:
            shutil.rmtree(work / split)


def _refuse(source: Source, unreadable: Mapping[str, Mapping[int, str]], allowed: int) -> None:
    lines = _one_line_each(source, unreadable)
    header = f"{len(lines)} unreadable among the sources, {allowed} allowed:"
    cure = f"repair or delete them, or drop them with --skip-bad {len(lines)}"
    raise DataError("\n  ".join([header, *shortened(lines, 10)]) + f"\n{cure}")


def _warn_of_dropped(source: Source, unreadable: Mapping[str, Mapping[int, str]]) -> None:
    """Log all dropped samples. Nothing else records which they are, as the manifest has no paths."""
    lines = _one_line_each(source, unreadable)
    if lines:
        log.warning("%s", "\n  ".join([f"{len(lines)} unreadable dropped:", *lines]))


def _one_line_each(source: Source, unreadable: Mapping[str, Mapping[int, str]]) -> list[str]:
    return [
        f"{printable(source.name(split, index))}: {reason}"
        for split, reasons in unreadable.items()
        for index, reason in sorted(reasons.items())
    ]


def _check_labels(source: Source) -> None:
    lines = []
    for split, labels in source.labels.items():
        wrong = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
        if len(wrong):
            more = f"; {len(wrong) - 1} more in {split}" if len(wrong) > 1 else ""
            lines.append(f"{printable(source.name(split, int(wrong[0])))}: label {labels[wrong[0]]}{more}")
    if lines:
        header = f"labels should be 0 … {len(source.classes) - 1}, a number for each class:"
        raise DataError("\n  ".join([header, *lines]))


_Task = tuple[SplitName, str, Path, str, Ints]


def _assign(
    source: Source, chosen: Mapping[SplitName, _Selection], work: Path, options: Options
) -> tuple[dict[SplitName, int], list[_Task]]:
    """Assign the samples to shards; return the number of lanes of each split, and a task for each shard."""
    sample_bytes = int(np.prod(source.image_shape))
    lanes: dict[SplitName, int] = {}
    tasks: list[_Task] = []
    for split, part in chosen.items():
        samples = len(part.ids)
        requested_shards, requested_lanes = options.shards, options.lanes
        if split != "train":
            # Evaluation works with any number of lanes that divides the shards: a small split gets fewer of both.
            if requested_shards is not None and requested_shards > samples:
                requested_shards = requested_lanes = samples
            elif requested_lanes is not None and requested_lanes > samples:
                requested_lanes = samples
        num_shards, lanes[split] = layout(samples, sample_bytes, requested_shards, requested_lanes)
        for number, ids in enumerate(np.array_split(part.ids, num_shards)):
            name = f"{split}/{number:05d}.tar"
            tasks.append((split, name, work / name, part.source_split, ids))
    return lanes, tasks


def _run(source: Source, tasks: list[_Task]) -> Iterator[_ShardResult]:
    """Run the tasks in worker processes, with a progress bar of samples; yield the results in order."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = max(1, min(machine.cores(), len(tasks)))
    total = sum(len(ids) for *_, ids in tasks)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, os.getpid()))
    try:
        with Bar("prepare", total=total) as bar:
            for result, (*_, ids) in zip(pool.map(_write_shard, tasks), tasks, strict=True):
                bar.update(len(ids))
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


_source: Source
"""The source, in a worker process. It is set once when the process starts."""


def _start_worker(source: Source, parent: int) -> None:
    global _source  # noqa: PLW0603 - the initializer of a pool can only set a global
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def exit_with_parent() -> None:  # a parent that is killed by SIGKILL cannot end its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _write_shard(task: _Task) -> _ShardResult:
    split, name, path, source_split, ids = task
    images = np.empty((len(ids), *_source.image_shape), np.uint8)
    unreadable = []
    for row, index in enumerate(ids.tolist()):
        try:
            images[row] = _source.load(source_split, index)
        except UnreadableError as error:
            unreadable.append((index, str(error)))
    if unreadable:
        return _ShardResult(split, None, None, unreadable)
    shards.write(path, shards.Block(images, _source.labels[source_split][ids], ids))
    histogram = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    return _ShardResult(split, shards.describe(path, name, len(ids)), histogram, [])


def _describe(lanes: Mapping[SplitName, int], results: Iterable[_ShardResult], source: Source) -> _Content:
    entries: dict[SplitName, list[Shard]] = {split: [] for split in lanes}
    histogram = np.zeros((source.image_shape[2], 256), np.int64)
    for result in results:
        assert result.shard is not None
        assert result.histogram is not None
        entries[result.split].append(result.shard)
        if result.split == "train":
            histogram += result.histogram
    # The histogram has integers, so mean and std have the same bits for any order of the sums.
    level = np.arange(256) / 255
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = (weight * level).sum(1)
    std = np.sqrt((weight * (level - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel is normalised to 0, not to 0 / 0
    splits = {
        split: Split(samples=sum(shard.samples for shard in of_split), lanes=lanes[split], shards=of_split)
        for split, of_split in sorted(entries.items(), key=lambda item: _SPLITS.index(item[0]))
    }
    return _Content(splits, mean.tolist(), std.tolist())


def _existing(out: Path, request: Mapping[str, Any]) -> Dataset:
    """Return the data set that is in `out`, if it was made with the requested options."""
    dataset = manifest.read(out)
    made_with = {key: value for key, value in dataset.manifest.source.items() if key != "skipped"}
    differing = sorted(key for key in {*made_with, *request} if made_with.get(key) != request.get(key))
    if differing:
        raise ConfigError(
            f"{out}: already has a data set that was prepared with other options ("
            + ", ".join(f"{key}: {made_with.get(key)}, now {request.get(key)}" for key in differing)
            + "); choose another --out, or delete it"
        )
    return dataset


def _start(out: Path) -> Path:
    """Make an empty OUT/.partial; remove the files of an interrupted run."""
    work = out / ".partial"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; choose another --out")
    if work.exists():
        for leftover in (work, *(out / split for split in _SPLITS)):
            shutil.rmtree(leftover, ignore_errors=True)
    elif out.exists() and any(entry.name != "lost+found" for entry in out.iterdir()):
        raise ConfigError(f"{out}: is neither empty nor a data set; choose another --out")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be created: {error.strerror}") from error
    return work


def _remove(out: Path, work: Path, created: bool) -> None:
    (out / manifest.NAME).unlink(missing_ok=True)  # first: without it, the folder is not a data set
    for leftover in (out if created else work, *(out / split for split in _SPLITS)):
        shutil.rmtree(leftover, ignore_errors=True)


def _finish(out: Path, work: Path, new_manifest: Manifest) -> None:
    for split in new_manifest.splits:
        for file in (work / split).iterdir():
            files.sync(file)
        (work / split).rename(out / split)
    files.sync(out)
    files.replace(out / manifest.NAME, manifest.to_json(new_manifest))
    shutil.rmtree(work)
