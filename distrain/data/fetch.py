"""Data sets at remote addresses: fsspec fetches their shards, and a folder of limited size caches them.

1. A file in the cache is named by the sha256 of its content. Every read of it is checked; a damaged file is deleted
   and fetched again.
2. A fetch is limited in time, memory and number of attempts. Transient failures (a 503, a stalled connection, a
   truncated body, wrong bytes) are retried after random waits with exponential backoff.
3. Content that matches the manifest is written under a unique temporary name, synced and renamed. The least recently
   used files are deleted to make room.

Any number of processes share a cache without a lock: temporary names are unique, a rename is atomic, and a file that
another process deletes between two reads is fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import hashlib
import io
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
import tenacity

from distrain import address, files
from distrain.config import Data
from distrain.errors import ConfigError
from distrain.text import plural, printable

_EXTRAS: dict[str, str | None] = {"file": None, "http": None, "https": None, "s3": "s3", "gs": "gs", "hf": "hf"}
"""Supported schemes, and the extra of distrain that installs the package that fsspec needs for it."""

_FIRST_WAIT_SECONDS = 1.0
"""Longest wait before the second attempt; it doubles with each attempt."""
_LONGEST_WAIT_SECONDS = 30.0
_CHUNK_BYTES = 2**20
_STOP_POLL_SECONDS = 0.1
"""Interval at which a fetch checks whether reading was stopped."""
_LEFTOVER_SECONDS = 3600
"""Age at which a temporary file is deleted: its process must be dead, since writing takes seconds."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

_ENTRY = re.compile(r"[0-9a-f]{64}\.tar")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}\.partial")
"""Names of the files in a cache folder that are counted and may be deleted; other files are never touched."""

_NETWORK = (
    "check the network and the server; data.fetch_retries and data.fetch_timeout_seconds set how long it is tried"
)
_CREDENTIALS = "check the address and its credentials (a run's config.yaml has none: give data.dir again)"
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
"""Names of exceptions of botocore and google.auth, which need not be installed."""

Check = Callable[[bytes], str | None]
"""A function that returns what is wrong with a file's content, or None."""

log = logging.getLogger("distrain")


class FetchError(Exception):
    """A file cannot be fetched.

    Args:
        reason: what went wrong.
        cure: what the user can do about it; None if the file itself must be restored.
        unreachable: whether the server did not answer, so that a later attempt may succeed.
    """

    def __init__(self, reason: str, cure: str | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.cure, self.unreachable = reason, cure, unreachable


class _TransientError(FetchError):
    """A failed attempt that is worth a retry."""


@dataclass(frozen=True)
class FetchOptions:
    """Settings for fetching files, as in section `data`. Without a cache folder nothing is stored."""

    cache_dir: Path | None
    cache_bytes: int
    retries: int
    timeout_seconds: float

    @classmethod
    def of(cls, data: Data, cached: bool = True) -> FetchOptions:
        """Return the options that a configuration sets; `cached=False` turns the cache off, as a local folder does."""
        remote = address.scheme(data.dir) is not None
        folder = cache_folder(data.cache_dir) if cached and remote and data.cache_gib > 0 else None
        return cls(folder, int(data.cache_gib * 2**30), data.fetch_retries, data.fetch_timeout_seconds)


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder of the cache: `cache_dir`, or distrain's folder among the user's caches.

    Raises:
        ConfigError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache_dir) if cache_dir is not None else Path(base if os.path.isabs(base) else "~/.cache", "distrain")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ConfigError(f"{folder}: there is no home folder; set data.cache_dir") from None


def locate(location: str | Path, options: FetchOptions) -> Path | Remote:
    """Return the path of a local folder, or a `Remote` for an address.

    Raises:
        ConfigError: the address's scheme is not supported, or its package is not installed.
    """
    if isinstance(location, Path):
        return location
    if location.lower().startswith("pipe:"):
        raise ConfigError("data.dir: pipe: would run a command; give a folder or an address")
    scheme = address.scheme(location)
    if "://" in location and "::" in re.sub(r"\[[0-9A-Fa-f:.]+\]", "", location):  # [::1] is a host
        raise ConfigError("data.dir: chained addresses (::) are not supported; give a folder or a plain address")
    if scheme is None:
        return Path(location)
    if scheme not in _EXTRAS:
        raise ConfigError(f"data.dir: {scheme}:// is not supported, only {'://, '.join(_EXTRAS)}://")
    return Remote(location, scheme, options)


