"""Data sets at remote addresses: opened by fsspec, their shards kept in a bounded folder.

1. a file in the cache is named by the sha256 of what it holds; every read of it is checked by the reader, and a damaged
   one is deleted and fetched again
2. a fetch is bounded in time, memory and number of tries; what may pass (a 503, a stall, a body cut short, wrong bytes)
   is tried again after random waits that grow
3. what was fetched and fits the manifest is written under a name of its own, synced and renamed; what was not used for
   longest makes room

Any number of processes share a cache without a lock: names are unique, a rename is atomic, and a file that another
process deletes between two reads is fetched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
import tenacity

from distrain import address
from distrain.config import Data
from distrain.errors import ConfigError

_EXTRAS: dict[str, str | None] = {"file": None, "http": None, "https": None, "s3": "s3", "gs": "gs", "hf": "hf"}
"""Schemes that are opened, and the extra of distrain that brings fsspec's package for it."""

_FIRST_WAIT_SECONDS = 1.0
"""Longest wait before the second try; it doubles with every try."""
_LONGEST_WAIT_SECONDS = 30.0
_CHUNK_BYTES = 2**20
_LOOK_SECONDS = 0.1
"""How long it takes to notice that reading was stopped."""
_LEFTOVER_SECONDS = 3600
"""Age of a file in the making whose process must be dead: writing one takes seconds."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

_ENTRY = re.compile(r"[0-9a-f]{64}\.tar")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}\.partial")
"""Names in a cache folder that are ours to count and delete; whatever else lies there stays."""

_NETWORK = "check the network and the server; data.fetch_retries and data.fetch_timeout_seconds say how long to try"
_CREDENTIALS = "check the address and its credentials (a run's config.yaml keeps none: give data.dir again)"
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
"""Errors of botocore and google.auth, which are not imported for their names."""

Wrong = Callable[[bytes], str | None]
"""Says what is wrong with a file's content, or None."""


