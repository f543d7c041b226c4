"""Tar files are read once, in worker processes: which samples they have, and where.

What was learnt about each tar file is written to a folder as soon as it was read to its end. Another attempt reads only
those that are not there, or that have changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from distrain import files, machine
from distrain.data.fetch import FetchError, FetchOptions, Remote, locate
from distrain.data.pillow import Decoding
from distrain.errors import DataError
from distrain.preparation import pool, tars
from distrain.preparation.tars import Contents, Fields
from distrain.progress import Bar
from distrain.text import plural, printable, shortened

log = logging.getLogger("distrain")

T = TypeVar("T")

FOLDER = "tars"
"""Folder of what was learnt, in the folder of unfinished work."""
_FORMAT = 1
"""Number that changes with the content of `Contents`, so that older files are not used."""
_MAX_BYTES = 2**32
_CURE = "bring it back, or correct the pattern"


@dataclass(frozen=True)
class TarFile:
    """A tar file to read.

    Attributes:
        name: its path below their location.
        version: size and time of modification of a local file, in ns; None: not known.
    """

    name: str
    version: tuple[int, int] | None


@dataclass(frozen=True)
class Request:
    """All that the workers need.

    Attributes:
        location: folder or address of the tar files.
        fetching: how remote files are fetched.
        fields: names of the fields of images and labels.
        decoding: decoding of images; only the limit of pixels matters.
        folder: folder of what was learnt.
    """

    location: str
    fetching: FetchOptions
    fields: Fields
    decoding: Decoding
    folder: Path

    def path(self, tar: TarFile) -> Path:
        """Return the file for what was learnt about a tar file."""
        key = json.dumps([_FORMAT, self.location, repr(self.fields), repr(self.decoding), tar.name, tar.version])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def find(location: str, names: Sequence[str], fetching: FetchOptions) -> list[TarFile]:
    """Return the tar files of these names, with the versions of local ones.

    Raises:
        DataError: files are missing.
    """
    root = locate(location, fetching)
    if isinstance(root, Remote):
        return [TarFile(name, None) for name in names]
    tar_files, problems = [], []
    for name in names:
        try:
            tar_files.append(TarFile(name, _version(os.stat(root / name))))
        except OSError as error:
            problems.append(f"{printable(root / name)}: {error.strerror}")
    if problems:
        header = f"{len(problems)} of {plural(len(names), 'tar file')} cannot be read; {_CURE}:"
        raise DataError("\n  ".join([header, *shortened(problems, 10)]))
    return tar_files


def read_all(
    location: str, tar_files: Sequence[TarFile], fetching: FetchOptions, fields: Fields, decoding: Decoding, work: Path
) -> list[Contents]:
    """Read tar files, except those that an earlier attempt has read; return what they contain, in order.

    Args:
        location: their folder or address.
        tar_files: the tar files.
        fetching: how remote files are fetched.
        fields: names of the fields of images and labels.
        decoding: decoding of images.
        work: folder of unfinished work; what is learnt is written to its folder `tars`.

    Raises:
        DataError: a tar file cannot be read, is damaged, or has no sample.
        AgainError: a worker process was killed.
    """
    request = Request(location, fetching, fields, decoding, work / FOLDER)
    request.folder.mkdir(exist_ok=True)
    _remove_others(request, tar_files)
    done = {tar.name: contents for tar in tar_files if (contents := _load(request.path(tar))) is not None}
    missing = [tar for tar in tar_files if tar.name not in done]
    earlier = [tar for tar in tar_files if tar.name in done]
    if earlier:
        log.info("%s of %s: read by an earlier attempt", f"{len(earlier):,}", plural(len(tar_files), "tar file"))
    for tar in _read(request, missing, earlier):
        contents = _load(request.path(tar))
        if contents is None:
            raise DataError(f"{request.path(tar)}: disappeared; run the same command again")
        done[tar.name] = contents
    return [done[tar.name] for tar in tar_files]


def _read(request: Request, tar_files: Sequence[TarFile], earlier: Sequence[TarFile]) -> Iterator[TarFile]:
    """Read tar files in worker processes, with a bar that shows MiB, or tar files if their sizes are not known."""
    sized = all(tar.version is not None for tar in (*tar_files, *earlier))
    unit = 2**20 if sized else 1
    sizes = np.cumsum([0, *(_size(tar) if sized else 1 for tar in (*earlier, *tar_files))])
    done = len(earlier)

    def advance(reports: Sequence[int]) -> None:
        bytes_or_tars = int(sizes[done]) + (sum(reports) if sized else 0)
        bar.update(max(0, bytes_or_tars // unit - bar.n))

    try:
        with Bar("read tar files", total=int(sizes[-1]) // unit, done=int(sizes[done]) // unit) as bar:
            workers = max(1, min(machine.cores(), len(tar_files)))
            results = pool.run(read_one, request, tar_files, workers, advance)
            for tar, _ in zip(tar_files, results, strict=True):
                done += 1
                advance([])
                yield tar
    except pool.WorkerDiedError as error:
        what = tar_files[error.progress[0]].name if error.progress is not None else None
        raise error.explained(what, "tar files that were read to their end are not read again") from None


def _size(tar: TarFile) -> int:
    return tar.version[0] if tar.version is not None else 0


def read_one(request: Request, tar: TarFile, progress: Callable[[int], None]) -> None:
    """Read a tar file and write what was learnt. Runs in a worker process."""
    root = locate(request.location, request.fetching)

    def read(stream: BinaryIO) -> Contents:
        contents = tars.read(stream, str(root / tar.name), request.fields, request.decoding, progress)
        if tar.version is not None and tar.version != _version(os.fstat(stream.fileno())):
            where = printable(root / tar.name)
            raise DataError(f"{where}: changed while it was read; wait until it is complete and run this again")
        return contents

    contents = read_file(root, tar.name, read)
    if not len(contents.samples) and not contents.unreadable:
        raise DataError(f"{printable(root / tar.name)}: {_without_samples(contents, request.fields)}")
    _save(request.path(tar), contents)


def _without_samples(contents: Contents, fields: Fields) -> str:
    members = [
        f"{count:,} {what} ({', '.join(names)})" for what, (count, names) in sorted(contents.passed_over.items())
    ]
    label = ":".join([fields.label, *([".".join(fields.path)] if fields.path else [])])
    return (
        f"has no sample with an image ({';'.join(fields.image)}) and a label ({label}), but"
        f" {'; '.join(members) or 'no files'}. Choose --image and --label, or remove it from the pattern"
    )


def read_file(root: Path | Remote, name: str, action: Callable[[BinaryIO], T]) -> T:
    """Return the result of `action`, which reads a tar file once from its beginning to its end.

    Raises:
        DataError: the file cannot be read.
        UnreachableError: a server did not answer after all retries.
    """
    if isinstance(root, Remote):

        def attempt() -> T:
            with root.stream(name) as stream:
                return action(stream)

        try:
            return root.retrying(attempt)
        except FetchError as error:
            raise error.explained(root / name, DataError, _CURE) from None
    try:
        with files.open_regular(root / name) as file:
            return action(file)
    except OSError as error:
        raise DataError(f"{printable(root / name)}: {error.strerror}; {_CURE}") from None


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _remove_others(request: Request, tar_files: Sequence[TarFile]) -> None:
    """Remove what belongs to another request, or to a tar file that has changed, and what was not complete."""
    names = {request.path(tar).name for tar in tar_files}
    for path in list(request.folder.iterdir()):
        if path.name not in names:
            path.unlink()


def _save(path: Path, contents: Contents) -> None:
    values = list(dict.fromkeys(contents.labels))
    codes = {value: code for code, value in enumerate(values)}
    others = {
        "bytes": contents.bytes,
        "sha256": contents.sha256,
        "values": values,
        "unreadable": contents.unreadable,
        "passed_over": contents.passed_over,
    }
    file = io.BytesIO()
    np.savez(
        file,
        samples=contents.samples,
        keys=contents.keys,
        codes=np.array([codes[label] for label in contents.labels], np.int64),
        others=np.frombuffer(json.dumps(others).encode(), np.uint8),
    )
    files.replace(path, file.getvalue())


def _load(path: Path) -> Contents | None:
    """Return what was written about a tar file; None: nothing that can be used."""
    try:
        with np.load(io.BytesIO(files.read(path, _MAX_BYTES)), allow_pickle=False) as arrays:
            others: dict[str, Any] = json.loads(arrays["others"].tobytes())
            values = others["values"]
            return Contents(
                others["bytes"],
                others["sha256"],
                arrays["samples"],
                [values[code] for code in arrays["codes"].tolist()],
                arrays["keys"],
                [(key, reason) for key, reason in others["unreadable"]],
                {what: (count, names) for what, (count, names) in others["passed_over"].items()},
            )
    except FileNotFoundError:
        return None
    except Exception:  # damaged by a crash of the machine: numpy raises many types
        log.warning("%s: is damaged; its tar file is read again", printable(path))
        return None
