"""Ranges of remote tar files: servers with and without range requests, S3, whole files in the cache, streams."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from harness import REPO
from object_stores import FaultyStore, faulty_store
from test_fetch import (
    PASSWORD,
    TOKEN,
    USER,
    Fault,
    Handler,
    Server,
    cut,
    cut_without_a_length,
    drip,
    endless,
    longer,
    only_warning,
    options,
    quick,
    reset,
    stall,
    stall_in_the_body,
    status,
    wrong_bytes,
)
from test_stream import reached

from distrain import config
from distrain.data import index, manifest
from distrain.data.disk_cache import Cache
from distrain.data.fetch import FetchError, Remote, locate
from distrain.errors import ConfigError, DataError, ShardError
from distrain.training.inputs import read_data

_ = quick  # a fixture of all tests here

TAR = "folder/a b#1?100%.tar"
"""Name with the characters that mean something in an address."""
CONTENT = Random(0).randbytes(3 * 2**20 + 777)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
START, STOP = 2**20 - 5, 2**20 + 70_000


class RangeServer(Server):
    """A server that answers range requests, unless `ignores_ranges` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.RequestHandlerClass = RangeHandler
        self.ignores_ranges = False
        self.ranges: list[str | None] = []
        """The header `Range` of each request; None: it had none."""

    @property
    def whole(self) -> int:
        """Number of requests for whole files."""
        return self.ranges.count(None)


class RangeHandler(Handler):
    """Gives faults the requested part of a file as body, and turns their status 200 into 206."""

    server: RangeServer

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def body_of(self, path: Path) -> bytes:
        requested = self.headers.get("Range")
        whole = path.read_bytes() if path.stat().st_size < 2**23 else b""  # faults send larger ones
        self.server.ranges.append(requested)
        self.status, self.content_range = 200, ""
        if requested is None or self.server.ignores_ranges:
            return whole
        first, last = map(int, requested.removeprefix("bytes=").split("-"))
        last = min(last, len(whole) - 1)
        self.status, self.content_range = 206, f"bytes {first}-{last}/{len(whole)}"
        if first > last:
            self.status, self.content_range = 416, f"bytes */{len(whole)}"
        return whole[first : last + 1]

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(getattr(self, "status", code) if code == 200 else code, message)
        if code == 200 and getattr(self, "content_range", ""):
            self.send_header("Content-Range", self.content_range)


def other_range(handler: Handler, body: bytes) -> None:
    handler.content_range = f"bytes 0-{len(body) - 1}/{len(CONTENT)}"  # type: ignore[attr-defined]
    handler.answer(CONTENT[: len(body)])


def other_bytes_of_the_file(handler: Handler, body: bytes) -> None:
    handler.answer(CONTENT[: len(body)])


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder with one tar file, or what `fetch` believes to be one."""
    path = tmp_path / "tars" / TAR
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return tmp_path / "tars"


@pytest.fixture
def server(tars: Path) -> Iterator[RangeServer]:
    one = RangeServer(tars)
    threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
    yield one
    one.over.set()
    one.shutdown()
    one.server_close()


@pytest.fixture
def without_ranges(server: RangeServer) -> RangeServer:
    server.ignores_ranges = True
    return server


@pytest.fixture(scope="module")
def bucket() -> Iterator[FaultyStore]:
    """A bucket of moto's server, with the tar file in a folder `tars`."""
    with faulty_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environ.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").put_object(Bucket="bucket", Key=f"tars/{TAR}", Body=CONTENT)
        yield store


@pytest.fixture
def s3(bucket: FaultyStore) -> str:
    """Address of the folder with the tar file."""
    bucket.fault = lambda *_: None
    return "s3://bucket/tars"


def remote(where: str, *args: Any, **settings: Any) -> Remote:
    location = locate(where, options(*args, **settings), "data.tars")
    assert isinstance(location, Remote)
    return location


