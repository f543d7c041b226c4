"""Shards: plain WebDataset tars whose records are blocks of samples. This module writes, reads and verifies them.

Reading is a `wds.DataPipeline` over one shard: read the file, check its size and digest → webdataset's tar reader →
blocks, without pickle. A tar that is cut between two members reads without error, so a shard is checked before it is
parsed.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import webdataset as wds
import xxhash
from numpy.typing import NDArray
from webdataset import tariterators

from distrain import files
from distrain.data.fetch import FetchError, Remote
from distrain.data.manifest import IDS, IMAGES, LABELS, Shard
from distrain.errors import ShardError
from distrain.text import plural, printable, shown

BLOCK_SAMPLES = 1024
"""Maximum number of samples in a block, which a plain WebDataset reader decodes at once."""

_HEADER_BYTES = 256
"""Maximum accepted size of an npy header; numpy writes 128 bytes for these arrays."""

_CURE = "restore the file or prepare the data set again; `distrain verify` checks all shards"

_DIGESTS: dict[str, Callable[[bytes], str]] = {
    "xxh3_128": xxhash.xxh3_128_hexdigest,
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
}


class Block(NamedTuple):
    """Consecutive samples: images uint8 [N, H, W, C], labels int64 [N], ids int64 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]


def write(path: Path, block: Block, block_samples: int = BLOCK_SAMPLES) -> None:
    """Write a shard file. The same block in a file of the same name, `train/00003.tar`, always gives the same bytes.

    Keys are unique in the data set, `train-00003-00001024`, as some readers expect of samples.
    """
    with path.open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
        for start in range(0, len(block.ids), block_samples):
            part = slice(start, start + block_samples)
            arrays: dict[str, NDArray[Any]] = {
                IMAGES: block.images[part],
                LABELS: block.labels[part],
                IDS: block.ids[part],
            }
            key = f"{path.parent.name}-{path.stem}-{start:08d}"
            tar.write({"__key__": key} | {name: _npy(array) for name, array in arrays.items()})


def describe(path: Path, name: str, samples: int) -> Shard:
    """Return the manifest's entry for a shard file."""
    data = path.read_bytes()
    return Shard(
        name=name,
        samples=samples,
        bytes=len(data),
        **{name: digest(data) for name, digest in _DIGESTS.items()},
    )


def image_offsets(path: Path, sample_bytes: int) -> NDArray[np.int64]:
    """Return the position of the pixels of each image in a shard file that `write` wrote: int64 [N]."""
    positions = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if member.name.endswith(f".{IMAGES}") and file is not None:
                np.lib.format.read_magic(file)
                (samples, *_), _, _ = np.lib.format.read_array_header_1_0(file)
                positions.append(member.offset_data + file.tell() + sample_bytes * np.arange(samples))
    return np.concatenate(positions)


def read(
    root: Path | Remote,
    shard: Shard,
    image_shape: list[int],
    num_classes: int,
    digests: Sequence[Literal["xxh3_128", "sha256"]] = ("xxh3_128",),
    stop: threading.Event | None = None,
) -> list[Block]:
    """Read the blocks of one shard; verify its size, digests, headers, shapes, number of samples and labels.

    Args:
        root: the data set's folder.
        shard: the manifest's entry.
        image_shape: [H, W, C] of each image.
        num_classes: labels are below it.
        digests: the digests to compare.
        stop: ends the wait for a remote shard when it is set.

    Raises:
        ShardError: the shard cannot be read or is damaged; the message names both.
    """
    data = _fetch(root, shard, digests, stop) if isinstance(root, Remote) else _read_file(root, shard, digests)

    def open_tar() -> Iterator[dict[str, Any]]:
        yield {"url": str(root / shard.name), "stream": io.BytesIO(data)}

    def decode(records: Iterator[dict[str, Any]]) -> Iterator[Block]:
        for record in records:
            yield _decode(record, image_shape, num_classes)

    pipeline = wds.DataPipeline(open_tar, tariterators.tar_file_expander, tariterators.group_by_keys, decode)
    try:
        blocks = list(pipeline)
    except MemoryError:
        raise
    except ShardError as error:
        # webdataset appends the stream and the address to an exception's arguments.
        raise ShardError(f"{error.args[0]}; {_CURE}") from error
    except Exception as error:
        # The digest matches, so the file has not changed: what was written is not a shard.
        raise ShardError(f"{root / shard.name}: not a shard of blocks: {printable(error)}; {_CURE}") from error
    samples = sum(len(block.ids) for block in blocks)
    if samples != shard.samples:
        reason = f"has {plural(samples, 'sample')}, the manifest says {shard.samples}"
        raise ShardError(f"{root / shard.name}: {reason}; {_CURE}")
    return blocks


