"""`distrain verify` checks that a data set has not changed since it was written."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import xxhash

from distrain.data import index, shards
from distrain.data.index import Samples
from distrain.data.manifest import Dataset, IndexManifest, IndexSplit, Manifest, Tar
from distrain.data.order import Ints
from distrain.errors import DataError
from distrain.preparation import listing
from distrain.progress import Bar
from distrain.text import named, plural, printable

_CHUNK_BYTES = 2**20


def verify(dataset: Dataset) -> Iterator[str]:
    """Read everything that belongs to a data set; yield one line for each error."""
    content = dataset.manifest
    ids: dict[str, Ints] = {}
    if isinstance(content, IndexManifest):
        yield from _verify_index(dataset, content, ids)
    else:
        yield from _verify_blocks(dataset, content, ids)
    for split_name, of_split in ids.items():
        values, counts = np.unique(of_split, return_counts=True)
        if (counts > 1).any():
            yield f"{dataset.root}/{split_name}: id {values[counts > 1][0]} occurs {counts[counts > 1][0]} times"


def _verify_blocks(dataset: Dataset, content: Manifest, ids: dict[str, Ints]) -> Iterator[str]:
    """Yield what is wrong with the shards; fill in the ids of the others."""
    entries = [(name, shard) for name, split in content.splits.items() for shard in split.shards]
    parts: dict[str, list[Ints]] = {}
    for name, shard in Bar("verify", entries):
        try:
            blocks = shards.read(dataset.root, shard, content.image_shape, len(content.classes), ("sha256", "xxh3_128"))
        except DataError as error:
            yield str(error)
            continue
        parts.setdefault(name, []).extend(block.ids for block in blocks)
    ids.update({name: np.concatenate(of_split) for name, of_split in parts.items()})


def _verify_index(dataset: Dataset, content: IndexManifest, ids: dict[str, Ints]) -> Iterator[str]:
    """Yield what is wrong with the index and the tar files; fill in the ids."""
    parts: dict[str, list[tuple[Tar, Samples]]] = {}
    for name, split in content.splits.items():
        try:
            samples = index.load(dataset, name)
        except DataError as error:
            yield str(error)
            continue
        ids[name] = samples["id"]
        for tar, of_tar in zip(split.tars, _by_tar(split, samples), strict=True):
            parts.setdefault(tar.name, []).append((tar, of_tar))
    for name, of_name in Bar("verify", list(parts.items())):
        tars, every = [tar for tar, _ in of_name], np.concatenate([samples for _, samples in of_name])
        try:
            reason = listing.read_file(dataset.tars, name, functools.partial(_check_tar, tars[0], every))
        except DataError as error:
            yield str(error)
            continue
        if reason is None and any((tar.bytes, tar.sha256) != (tars[0].bytes, tars[0].sha256) for tar in tars):
            reason = "is described in several ways"
        if reason is not None:
            yield f"{printable(dataset.tars / name)}: {reason}"


def _by_tar(split: IndexSplit, samples: Samples) -> Iterator[Samples]:
    ends = itertools.accumulate(tar.samples for tar in split.tars)
    for start, end in itertools.pairwise([0, *ends]):
        yield samples[start:end]


def _check_tar(tar: Tar, samples: Samples, stream: BinaryIO) -> str | None:
    """Read a tar file to its end; return what is wrong with it, or None."""
    sha256 = hashlib.sha256()
    position = 0
    changed = []

    def read(size: int, also: xxhash.xxh3_64 | None = None) -> None:
        nonlocal position
        while size > 0 and (chunk := stream.read(min(size, _CHUNK_BYTES))):
            sha256.update(chunk)
            if also is not None:
                also.update(chunk)
            size -= len(chunk)
            position += len(chunk)

    for sample in np.sort(samples, order="offset"):
        read(int(sample["offset"]) - position)
        digest = xxhash.xxh3_64()
        read(int(sample["bytes"]), digest)
        if digest.intdigest() != sample["digest"]:
            changed.append(int(sample["offset"]))
    read(2**62)
    if position != tar.bytes:
        return f"{position:,} bytes instead of {tar.bytes:,}"
    if changed:
        return f"{plural(len(changed), 'image')} changed since it was indexed (at byte {named(changed, '{:,}'.format)})"
    if sha256.hexdigest() != tar.sha256:
        return "changed since it was indexed (its sha256 differs, the images are the same)"
    return None
