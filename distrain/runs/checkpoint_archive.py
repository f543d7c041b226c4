"""A checkpoint as one uncompressed tar file, written and read as a stream, without a copy of it on disk or in memory.

    step-00001234/state.json  …/digests.json  …/model.safetensors  …/optimizer.safetensors

The state is first, so that it can be read without the weights.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from distrain import files
from distrain.runs import checkpoint, records

_STATE = checkpoint.FILES[0]
_BLOCK = tarfile.BLOCKSIZE
_PIECE_BYTES = 2**20


class OpenCheckpoint:
    """The open files of a checkpoint: their content can be read even after they were deleted.

    Raises:
        OSError: one cannot be opened.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.step, self._folder = step, path.name
        self._files: dict[str, BinaryIO] = {}
        with ExitStack() as opened:
            for name in checkpoint.FILES:
                self._files[name] = opened.enter_context(files.open_regular(path / name))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def state(self) -> bytes:
        """Return the content of state.json."""
        self._files[_STATE].seek(0)
        return self._files[_STATE].read()

    @property
    def archive_bytes(self) -> int:
        """Size of the tar file."""
        return sum(_BLOCK + _padded(_size(file)) for file in self._files.values()) + 2 * _BLOCK

    def archive(self) -> Iterator[bytes]:
        """Yield the tar file in pieces of at most a MiB."""
        for name, file in self._files.items():
            size = _size(file)
            header = tarfile.TarInfo(f"{self._folder}/{name}")
            header.size = size
            yield header.tobuf(tarfile.GNU_FORMAT)
            file.seek(0)
            while piece := file.read(_PIECE_BYTES):
                yield piece
            yield bytes(_padded(size) - size)
        yield bytes(2 * _BLOCK)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def read_state(stream: BinaryIO) -> bytes:
    """Return the content of state.json, which is first in a tar file.

    Raises:
        tarfile.ReadError: it is not; or this is no tar file.
    """
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        member = tar.next()
        if member is None or _name(member) != _STATE or member.size > records.State.max_bytes:
            raise tarfile.ReadError(f"does not begin with {_STATE}")
        return _content(tar, member).read()


def extract(stream: BinaryIO, folder: Path, on_progress: Callable[[], None]) -> None:
    """Write the files of a checkpoint from a tar file to disk.

    Args:
        stream: the tar file.
        folder: an empty folder, which gets them.
        on_progress: called after each MiB; it may raise.

    Raises:
        tarfile.ReadError: it ends early, or has something else.
        OSError: a file cannot be written.
    """
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            name = _name(member)
            if name not in checkpoint.FILES:
                raise tarfile.ReadError(f"has {member.name!r}, which is no file of a checkpoint")
            with (folder / name).open("wb") as file:
                content = _content(tar, member)
                while piece := content.read(_PIECE_BYTES):
                    file.write(piece)
                    on_progress()
                file.flush()
                os.fsync(file.fileno())


def _name(member: tarfile.TarInfo) -> str:
    return member.name.rpartition("/")[2] if member.isreg() else ""


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    return content  # type: ignore[return-value]