class Remote:
    """The folder of a data set at an address. As text it shows the address without secrets."""

    def __init__(self, location: str, scheme: str, options: FetchOptions) -> None:
        self._address, self._public_address = location, address.without_secrets(location).rstrip("/")
        self._http, self._is_file = scheme in ("http", "https"), scheme == "file"
        self._options = options
        self._fs = _file_system(scheme, options.timeout_seconds)
        self._cache = Cache(options.cache_dir, options.cache_bytes) if options.cache_dir is not None else None

    def __str__(self) -> str:
        return self._public_address

    def __repr__(self) -> str:
        return f"Remote({self._public_address})"

    def __truediv__(self, name: str) -> str:
        return f"{self._public_address}/{name}"

    def without_retries(self) -> Remote:
        """Return the same folder, of which each file is fetched in one attempt."""
        remote = copy.copy(self)
        remote._options = replace(self._options, retries=0)
        return remote

    def read(self, name: str, size: int, sha256: str, check: Check, stop: threading.Event | None = None) -> bytes:
        """Return the content of a file, from the cache if possible; fetch it and cache it otherwise.

        Args:
            name: path of the file below the address.
            size: its size in bytes; no more is read.
            sha256: its digest, in hexadecimal.
            check: checks the content, whether cached or fetched. Fetched content must also have the digest.
            stop: ends waits and fetches when it is set.

        Raises:
            FetchError: the file cannot be fetched.
        """
        cached = self._cache.get(sha256, check, size) if self._cache is not None else None
        if cached is not None:
            return cached

        def check_all(data: bytes) -> str | None:
            matches = hashlib.sha256(data).hexdigest() == sha256
            return check(data) or (None if matches else "changed since it was prepared (its sha256 differs)")

        data = self.fetch(name, size, check_all, stop)
        if self._cache is not None:
            self._cache.put(sha256, data)
        return data

    def fetch(self, name: str, max_bytes: int, check: Check, stop: threading.Event | None = None) -> bytes:
        """Return the content of a file of at most `max_bytes`, from its address.

        The other arguments and errors are those of `read`.
        """
        stop = stop or threading.Event()
        retrying = tenacity.Retrying(  # guard: fetch-retries
            retry=tenacity.retry_if_exception_type(_TransientError),
            stop=tenacity.stop_after_attempt(self._options.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(self._attempt, self._url(name), max_bytes, check, stop)
        except _TransientError as error:
            attempts = retrying.statistics["attempt_number"]
            raise FetchError(
                f"{error.reason} (tried {plural(attempts, 'time')})", error.cure, error.cure == _NETWORK
            ) from None

    def _attempt(self, url: str, max_bytes: int, check: Check, stop: threading.Event) -> bytes:
        try:
            data = _with_timeout(
                lambda abandoned: self._get(url, max_bytes, abandoned), self._options.timeout_seconds, stop
            )
        except (MemoryError, FetchError):
            raise
        except Exception as error:
            problem = self._explain(error)
        else:
            too_long = f"more than the expected {max_bytes} bytes"
            reason = too_long if len(data) > max_bytes else check(data)  # guard: wrong-bytes
            if reason is None:
                return data
            problem = _TransientError(reason)
        raise problem  # not inside `except`: a traceback would show the original error, with secrets of the address

    def _get(self, url: str, max_bytes: int, abandoned: threading.Event) -> bytes:
        # block_size 0 streams the file; fsspec's other reader sends more requests. With a size, it requests none.
        options = {"block_size": 0, "size": max_bytes} if self._http else {}
        content = io.BytesIO()
        if self._is_file:
            self._check_file(self._fs._strip_protocol(url))
        with self._fs.open(url, "rb", **options) as file:
            while content.tell() <= max_bytes and not abandoned.is_set():  # guard: no-more-than-promised
                chunk = file.read(min(_CHUNK_BYTES, max_bytes + 1 - content.tell()))
                if not chunk:
                    break
                content.write(chunk)
        return content.getvalue()

    @staticmethod
    def _check_file(path: str) -> None:
        """Refuse a FIFO or device, which could be waited for until the time-out, again and again."""
        try:
            files.open_regular(path).close()
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise FetchError(str(error.strerror)) from None
            raise

    def _url(self, name: str) -> str:
        if not self._http:
            return f"{self._address.rstrip('/')}/{name}"
        scheme, host, path, query, _ = urlsplit(self._address)
        return urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, ""))  # the query may be a token

    def _explain(self, error: Exception) -> FetchError:
        response = getattr(error, "response", None)
        status = (
            getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
        )
        if isinstance(error, FileNotFoundError):
            status = 404
        elif isinstance(error, PermissionError):
            status = 403
        if isinstance(status, int) and status >= 400:
            phrase = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
            reason = f"HTTP {status} {phrase}".rstrip() if self._http else phrase or str(status)
            if status in (401, 403):
                return FetchError(reason, _CREDENTIALS)
            if status < 500 and status not in (408, 425, 429):
                return FetchError(reason)
            return _TransientError(reason, _NETWORK)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return _TransientError(f"no complete answer within {self._options.timeout_seconds:g} s", _NETWORK)
        if _NO_CREDENTIALS.intersection(type_.__name__ for type_ in type(error).__mro__):
            # Retried: machines in a cloud get credentials from a server, which may be busy.
            return _TransientError(printable(str(error).splitlines()[0]), _CREDENTIALS)
        message = (str(error) or type(error).__name__).replace(self._address, self._public_address)
        reason = printable(address.scrub(message.splitlines()[0]))
        # ValueError: a wrong address, or a certificate that does not match. A retry cannot help.
        is_final = isinstance(error, (ValueError, IsADirectoryError, NotADirectoryError))
        return (FetchError if is_final else _TransientError)(reason, _NETWORK)


