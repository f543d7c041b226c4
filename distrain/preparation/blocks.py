"""`distrain prepare` makes a data set from a source.

1. Choose the samples of each split (limit, stratified val and test) and shuffle them. This depends only on the seed.
2. Distribute them to shards whose sizes differ by at most one.
3. Worker processes load, decode and write one shard at a time.
4. If samples are unreadable, and may be dropped: choose again without them. What is decoded is not decoded again.
5. Move the shards to their final folders and write the manifest last.

Everything is written to OUT/.partial, so that an interrupted run never looks like a data set.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from distrain import address, machine
from distrain.data import manifest, shards
from distrain.data.manifest import Dataset, IndexManifest, Manifest, Shard, Split
from distrain.data.order import Ints, split_permutation
from distrain.data.pillow import UnreadableError, recorded_warnings
from distrain.errors import AgainError, ConfigError, DataError
from distrain.preparation import pool
from distrain.preparation.ownership import OutputFolder
from distrain.preparation.remarks import Remark, Sample, remarks_on, report
from distrain.preparation.sources import Source
from distrain.progress import Bar
from distrain.text import named, plural, printable, shortened

log = logging.getLogger("distrain")

DEFAULT_LANES = 64
_DROPPED = 0.03
"""Maximum part of the training samples that an epoch drops, as shards have different sizes, with the default lanes."""
DEFAULT_TEST_FRACTION = 0.1
SHARD_BYTES = 32 * 2**20
"""Target size of the largest shard, if the number of shards is not given."""

_SHARD_OVERHEAD = 16 * 2**10
"""Maximum of the bytes of a shard's headers, and what fills the tar's last record."""

FIXED_BY_OPTIONS = ("cifar10", "synthetic", "webdataset")
"""Sources whose options say which samples they have."""

RESULTS = ("skipped", "listed", "labels", "mixing")
"""Entries of a manifest's `source` that are not options, but were measured."""

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
_TEST_DRAW, _VAL_DRAW, _LIMIT_DRAW, _SHUFFLE_DRAW = 0, 1, 10, 20


@dataclass(frozen=True)
class Options:
    """Options of `prepare` that do not depend on the source."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    shards: Annotated[int, Field(ge=1)] | None = None
    lanes: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """None: `DEFAULT_TEST_FRACTION` if the source has no test split."""
    skip_bad: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Selection:
    """The samples of an output split: their split in the source, and their ids in final order."""

    source_split: str
    ids: Ints


Writer = Callable[[Any, OutputFolder, Options, Mapping[str, Any]], "tuple[Path, list[str], Manifest | IndexManifest]"]
"""A function that writes a data set from a source, in the folder's `work`, with options, for a request.