class FetchError(Exception):
    """A file cannot be had: the reason, and the cure where that is not to mend the file itself."""

    def __init__(self, reason: str, cure: str | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.cure, self.unreachable = reason, cure, unreachable


class _PassingError(FetchError):
    """It may be gone at the next try."""


@dataclass(frozen=True)
class Settings:
    """How files are fetched: the keys of section `data`. No cache: nothing is kept."""

    cache: Path | None
    cache_bytes: int
    retries: int
    timeout_seconds: float

    @classmethod
    def of(cls, data: Data, cached: bool = True) -> Settings:
        """The settings of a configuration."""
        folder = cache_folder(data.cache_dir) if cached and data.cache_gib > 0 else None
        return cls(folder, int(data.cache_gib * 2**30), data.fetch_retries, data.fetch_timeout_seconds)


def cache_folder(asked: str | None) -> Path:
    """The folder asked for, or the user's for caches.

    Raises:
        ConfigError: the user has no home to take it from.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(asked) if asked is not None else Path(base if os.path.isabs(base) else "~/.cache", "distrain")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ConfigError(f"{folder}: there is no home folder; set data.cache_dir") from None


def locate(where: str | Path, settings: Settings) -> Path | Remote:
    """A local folder's path, or what stands for a remote one.

    Raises:
        ConfigError: an address of a kind that is not opened, or whose package is not installed.
    """
    if isinstance(where, Path):
        return where
    if where.lower().startswith("pipe:"):
        raise ConfigError("data.dir: pipe: would run a command; give a folder or an address")
    scheme = address.scheme(where)
    if "://" in where and "::" in re.sub(r"\[[0-9A-Fa-f:.]+\]", "", where):  # [::1] is a host
        raise ConfigError("data.dir: chained addresses (::) are not opened; give a folder or a plain address")
    if scheme is None:
        return Path(where)
    if scheme not in _EXTRAS:
        raise ConfigError(f"data.dir: {scheme}:// is not opened, only {'://, '.join(_EXTRAS)}://")
    return Remote(where, scheme, settings)


class Remote:
    """A data set's folder at an address. Its text has no secrets."""

    def __init__(self, where: str, scheme: str, settings: Settings) -> None:
        self._where, self._shown = where, address.shown(where).rstrip("/")
        self._http = scheme in ("http", "https")
        self._settings = settings
        self._fs = _file_system(scheme, settings.timeout_seconds)
        self._cache = Cache(settings.cache, settings.cache_bytes) if settings.cache is not None else None

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"Remote({self._shown})"

    def __truediv__(self, name: str) -> str:
        return f"{self._shown}/{name}"

    def read(self, name: str, size: int, sha256: str, wrong: Wrong, stop: threading.Event | None = None) -> bytes:
        """The content of a file, from the cache or fetched into it.

        Args:
            name: path below the address.
            size: its bytes; no more are ever read.
            sha256: its digest, in hexadecimal.
            wrong: checks every content, from the cache or not; what is fetched must have the digest as well.
            stop: set from outside, ends waits and fetches.

        Raises:
            FetchError: it could not be had.
        """
        cached = self._cache.get(sha256, wrong) if self._cache is not None else None
        if cached is not None:
            return cached

        def wrong_too(data: bytes) -> str | None:
            fits = hashlib.sha256(data).hexdigest() == sha256
            return wrong(data) or (None if fits else "changed since it was prepared (its sha256 differs)")

        data = self.fetch(name, size, wrong_too, stop)
        if self._cache is not None:
            self._cache.put(sha256, data)
        return data

    def fetch(self, name: str, most: int, wrong: Wrong, stop: threading.Event | None = None) -> bytes:
        """The content of a file of at most `most` bytes, from its address. Arguments and errors as of `read`."""
        stop = stop or threading.Event()
        retrying = tenacity.Retrying(  # guard: fetch-retries
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_after_attempt(self._settings.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(self._try, self._url(name), most, wrong, stop)
        except _PassingError as error:
            tries = retrying.statistics["attempt_number"]
            raise FetchError(f"{error.reason} (tried {tries} times)", error.cure, error.cure == _NETWORK) from None

    def _try(self, url: str, most: int, wrong: Wrong, stop: threading.Event) -> bytes:
        try:
            data = _bounded(lambda given_up: self._get(url, most, given_up), self._settings.timeout_seconds, stop)
        except (MemoryError, FetchError):
            raise
        except Exception as error:
            problem = self._explain(error)
        else:
            reason = f"more than the promised {most} bytes" if len(data) > most else wrong(data)  # guard: wrong-bytes
            if reason is None:
                return data
            problem = _PassingError(reason)
        raise problem  # out here: as its context, the error with the whole address would show in a traceback

    def _get(self, url: str, most: int, given_up: threading.Event) -> bytes:
        # A stream: fsspec's other reader asks for sizes and ranges first. A size given, none is asked for.
        how = {"block_size": 0, "size": most} if self._http else {}
        content = io.BytesIO()
        with self._fs.open(url, "rb", **how) as file:
            while content.tell() <= most and not given_up.is_set():  # guard: no-more-than-promised
                part = file.read(min(_CHUNK_BYTES, most + 1 - content.tell()))
                if not part:
                    break
                content.write(part)
        return content.getvalue()

    def _url(self, name: str) -> str:
        if not self._http:
            return f"{self._where.rstrip('/')}/{name}"
        scheme, host, path, query, _ = urlsplit(self._where)
        return urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, ""))  # a token goes behind the name

    def _explain(self, error: Exception) -> FetchError:
        answer = getattr(error, "response", None)
        status = getattr(error, "status", None) or getattr(answer, "status_code", None) or getattr(error, "code", None)
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
            return _PassingError(reason, _NETWORK)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return _PassingError(f"no whole answer within {self._settings.timeout_seconds:g} s", _NETWORK)
        if _NO_CREDENTIALS.intersection(type_.__name__ for type_ in type(error).__mro__):
            # Tried again all the same: a cloud's own machines ask a server for theirs, which may be busy.
            return _PassingError(str(error).splitlines()[0], _CREDENTIALS)
        said = (str(error) or type(error).__name__).replace(self._where, self._shown)
        reason = address.scrub(said.splitlines()[0])[:300]
        # A wrong address, a certificate that does not fit: never another time.
        kind = FetchError if isinstance(error, (ValueError, IsADirectoryError, NotADirectoryError)) else _PassingError
        return kind(reason, _NETWORK)


class Cache:
    """A folder of files named by their sha256, of at most `most` bytes together, those being written counted."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._untold = threading.Lock()

    def get(self, sha256: str, wrong: Wrong) -> bytes | None:
        """The content of that digest, if it is there and nothing is wrong with it."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            data = None  # as good as damaged
        sound = data is not None and wrong(data) is None  # guard: check-cached-bytes
        with contextlib.suppress(OSError):  # evicted meanwhile, or a cache that can only be read
            if sound:
                os.utime(path)  # used now: not the next to go
            else:
                path.unlink()
        return data if sound else None

    def put(self, sha256: str, data: bytes) -> None:
        """Keep a content, if there is room for it. Where there is none, that is told once."""
        partial = self._folder / f".{sha256}.{uuid.uuid4().hex}.partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                if not self._reserve(partial, len(data)):
                    self._tell("data.cache_gib leaves no room for the shards being fetched; raise it")
                    return
                self._write(partial, data)
                partial.replace(self._path(sha256))
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            self._tell(f"{error.strerror}; make room there, or set data.cache_dir to a folder with more")

    def _path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.tar"

    def _reserve(self, partial: Path, size: int) -> bool:
        """Take a place for a file and delete what is too much with it; whether it may be written."""
        # First the place, then the count: of two processes, the second to count sees both.
        with partial.open("xb") as file:
            file.truncate(size)
        entries, total = self._scan()
        excess = total - self._most
        if excess > sum(size for _, size, _ in entries):
            return False
        self._delete(entries, excess)  # guard: cache-bound
        return True

    def _write(self, partial: Path, data: bytes) -> None:
        with partial.open("r+b", buffering=0) as file:  # not "wb", which gives the place up
            while True:
                try:
                    file.seek(0)
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]
                    os.fsync(file.fileno())
                    return
                except OSError as error:
                    file.truncate(0)  # what was written of it takes room as well
                    file.truncate(len(data))
                    if error.errno not in _FULL or not self._delete(self._scan()[0], len(data)):
                        raise

    def _scan(self) -> tuple[list[tuple[int, int, str]], int]:
        """(last use, bytes, path) of every whole file, and the bytes of all; sweeps what dead processes left."""
        entries, total = [], 0
        with os.scandir(self._folder) as found:
            for entry in found:
                whole = _ENTRY.fullmatch(entry.name)
                if not whole and not _PARTIAL.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                    if not whole and time.time() - status.st_mtime > _LEFTOVER_SECONDS:
                        os.unlink(entry.path)
                        continue
                except FileNotFoundError:  # another process was faster
                    continue
                total += status.st_size
                if whole:
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        return entries, total

    @staticmethod
    def _delete(entries: list[tuple[int, int, str]], needed: int) -> bool:
        """Delete the least recently used until so many bytes are free; whether any was there to delete."""
        for _, size, path in sorted(entries):
            if needed <= 0:
                break
            Path(path).unlink(missing_ok=True)
            needed -= size
        return bool(entries)

    def _tell(self, reason: str) -> None:
        if self._untold.acquire(blocking=False):  # guard: full-cache
            print(
                f"warning: {self._folder}: shards cannot be kept there and are fetched at every use: {reason}",
                file=sys.stderr,
                flush=True,
            )