class Cache:
    """A folder of files that are named by their sha256. Their total size, with those being written, is limited."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._first_warning = threading.Lock()

    def get(self, sha256: str, check: Check, size: int) -> bytes | None:
        """Return the content with this digest and size; None if it is not cached, or damaged."""
        path = self._path(sha256)
        try:
            data = files.read(path, size)
        except FileNotFoundError:
            return None
        except OSError:
            data = None  # treated as damaged
        intact = data is not None and check(data) is None  # guard: check-cached-bytes
        with contextlib.suppress(OSError):  # evicted in the meantime, or a read-only cache
            if intact:
                os.utime(path)  # now the most recently used
            else:
                path.unlink()
        return data if intact else None

    def put(self, sha256: str, data: bytes) -> None:
        """Store a content if there is room for it; log one warning if there is not."""
        partial = self._folder / f".{sha256}.{uuid.uuid4().hex}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                if not self._reserve(partial, len(data)):
                    self._warn("data.cache_gib is too small for the shards that are fetched at the same time; raise it")
                    return
                self._write(partial, data)
                partial.replace(self._path(sha256))
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"{error.strerror}; make room there, or set data.cache_dir to a folder with more")

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    def _reserve(self, partial: Path, size: int) -> bool:
        """Reserve space for a file and delete old files to stay within the limit; return whether it may be written."""
        # Reserve first, count second: of two processes, the second one to count sees both files.
        with partial.open("xb") as file:
            file.truncate(size)
        entries, total = self._scan()
        excess = total - self._max_bytes
        if excess > sum(size for _, size, _ in entries):
            return False
        self._delete(entries, excess)  # guard: cache-bound
        return True

    def _write(self, partial: Path, data: bytes) -> None:
        with partial.open("r+b", buffering=0) as file:  # not "wb", which would release the reserved space
            while True:
                try:
                    file.seek(0)
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    os.fsync(file.fileno())
                    return
                except OSError as error:
                    file.truncate(0)  # release the blocks written so far
                    file.truncate(len(data))
                    if error.errno not in _FULL or not self._delete(self._scan()[0], len(data)):
                        raise

    def _scan(self) -> tuple[list[tuple[int, int, str]], int]:
        """List (last use, bytes, path) of complete files, and all bytes; delete leftovers of dead processes."""
        entries, total = [], 0
        with os.scandir(self._folder) as folder:
            for entry in folder:
                complete = _ENTRY.fullmatch(entry.name)
                if not complete and not _PARTIAL.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if not complete and time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                        os.unlink(entry.path)
                        continue
                except FileNotFoundError:  # another process has deleted it
                    continue
                total += status.st_size
                if complete:
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        return entries, total

    @staticmethod
    def _delete(entries: list[tuple[int, int, str]], needed: int) -> bool:
        """Delete the least recently used files until `needed` bytes are free; return whether there were any files."""
        for _, size, path in sorted(entries):
            if needed <= 0:
                break
            Path(path).unlink(missing_ok=True)
            needed -= size
        return bool(entries)

    def _warn(self, reason: str) -> None:
        if self._first_warning.acquire(blocking=False):  # guard: full-cache
            log.warning("%s: shards cannot be cached there and are fetched at every use: %s", self._folder, reason)


def _file_system(scheme: str, timeout_seconds: float) -> Any:
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # trust_env: takes a proxy from the environment, the only way to set one.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=timeout_seconds), "trust_env": True}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        extra = _EXTRAS[scheme]
        raise ConfigError(f"data.dir: {scheme}:// needs a package: pip install 'distrain[{extra}]'") from None


def _with_timeout(get: Callable[[threading.Event], bytes], seconds: float, stop: threading.Event) -> bytes:
    """Return the result of `get`, which runs in a thread, as not every file system has time-outs.

    The thread is abandoned after `seconds`, or when `stop` is set: then the event that `get` receives is set.
    """
    results: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def work() -> None:
        try:
            results.put(get(abandoned))
        except BaseException as error:
            results.put(error)

    if not stop.is_set():
        threading.Thread(target=work, name="distrain-fetch", daemon=True).start()
    deadline = time.monotonic() + seconds
    try:
        while not stop.is_set():  # guard: fetch-sees-stop
            remaining = deadline - time.monotonic()
            try:
                result = results.get(timeout=max(0.0, min(remaining, _STOP_POLL_SECONDS)))
            except queue.Empty:
                if remaining <= 0:  # guard: fetch-deadline
                    raise TimeoutError from None
                continue
            if isinstance(result, BaseException):
                raise result
            return result
    finally:
        abandoned.set()
    raise FetchError("reading was stopped")