It returns the folder of what it wrote, the names in it that belong to the data set, and the manifest."""


@dataclass(frozen=True)
class _ShardResult:
    """A worker's result for one shard.

    Attributes:
        shard: its entry in the manifest; None if samples are unreadable.
        histogram: of the pixels, for each channel.
        unreadable: indices and reasons of the samples that are not in the file.
        remarks: indices of samples, and what should be known about them.
    """

    shard: Shard | None
    histogram: Ints
    unreadable: list[tuple[int, str]]
    remarks: list[tuple[int, list[Remark]]]


def prepare(
    out: Path,
    kind: str,
    source_options: Mapping[str, Any],
    open_source: Callable[[Path], Any],
    options: Options,
    write: Writer | None = None,
    resumable: str | None = None,
) -> tuple[Dataset, bool]:
    """Make a data set in `out`, or return the one that is already there.

    Args:
        out: the folder of the data set.
        kind: the name of the source.
        source_options: options of the source, for the manifest. Paths do not belong here: the manifest must not depend
            on the machine.
        open_source: opens the source. It may write files to the folder that it receives.
        options: the other options.
        write: writes the data set; None: as blocks.
        resumable: name of a folder, in the one that `open_source` receives, that a failure leaves for the next attempt.

    Returns:
        The data set, and whether it was made by this call.

    Raises:
        ConfigError: `out` has other content, or the options contradict each other or the source.
        DataError: the source cannot be read.
        AgainError: another process is preparing a data set in `out`, or a worker process was killed.
        CrashedError: a worker process crashed.
    """
    for name in ("val_fraction", "test_fraction"):
        if not 0 <= (getattr(options, name) or 0) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 0 or more and below 1")
    request = {"kind": kind, **source_options, **{k: v for k, v in vars(options).items() if k != "skip_bad"}}
    if options.test_fraction is None:
        request["test_fraction"] = DEFAULT_TEST_FRACTION
    if address.is_address(out):
        raise ConfigError(f"--out {printable(out)}: is an address; choose a folder, and upload it when it is complete")
    if (out / manifest.NAME).exists():
        return _existing(out, request, open_source), False
    folder = OutputFolder(out, resumable)
    try:
        if (out / manifest.NAME).exists():  # another process has just finished it
            folder.discard()
            return _existing(out, request, open_source), False
        source = open_source(folder.work)
        check_source(source, options)
        root, names, new_manifest = (write or write_blocks)(source, folder, options, request)
        folder.finish(root, names, manifest.to_json(new_manifest))
    except OSError as error:
        folder.discard()
        remains = "run the same command again: it continues" if resumable else f"nothing was kept in {out}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remains = f"free some space, and {remains}" if resumable else f"{remains}; free some space"
        raise DataError(f"{error.filename or out}: {error.strerror or error}; {remains}") from error
    except BaseException:
        folder.discard()
        raise
    return manifest.read(out), True


def choose(
    labels: Mapping[str, NDArray[np.int64]], excluded: Mapping[str, Collection[int]], options: Options
) -> dict[SplitName, Selection]:
    """Choose and shuffle the samples of each split. Val and test are drawn from train if the source has none."""
    chosen: dict[SplitName, Selection] = {}
    for split in SPLITS:
        if split in labels:
            everything = np.arange(len(labels[split]), dtype=np.int64)
            dropped = np.array(sorted(excluded.get(split, ())), np.int64)
            chosen[split] = Selection(split, np.setdiff1d(everything, dropped))
    test_fraction = DEFAULT_TEST_FRACTION if options.test_fraction is None else options.test_fraction
    draws: list[tuple[SplitName, float, int]] = [
        ("test", test_fraction, _TEST_DRAW),
        ("val", options.val_fraction, _VAL_DRAW),
    ]
    for split, fraction, draw in draws:
        if split not in labels and fraction > 0:
            train = chosen["train"].ids
            count = round(fraction * len(train))
            taken = stratified(labels["train"][train], count, options.seed, draw)
            chosen[split] = Selection("train", train[taken])
            chosen["train"] = Selection("train", np.delete(train, taken))
    for number, (split, part) in enumerate(sorted(chosen.items())):
        ids = part.ids
        if options.limit is not None and options.limit < len(ids):
            labels_here = labels[part.source_split][ids]
            ids = ids[np.sort(stratified(labels_here, options.limit, options.seed, _LIMIT_DRAW + number))]
        ids = ids[split_permutation(len(ids), options.seed, _SHUFFLE_DRAW + number)]
        chosen[split] = Selection(part.source_split, ids)
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


def layout(
    samples: int,
    sample_bytes: float,
    num_shards: int | None,
    lanes: int | None,
    default_shards: Callable[[int, float, int], int] | None = None,
) -> tuple[int, int]:
    """Return the number of shards and of lanes of a train split.

    Args:
        samples: its number of samples.
        sample_bytes: mean size of a sample.
        num_shards: number of shards; None: the default.
        lanes: number of lanes; None: the default.
        default_shards: returns the number of shards of `samples`, `sample_bytes` and lanes; None: that of blocks.

    Raises:
        ConfigError: the number of shards is not a multiple of the lanes, or above the number of samples.
    """
    default_shards = default_shards or _default_shards
    if num_shards is None:
        lanes = lanes or _default_lanes(samples, sample_bytes, default_shards)
        num_shards = default_shards(samples, sample_bytes, lanes)
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


def _default_lanes(samples: int, sample_bytes: float, default_shards: Callable[[int, float, int], int]) -> int:
    """Return the largest number of lanes with which an epoch drops few samples; a power of two if one of 8 … 64 does.

    An epoch uses as many samples of each shard as the smallest one has.
    """

    def drops_few(lanes: int) -> bool:
        return lanes <= samples and samples % default_shards(samples, sample_bytes, lanes) <= _DROPPED * samples

    candidates: list[int] = [DEFAULT_LANES, 32, 16, 8, *range(DEFAULT_LANES - 1, 0, -1)]
    return next(lanes for lanes in candidates if drops_few(lanes))


def _default_shards(samples: int, sample_bytes: float, lanes: int) -> int:
    per_lane = max(1, math.ceil(samples * sample_bytes / (lanes * SHARD_BYTES)))
    return lanes * min(per_lane, max(1, samples // lanes))


def layout_of(
    split: str,
    samples: int,
    sample_bytes: float,
    options: Options,
    default_shards: Callable[[int, float, int], int] | None = None,
) -> tuple[int, int]:
    """Return the number of shards and of lanes of a split. The other arguments and errors are those of `layout`."""
    num_shards, lanes = options.shards, options.lanes
    if split != "train":
        # Evaluation works with any number of lanes that divides the shards: a small split gets fewer of both.
        if num_shards is not None and num_shards > samples:
            num_shards = lanes = samples
        elif lanes is not None and lanes > samples:
            lanes = samples
    return layout(samples, sample_bytes, num_shards, lanes, default_shards)


@dataclass(frozen=True)
class _Content:
    """The manifest's entries that depend on the samples."""

    splits: dict[SplitName, Split]
    mean: list[float]
    std: list[float]