def check_of(start: int, stop: int) -> Callable[[bytes], str | None]:
    def check(data: bytes) -> str | None:
        if len(data) != stop - start:
            return f"ends at byte {start + len(data)}, within an image"
        return None if data == CONTENT[start:stop] else "changed since it was indexed"

    return check


def read(root: Remote, start: int = START, stop: int = STOP, event: threading.Event | None = None) -> bytes:
    return root.read_range(TAR, start, stop, len(CONTENT), SHA256, check_of(start, stop), event)


def is_right(root: Remote, start: int = START, stop: int = STOP) -> bool:
    return read(root, start, stop) == CONTENT[start:stop]


def problem(root: Remote) -> FetchError:
    with pytest.raises(FetchError) as caught:
        read(root)
    return caught.value


def entries(cache: Path) -> list[int]:
    """Sizes of the entries of a cache; nothing else is there but locks."""
    paths = [path for path in cache.glob("*") if path.suffix != ".lock"] if cache.exists() else []
    assert all(re.fullmatch(r"[0-9a-f]{64}\.cached", path.name) for path in paths)
    return sorted(path.stat().st_size for path in paths)


# Ranges


@pytest.mark.parametrize("kind", ["http", "file", "s3"])
def test_a_range_is_fetched_once_and_then_read_from_the_cache(
    kind: str, server: RangeServer, tars: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = {"http": server.address, "file": f"file://{tars}"}.get(kind) or request.getfixturevalue("s3")
    root, cache = remote(where, tmp_path / "cache"), tmp_path / "cache"
    parts = [(START, STOP), (0, 1), (len(CONTENT) - 9, len(CONTENT)), (START, STOP - 1)]
    for _ in range(2):
        assert all(is_right(root, *part) for part in parts)
    assert entries(cache) == sorted(stop - start for start, stop in parts)
    if kind == "http":
        assert server.ranges == [f"bytes={start}-{stop - 1}" for start, stop in parts]
    assert root.size(TAR) == len(CONTENT)
    assert root.size("absent.tar") in (None, len(CONTENT))  # do_HEAD knows one answer


def test_s3_is_sent_one_request_for_a_range(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, calls = remote(s3), []
    call = root.file_system._call_s3

    async def record(method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append((method, kwargs.get("Range")))
        return await call(method, *args, **kwargs)

    monkeypatch.setattr(root.file_system, "_call_s3", record)
    assert is_right(root)
    assert calls == [("get_object", f"bytes={START}-{STOP - 1}")]


def test_503s_and_cut_answers_of_s3_are_retried(s3: str, bucket: FaultyStore) -> None:
    root, faults = remote(s3, retries=3), ["503", "cut", None]
    bucket.fault = lambda method, path, number: faults[number % 3]
    for start in range(0, 9000, 1000):
        assert is_right(root, start, start + 1000)
    bucket.fault = lambda *_: "503"
    assert problem(remote(s3, retries=1)).unreachable


def test_a_damaged_range_in_the_cache_is_fetched_again(server: RangeServer, tmp_path: Path) -> None:
    root = remote(server.address, tmp_path / "cache")
    assert is_right(root)
    (entry,) = (tmp_path / "cache").iterdir()
    for number, content in enumerate([b"", bytes(STOP - START)]):
        entry.write_bytes(content)
        assert is_right(root)
        assert entry.read_bytes() == CONTENT[START:STOP]
        assert len(server.ranges) == number + 2


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (500, 503, 429)),
        *(cut, cut_without_a_length, wrong_bytes, longer, reset, other_range, other_bytes_of_the_file),
        *(stall, stall_in_the_body, drip),
    ],
)
def test_what_may_pass_is_tried_again(fault: Fault, server: RangeServer, tmp_path: Path) -> None:
    hangs = fault in (stall, stall_in_the_body, drip)
    root = remote(server.address, tmp_path / "cache", seconds=1 if hangs else 10)
    server.faults[TAR] = [fault] if hangs else [fault, fault]
    assert is_right(root)
    assert len(server.requested) == (2 if hangs else 3)
    assert server.whole == 0
    assert entries(tmp_path / "cache") == [STOP - START]


