"""Data sets at remote addresses: fsspec fetches files, or ranges of files, and a folder of limited size caches them.

1. An entry of the cache is named by what determines its content: the sha256 of a file, or of this and a range. Every
   read of it is checked; a damaged entry is deleted and fetched again.
2. A fetch is limited in time, memory and number of attempts. Transient failures (a 503, a stalled connection, a
   truncated body, wrong bytes) are retried after random waits with exponential backoff.
3. A server that ignores range requests sends whole files. Such a file is fetched once, into the cache, and its ranges
   are read there.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec
import fsspec.asyn
import tenacity

from distrain import address, files
from distrain.config import Data
from distrain.data.disk_cache import Cache, Check
from distrain.errors import ConfigError, DataError, UnreachableError
from distrain.text import plural, printable

_EXTRAS: dict[str, str | None] = {"file": None, "http": None, "https": None, "s3": "s3", "gs": "gs", "hf": "hf"}
"""Supported schemes, and the extra of distrain that installs the package that fsspec needs for it."""

_FIRST_WAIT_SECONDS = 1.0
"""Longest wait before the second attempt; it doubles with each attempt."""
_LONGEST_WAIT_SECONDS = 30.0
_CHUNK_BYTES = 2**20
_BLOCK_BYTES = 2**23
"""Bytes of one request to an object store, where a file is read from its beginning to its end."""
_STOP_POLL_SECONDS = 0.1
"""Interval at which a fetch checks whether reading was stopped."""

_NETWORK = (
    "check the network and the server; data.fetch_retries and data.fetch_timeout_seconds set how long it is tried"
)
_TRY_AGAIN = (408, 425, 429)
_TRY_AGAIN_CODES = ("RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
"""Codes of S3 for requests that were damaged or delayed on their way; the status is 400."""
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
"""Names of exceptions of botocore and google.auth, which need not be installed."""

T = TypeVar("T")

log = logging.getLogger("distrain")


class FetchError(Exception):
    """A file cannot be fetched, or not be written to an object store.

    Args:
        reason: what went wrong.
        cure: what the user can do about it; None if the file itself must be restored.
        unreachable: whether the server did not answer, so that a later attempt may succeed.
    """

    def __init__(self, reason: str, cure: str | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.cure, self.unreachable = reason, cure, unreachable

    @property
    def is_damage(self) -> bool:
        """Whether the file itself is at fault: the store answers, and allows to read it."""
        return self.cure is None

    def explained(self, where: str, kind: type[DataError], cure: str) -> DataError:
        """Return the error that the user sees: of this kind, or UnreachableError if a later attempt may succeed.

        Args:
            where: the file.
            kind: the error if the file itself is at fault.
            cure: for that case.
        """
        error_type = UnreachableError if self.unreachable else kind
        return error_type(f"{where}: {self.reason}; {self.cure or cure}")


class TransientError(FetchError):
    """A failed attempt that is worth a retry; `Remote.retrying` repeats it."""


class _NoRangesError(FetchError):
    """The server answers a request for a range with something else."""

    def __init__(self) -> None:
        super().__init__("the server does not support range requests")


class _Part(NamedTuple):
    """A range of bytes of a remote file: `start` … `stop` - 1."""

    url: str
    start: int
    stop: int
    file_bytes: int
    file_sha256: str


@dataclass(frozen=True)
class FetchOptions:
    """Settings for fetching files, as in section `data`. With `cache_bytes=0` nothing is cached."""

    cache_dir: str | Path | None
    cache_bytes: int
    retries: int
    timeout_seconds: float

    @classmethod
    def of(cls, data: Data, cached: bool = True) -> FetchOptions:
        """Return the options that a configuration sets; `cached=False` turns the cache off."""
        cache_bytes = int(data.cache_gib * 2**30) if cached else 0
        return cls(data.cache_dir, cache_bytes, data.fetch_retries, data.fetch_timeout_seconds)


def cache_folder(cache_dir: str | Path | None) -> Path:
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


def locate(location: str | Path, options: FetchOptions, key: str = "data.dir") -> Path | Remote:
    """Return the path of a local folder, or a `Remote` for an address.

    Args:
        location: the folder or address.
        options: how it is fetched.
        key: the configuration's key that names it, for messages.

    Raises:
        ConfigError: the address's scheme is not supported, its package is not installed, or there is no cache folder.
    """
    if isinstance(location, Path):
        return location
    if location.lower().startswith("pipe:"):
        raise ConfigError(f"{key}: pipe: would run a command; give a folder or an address")
    scheme = address.scheme(location)
    if "://" in location and "::" in re.sub(r"\[[0-9A-Fa-f:.]+\]", "", location):  # [::1] is a host
        raise ConfigError(f"{key}: chained addresses (::) are not supported; give a folder or a plain address")
    if scheme is None:
        return Path(location)
    if scheme not in _EXTRAS:
        raise ConfigError(f"{key}: {scheme}:// is not supported, only {'://, '.join(_EXTRAS)}://")
    if scheme == "s3" and "@" in location.split("/")[2]:
        raise ConfigError(
            f"{key}: an s3:// address has no user or password; set AWS_ACCESS_KEY_ID and the like instead"
        )
    return Remote(location, scheme, options, key)


class Remote:
    """A remote folder: that of a data set, or of tar files. As text it shows the address without secrets."""

    def __init__(self, location: str, scheme: str, options: FetchOptions, key: str) -> None:
        self._address, self._public_address = location, address.without_secrets(location).rstrip("/")
        self._http, self._is_file = scheme in ("http", "https"), scheme == "file"
        self._options, self._key = options, key
        self.file_system = _file_system(scheme, options.timeout_seconds, key)
        cached = options.cache_bytes > 0
        self._cache = Cache(cache_folder(options.cache_dir), options.cache_bytes) if cached else None
        self._first_whole = threading.Lock()

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
        url, stop = self.url(name), stop or threading.Event()

        def get(abandoned: threading.Event) -> bytes:
            return self._get(url, max_bytes, abandoned)

        return self.retrying(lambda: self._attempt(get, max_bytes, check, stop), stop)

    def read_range(
        self,
        name: str,
        start: int,
        stop: int,
        file_bytes: int,
        file_sha256: str,
        check: Check,
        stop_event: threading.Event | None = None,
    ) -> bytes:
        """Return the bytes `start` … `stop` - 1 of a file, from the cache if possible; fetch and cache them otherwise.

        Args:
            name: path of the file below the address.
            start: first byte.
            stop: end of the range.
            file_bytes: size of the file in bytes.
            file_sha256: its digest, in hexadecimal.
            check: checks the range, whether cached or fetched.
            stop_event: ends waits and fetches when it is set.

        Raises:
            FetchError: the range cannot be fetched; or the server sends whole files only, and there is no room for one.
        """
        key = hashlib.sha256(f"{file_sha256}:{start}-{stop}".encode()).hexdigest()
        if self._cache is not None:
            cached = self._cache.get(key, check, stop - start)
            cached = cached or self._cache.get(file_sha256, check, stop - start, start)
            if cached is not None:
                return cached
        part, stop_event = _Part(self.url(name), start, stop, file_bytes, file_sha256), stop_event or threading.Event()

        def get(abandoned: threading.Event) -> bytes:
            return self._get_range(part, abandoned)

        try:
            data = self.retrying(lambda: self._attempt(get, stop - start, check, stop_event), stop_event)
        except _NoRangesError:
            cache = self._whole_files()
        else:
            if self._cache is not None:
                self._cache.put(key, data)
            return data
        return self.retrying(lambda: self._read_whole(cache, part, check, stop_event), stop_event)

    def stream(self, name: str, stop: threading.Event | None = None) -> BinaryIO:
        """Open a file that is read from its beginning to its end.

        Each MiB of it has the time-out of an attempt. Opening and reading raise `FetchError`: `retrying` can repeat an
        action that opens the file and reads it.
        """
        return io.BufferedReader(_Stream(self, self.url(name), stop or threading.Event()), _CHUNK_BYTES)

    def size(self, name: str, stop: threading.Event | None = None) -> int | None:
        """Return the size of a file in bytes; None if the server does not say it."""
        try:
            size = self.limited(lambda _: self.file_system.size(self.url(name)), stop or threading.Event())
        except FetchError:
            return None
        return size if isinstance(size, int) else None

    def retrying(self, action: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Return the result of `action`, which is repeated after transient failures, as often as the options allow.

        Args:
            action: something that reads from this folder.
            stop: ends the waits between attempts when it is set.

        Raises:
            FetchError: it failed.
        """
        stop = stop or threading.Event()
        retrying = tenacity.Retrying(  # guard: fetch-retries
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(self._options.retries + 1) | tenacity.stop_when_event_set(stop),
            wait=tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(action)
        except TransientError as error:
            attempts = retrying.statistics["attempt_number"]
            raise FetchError(
                f"{error.reason} (tried {plural(attempts, 'time')})", error.cure, error.cure == _NETWORK
            ) from None

    def _attempt(
        self, get: Callable[[threading.Event], bytes], max_bytes: int, check: Check, stop: threading.Event
    ) -> bytes:
        data = self.limited(get, stop)
        too_long = f"more than the expected {max_bytes} bytes"
        reason = too_long if len(data) > max_bytes else check(data)  # guard: wrong-bytes
        if reason is not None:
            raise TransientError(reason)
        return data

    def limited(self, get: Callable[[threading.Event], T], stop: threading.Event) -> T:
        """Return the result of `get`, limited in time; its errors become `FetchError`s without secrets.

        Args:
            get: called in a thread, with an event that is set when its result is no longer needed.
            stop: ends the wait when it is set.
        """
        try:
            return _with_timeout(get, self._options.timeout_seconds, stop)
        except (MemoryError, FetchError):
            raise
        except Exception as error:
            problem = wrong_bucket(error) or self._explain(error)
        raise problem  # not inside `except`: a traceback would show the original error, with secrets of the address

    def _get(self, url: str, max_bytes: int, abandoned: threading.Event) -> bytes:
        content = io.BytesIO()
        with self._open(url) as file:
            while content.tell() <= max_bytes and not abandoned.is_set():  # guard: no-more-than-promised
                chunk = file.read(min(_CHUNK_BYTES, max_bytes + 1 - content.tell()))
                if not chunk:
                    break
                content.write(chunk)
        return content.getvalue()

    def _open(self, url: str) -> Any:
        """Open a file that is read from its beginning to its end."""
        if self._is_file:
            self._check_file(self.file_system._strip_protocol(url))
        if not self._http:
            return self.file_system.open(url, "rb", block_size=_BLOCK_BYTES)
        import aiohttp

        # block_size 0 streams the file; fsspec's other reader sends more requests. With a size, it requests none.
        seconds = self._options.timeout_seconds
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        return self.file_system.open(url, "rb", block_size=0, size=1, timeout=timeout)

    def _get_range(self, part: _Part, abandoned: threading.Event) -> bytes:
        if self._http:
            data: bytes = fsspec.asyn.sync(self.file_system.loop, self._get_http_range, part, abandoned)
            return data
        if self._is_file:
            self._check_file(self.file_system._strip_protocol(part.url))
        # Both send one request, for this range alone.
        if isinstance(self.file_system, fsspec.asyn.AsyncFileSystem):
            return bytes(self.file_system.cat_file(part.url, start=part.start, end=part.stop))
        with self.file_system.open(part.url, "rb", size=part.file_bytes, cache_type="none") as file:
            file.seek(part.start)
            return bytes(file.read(part.stop - part.start))

    async def _get_http_range(self, part: _Part, abandoned: threading.Event) -> bytes:
        session = await self.file_system.set_session()
        headers = {"Range": f"bytes={part.start}-{part.stop - 1}", "Accept-Encoding": "identity"}
        content, most = bytearray(), part.stop - part.start + 1
        async with session.get(self.file_system.encode_url(part.url), headers=headers) as response:
            response.raise_for_status()
            if response.status != HTTPStatus.PARTIAL_CONTENT:  # guard: partial-content
                raise _NoRangesError
            sent = response.headers.get("Content-Range", "")
            if not sent.startswith(f"bytes {part.start}-"):
                raise TransientError(f"the server sent another range: {printable(sent, 50)}")
            while len(content) < most and not abandoned.is_set():
                chunk = await response.content.read(most - len(content))
                if not chunk:
                    break
                content += chunk
        return bytes(content)

    def _whole_files(self) -> Cache:
        """Return the cache, into which whole files are fetched where the server ignores ranges; log it once."""
        reason = "the server does not support range requests: tar files are fetched whole"
        if self._cache is None:
            raise FetchError(
                f"{reason}, but there is no cache", "raise data.cache_gib, or copy the tar files to a disk of the job"
            )
        if self._first_whole.acquire(blocking=False):
            log.warning("%s: %s, into %s", self, reason, self._cache.folder)
        return self._cache

    def _read_whole(self, cache: Cache, part: _Part, check: Check, stop: threading.Event) -> bytes:
        """Return a range of a file from the cache, into which the whole file is fetched if it is not there."""
        key, size = part.file_sha256, part.stop - part.start
        with cache.only_one(key, self._options.timeout_seconds + _LONGEST_WAIT_SECONDS, stop):
            data = cache.get(key, check, size, part.start)  # another process may have fetched it
            if data is not None:
                return data
            problem = cache.store(key, part.file_bytes, lambda: self._pieces(part, stop))
        if problem is not None:
            error_type = FetchError if part.file_bytes > cache.max_bytes else TransientError  # others may leave room
            raise error_type(
                f"the server sends whole files only, and {cache.folder} has no room for this one: {problem}",
                "or copy the tar files to a disk of the job",
            )
        data = cache.get(key, lambda _: None, size, part.start)
        if data is None:
            raise TransientError(f"deleted from {cache.folder} before it was read", "raise data.cache_gib")
        reason = check(data)
        if reason is not None:
            raise FetchError(reason)
        return data

    def _pieces(self, part: _Part, stop: threading.Event) -> Iterator[bytes]:
        """Yield the content of a whole file, and check its size and digest."""
        digest, size = hashlib.sha256(), 0
        with _Stream(self, part.url, stop) as file:
            while piece := file.read(_CHUNK_BYTES):
                size += len(piece)
                if size > part.file_bytes:
                    raise TransientError(f"more than the expected {part.file_bytes} bytes")
                digest.update(piece)
                yield piece
        if digest.hexdigest() != part.file_sha256:  # guard: whole-file-digest
            raise TransientError("changed since it was indexed (its sha256 differs)")

    @staticmethod
    def _check_file(path: str) -> None:
        """Refuse a FIFO or device, which could be waited for until the time-out, again and again."""
        try:
            files.open_regular(path).close()
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise FetchError(str(error.strerror)) from None
            raise

    def url(self, name: str) -> str:
        """Return the address of a file as `file_system` needs it; it may hold secrets."""
        if not self._http:
            return f"{self._address.rstrip('/')}/{name}"
        scheme, host, path, query, _ = urlsplit(self._address)
        return urlunsplit((scheme, host, f"{path.rstrip('/')}/{quote(name)}", query, ""))  # the query may be a token

    def _explain(self, error: Exception) -> FetchError:
        credentials = "check the address and its credentials"
        if self._http:
            credentials += f" (a run's config.yaml has none: give {self._key} again)"
        response = getattr(error, "response", None)
        status = (
            getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
        )
        if _s3_answer(error).code == "InvalidRange":
            status = 416
        elif isinstance(error, FileNotFoundError):
            status = 404
        elif isinstance(error, PermissionError):
            status = 403
        if isinstance(status, int) and status >= 400:
            phrase = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
            reason = f"HTTP {status} {phrase}".rstrip() if self._http else phrase or str(status)
            if status in (401, 403):
                return FetchError(reason, credentials)
            if status == 416:
                reason += ": the file is shorter than when it was indexed"
            if status < 500 and status not in _TRY_AGAIN:
                return FetchError(reason)
            return TransientError(reason, _NETWORK)
        if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
            return TransientError(f"no complete answer within {self._options.timeout_seconds:g} s", _NETWORK)
        if _NO_CREDENTIALS.intersection(type_.__name__ for type_ in type(error).__mro__):
            # Retried: machines in a cloud get credentials from a server, which may be busy.
            return TransientError(printable(str(error).splitlines()[0]), credentials)
        message = (str(error) or type(error).__name__).replace(self._address, self._public_address)
        reason = printable(address.scrub(message.splitlines()[0]))
        # ValueError: a wrong address, or a certificate that does not match. A retry cannot help.
        is_refusal = _s3_answer(error).is_final
        is_final = is_refusal or isinstance(error, (ValueError, IsADirectoryError, NotADirectoryError))
        return (FetchError if is_final else TransientError)(reason, credentials if is_refusal else _NETWORK)


def wrong_bucket(error: Exception) -> FetchError | None:
    """Return what an error of s3fs says about the name of a bucket; None if it is another error."""
    answer = _s3_answer(error)
    if answer.code == "NoSuchBucket":
        return FetchError("there is no such bucket", "check the address")
    if answer.code in _WRONG_REGION or isinstance(error, RecursionError):  # botocore follows a redirect for ever
        return FetchError(
            f"the bucket is in another region, or on another server ({answer.code or 'PermanentRedirect'})",
            "set AWS_DEFAULT_REGION to its region, and AWS_ENDPOINT_URL to its server unless it is Amazon's",
        )
    if type(error).__name__ == "ParamValidationError":  # of botocore, which need not be installed
        return FetchError("the name of the bucket, or of a file, is not valid", "check the address")
    return None


class _S3Answer(NamedTuple):
    """HTTP status and code of an answer of S3 that is an error; None without one."""

    status: int | None = None
    code: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether the same request would get the same answer."""
        is_refusal = self.status is not None and 300 <= self.status < 500
        return is_refusal and self.status not in (*_TRY_AGAIN, 409) and self.code not in _TRY_AGAIN_CODES


def _s3_answer(error: BaseException) -> _S3Answer:
    """Return the answer of S3 behind an error: s3fs raises an OSError for botocore's."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return _S3Answer(status, answer.get("Error", {}).get("Code"))
    return _S3Answer()


class _Stream(io.RawIOBase):
    """A remote file that is read from its beginning to its end. Opening it, and each read, have the time-out."""

    _file: Any = None

    def __init__(self, remote: Remote, url: str, stop: threading.Event) -> None:
        self._remote, self._stop = remote, stop
        self._file = remote.limited(lambda _: remote._open(url), stop)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to a MiB into `buffer`; return the number of bytes, 0 at the end."""
        size = min(len(buffer), _CHUNK_BYTES)
        file, self._file = self._file, None  # an abandoned thread closes it
        data = self._remote.limited(lambda abandoned: _read_up_to(file, size, abandoned), self._stop)
        self._file = file
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None
        super().close()


def _read_up_to(file: Any, size: int, abandoned: threading.Event) -> bytes:
    """Return `size` bytes, fewer at the end of the file. The file is closed if that fails, or is abandoned."""
    content, complete = bytearray(), False
    try:
        while len(content) < size and not abandoned.is_set():
            chunk = file.read(size - len(content))
            if not chunk:
                break
            content += chunk
        complete = not abandoned.is_set()
    finally:
        if not complete:
            file.close()
    return bytes(content)


def _file_system(scheme: str, timeout_seconds: float, key: str) -> Any:
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # trust_env: takes a proxy from the environment, the only way to set one.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=timeout_seconds), "trust_env": True}
    if scheme == "s3":  # by default, a part that takes 15 s to be sent fails
        options["config_kwargs"] = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        extra = _EXTRAS[scheme]
        raise ConfigError(f"{key}: {scheme}:// needs a package: pip install 'distrain[{extra}]'") from None


def _with_timeout(get: Callable[[threading.Event], T], seconds: float, stop: threading.Event) -> T:
    """Return the result of `get`, which runs in a thread, as not every file system has time-outs.

    The thread is abandoned after `seconds`, or when `stop` is set: then the event that `get` receives is set.
    """
    results: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
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
