"""The index of tar files: where the encoded image of each sample is, its label, size and digest.

A split is cut into virtual shards, stretches of consecutive samples in the order of the tar files. Reading a stretch
takes one read of each tar file that it is in; what is between its images is read too, and dropped.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from distrain import files
from distrain.data.fetch import FetchError, Remote
from distrain.data.manifest import Dataset, File, IndexSplit, Tar
from distrain.errors import DataError, ShardError
from distrain.text import printable

SAMPLE = np.dtype(
    [
        ("offset", "<i8"), ("digest", "<u8"), ("id", "<i8"),
        ("bytes", "<u4"), ("label", "<i4"), ("height", "<u4"), ("width", "<u4"),
    ]
)  # fmt: skip
"""Entry of a sample.

offset: position of its encoded image in the tar file; digest: xxh3_64 of the image's bytes; id: number of the sample in
the source's split; bytes: length of the encoded image; label: class; height, width: of the upright image, in pixels."""

Samples = NDArray[np.void]
"""An array of `SAMPLE`."""

_LARGEST_GAP = 2**16
"""Bytes between two images that are read and dropped; a larger gap costs more than a second read."""

_CURE = "bring the file back, or index the tar files again; `distrain verify` checks all of them"


@dataclass(frozen=True, eq=False)
class Stretch:
    """The samples of a virtual shard: their encoded images, their entries in the index, and the number of the first."""

    images: list[memoryview]
    samples: Samples
    first: int


class Range(NamedTuple):
    """Consecutive bytes of a tar file, and the samples whose images they contain: first … last - 1."""

    tar: int
    start: int
    stop: int
    first: int
    last: int


