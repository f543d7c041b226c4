"""`distrain prepare webdataset`: from tar files of encoded images to an index of them, or to blocks.

1. Each tar file is read once (`listing`); what was learnt about it survives an interruption.
2. Labels become classes, and val and test are drawn from train if there are none, as for every source.
3. The samples stay in the order of the tar files, and are cut into virtual shards. If classes are badly mixed in that
   order, the data is refused.
4. Mean and std are measured on a drawn sample of the images, which are decoded for that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from distrain import address, files, machine
from distrain.config import Data
from distrain.data import index
from distrain.data.fetch import FetchOptions
from distrain.data.manifest import TARS, Dataset, File, IndexManifest, IndexSplit, SplitName, Tar
from distrain.data.order import Ints, split_permutation
from distrain.data.pillow import Decoding, UnreadableError, recorded_warnings
from distrain.errors import ConfigError, DataError
from distrain.preparation import blocks, listing, mixing, patterns, pool, remarks
from distrain.preparation.blocks import Options, Selection
from distrain.preparation.ownership import OutputFolder
from distrain.preparation.sources.webdataset import WebDataset
from distrain.preparation.tars import Contents, Fields
from distrain.progress import Bar
from distrain.text import named, percent, plural, printable, shortened, shown

log = logging.getLogger("distrain")

STRETCH_SAMPLES = 32
STRETCH_BYTES = 2 * 2**20
"""A virtual shard has at least so many samples, and at least so many bytes, if the split is large enough."""

_MEASURED_IMAGES = 1000
_IMAGES_OF_A_TASK = 25
_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_MEASURE_DRAW = 30


@dataclass(frozen=True)
class TarOptions:
    """Options of `prepare webdataset`.

    Attributes:
        patterns: of tar files, for each split.
        image: names of the fields that are images, such as `jpg;png`.
        label: name of the field that is the label, such as `cls` or `json:path`.
        classes: names of the classes; None: from the labels.
        decoding: decoding of images.
        accept_order: whether badly mixed classes are accepted.
        normalization: `measured` or `imagenet`.
        convert: whether blocks are written instead of an index.
        image_size: height and width of the images in blocks; None: they have one size.
    """

    patterns: Mapping[str, Sequence[str]]
    image: str
    label: str
    classes: Sequence[str] | None
    decoding: Decoding
    accept_order: bool = False
    normalization: str = "measured"
    convert: bool = False
    image_size: int | None = None


def prepare_webdataset(out: Path, tar_options: TarOptions, options: Options) -> tuple[Dataset, bool]:
    """Make an index of tar files in `out`, or blocks of their images, or return the data set that is there.

    Raises:
        ConfigError: a pattern, a field or another option cannot be used, or `out` has other content.
        DataError: a tar file cannot be used, or the samples of all of them.
        AgainError: a worker process was killed, or another process is preparing a data set in `out`.
    """
    fields = Fields.parse(tar_options.image, tar_options.label)
    location, names = _names(tar_options.patterns)
    fetching = FetchOptions.of(Data())
    tar_files = {split: listing.find(location, of_split, fetching) for split, of_split in names.items()}

    def open_source(work: Path) -> WebDataset:
        every = [tar for of_split in tar_files.values() for tar in of_split]
        contents = listing.read_all(location, every, fetching, fields, tar_options.decoding, work)
        remaining = iter(contents)
        by_split = {split: list(itertools.islice(remaining, len(of_split))) for split, of_split in names.items()}
        for split, of_split in by_split.items():
            _check_readable(split, names[split], of_split)
        source = WebDataset(location, fetching, names, by_split, tar_options.classes, tar_options.decoding)
        if tar_options.convert:
            source.image_shape = _image_shape(source, tar_options.image_size)
        _report(source, tar_options)
        if len(np.unique(source.labels["train"])) == 1:
            label = shown(source.classes[source.labels["train"][0]])
            raise DataError(f"all samples of train have the label {label}: training needs two; choose another --label")
        return source

    def write(source: WebDataset, folder: OutputFolder, options: Options, request: Mapping[str, Any]) -> Any:
        if tar_options.convert:
            return blocks.write_blocks(source, folder, options, request, source.dropped)
        return _write_index(source, folder, options, request, tar_options, location)

    dataset, made = blocks.prepare(
        out, "webdataset", _request(tar_options, tar_files), open_source, options, write, listing.FOLDER
    )
    if not made and isinstance(dataset.manifest, IndexManifest):
        _update_location(out, location)
    return dataset, made


def _update_location(out: Path, location: str) -> None:
    """Record where the tar files of an index are, if they were moved: they have the same names and sizes there."""
    content = _location_json(location)
    if (out / TARS).read_bytes() != content:
        files.replace(out / TARS, content)
        log.info("%s: the tar files are in %s now", out / TARS, printable(address.without_secrets(location)))


def _names(all_patterns: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, list[str]]]:
    """Return the location of the tar files, and their names below it for each split."""
    expanded = {split: patterns.expand(of_split) for split, of_split in all_patterns.items() if of_split}
    location, names = patterns.common_root([name for of_split in expanded.values() for name in of_split])
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"{named(repeated, str)}: given twice; each sample would be in the data set twice")
    remaining = iter(names)
    return location, {split: list(itertools.islice(remaining, len(of_split))) for split, of_split in expanded.items()}


def _request(tar_options: TarOptions, tar_files: Mapping[str, Sequence[listing.TarFile]]) -> dict[str, Any]:
    """Return the options that decide what is written, for the manifest."""
    request: dict[str, Any] = {
        "image": tar_options.image,
        "label": tar_options.label,
        "classes": None if tar_options.classes is None else _digest(tar_options.classes),
        **vars(tar_options.decoding),
        "tars": {split: _names_and_sizes(of_split) for split, of_split in tar_files.items()},
    }
    request["convert"] = tar_options.convert
    if tar_options.convert:
        return {**request, "image_size": tar_options.image_size}
    return {**request, "normalization": tar_options.normalization, "accept_order": tar_options.accept_order}


def _names_and_sizes(tar_files: Sequence[listing.TarFile]) -> str:
    entries = [(tar.name, tar.version[0] if tar.version is not None else None) for tar in tar_files]
    return f"{plural(len(entries), 'file')}, digest of names and sizes {_digest(entries)}"


def _digest(value: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(value).encode())


def _check_readable(split: str, names: Sequence[str], contents: Sequence[Contents]) -> None:
    """Check that at least one image of a split can be read."""
    if not any(len(each.samples) for each in contents):
        lines = [
            printable(f"{name}, {key}: {reason}")
            for name, each in zip(names, contents, strict=True)
            for key, reason in each.unreadable
        ]
        raise DataError("\n  ".join([f"no image of {split} can be read:", *shortened(lines, 10)]))


def _image_shape(source: WebDataset, image_size: int | None) -> tuple[int, int, int]:
    if image_size is not None:
        return image_size, image_size, 3
    if source.common_shape is None:
        raise ConfigError("--convert: the images have several sizes; choose one with --image-size, such as 64")
    return source.common_shape


def _write_index(
    source: WebDataset,
    folder: OutputFolder,
    options: Options,
    request: Mapping[str, Any],
    tar_options: TarOptions,
    location: str,
) -> tuple[Path, list[str], IndexManifest]:
    """Write an index of the samples; return its folder, the names of its files and its manifest."""
    chosen, dropped = _choose(source, options, {})
    num_shards, _ = _layout("train", _entries(source, chosen["train"]), options)
    rho = _check_mixing(source, chosen["train"], num_shards, tar_options.accept_order)
    mean, std = _IMAGENET
    normalization = "ImageNet's"
    if tar_options.normalization == "measured":
        chosen, dropped, pixels = _measure(source, options)
        mean, std = blocks.mean_and_std(pixels.histogram)
        brightest = int(np.flatnonzero(pixels.histogram.sum(0))[-1])
        # Without the options: whether they had no effect is not known of the other images.
        remarks.report(dict(pixels.remarks), lambda sample: source.name(*sample), pixels.images, brightest, {})
        normalization = f"measured on {plural(pixels.images, 'drawn image')}"
    layouts = {split: _layout(split, _entries(source, part), options) for split, part in chosen.items()}
    blocks.warn_of_dropped(dropped)
    blocks.report_limits(chosen, {split: lanes for split, (_, lanes) in layouts.items()}, source, options)
    _report_memory(source, chosen["train"], *layouts["train"])
    root = folder.work / "index"
    root.mkdir()
    files.write(root / TARS, _location_json(location))
    splits = {
        split: _write_split(source, split, chosen[split], layouts[split], root)
        for split in blocks.SPLITS
        if split in chosen
    }
    used = np.concatenate([_entries(source, part) for part in chosen.values()])
    sizes = np.stack([used["height"], used["width"]], 1)
    description = IndexManifest(
        format="distrain-index",
        version=1,
        source={**request, **blocks.listed(source), "skipped": len(dropped), "mixing": rho},
        classes=source.classes,
        mean=mean,
        std=std,
        image_shape=[*sizes[0].tolist(), 3] if (sizes == sizes[0]).all() else None,
        smallest=sizes.min(0).tolist(),
        largest=sizes.max(0).tolist(),
        normalization=normalization,
        splits=splits,
    )
    return root, [TARS, *(f"{split}.npy" for split in splits)], description


def _entries(source: WebDataset, part: Selection) -> index.Samples:
    """Return the entries of chosen samples in the index."""
    return source.samples[part.source_split][part.ids]


def _choose(
    source: WebDataset, options: Options, unreadable: Mapping[int, str]
) -> tuple[dict[SplitName, Selection], list[str]]:
    """Choose the samples of each split, in the order of the tar files.

    Args:
        source: the samples.
        options: options of the choice.
        unreadable: numbers of training samples that cannot be decoded, and the reasons.

    Returns:
        The samples, and a line for each one that is dropped.
    """
    dropped = [*source.dropped, *blocks.one_line_each(source, {"train": unreadable})]
    blocks.check_unreadable(dropped, options.skip_bad)
    chosen = {
        split: replace(part, ids=np.sort(part.ids))
        for split, part in blocks.choose(source.labels, {"train": unreadable}, options).items()
    }
    blocks.check_chosen(source, chosen, options)
    return chosen, dropped


def _measure(source: WebDataset, options: Options) -> tuple[dict[SplitName, Selection], list[str], _Pixels]:
    """Measure the pixels of a sample of train. If some cannot be decoded, all samples are chosen again without them.

    Returns:
        The samples and the lines of `_choose`, and the pixels.
    """
    unreadable: dict[int, str] = {}
    while True:
        chosen, dropped = _choose(source, options, unreadable)
        pixels = _measure_pixels(source, chosen["train"], options.seed)
        if not pixels.unreadable:
            return chosen, dropped, pixels
        unreadable.update(pixels.unreadable)


class _Pixels(NamedTuple):
    """The pixels of some images.

    Attributes:
        histogram: of their values, for each channel: int64 [3, 256].
        images: number of images.
        unreadable: numbers of samples that cannot be decoded, and the reasons.
        remarks: what should be known about samples.
    """

    histogram: Ints
    images: int
    unreadable: list[tuple[int, str]]
    remarks: list[tuple[remarks.Sample, list[remarks.Remark]]]


def _measure_pixels(source: WebDataset, part: Selection, seed: int) -> _Pixels:
    """Decode a fixed sample of the training images, drawn by the seed, in worker processes."""
    drawn = split_permutation(len(source.labels[part.source_split]), seed, _MEASURE_DRAW)
    ids = np.sort(drawn[np.isin(drawn, part.ids)][:_MEASURED_IMAGES])
    tasks = np.array_split(ids, -(-len(ids) // _IMAGES_OF_A_TASK))
    result = _Pixels(np.zeros((3, 256), np.int64), len(ids), [], [])
    try:
        with Bar("measure mean and std", total=len(ids)) as bar:
            for some in pool.run(_measure_some, source, tasks, min(machine.cores(), len(tasks))):
                result = _Pixels(
                    result.histogram + some.histogram,
                    len(ids),
                    [*result.unreadable, *some.unreadable],
                    [*result.remarks, *some.remarks],
                )
                bar.update(min(_IMAGES_OF_A_TASK, len(ids) - bar.n))
    except pool.WorkerDiedError as error:
        what = None
        if error.progress is not None and error.progress[1] >= 0:
            what = source.name("train", error.progress[1])
        raise error.explained(what, "tar files are not read again") from None
    return result


def _measure_some(source: WebDataset, ids: Ints, progress: Callable[[int], None]) -> _Pixels:
    """Count the values of the pixels of some training images. Runs in a worker process."""
    result = _Pixels(np.zeros((3, 256), np.int64), len(ids), [], [])
    for number in ids.tolist():
        progress(number)
        try:
            with recorded_warnings() as caught:
                image = source.decode("train", number)
        except UnreadableError as error:
            result.unreadable.append((number, str(error)))
            continue
        result.histogram[:] += blocks.histogram_of(image)
        if of_sample := remarks.remarks_on(image, caught):
            result.remarks.append((("train", number), of_sample))
    return result


def _layout(split: SplitName, entries: index.Samples, options: Options) -> tuple[int, int]:
    """Return the number of virtual shards and of lanes of a split."""
    return blocks.layout_of(split, len(entries), float(entries["bytes"].mean()), options, default_shards)


def default_shards(samples: int, sample_bytes: float, lanes: int) -> int:
    """Return the number of virtual shards: a multiple of the lanes.

    A virtual shard has at least `STRETCH_SAMPLES` and `STRETCH_BYTES`, if the split is large enough.
    """
    stretch = max(STRETCH_SAMPLES, STRETCH_BYTES / sample_bytes)
    return lanes * max(1, int(samples // (lanes * stretch)))


def _check_mixing(source: WebDataset, part: Selection, num_shards: int, accept_order: bool) -> float:
    """Measure how well the classes of train are mixed; return rho, rounded for the manifest.

    Raises:
        DataError: they are badly mixed, and this is not accepted.
    """
    labels = source.labels[part.source_split][part.ids]
    starts = np.arange(num_shards + 1) * len(labels) // num_shards
    measured = mixing.measure(labels, starts)
    text = (
        f"a stretch of {plural(round(measured.shard_samples), 'sample')} has {measured.classes:,.1f} of"
        f" {plural(len(source.classes), 'class')} on average, {measured.chance:,.1f} if their order were random"
    )
    if measured.exceeds(mixing.SORTED) and not accept_order:
        raise DataError(
            f"the samples are sorted by class in the tar files: {text} (sorted by {percent(measured.rho)}). Training in"
            " this order would be bad. Use --convert --image-size N, which shuffles all samples into blocks; or shuffle"
            " before the tar files are written; or --accept-order"
        )
    if measured.exceeds(mixing.NOTICEABLE):
        log.warning("classes are not well mixed in the tar files: %s (sorted by %s)", text, percent(measured.rho))
    else:
        log.info("classes are mixed along the tar files: %s", text)
    return round(measured.rho, 4)


def _report_memory(source: WebDataset, part: Selection, num_shards: int, lanes: int) -> None:
    total = int(_entries(source, part)["bytes"].sum())
    log.info(
        "train has %s of about %s samples and %s MiB; reading needs about %s MiB of memory for encoded images,"
        " divided by the number of processes",
        plural(num_shards, "virtual shard"),
        f"{len(part.ids) / num_shards:,.0f}",
        f"{total / num_shards / 2**20:.3g}",
        f"{min(3 * lanes, num_shards) * total / num_shards / 2**20:.3g}",  # two rounds of a step, and the next one
    )


def _report(source: WebDataset, tar_options: TarOptions) -> None:
    """Log what was recognised in the tar files, and what was passed over."""
    origin = "--classes" if tar_options.classes is not None else f"labels ({tar_options.label})"
    classes = ", ".join(printable(name, 40) for name in shortened(source.classes, 5))
    lines = [*_sizes(source), f"{plural(len(source.classes), 'class')} from {origin}: {classes}"]
    log.info("%s", "\n  ".join(["recognised:", *lines]))
    passed_over = _passed_over(source)
    fields = [line for line in passed_over if " × field ." in line]
    others = [line for line in passed_over if line not in fields]
    if fields:
        log.info("%s", "\n  ".join(["fields that are not used:", *fields]))
    if others:
        log.warning("%s", "\n  ".join(["passed over:", *others]))
    for warning in _repeated(source):
        log.warning("%s", warning)


def _sizes(source: WebDataset) -> list[str]:
    """Return one line for each split, with its samples and bytes, and one about the sizes of the images."""
    lines = []
    for split, samples in source.samples.items():
        tars = plural(len(source.tars[split]), "tar file")
        size = sum(contents.bytes for contents in source.contents[split]) / 2**20
        lines.append(f"{split}: {plural(len(samples), 'sample')} in {tars} of {size:,.1f} MiB")
    every = np.concatenate(list(source.samples.values()))
    by_area = np.argsort(every["height"].astype(np.int64) * every["width"], kind="stable")
    three = every[by_area[[0, len(by_area) // 2, -1]]]
    smallest, median, largest = (f"{sample['height']}×{sample['width']}" for sample in three)
    sizes = f"all {smallest}" if source.common_shape else f"{smallest} to {largest}, median {median}"
    return [*lines, f"images: {sizes}"]


def _passed_over(source: WebDataset) -> list[str]:
    """Return one line for each kind of members that no sample uses: count, and names of the first."""
    counts: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    for split, of_split in source.contents.items():
        for tar, contents in zip(source.tars[split], of_split, strict=True):
            for what, (count, first) in contents.passed_over.items():
                counts[what] += count
                names[what] = [*names.get(what, []), *(f"{tar}: {name}" for name in first)][:2]
    return [
        f"{count:,} × {what}: {', '.join(map(printable, names[what]))}{' …' if count > 2 else ''}"
        for what, count in counts.most_common()
    ]


def _repeated(source: WebDataset) -> list[str]:
    """Return one line for each kind of samples that are there several times."""
    lines = []
    for split, of_split in source.contents.items():
        keys = np.concatenate([contents.keys for contents in of_split])
        first, again = _first_repetition(keys)
        if again:
            lines.append(
                f"{plural(again, 'key')} of {split} repeated in other tar files, or in the same: each is a sample"
                f" (first: {printable(source.name(split, first))})"
            )
    train = source.samples["train"]["digest"]
    for split in source.samples:
        if split != "train":
            leaked = np.flatnonzero(np.isin(source.samples[split]["digest"], train))
            if len(leaked):
                lines.append(
                    f"{plural(len(leaked), 'image')} of {split} also in train (remove them from one split: accuracy"
                    f" should not count images that were trained on): {source.name(split, int(leaked[0]))}"
                )
    return lines


def _first_repetition(values: np.ndarray) -> tuple[int, int]:
    """Return the index of the first value that occurred before, and how many such values there are."""
    _, first = np.unique(values, return_index=True)
    again = np.delete(np.arange(len(values)), first)
    return (int(again[0]) if len(again) else -1), len(again)


def _write_split(
    source: WebDataset, split: SplitName, part: Selection, layout: tuple[int, int], root: Path
) -> IndexSplit:
    samples = _entries(source, part)
    content = index.to_bytes(samples)
    files.write(root / f"{split}.npy", content)
    counts = np.diff(np.searchsorted(part.ids, source.starts[part.source_split]))
    tars = [
        Tar(name=name, bytes=contents.bytes, samples=int(count), sha256=contents.sha256)
        for name, contents, count in zip(
            source.tars[part.source_split], source.contents[part.source_split], counts, strict=True
        )
        if count
    ]
    file = File(name=f"{split}.npy", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    size = int(samples["bytes"].sum())
    return IndexSplit(samples=len(samples), bytes=size, lanes=layout[1], shards=layout[0], index=file, tars=tars)


def _location_json(location: str) -> bytes:
    public = address.without_secrets(location)
    if public != location:
        log.warning(
            "the address of the tar files has a password or a query, which %s does not record: give it as data.tars"
            " when you train",
            TARS,
        )
    return json.dumps({"location": public}, ensure_ascii=False).encode() + b"\n"
