"""Files with the same bytes, recognised without reading all files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from distrain.preparation.sources import UnreadableError
from distrain.preparation.sources.archives import File, read

_TAIL_BYTES = 4096
_BATCH = 10_000  # a pool keeps an object for each call


def equal_files(files: Sequence[File]) -> list[list[int]]:
    """Return the groups of two or more files with the same bytes, as indices in increasing order.

    Files of equal size are compared by their last bytes, zip members by their checksum, and whole if these are equal.
    Unreadable and empty files are in no group.
    """
    groups = _by(lambda index: files[index].size if files[index].size > 0 else None, [range(len(files))], map)
    pool = ThreadPoolExecutor()  # on a network file system, reading is waiting
    try:
        groups = _by(lambda index: _end(files[index]), groups, pool.map)
        return sorted(_by(lambda index: digest(files[index]), groups, pool.map))
    finally:
        pool.shutdown(cancel_futures=True)


def digest(file: File) -> bytes | None:
    """Return a digest of a file's bytes; None if it is unreadable."""
    try:
        return xxhash.xxh3_128_digest(read(file))
    except UnreadableError:
        return None


def _by(
    key: Callable[[int], Hashable], groups: Sequence[Sequence[int]], run: Callable[..., Iterable[Hashable]]
) -> list[list[int]]:
    """Divide each group by a key, and return those of two or more. A key of None belongs to no group."""
    members = [(number, index) for number, group in enumerate(groups) for index in group]
    parts: dict[Hashable, list[int]] = defaultdict(list)
    for start in range(0, len(members), _BATCH):
        batch = members[start : start + _BATCH]
        for (number, index), value in zip(batch, run(key, [index for _, index in batch]), strict=True):
            if value is not None:
                parts[number, value].append(index)
    return [part for part in parts.values() if len(part) > 1]


def _end(file: File) -> Hashable:
    if file.crc is not None:
        return file.crc
    try:
        with open(file.path, "rb") as stream:
            end = file.size if file.offset is None else file.offset + file.size
            length = min(_TAIL_BYTES, file.size)
            stream.seek(end - length)
            return xxhash.xxh3_128_digest(stream.read(length))
    except OSError:
        return None