def _read_file(root: Path, shard: Shard, digests: Sequence[str]) -> bytes:
    path = root / shard.name
    try:
        data = files.read(path, shard.bytes)
    except OSError as error:
        raise ShardError(f"{printable(path)}: {error.strerror}; {_CURE}") from error
    reason = _check(data, shard, digests)
    if reason is not None:
        raise ShardError(f"{path}: {reason}; {_CURE}")
    return data


def _fetch(root: Remote, shard: Shard, digests: Sequence[str], stop: threading.Event | None) -> bytes:
    try:
        return root.read(shard.name, shard.bytes, shard.sha256, lambda data: _check(data, shard, digests), stop)
    except FetchError as error:
        raise error.explained(root / shard.name, ShardError, _CURE) from None


def _check(data: bytes, shard: Shard, digests: Sequence[str]) -> str | None:
    """Return what is wrong with the content of a shard file, or None."""
    if len(data) != shard.bytes:
        return f"{len(data)} bytes instead of {shard.bytes}"
    for digest in digests:
        if _DIGESTS[digest](data) != getattr(shard, digest):  # guard: digest-of-shard
            return f"changed since it was prepared (its {digest} differs)"
    return None


def _decode(record: dict[str, Any], image_shape: list[int], num_classes: int) -> Block:
    where = printable(f"{record['__url__']}: block {printable(record['__key__'], 100)}")
    missing = [name for name in (IMAGES, LABELS, IDS) if name not in record]
    if missing:
        raise ShardError(f"{where}: has no {', '.join(missing)}")
    images = _parse_npy(record[IMAGES], np.dtype(np.uint8), tuple(image_shape), f"{where}.{IMAGES}")
    labels = _parse_npy(record[LABELS], np.dtype(np.int64), (), f"{where}.{LABELS}")
    ids = _parse_npy(record[IDS], np.dtype(np.int64), (), f"{where}.{IDS}")
    if not len(images) == len(labels) == len(ids):
        raise ShardError(f"{where}: {len(images)} images, {len(labels)} labels, {len(ids)} ids")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ShardError(f"{where}: labels {labels.min()} to {labels.max()}, the data set has {num_classes} classes")
    return Block(images, labels, ids)


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _parse_npy(data: bytes, dtype: np.dtype[Any], item_shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Return a view of the array in `data`. Its header must match the expected type and the number of bytes."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, actual_dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_HEADER_BYTES)
    except Exception as error:  # numpy's header parser raises more than ValueError on damaged text
        raise ShardError(f"{where}: not an npy array ({printable(error)})") from None
    if actual_dtype != dtype or fortran or not shape or shape[1:] != item_shape:
        expected = f"{dtype} [N{''.join(f', {n}' for n in item_shape)}]"
        raise ShardError(f"{where}: is {printable(actual_dtype, 100)} {shown(list(shape))}, expected {expected}")
    start = file.tell()
    expected_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if expected_bytes != len(data) - start:
        raise ShardError(f"{where}: its header says {expected_bytes} bytes, but there are {len(data) - start}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