@pytest.mark.parametrize(
    ("fault", "reason", "attempts"),
    [
        (status(503), r"HTTP 503 Service Unavailable \(tried 3 times\)", 3),
        (cut_without_a_length, r"ends at byte 1083573, within an image \(tried 3 times\)", 3),
        (other_range, r"the server sent another range: bytes 0-70004/3146505 \(tried 3 times\)", 3),
        (other_bytes_of_the_file, r"changed since it was indexed \(tried 3 times\)", 3),
        (status(404), "HTTP 404 Not Found", 1),
        (status(416), "HTTP 416 .*Range Not Satisfiable: the file is shorter than when it was indexed", 1),
    ],
)
def test_the_reason_of_a_lasting_failure_is_reported(
    fault: Fault, reason: str, attempts: int, server: RangeServer, tmp_path: Path
) -> None:
    server.always = fault
    error = problem(remote(server.address, tmp_path / "cache"))
    assert re.fullmatch(reason, error.reason)
    assert len(server.requested) == attempts
    assert entries(tmp_path / "cache") == []
    assert error.unreachable == ("503" in reason)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_file_that_is_missing_or_shorter_is_an_error(kind: str, tars: Path, request: pytest.FixtureRequest) -> None:
    root = remote(f"file://{tars}" if kind == "file" else request.getfixturevalue("s3"), retries=1)
    end = len(CONTENT)
    with pytest.raises(FetchError, match=f"ends at byte {end}, within an image"):
        root.read_range(TAR, end - 5, end + 5, end + 9, SHA256, check_of(end - 5, end + 5))
    with pytest.raises(FetchError, match="shorter than when it was indexed" if kind == "s3" else "ends at byte"):
        root.read_range(TAR, end + 5, end + 9, end + 9, SHA256, check_of(end + 5, end + 9))
    with pytest.raises(FetchError, match="Not Found"):
        root.read_range("absent.tar", 0, 9, 9, SHA256, fine)


def fine(_: bytes) -> None:
    return None


# Servers without range requests


