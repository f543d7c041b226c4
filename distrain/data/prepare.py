"""`distrain prepare`: from a source to a data set, and `distrain verify`: is it still what was written?

1. choose the samples of each split (limit, stratified val and test) and shuffle them, from the seed alone
2. deal them to shards whose sizes differ by at most one
3. worker processes load, decode and write one shard at a time
4. move the shards into place; write the manifest last

Everything is written under OUT/.partial, so an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

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
from tqdm import tqdm

from distrain import files, machine
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset, Manifest, Shard, Split
from distrain.data.order import Ints, split_permutation
from distrain.data.sources import Source, UnreadableError
from distrain.errors import ConfigError, DataError
from distrain.text import printable

DEFAULT_LANES = 64
SHARD_BYTES = 32 * 2**20
"""Aim for the largest shard, where the number of shards is not given."""

SplitName = Literal["train", "val", "test"]
_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_TEST_DRAW, _VAL_DRAW, _LIMIT_DRAW, _SHUFFLE_DRAW = 0, 1, 10, 20


@dataclass(frozen=True)
class Options:
    """What the user asked of `prepare`, beside the source itself."""

    seed: int = 0
    shards: int | None = None
    lanes: int | None = None
    limit: int | None = None
    val_fraction: float = 0.0
    test_fraction: float = 0.1
    skip_bad: int = 0


@dataclass(frozen=True)
class _Chosen:
    """Samples of an output split: where in the source they come from, in their final order."""

    source_split: str
    ids: Ints


@dataclass(frozen=True)
class _Written:
    """What a worker returns for one shard: its entry and a histogram per channel, or the samples it cannot read."""

    split: SplitName
    shard: Shard | None
    histogram: Ints | None
    bad: list[tuple[int, str]]


def prepare(
    out: Path, kind: str, asked: Mapping[str, Any], open_source: Callable[[Path], Source], options: Options
) -> tuple[Dataset, bool]:
    """Write a data set to `out`, or find the finished one there.

    Args:
        out: the folder to make.
        kind: the source's name.
        asked: what was asked of the source (no paths: the manifest says the same wherever it is made).
        open_source: opens the source; may lay files into the folder it is given.
        options: splits, shards and seed.

    Returns:
        The data set, and whether it was made now.

    Raises:
        ConfigError: `out` holds something else, or the numbers do not fit together.
        DataError: the source cannot be read.
    """
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 0 or more and below 1")
    request = {"kind": kind, **asked, **{k: v for k, v in vars(options).items() if k != "skip_bad"}}
    if (out / manifest.NAME).exists():
        return _found(out, request), False
    created = not out.exists()
    work = _start(out)
    try:
        source = open_source(work)
        splits, classes, skipped = _write(source, work, options)
        made = Manifest(
            format="distrain-blocks",
            version=1,
            source={**request, "skipped": skipped},
            classes=classes,
            image_shape=list(source.image_shape),
            mean=splits.mean,
            std=splits.std,
            splits=splits.splits,
        )
        _finish(out, work, made)
    except OSError as error:
        _remove(out, work, created)
        raise DataError(f"{error.filename or out}: {error.strerror or error}; nothing is left in {out}") from error
    except BaseException:
        _remove(out, work, created)
        raise
    return manifest.read(out), True


def verify(dataset: Dataset) -> Iterator[str]:
    """Read every shard of a data set; one line for each thing that is wrong."""
    found = dataset.manifest
    entries = [(name, shard) for name, split in found.splits.items() for shard in split.shards]
    ids: dict[str, list[Ints]] = {}
    for name, shard in tqdm(entries, desc="verify", unit="shard", disable=None):
        try:
            blocks = shards.read(dataset.root, shard, found.image_shape, len(found.classes), ("sha256", "xxh3_128"))
        except DataError as error:
            yield str(error)
            continue
        ids.setdefault(name, []).extend(block.ids for block in blocks)
    for split_name, parts in ids.items():
        values, counts = np.unique(np.concatenate(parts), return_counts=True)
        if (counts > 1).any():
            yield f"{dataset.root}/{split_name}: id {values[counts > 1][0]} occurs {counts[counts > 1][0]} times"


def choose(
    labels: Mapping[str, NDArray[np.int64]], bad: Mapping[str, Collection[int]], options: Options
) -> dict[SplitName, _Chosen]:
    """The samples of each split, shuffled. Val and test are drawn from train where the source has none."""
    chosen: dict[SplitName, _Chosen] = {}
    for split in _SPLITS:
        if split in labels:
            everything = np.arange(len(labels[split]), dtype=np.int64)
            chosen[split] = _Chosen(split, np.setdiff1d(everything, np.array(sorted(bad.get(split, ())), np.int64)))
    draws: list[tuple[SplitName, float, int]] = [
        ("test", options.test_fraction, _TEST_DRAW),
        ("val", options.val_fraction, _VAL_DRAW),
    ]
    for split, fraction, draw in draws:
        if split not in labels and fraction > 0:
            train = chosen["train"].ids
            count = round(fraction * len(train))
            taken = stratified(labels["train"][train], count, options.seed, draw)
            chosen[split] = _Chosen("train", train[taken])
            chosen["train"] = _Chosen("train", np.delete(train, taken))
    for number, (split, part) in enumerate(sorted(chosen.items())):
        ids = part.ids
        if options.limit is not None and options.limit < len(ids):
            labels_here = labels[part.source_split][ids]
            ids = ids[np.sort(stratified(labels_here, options.limit, options.seed, _LIMIT_DRAW + number))]
        ids = ids[split_permutation(len(ids), options.seed, _SHUFFLE_DRAW + number)]
        chosen[split] = _Chosen(part.source_split, ids)
    return chosen


def stratified(labels: NDArray[np.int64], count: int, seed: int, draw: int) -> Ints:
    """Indices of `count` samples drawn at random, each class in proportion: int64 [count]."""
    shuffled = split_permutation(len(labels), seed, draw)
    _, first, sizes = np.unique(labels[shuffled], return_index=True, return_counts=True)
    taken, remainder = np.divmod(count * sizes, max(1, len(labels)))
    # The largest remainders get what rounding down has left; of equal ones, those that the shuffle has first.
    taken[np.lexsort((first, -remainder))[: count - taken.sum()]] += 1
    by_class = np.argsort(labels[shuffled], kind="stable")
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return shuffled[np.sort(by_class[place < np.repeat(taken, sizes)])]


def layout(samples: int, sample_bytes: int, num_shards: int | None, lanes: int | None) -> tuple[int, int]:
    """(number of shards, lanes) of a train split.

    Raises:
        ConfigError: lanes do not divide shards, or there are more shards than samples.
    """
    if num_shards is None:
        lanes = lanes or min(DEFAULT_LANES, samples)
        per_lane = max(1, -(-samples * sample_bytes // (lanes * SHARD_BYTES)))
        num_shards = lanes * min(per_lane, max(1, samples // lanes))
    elif lanes is None:
        lanes = max(n for n in range(1, DEFAULT_LANES + 1) if num_shards % n == 0)
    if num_shards % lanes:
        raise ConfigError(f"--lanes {lanes} does not divide --shards {num_shards}; choose a multiple of the lanes")
    if num_shards > samples:
        raise ConfigError(f"{num_shards} shards for {samples} training samples; choose --lanes and --shards below")
    return num_shards, lanes


@dataclass(frozen=True)
class _Result:
    splits: dict[SplitName, Split]
    mean: list[float]
    std: list[float]


def _write(source: Source, work: Path, options: Options) -> tuple[_Result, list[str], int]:
    """Write all shards; what cannot be read is left out and the rest dealt again: with a limit, others take its place
    and may be unreadable as well.
    """
    _check_labels(source)
    bad: dict[str, dict[int, str]] = {}
    while True:
        chosen = choose(source.labels, bad, options)
        if "train" not in chosen or not len(chosen["train"].ids):
            raise DataError("no training samples are left; give more images or smaller fractions")
        for split, part in chosen.items():
            if not len(part.ids):
                raise DataError(f"no samples are left for {split}; give more images or a larger --{split}-fraction")
            (work / split).mkdir(exist_ok=True)
        train = chosen["train"]
        present = np.bincount(source.labels[train.source_split][train.ids], minlength=len(source.classes))
        if not present.all():
            raise DataError(
                f"class {source.classes[int(present.argmin())]!r} has no training sample; give more images, or a"
                " larger --limit"
            )
        lanes, tasks = _deal(source, chosen, work, options)
        written = list(_run(source, tasks))
        newly_bad = [(result.split, index, why) for result in written for index, why in result.bad]
        if not newly_bad:
            _tell_skipped(source, bad)
            return _collect(lanes, written, source), source.classes, sum(len(ids) for ids in bad.values())
        for split, index, why in newly_bad:
            bad.setdefault(chosen[split].source_split, {})[index] = why
        if sum(len(ids) for ids in bad.values()) > options.skip_bad:
            _refuse(source, bad, options.skip_bad)
        for split in chosen:
            shutil.rmtree(work / split)


def _refuse(source: Source, bad: Mapping[str, Mapping[int, str]], allowed: int) -> None:
    lines = _named(source, bad)
    more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
    raise DataError(
        "\n".join([f"{len(lines)} unreadable among the sources, {allowed} allowed:", *lines[:10], *more])
        + f"\nmend or delete them, or leave them out with --skip-bad {len(lines)}"
    )


def _tell_skipped(source: Source, bad: Mapping[str, Mapping[int, str]]) -> None:
    """All of them: nothing else says which they were, as the manifest holds no paths."""
    lines = _named(source, bad)
    if lines:
        print("\n".join([f"warning: {len(lines)} unreadable left out:", *lines]), file=sys.stderr, flush=True)


def _named(source: Source, bad: Mapping[str, Mapping[int, str]]) -> list[str]:
    return [
        f"  {printable(source.name(split, index))}: {why}"
        for split, found in bad.items()
        for index, why in sorted(found.items())
    ]


def _check_labels(source: Source) -> None:
    lines = []
    for split, labels in source.labels.items():
        wrong = np.flatnonzero((labels < 0) | (labels >= len(source.classes)))
        if len(wrong):
            more = f"; {len(wrong) - 1} more in {split}" if len(wrong) > 1 else ""
            lines.append(f"{printable(source.name(split, int(wrong[0])))}: label {labels[wrong[0]]}{more}")
    if lines:
        told = f"labels should be 0 … {len(source.classes) - 1}, a number for each class:"
        raise DataError("\n  ".join([told, *lines]))


_Task = tuple[SplitName, str, Path, str, Ints]


def _deal(
    source: Source, chosen: Mapping[SplitName, _Chosen], work: Path, options: Options
) -> tuple[dict[SplitName, int], list[_Task]]:
    """Lanes of each split, and a task for each shard."""
    sample_bytes = int(np.prod(source.image_shape))
    lanes_of: dict[SplitName, int] = {}
    tasks: list[_Task] = []
    for split, part in chosen.items():
        samples = len(part.ids)
        asked_shards, asked_lanes = options.shards, options.lanes
        if split != "train":
            # Evaluation asks no more of lanes than to divide the shards: a small split takes fewer of both.
            if asked_shards is not None and asked_shards > samples:
                asked_shards = asked_lanes = samples
            elif asked_lanes is not None and asked_lanes > samples:
                asked_lanes = samples
        num_shards, lanes_of[split] = layout(samples, sample_bytes, asked_shards, asked_lanes)
        for number, ids in enumerate(np.array_split(part.ids, num_shards)):
            name = f"{split}/{number:05d}.tar"
            tasks.append((split, name, work / name, part.source_split, ids))
    return lanes_of, tasks


def _run(source: Source, tasks: list[_Task]) -> Iterator[_Written]:
    """Results of all tasks in order, from worker processes, with a progress bar over the samples."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = max(1, min(machine.cores(), len(tasks)))
    total = sum(len(ids) for *_, ids in tasks)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (source, os.getpid()))
    try:
        with tqdm(total=total, desc="prepare", unit="image", unit_scale=True, disable=None) as bar:
            for result, (*_, ids) in zip(pool.map(_write_shard, tasks), tasks, strict=True):
                bar.update(len(ids))
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