class _Task(NamedTuple):
    """A shard to write: its output split, name and file, and its samples in the source."""

    split: SplitName
    name: str
    path: Path
    source_split: str
    ids: Ints


def write_blocks(
    source: Source, folder: OutputFolder, options: Options, request: Mapping[str, Any], dropped: Sequence[str] = ()
) -> tuple[Path, list[str], Manifest]:
    """Write a data set of blocks; return the folder with its splits, their names, and its manifest.

    `dropped` has a line for each sample that the source does not have, as it cannot be read.
    """
    check_unreadable(dropped, options.skip_bad)
    root, content, skipped = _write(source, folder, options, request, dropped)
    new_manifest = Manifest(
        format="distrain-blocks",
        version=1,
        source={**request, **listed(source), "skipped": skipped},
        classes=source.classes,
        image_shape=list(source.image_shape),
        mean=content.mean,
        std=content.std,
        splits=content.splits,
    )
    return root, list(content.splits), new_manifest


def _write(
    source: Source,
    folder: OutputFolder,
    options: Options,
    source_options: Mapping[str, Any],
    dropped: Sequence[str],
) -> tuple[Path, _Content, int]:
    """Write all shards; return their folder, their description and the number of unreadable samples.

    If samples are unreadable, all samples are chosen again without them. With a limit, the samples that replace them
    may be unreadable too, so this repeats. Samples that are decoded already are copied.
    """
    unreadable: dict[str, dict[int, str]] = {}
    remarks: dict[Sample, list[Remark]] = {}
    decoded: Source = source
    for attempt in itertools.count():
        root, previous = (folder.work / f"attempt-{number}" for number in (attempt, attempt - 1))
        chosen = choose(source.labels, unreadable, options)
        check_chosen(source, chosen, options)
        lanes, tasks = _assign(source, chosen, root, options)
        if not _has_space(folder.path, source, tasks, required=attempt == 0):
            shutil.rmtree(previous)
            decoded = source
        for split in chosen:
            (root / split).mkdir(parents=True)
        results = list(_run(decoded, tasks))
        shutil.rmtree(previous, ignore_errors=True)
        for task, result in zip(tasks, results, strict=True):
            for index, of_sample in result.remarks:
                remarks.setdefault((task.source_split, index), of_sample)
            unreadable.setdefault(task.source_split, {}).update(result.unreadable)
        if not any(result.unreadable for result in results):
            break
        check_unreadable([*dropped, *one_line_each(source, unreadable)], options.skip_bad)
        decoded = _Decoded(source, tasks, results)
    lines = [*dropped, *one_line_each(source, unreadable)]
    warn_of_dropped(lines)
    used = {(task.source_split, index) for task in tasks for index in task.ids.tolist()} if remarks else set()
    report(
        {sample: remarks[sample] for sample in sorted(remarks) if sample in used},
        lambda sample: source.name(*sample),
        sum(len(task.ids) for task in tasks),
        max(int(np.flatnonzero(result.histogram.sum(0))[-1]) for result in results),
        source_options,
    )
    report_limits(chosen, lanes, source, options)
    return root, _describe(lanes, tasks, results, source), len(lines)