def test_a_whole_file_is_fetched_once_and_every_range_read_from_it(
    without_ranges: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = remote(without_ranges.address, tmp_path / "cache")
    for start in range(0, len(CONTENT), 2**18):
        assert is_right(root, start, min(start + 2**18, len(CONTENT)))
    assert without_ranges.ranges == ["bytes=0-262143", None]
    assert entries(tmp_path / "cache") == [len(CONTENT)]
    assert (tmp_path / "cache" / f"{SHA256}.cached").read_bytes() == CONTENT
    (tmp_path / "cache" / f"{SHA256}.cached").unlink()
    assert is_right(root)
    assert without_ranges.whole == 2
    warning = only_warning(caplog)  # once, for two files
    assert "does not support range requests: tar files are fetched whole" in warning
    assert warning.startswith(without_ranges.address)


def test_a_damaged_file_in_the_cache_is_fetched_again(without_ranges: RangeServer, tmp_path: Path) -> None:
    root, entry = remote(without_ranges.address, tmp_path / "cache"), tmp_path / "cache" / f"{SHA256}.cached"
    assert is_right(root)
    for number, damaged in enumerate([CONTENT[:START], CONTENT[:START] + bytes(2**20)]):
        entry.write_bytes(damaged)
        assert is_right(root)
        assert entry.read_bytes() == CONTENT
        assert without_ranges.whole == number + 2


def test_a_wrong_index_of_the_right_file_is_an_error(without_ranges: RangeServer, tmp_path: Path) -> None:
    root = remote(without_ranges.address, tmp_path / "cache")
    with pytest.raises(FetchError, match="^changed since it was indexed$"):
        root.read_range(TAR, 0, 9, len(CONTENT), SHA256, lambda _: "changed since it was indexed")
    assert without_ranges.whole == 1


@pytest.mark.parametrize(
    "fault", [status(503), cut, cut_without_a_length, wrong_bytes, longer, reset, stall_in_the_body, endless]
)
def test_a_whole_file_that_is_not_the_indexed_one_is_fetched_again(
    fault: Fault, without_ranges: RangeServer, tmp_path: Path
) -> None:
    root = remote(without_ranges.address, tmp_path / "cache", seconds=1 if fault is stall_in_the_body else 10)

    def once(handler: Handler, body: bytes) -> None:
        if "Range" in handler.headers or without_ranges.whole > 1:
            handler.answer(body)
        else:
            fault(handler, body)

    without_ranges.always = once
    assert is_right(root)
    assert without_ranges.whole == 2
    assert entries(tmp_path / "cache") == [len(CONTENT)]


def test_an_answer_with_the_whole_file_is_neither_trained_on_nor_read(server: RangeServer, tmp_path: Path) -> None:
    server.ignores_ranges, server.always = True, endless
    begun = time.monotonic()
    error = problem(remote(server.address, seconds=30))
    assert time.monotonic() - begun < 5
    assert (
        error.reason == "the server does not support range requests: tar files are fetched whole, but there is no cache"
    )
    assert error.cure == "raise data.cache_gib, or copy the tar files to a disk of the job"
    before = -1
    while before != server.sent:  # until the server sees that nobody reads
        before = server.sent
        time.sleep(0.1)
    assert server.sent < 16 * 2**20


def test_a_file_that_takes_longer_than_the_time_out_is_fetched_while_it_arrives(
    without_ranges: RangeServer, tmp_path: Path
) -> None:
    def steady(handler: Handler, body: bytes) -> None:
        handler.answer(b"", length=len(body))
        for start in range(0, len(body), 2**19):
            handler.server.over.wait(0.2)
            handler.wfile.write(body[start : start + 2**19])

    without_ranges.always = steady
    begun = time.monotonic()
    assert is_right(remote(without_ranges.address, tmp_path / "cache", retries=0, seconds=1))
    assert time.monotonic() - begun > 1.2


def test_a_whole_file_is_never_in_memory(without_ranges: RangeServer, tars: Path, tmp_path: Path) -> None:
    large = bytes(range(256)) * 2**17  # 32 MiB
    (tars / "large.tar").write_bytes(large)
    digest, half = hashlib.sha256(large).hexdigest(), len(large) // 2

    def unread(handler: Handler, _: bytes) -> None:
        handler.answer(b"", length=len(large))
        with (tars / "large.tar").open("rb") as file:
            while piece := file.read(2**16):
                handler.wfile.write(piece)

    without_ranges.always = unread
    root = remote(without_ranges.address, tmp_path / "cache")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        data = root.read_range("large.tar", half, half + 99, len(large), digest, fine)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert data == large[half : half + 99]
    assert peak < 12 * 2**20


def test_threads_that_need_a_file_at_the_same_time_fetch_it_once(without_ranges: RangeServer, tmp_path: Path) -> None:
    readers = 4
    all_started = threading.Barrier(readers)

    def run(number: int) -> bool:
        root = remote(without_ranges.address, tmp_path / "cache")
        all_started.wait(10)
        return is_right(root, number * 1000, number * 1000 + 500)

    with ThreadPoolExecutor(readers) as pool:
        assert all(pool.map(run, range(readers)))
    assert without_ranges.whole == 1


READER = """
import sys, threading
from distrain.data import fetch
address, cache, name, size, sha256, start, stop = sys.argv[1:]
root = fetch.locate(address, fetch.FetchOptions(cache, 2**30, 2, 30))
data = root.read_range(name, int(start), int(stop), int(size), sha256, lambda _: None)
sys.stdout.buffer.write(data)
"""


def reader(server: RangeServer, cache: Path, start: int = START, stop: int = STOP) -> subprocess.Popen[bytes]:
    values = (server.address, cache, TAR, len(CONTENT), SHA256, start, stop)
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", READER, *map(str, values)], stdout=subprocess.PIPE, env=environment)


def test_a_process_killed_while_it_fetches_a_file_is_replaced_by_one_of_those_that_wait(
    without_ranges: RangeServer, tmp_path: Path
) -> None:
    in_the_body = threading.Event()

    def first_stalls(handler: Handler, body: bytes) -> None:
        if "Range" in handler.headers or without_ranges.whole > 1:
            handler.answer(body)
            return
        handler.answer(body[: 2**20], length=len(body))
        in_the_body.set()
        stall(handler, body)

    without_ranges.always = first_stalls
    first = reader(without_ranges, tmp_path / "cache")
    assert in_the_body.wait(30)
    others = [reader(without_ranges, tmp_path / "cache", number, number + 99) for number in range(2)]
    assert reached(lambda: len([each for each in without_ranges.ranges if each]) == 3)  # both know: no ranges
    time.sleep(0.3)
    assert without_ranges.whole == 1  # they wait
    first.kill()
    assert [other.communicate(timeout=30)[0] for other in others] == [CONTENT[:99], CONTENT[1:100]]
    assert first.wait() == -9
    assert without_ranges.whole == 2


@pytest.mark.parametrize("how", ["hangs", "stop", "no locks"])
def test_no_wait_for_a_lock_is_endless(
    how: str, without_ranges: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, event = (
        remote(without_ranges.address, tmp_path / "cache", seconds=0.3 if how == "hangs" else 30),
        threading.Event(),
    )
    (tmp_path / "cache").mkdir()
    begun = time.monotonic()
    with (tmp_path / "cache" / f".{SHA256}.lock").open("wb") as lock:
        if how == "no locks":
            monkeypatch.setattr(fcntl, "flock", lambda *_: no_locks())
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if how == "stop":
            threading.Timer(0.3, event.set).start()
            with pytest.raises(FetchError, match="reading was stopped"):
                read(root, event=event)
        else:
            late = threading.Timer(5, event.set)  # ends a wait without end
            late.start()
            assert read(root, event=event) == CONTENT[START:STOP]
            late.cancel()
    assert time.monotonic() - begun < 5
    assert without_ranges.whole == (0 if how == "stop" else 1)


def no_locks() -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_lock_is_waited_for_as_long_as_its_holder_writes(tmp_path: Path) -> None:
    cache, key, ended = Cache(tmp_path, 2**20), "0" * 64, threading.Event()

    def write() -> Iterator[bytes]:
        for _ in range(6):
            time.sleep(0.3)
            yield b"x"
        ended.set()

    def hold() -> None:
        with cache.only_one(key, 1, threading.Event()):
            started.set()
            assert cache.store(key, 6, write) is None

    started = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert started.wait(10)
    with cache.only_one(key, 1, threading.Event()):
        assert ended.is_set()
        assert cache.get(key, fine, 6) == b"xxxxxx"
    holder.join(10)


def test_without_room_for_a_whole_file_the_error_has_the_cure(without_ranges: RangeServer, tmp_path: Path) -> None:
    error = problem(remote(without_ranges.address, tmp_path / "cache", max_bytes=len(CONTENT) - 1))
    assert (
        "has no room for this one: data.cache_gib is too small for what is fetched at the same time; raise it"
        in error.reason
    )
    assert error.cure == "or copy the tar files to a disk of the job"
    assert "tried" not in error.reason
    assert without_ranges.whole == 0
    (tmp_path / "file").touch()
    error = problem(remote(without_ranges.address, tmp_path / "file" / "below", retries=1))
    assert (
        "Not a directory; make room there, or set data.cache_dir to a folder with more (tried 2 times)" in error.reason
    )
    assert not error.unreachable


def test_room_that_other_fetches_leave_is_waited_for(without_ranges: RangeServer, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    other = tmp_path / "cache" / f".{'1' * 64}.{'0' * 32}.partial"
    other.write_bytes(bytes(10))

    def leave(handler: Handler, body: bytes) -> None:
        if len(without_ranges.ranges) == 1:
            threading.Timer(0.3, other.unlink).start()
        handler.answer(body)

    without_ranges.always = leave
    assert is_right(remote(without_ranges.address, tmp_path / "cache", max_bytes=len(CONTENT), retries=50))
    assert entries(tmp_path / "cache") == [len(CONTENT)]


def test_locks_that_nobody_used_for_an_hour_are_deleted(without_ranges: RangeServer, tmp_path: Path) -> None:
    root, locks = (
        remote(without_ranges.address, tmp_path / "cache"),
        [tmp_path / "cache" / f".{key}.lock" for key in (SHA256, "1" * 64)],
    )
    (tmp_path / "cache").mkdir()
    for lock in locks:
        lock.touch()
        os.utime(lock, (1000, 1000))
    assert is_right(root)
    assert [lock.exists() for lock in locks] == [True, False]


# An index whose tar files are remote


IMAGES = [(1000, 400), (30_000, 5000), (35_512, 70_000), (2**21, 100_000)]
"""Position and size of each "image" in the tar file."""


@pytest.fixture
def index_folder(tmp_path: Path) -> Path:
    """An index of the tar file, without tars.json."""
    rows = [(at, index.digest(CONTENT[at : at + size]), i, size, 0, 1, 1) for i, (at, size) in enumerate(IMAGES)]
    content = index.to_bytes(np.array(rows, index.SAMPLE))
    entry = {"name": "train.npy", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tar = {"name": TAR, "bytes": len(CONTENT), "samples": len(IMAGES), "sha256": SHA256}
    total = sum(size for _, size in IMAGES)
    train = {"samples": len(IMAGES), "bytes": total, "lanes": 1, "shards": 1, "index": entry, "tars": [tar]}
    tree = {
        **{"format": "distrain-index", "version": 1, "source": {}, "classes": ["a"], "normalization": "none"},
        **{"mean": [0.5] * 3, "std": [0.5] * 3, "image_shape": None, "smallest": [1, 1], "largest": [2, 2]},
        "splits": {"train": train},
    }
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "train.npy").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_local_index_of_remote_tar_files_is_read(
    ignores_ranges: bool, index_folder: Path, server: RangeServer, tmp_path: Path
) -> None:
    server.ignores_ranges = ignores_ranges
    keys = [
        f"data.dir={index_folder}", f"data.tars={server.address}", f"data.cache_dir={tmp_path / 'cache'}",
        "data.image_size=8",
    ]  # fmt: skip
    for _ in range(2):
        dataset = read_data(config.load(None, keys), "train")
        images = index.read(dataset, "train", index.load(dataset, "train"), 0, threading.Event()).images
        assert images == [CONTENT[at : at + size] for at, size in IMAGES]
    assert len(server.ranges) == 2  # of three images that are near each other, and of the last one; or the tar file
    with pytest.raises(ConfigError, match=r"^data\.tars: ssh:// is not supported"):
        manifest.read(index_folder, tars="ssh://host/tars")
    with pytest.raises(DataError, match=r"/index: has no tars\.json; set data\.tars$"):
        manifest.read(index_folder)
    (index_folder / "tars.json").write_text(json.dumps({"location": server.address + "/elsewhere"}))
    dataset = manifest.read(index_folder)
    with pytest.raises(ShardError) as caught:
        index.read(dataset, "train", index.load(dataset, "train"), 0, threading.Event())
    assert str(caught.value).startswith(f"{server.address}/elsewhere/{TAR}: HTTP 404 Not Found; bring the file back")


# Streams


def all_of(root: Remote) -> bytes:
    with root.stream(TAR) as file:
        return b"".join(iter(lambda: file.read(10_000), b""))


@pytest.mark.parametrize("kind", ["http", "file", "s3"])
def test_a_stream_is_the_file(kind: str, server: RangeServer, tars: Path, request: pytest.FixtureRequest) -> None:
    where = {"http": server.address, "file": f"file://{tars}"}.get(kind) or request.getfixturevalue("s3")
    assert all_of(remote(where)) == CONTENT
    with remote(where).stream(TAR) as file:  # not read to its end
        assert file.read(9) == CONTENT[:9]
    assert server.ranges == ([None, None] if kind == "http" else [])


@pytest.mark.parametrize("fault", [status(503), cut, reset, stall, stall_in_the_body])
def test_a_stream_that_fails_is_read_again_from_its_beginning(fault: Fault, server: RangeServer) -> None:
    hangs = fault in (stall, stall_in_the_body)
    retries = 1 if hangs else 2
    root = remote(server.address, retries=retries, seconds=1 if hangs else 10)
    server.faults[TAR] = [fault] * retries
    assert root.retrying(lambda: all_of(root)) == CONTENT
    assert len(server.requested) == retries + 1
    server.always = fault
    begun = time.monotonic()
    with pytest.raises(FetchError, match=rf"\(tried {retries + 1} times\)") as caught:
        root.retrying(lambda: all_of(root))
    assert caught.value.unreachable
    while [thread for thread in threading.enumerate() if thread.name == "distrain-fetch"]:
        assert time.monotonic() - begun < 10, "an abandoned read still runs"
        time.sleep(0.02)


def test_a_stop_ends_a_stream(server: RangeServer) -> None:
    stop, root = threading.Event(), remote(server.address, seconds=60)
    server.always = stall_in_the_body
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(FetchError, match="reading was stopped"), root.stream(TAR, stop) as file:
        file.read()
    assert time.monotonic() - begun < 5


# Addresses


@pytest.mark.parametrize("fault", [None, status(404), status(500), cut, reset, stall])
@pytest.mark.parametrize("action", [read, all_of])
def test_errors_and_their_tracebacks_show_no_secret(
    action: Callable[[Remote], bytes], fault: Fault | None, server: RangeServer, tmp_path: Path
) -> None:
    where = server.address.replace("://", f"://{USER}:{PASSWORD}@") + f"?sig={TOKEN}"
    root = remote(where, tmp_path / "cache", retries=1, seconds=0.5)
    server.always = fault
    if fault is None:
        server.needed = {}
    with pytest.raises(FetchError) as caught:
        root.retrying(lambda: action(root))
    whole = "".join(traceback.format_exception(caught.value)) + str(caught.value.cure)
    behind: BaseException | None = caught.value
    while behind is not None:
        whole += repr(behind)
        behind = behind.__cause__ or behind.__context__
    assert not [secret for secret in (USER, PASSWORD, TOKEN) if secret in whole]
    if fault is None:
        assert caught.value.cure == (
            "check the address and its credentials (a run's config.yaml has none: give data.tars again)"
        )


def test_messages_name_the_key_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for where in ("pipe:cat x", "zip://a::http://h/x", "ssh://h/x", "gs://bucket/x"):
        with pytest.raises(ConfigError, match=r"^data\.tars: "):
            locate(where, options(), "data.tars")


def test_no_secret_of_the_tar_files_address_is_recorded() -> None:
    where = f"https://{USER}:{PASSWORD}@host/tars?sig={TOKEN}"
    loaded = config.load(None, [f"data.tars={where}"])
    assert loaded.data.tars == where
    assert config.public(loaded)["data"]["tars"] == "https://host/tars"
    assert config.public(config.Config())["data"]["tars"] is None
    assert "data.tars" not in config.identity(loaded)