_source: Source
"""The source of a worker process, set once when it starts."""


def _start_worker(source: Source, parent: int) -> None:
    global _source  # noqa: PLW0603 - a pool's initializer has no other place
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def leave_with_parent() -> None:  # a parent killed with SIGKILL cannot end its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_shard(task: _Task) -> _Written:
    split, name, path, source_split, ids = task
    images = np.empty((len(ids), *_source.image_shape), np.uint8)
    bad = []
    for place, index in enumerate(ids.tolist()):
        try:
            images[place] = _source.load(source_split, index)
        except UnreadableError as error:
            bad.append((index, str(error)))
    if bad:
        return _Written(split, None, None, bad)
    shards.write(path, shards.Block(images, _source.labels[source_split][ids], ids))
    histogram = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    return _Written(split, shards.describe(path, name, len(ids)), histogram, [])


def _collect(lanes: Mapping[SplitName, int], written: Iterable[_Written], source: Source) -> _Result:
    entries: dict[SplitName, list[Shard]] = {split: [] for split in lanes}
    histogram = np.zeros((source.image_shape[2], 256), np.int64)
    for result in written:
        assert result.shard is not None
        assert result.histogram is not None
        entries[result.split].append(result.shard)
        if result.split == "train":
            histogram += result.histogram
    # Moments of integers: the same bits, whatever the order in which the workers finished.
    level = np.arange(256) / 255
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = (weight * level).sum(1)
    std = np.sqrt((weight * (level - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a channel that is the same everywhere becomes 0 and not 0 / 0
    splits = {
        split: Split(samples=sum(shard.samples for shard in found), lanes=lanes[split], shards=found)
        for split, found in sorted(entries.items(), key=lambda item: _SPLITS.index(item[0]))
    }
    return _Result(splits, mean.tolist(), std.tolist())


def _found(out: Path, request: Mapping[str, Any]) -> Dataset:
    """The finished data set in `out`, if it is the one that is asked for."""
    dataset = manifest.read(out)
    made = {key: value for key, value in dataset.manifest.source.items() if key != "skipped"}
    differ = sorted(key for key in {*made, *request} if made.get(key) != request.get(key))
    if differ:
        raise ConfigError(
            f"{out}: already holds a data set prepared otherwise ("
            + ", ".join(f"{key}: {made.get(key)}, asked for {request.get(key)}" for key in differ)
            + "); choose another --out, or delete it"
        )
    return dataset


def _start(out: Path) -> Path:
    """An empty OUT/.partial; what an interrupted run left is removed."""
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
        raise ConfigError(f"{out}: cannot be made: {error.strerror}") from error
    return work


def _remove(out: Path, work: Path, created: bool) -> None:
    (out / manifest.NAME).unlink(missing_ok=True)  # first: without it nothing looks finished
    for leftover in (out if created else work, *(out / split for split in _SPLITS)):
        shutil.rmtree(leftover, ignore_errors=True)


def _finish(out: Path, work: Path, made: Manifest) -> None:
    for split in made.splits:
        for file in (work / split).iterdir():
            files.sync(file)
        (work / split).rename(out / split)
    files.sync(out)
    files.replace(out / manifest.NAME, manifest.to_json(made))
    shutil.rmtree(work)