def to_bytes(samples: Samples) -> bytes:
    """Return the content of an index file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(samples, SAMPLE), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def load(dataset: Dataset, split_name: str) -> Samples:
    """Read the index file of a split, and compare it with its digest.

    Raises:
        DataError: it cannot be read, or is damaged.
    """
    split = dataset.indexed(split_name)
    where, data = printable(dataset.root / split.index.name), _read_file(dataset.root, split.index)
    try:
        samples: Samples = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy's header parser raises more than ValueError on damaged text
        raise DataError(f"{where}: not an npy array ({printable(error)}); {_CURE}") from None
    if samples.dtype != SAMPLE or samples.shape != (split.samples,):
        raise DataError(f"{where}: {samples.shape} entries, the manifest says {split.samples}; {_CURE}")
    if not 0 <= samples["label"].min() <= samples["label"].max() < len(dataset.manifest.classes):
        raise DataError(f"{where}: a label is not the number of a class; {_CURE}")
    return samples


def read(dataset: Dataset, split_name: str, samples: Samples, number: int, stop: threading.Event) -> Stretch:
    """Read the encoded images of a virtual shard; each is compared with its digest.

    Args:
        dataset: the data set.
        split_name: the split.
        samples: its index (`load`).
        number: of the virtual shard.
        stop: ends the wait for a remote file when it is set.

    Raises:
        ShardError: a tar file cannot be read, or has changed since it was indexed.
    """
    split = dataset.indexed(split_name)
    first, last = split.starts[number : number + 2]
    stretch = samples[first:last]
    images: list[memoryview] = []
    for part in ranges(stretch, tars_of(split, int(first), int(last))):
        tar, entries = split.tars[part.tar], stretch[part.first : part.last]
        data = memoryview(_read_range(dataset.tars, tar, part, entries, stop))
        images += _compact([data[start:end] for start, end in _within(entries, part.start)])
    return Stretch(images, stretch, int(first))


def read_image(root: Path | Remote, tar: Tar, sample: Samples) -> bytes:
    """Read one encoded image; `sample` is its entry, an array of one. The errors are those of `read`."""
    (part,) = ranges(sample, np.zeros(1, np.int64))
    return _read_range(root, tar, part, sample, threading.Event())


def tars_of(split: IndexSplit, first: int, last: int) -> NDArray[np.int64]:
    """Return the number of the tar file that each of the samples first … last - 1 is in: int64 [n]."""
    return np.searchsorted(split.tar_ends, np.arange(first, last), side="right")


def ranges(samples: Samples, tars: NDArray[np.int64]) -> Iterator[Range]:
    """Yield the ranges of bytes that contain the images of consecutive samples, in their order.

    Args:
        samples: their entries in the index.
        tars: number of the tar file of each: int64 [n].
    """
    starts = samples["offset"]
    ends = starts + samples["bytes"]
    is_new = (tars[1:] != tars[:-1]) | (starts[1:] < ends[:-1]) | (starts[1:] - ends[:-1] > _LARGEST_GAP)
    cuts = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(samples)]
    for first, last in itertools.pairwise(cuts):
        yield Range(int(tars[first]), int(starts[first]), int(ends[last - 1]), first, last)


def digest(image: bytes | memoryview) -> int:
    """Return the digest of an encoded image: its xxh3_64, which shows damage."""
    return xxhash.xxh3_64_intdigest(image)


def describe(split: IndexSplit, number: int, offset: int) -> str:
    """Return the name of a sample for messages: its tar file, and where its image begins."""
    tar = split.tars[int(tars_of(split, number, number + 1)[0])]
    return printable(f"{tar.name}, the image at byte {offset:,}")


def _compact(images: Sequence[memoryview]) -> list[memoryview]:
    """Copy images, so that what is between them does not stay in memory; decoding one takes longer than all copies."""
    data = memoryview(b"".join(images))
    ends = list(itertools.accumulate(map(len, images)))
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _within(entries: Samples, start: int) -> list[tuple[int, int]]:
    starts = (entries["offset"] - start).tolist()
    return [(begin, begin + size) for begin, size in zip(starts, entries["bytes"].tolist(), strict=True)]


def _check(data: bytes, part: Range, entries: Samples) -> str | None:
    """Return what is wrong with the bytes of a range, or None."""
    if len(data) != part.stop - part.start:
        return f"ends at byte {part.start + len(data):,}, within an image"
    view = memoryview(data)
    for entry, (begin, end) in zip(entries, _within(entries, part.start), strict=True):
        if digest(view[begin:end]) != entry["digest"]:  # guard: digest-of-sample
            return f"changed since it was indexed (the image at byte {entry['offset']:,} differs)"
    return None


def _read_range(root: Path | Remote, tar: Tar, part: Range, entries: Samples, stop: threading.Event) -> bytes:
    if isinstance(root, Remote):
        try:
            return root.read_range(
                tar.name, part.start, part.stop, tar.bytes, tar.sha256, lambda data: _check(data, part, entries), stop
            )
        except FetchError as error:
            raise error.explained(root / tar.name, ShardError, _CURE) from None
    path = root / tar.name
    try:
        with files.open_regular(path) as file:
            file.seek(part.start)
            data = file.read(part.stop - part.start)
    except OSError as error:
        raise ShardError(f"{printable(path)}: {error.strerror}; {_CURE}") from error
    reason = _check(data, part, entries)
    if reason is not None:
        raise ShardError(f"{printable(path)}: {reason}; {_CURE}")
    return data


def _read_file(root: Path | Remote, file: File) -> bytes:
    def check(data: bytes) -> str | None:
        if len(data) != file.bytes:
            return f"{len(data)} bytes instead of {file.bytes}"
        matches = hashlib.sha256(data).hexdigest() == file.sha256
        return None if matches else "changed since it was written (its sha256 differs)"

    if isinstance(root, Remote):
        try:
            return root.read(file.name, file.bytes, file.sha256, check)
        except FetchError as error:
            raise error.explained(root / file.name, DataError, _CURE) from None
    try:
        data = files.read(root / file.name, file.bytes)
    except OSError as error:
        raise DataError(f"{printable(root / file.name)}: {error.strerror}; {_CURE}") from error
    reason = check(data)
    if reason is not None:
        raise DataError(f"{printable(root / file.name)}: {reason}; {_CURE}")
    return data