def _file_system(scheme: str, timeout_seconds: float) -> Any:
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # trust_env: behind a proxy, there is no other way to name it.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=timeout_seconds), "trust_env": True}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        extra = _EXTRAS[scheme]
        raise ConfigError(f"data.dir: {scheme}:// needs a package: pip install 'distrain[{extra}]'") from None


def _bounded(get: Callable[[threading.Event], bytes], seconds: float, stop: threading.Event) -> bytes:
    """What `get` returns, in a thread that is left behind after so many seconds or when reading is stopped: not every
    file system takes a time-out. The event that it is given says that nobody waits any more.
    """
    answers: queue.SimpleQueue[bytes | BaseException] = queue.SimpleQueue()
    given_up = threading.Event()

    def work() -> None:
        try:
            answers.put(get(given_up))
        except BaseException as error:
            answers.put(error)

    if not stop.is_set():
        threading.Thread(target=work, name="distrain-fetch", daemon=True).start()
    deadline = time.monotonic() + seconds
    try:
        while not stop.is_set():  # guard: fetch-sees-stop
            left = deadline - time.monotonic()
            try:
                answer = answers.get(timeout=max(0.0, min(left, _LOOK_SECONDS)))
            except queue.Empty:
                if left <= 0:  # guard: fetch-deadline
                    raise TimeoutError from None
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer
    finally:
        given_up.set()
    raise FetchError("reading was stopped")
