"""Stores of whole objects: a bucket of S3, or a folder. An object is there as a whole or not at all.

The store must be able to create an object only if there is none of its name (conditional writes): of two jobs exactly
one succeeds. S3 can; of servers that speak its protocol, some ignore the condition (`check_conditional_writes`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from distrain import address, files
from distrain.data.fetch import FetchError, FetchOptions, Remote, locate, wrong_bucket
from distrain.errors import ConfigError

_PART_BYTES = 2**24
"""Bytes of one request of a large upload; each has the time-out of an attempt, data.fetch_timeout_seconds."""
_MAX_PARTS = 9_000
"""S3 allows 10,000 parts of an object; larger objects have larger parts."""
_MAX_LOG_BYTES = 2**31
"""Maximum size of an object that is read into memory."""

T = TypeVar("T")


class Store(Protocol):
    """A place for whole objects. Their names are relative paths; errors are `FetchError`s, without secrets."""

    def __str__(self) -> str:
        """Return the address, without secrets."""

    def put(
        self, name: str, pieces: Callable[[], Iterable[bytes]], size: int, before_commit: Callable[[], None]
    ) -> None:
        """Write an object, or replace it; readers see the old one until the new one is complete.

        Args:
            name: its name.
            pieces: yields its content; called again for each attempt.
            size: number of all bytes.
            before_commit: called when all bytes are sent, before the object appears; it may raise.
        """

    def create(self, name: str, content: bytes) -> bool:
        """Create a small object; return False if there is one of this name already.

        A request whose answer was lost is repeated, and then refused although it has succeeded: compare the content.
        """

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object; None if there is none."""

    def consume(self, name: str, action: Callable[[BinaryIO], T]) -> T:
        """Return the result of `action`, which reads an object from its beginning.

        It is repeated after transient failures, also those that it raises itself (`TransientError`).
        """

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder, without its own name, sorted; it may be missing."""

    def delete(self, name: str) -> None:
        """Delete an object; one that is missing already is fine."""

    def abort_uploads(self, folder: str) -> None:
        """Abort all uploads to a folder, also those of other jobs, which then fail; it may be not permitted."""


def open_store(location: str, options: FetchOptions, stop: threading.Event, key: str = "run.mirror") -> Store:
    """Return the store at an address; nothing is asked of it yet.

    Args:
        location: s3://bucket/prefix or file:///path.
        options: time-out and retries of its requests.
        stop: ends requests, and waits between attempts, when it is set.
        key: the configuration's key that names it, for messages.

    Raises:
        ConfigError: another kind of address, or a package is missing.
    """
    scheme = address.scheme(location)
    if scheme == "file":
        return _Folder(Path(location[len("file://") :]))
    remote = locate(location, options, key) if scheme == "s3" else None
    if not isinstance(remote, Remote):
        raise ConfigError(f"{key}: should be s3://bucket/prefix or file:///path")
    return _Bucket(remote, stop)


def check_conditional_writes(store: Store, name: str, content: bytes) -> None:
    """Check that the store refuses to create an object that exists.

    Args:
        store: the store.
        name: an object that this process has just created.
        content: its content: a store that ignores the condition writes the same again.

    Raises:
        ConfigError: it does not.
        FetchError: it cannot be written.
    """
    if store.create(name, content):  # guard: conditional-writes
        raise ConfigError(
            f"{store}: this store ignores the condition of a write (If-None-Match), so two jobs could write here at the"
            " same time; choose a store with conditional writes for run.mirror"
        )


class _Bucket:
    """Objects in a bucket of S3, through s3fs. A large one is sent in parts, and appears when the last is confirmed."""

    def __init__(self, remote: Remote, stop: threading.Event) -> None:
        self._remote, self._stop, self._fs = remote, stop, remote.file_system

    def __str__(self) -> str:
        return str(self._remote)

    def put(
        self, name: str, pieces: Callable[[], Iterable[bytes]], size: int, before_commit: Callable[[], None]
    ) -> None:
        url, part = self._remote.url(name), max(_PART_BYTES, size // _MAX_PARTS)

        def attempt() -> None:
            if size <= part:
                before_commit()
                self._once(lambda: self._fs.pipe_file(url, b"".join(pieces())))
                return
            # Without `autocommit`, closing the file sends its last part, and `commit` makes the object appear.
            file = self._once(lambda: self._fs.open(url, "wb", block_size=part, autocommit=False))
            try:
                for piece in pieces():
                    self._once(partial(file.write, piece))
                self._once(file.close)
                before_commit()
                self._once(file.commit)
            except BaseException:
                file.closed = True  # else its destructor would send the rest
                with contextlib.suppress(Exception):  # parts that remain are invisible, but cost money
                    self._once(file.discard)
                raise

        self._remote.retrying(attempt, self._stop)

    def create(self, name: str, content: bytes) -> bool:
        def attempt() -> bool:
            try:
                self._fs.pipe_file(self._remote.url(name), content, mode="create")
            except OSError as error:
                if _exists(error):
                    return False
                raise
            return True

        return self._often(attempt)

    def read(self, name: str) -> bytes | None:
        def attempt() -> bytes | None:
            try:
                return bytes(self._fs.cat_file(self._remote.url(name)))
            except FileNotFoundError as error:
                if wrong_bucket(error) is not None:
                    raise
                return None

        return self._often(attempt)

    def consume(self, name: str, action: Callable[[BinaryIO], T]) -> T:
        def attempt() -> T:
            with self._remote.stream(name, self._stop) as file:
                return action(file)

        return self._remote.retrying(attempt, self._stop)

    def names(self, folder: str) -> list[str]:
        def attempt() -> list[str]:
            try:
                paths = self._fs.ls(self._remote.url(folder), detail=False, refresh=True)
            except FileNotFoundError as error:
                if wrong_bucket(error) is not None:
                    raise
                return []
            return sorted({str(path).rpartition("/")[2] for path in paths} - {""})

        return self._often(attempt)

    def delete(self, name: str) -> None:
        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._remote.url(name))

        self._often(attempt)

    def abort_uploads(self, folder: str) -> None:
        bucket, key, _ = self._fs.split_path(self._remote.url(folder))
        with contextlib.suppress(FetchError):
            answer = self._once(lambda: self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/"))
            for upload in answer.get("Uploads", []):
                self._once(partial(self._fs.abort_mpu, bucket, upload["Key"], upload["UploadId"]))

    def _once(self, request: Callable[[], T]) -> T:
        return self._remote.limited(lambda _: request(), self._stop)

    def _often(self, request: Callable[[], T]) -> T:
        return self._remote.retrying(lambda: self._once(request), self._stop)


def _exists(error: OSError) -> bool:
    """Whether an error of s3fs says that a condition was not met: HTTP 412 Precondition Failed."""
    answer = getattr(error.__cause__, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412")


class _Folder:
    """Objects in a folder. Each is written under a temporary name, synced, and then renamed or linked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return f"file://{self._folder}"

    def put(
        self, name: str, pieces: Callable[[], Iterable[bytes]], size: int, before_commit: Callable[[], None]
    ) -> None:
        with self._partial(name) as (work, path):
            with work.open("wb") as file:
                for piece in pieces():
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            before_commit()
            work.replace(path)
            files.sync(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        path = self._folder / name
        with self._errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = files.create(path, content)
            if is_new:
                files.sync(path.parent)
        return is_new

    def read(self, name: str) -> bytes | None:
        with self._errors(name):
            try:
                return files.read(self._folder / name, _MAX_LOG_BYTES)
            except FileNotFoundError:
                return None

    def consume(self, name: str, action: Callable[[BinaryIO], T]) -> T:
        with self._errors(name):
            file = files.open_regular(self._folder / name)
        with file:
            return action(file)

    def names(self, folder: str) -> list[str]:
        with self._errors(folder):
            try:
                return sorted(each for each in os.listdir(self._folder / folder) if not each.startswith("."))
            except FileNotFoundError:
                return []

    def delete(self, name: str) -> None:
        with self._errors(name):
            (self._folder / name).unlink(missing_ok=True)

    def abort_uploads(self, folder: str) -> None:
        for work in (self._folder / folder).glob(".*.partial"):
            with contextlib.suppress(OSError):
                work.unlink()

    @contextlib.contextmanager
    def _partial(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Yield a temporary path and the path of an object; what is left at the first is removed."""
        path = self._folder / name
        work = path.with_name(f".{uuid.uuid4().hex}.partial")
        with self._errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield work, path
            finally:
                work.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_of_file = error.errno in (errno.ENOENT, errno.EISDIR, errno.EINVAL)  # there is no file to be read
            cure = None if is_of_file else "check this folder, its space and its permissions"
            raise FetchError(f"{name or self._folder}: {error.strerror or error}", cure) from None