def check_chosen(source: Source, chosen: Mapping[SplitName, Selection], options: Options) -> None:
    """Check that all splits have samples, and train has some of each class."""
    if "train" not in chosen or not len(chosen["train"].ids):
        raise DataError("no training samples are left; use more images or smaller fractions")
    for split, part in chosen.items():
        if not len(part.ids):
            raise DataError(f"no samples are left for {split}; use more images or a larger --{split}-fraction")
    labels = {source.classes[label] for label in np.unique(source.labels["train"])}
    missing = _missing_classes(source, chosen["train"])
    lost = [name for name in missing if name in labels]
    if lost:
        drawn = [f"--{split}-fraction" for split in chosen if split != "train" and split not in source.labels]
        cures = [f"a smaller {' or '.join(drawn)}"] if drawn else []
        cures += [] if options.limit is None else ["a larger --limit"]
        raise DataError(f"train has no image of {_named_classes(lost)}; use {' or '.join(['more images', *cures])}")
    if missing == ["0"]:
        log.warning("no training sample has the label 0: are the labels counted from 1? Class 0 is never trained")
    elif missing:
        log.warning("no training sample has the label of %s, which the model never learns", _named_classes(missing))


def _missing_classes(source: Source, part: Selection) -> list[str]:
    """Return the classes of which a split has no sample."""
    counts = np.bincount(source.labels[part.source_split][part.ids], minlength=len(source.classes))
    return [source.classes[label] for label in np.flatnonzero(counts == 0)]


def _named_classes(names: Sequence[str]) -> str:
    return f"{plural(len(names), 'class')} ({named(names, str)})"


def _has_space(out: Path, source: Source, tasks: Sequence[_Task], required: bool) -> bool:
    """Whether the shards fit on the disk.

    Raises:
        DataError: they do not, and are `required` to.
    """
    sample_bytes = int(np.prod(source.image_shape)) + 16  # label and id
    needed = int(1.02 * sum(len(task.ids) for task in tasks) * sample_bytes) + _SHARD_OVERHEAD * len(tasks)
    usage = shutil.disk_usage(out)
    if usage.total == 0 or needed <= usage.free:  # some network file systems report 0
        return True
    if required:
        raise DataError(
            f"{out}: the data set needs {needed / 2**20:,.1f} MiB, but only {usage.free / 2**20:,.1f} MiB are free"
            " there; free some, choose another --out, or make it smaller (--image-size, --limit)"
        )
    return False


def check_unreadable(lines: Sequence[str], allowed: int) -> None:
    """Check the number of samples that cannot be read, of which each has a line.

    Raises:
        DataError: there are more than allowed.
    """
    if len(lines) <= allowed:
        return
    header = f"{len(lines)} unreadable among the sources, {allowed} allowed:"
    cure = f"repair or delete them, or drop them with --skip-bad {len(lines)}"
    raise DataError("\n  ".join([header, *shortened(lines, 10)]) + f"\n{cure}")


def warn_of_dropped(lines: Sequence[str]) -> None:
    """Log all dropped samples. Nothing else records which they are, as the manifest has no paths."""
    if lines:
        log.warning("%s", "\n  ".join([f"{len(lines)} unreadable dropped:", *lines]))


def one_line_each(source: Source, unreadable: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Return the names of samples that cannot be read, with the reasons."""
    return [
        f"{printable(source.name(split, index))}: {reason}"
        for split, reasons in unreadable.items()
        for index, reason in sorted(reasons.items())
    ]


def check_source(source: Source, options: Options) -> None:
    """Check the labels of a source, and that no option was given that does nothing with this source.

    Raises:
        DataError: a label is not the number of a class.
        ConfigError: a split is to be drawn that the source has.
    """
    _check_labels(source)
    for split, fraction in (("val", options.val_fraction), ("test", options.test_fraction)):
        if fraction and split in source.labels:
            raise ConfigError(
                f"--{split}-fraction {fraction} has no effect, as the source has a {split} split of"
                f" {len(source.labels[split]):,}; leave the option out, or the split"
            )


def listed(source: Source) -> dict[str, Any]:
    """Return the number of samples of each split of a source, and a digest of all labels, for the manifest."""
    digest = xxhash.xxh3_64()
    for split in sorted(source.labels):
        digest.update(np.ascontiguousarray(source.labels[split], np.int64).tobytes())
    return {"listed": {split: len(labels) for split, labels in source.labels.items()}, "labels": digest.hexdigest()}


def report_limits(
    chosen: Mapping[SplitName, Selection], lanes: Mapping[SplitName, int], source: Source, options: Options
) -> None:
    """Log which of the limits that were given had no effect, or not the whole one, and which classes are not scored."""
    largest = max(len(part.ids) for part in chosen.values())
    if options.limit is not None and largest < options.limit:
        log.warning("--limit %d has no effect: the largest split has %d samples", options.limit, largest)
    never_trained = _missing_classes(source, chosen["train"])
    for split, part in chosen.items():
        missing = [name for name in _missing_classes(source, part) if name not in never_trained]
        if missing:
            drawn = f"; use more images or a larger --{split}-fraction" if split not in source.labels else ""
            cure = "; use a larger --limit" if len(part.ids) == options.limit else drawn
            log.warning("%s has no image of %s, which are not scored there%s", split, _named_classes(missing), cure)
    for split, number in lanes.items():
        if options.lanes is not None and number != options.lanes:
            log.info(
                "%s has only %d samples: %d lanes instead of %d", split, len(chosen[split].ids), number, options.lanes
            )


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


def _assign(
    source: Source, chosen: Mapping[SplitName, Selection], root: Path, options: Options
) -> tuple[dict[SplitName, int], list[_Task]]:
    """Assign the samples to shards; return the number of lanes of each split, and a task for each shard."""
    sample_bytes = int(np.prod(source.image_shape))
    lanes: dict[SplitName, int] = {}
    tasks: list[_Task] = []
    for split, part in chosen.items():
        num_shards, lanes[split] = layout_of(split, len(part.ids), sample_bytes, options)
        for number, ids in enumerate(np.array_split(part.ids, num_shards)):
            name = f"{split}/{number:05d}.tar"
            tasks.append(_Task(split, name, root / name, part.source_split, ids))
    return lanes, tasks


def _run(source: Source, tasks: Sequence[_Task]) -> Iterator[_ShardResult]:
    """Run the tasks in worker processes, with a progress bar of samples; yield the results in order."""
    workers = max(1, min(machine.cores(), len(tasks)))
    total = sum(len(task.ids) for task in tasks)
    try:
        with Bar("prepare", total=total) as bar:
            for result, task in zip(pool.run(_write_shard, source, tasks, workers), tasks, strict=True):
                bar.update(len(task.ids))
                yield result
    except pool.WorkerDiedError as error:
        what = None
        if error.progress is not None and error.progress[1] >= 0:
            task, row = tasks[error.progress[0]], error.progress[1]
            what = source.name(task.source_split, int(task.ids[row]))
        raise error.explained(what, "nothing was kept") from None


def _write_shard(source: Source, task: _Task, progress: Callable[[int], None]) -> _ShardResult:
    """Load the samples of a shard and write those that are readable. Runs in a worker process."""
    images = np.empty((len(task.ids), *source.image_shape), np.uint8)
    unreadable: list[tuple[int, str]] = []
    remarks: list[tuple[int, list[Remark]]] = []
    for row, index in enumerate(task.ids.tolist()):
        progress(row)
        try:
            images[row], of_sample = _load(source, task.source_split, index)
        except UnreadableError as error:
            unreadable.append((index, str(error)))
            continue
        if of_sample:
            remarks.append((index, of_sample))
    readable = ~np.isin(task.ids, [index for index, _ in unreadable])
    images, ids = images[readable], task.ids[readable]
    if len(ids):
        shards.write(task.path, shards.Block(images, source.labels[task.source_split][ids], ids))
    histogram = histogram_of(images)
    shard = None if unreadable else shards.describe(task.path, task.name, len(ids))
    return _ShardResult(shard, histogram, unreadable, remarks)


def _load(source: Source, split: str, index: int) -> tuple[NDArray[np.uint8], list[Remark]]:
    """Return an image, and what should be known about it."""
    try:
        with recorded_warnings() as caught:
            image = source.load(split, index)
    except MemoryError:
        name = printable(source.name(split, index))
        raise AgainError(f"{name}: there is not enough memory to decode it; nothing was kept") from None
    return image, remarks_on(image, caught)


class _Decoded:
    """A source whose samples an earlier attempt wrote to shards, as far as they are there."""

    def __init__(self, source: Source, tasks: Sequence[_Task], results: Sequence[_ShardResult]) -> None:
        self.classes, self.image_shape, self.labels = source.classes, source.image_shape, source.labels
        self._source = source
        self._paths = [task.path for task in tasks]
        self._file = {split: np.full(len(labels), -1) for split, labels in source.labels.items()}
        self._offset = {split: np.zeros(len(labels), np.int64) for split, labels in source.labels.items()}
        self._sample_bytes = int(np.prod(source.image_shape))
        for number, (task, result) in enumerate(zip(tasks, results, strict=True)):
            ids = task.ids[~np.isin(task.ids, [index for index, _ in result.unreadable])]
            if len(ids):
                self._file[task.source_split][ids] = number
                self._offset[task.source_split][ids] = shards.image_offsets(task.path, self._sample_bytes)

    def name(self, split: str, index: int) -> str:
        return self._source.name(split, index)

    def load(self, split: str, index: int) -> NDArray[np.uint8]:
        number = self._file[split][index]
        if number < 0:
            return self._source.load(split, index)
        offset = int(self._offset[split][index])
        return np.fromfile(self._paths[number], np.uint8, self._sample_bytes, offset=offset).reshape(self.image_shape)


def _describe(
    lanes: Mapping[SplitName, int], tasks: Sequence[_Task], results: Sequence[_ShardResult], source: Source
) -> _Content:
    entries: dict[SplitName, list[Shard]] = {split: [] for split in lanes}
    histogram = np.zeros((source.image_shape[2], 256), np.int64)
    for task, result in zip(tasks, results, strict=True):
        assert result.shard is not None
        entries[task.split].append(result.shard)
        if task.split == "train":
            histogram += result.histogram
    mean, std = mean_and_std(histogram)
    splits = {
        split: Split(samples=sum(shard.samples for shard in of_split), lanes=lanes[split], shards=of_split)
        for split, of_split in sorted(entries.items(), key=lambda item: SPLITS.index(item[0]))
    }
    return _Content(splits, mean, std)


def histogram_of(images: NDArray[np.uint8]) -> Ints:
    """Count the values of the pixels of images [..., C], for each channel: int64 [C, 256]."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])


def mean_and_std(histogram: Ints) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of pixels in 0 … 1, from a histogram: int64 [C, 256]."""
    # The histogram has integers, so mean and std have the same bits for any order of the sums.
    level = np.arange(256) / 255
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = (weight * level).sum(1)
    std = np.sqrt((weight * (level - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1  # a constant channel is normalised to 0, not to 0 / 0
    return mean.tolist(), std.tolist()


def _existing(out: Path, request: Mapping[str, Any], open_source: Callable[[Path], Source]) -> Dataset:
    """Return the data set that is in `out`, if it was made with the requested options from as many images."""
    dataset = manifest.read(out)
    made_with = {k: v for k, v in dataset.manifest.source.items() if k not in RESULTS}
    differences = [
        f"{key}: {printable(str(made_with.get(key)))}, now {printable(str(request.get(key)))}"
        for key in sorted({*made_with, *request})
        if made_with.get(key) != request.get(key)
    ]
    how = "with other options"
    if not differences and request["kind"] not in FIXED_BY_OPTIONS:
        how = "from other images"
        beside = out.parent if os.access(out.parent, os.W_OK) else None  # it has had space for the same before
        assert isinstance(dataset.manifest, Manifest)
        try:
            with tempfile.TemporaryDirectory(prefix=".distrain-", dir=beside) as work:
                differences = list(_other_images(dataset.manifest, open_source(Path(work))))
        except OSError as error:
            raise DataError(f"{error.filename or out}: {error.strerror or error}; {out} was not changed") from error
    if differences:
        raise ConfigError(
            f"{out}: already has a data set that was prepared {how} ({', '.join(differences)}); choose another --out,"
            " or delete it"
        )
    return dataset


def _other_images(existing: Manifest | IndexManifest, source: Source) -> Iterator[str]:
    """Yield the differences between the classes and numbers of images of a data set and of a source."""
    for text, here, there in (
        ("without class", existing.classes, source.classes),
        ("with class", source.classes, existing.classes),
    ):
        missing = [repr(name) for name in here if name not in set(there)]
        if missing:
            yield f"now {text} {', '.join(shortened(missing, 3))}"
    before, now = existing.source.get("listed", {}), listed(source)
    for split in SPLITS:
        if before.get(split, 0) != now["listed"].get(split, 0):
            yield f"{split}: {before.get(split, 0):,} images, now {now['listed'].get(split, 0):,}"
    if existing.source.get("labels") != now["labels"]:
        yield "images per class differ"
