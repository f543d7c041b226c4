"""Remote data sets: a real server that misbehaves, and a cache that is full, damaged, shared or not to be written."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from harness import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import needed, order_of, reached

import distrain
from distrain import address, cli, config
from distrain.data import fetch, manifest, shards
from distrain.data.cache import Cache as MemoryCache
from distrain.data.disk_cache import Cache
from distrain.data.fetch import FetchOptions, Remote, locate
from distrain.data.manifest import Dataset
from distrain.data.order import Order
from distrain.data.stream import EvaluationBatches, TrainingBatches
from distrain.environment import World
from distrain.errors import ConfigError, DataError, ShardError, UnreachableError

USER, PASSWORD, TOKEN = "someone", "pa55word", "t0ken"
SHARD = "train/00003.tar"

Fault = Callable[["Handler", bytes], None]


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback. `faults` of a path are done to its next requests, `always` to every one."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.faults: dict[str, list[Fault]] = {}
        self.always: Fault | None = None
        self.needed: dict[str, str] | None = None
        self.requested: list[str] = []
        self.sent = 0
        self.over = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:  # clients go away; that is the point
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer takes 40 ms
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path.lstrip("/"))
        self.server.requested.append(name)
        if self.server.needed is not None:
            credentials = {"authorization": self.headers.get("Authorization"), "query": url.query}
            if credentials != self.server.needed:
                self.answer(b"go away", 403)
                return
        path = self.server.root / name
        if not path.is_file():
            self.answer(b"", 404)
            return
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else self.server.always
        body = self.body_of(path)
        if fault is None:
            self.answer(body)
        else:
            fault(self, body)

    def body_of(self, path: Path) -> bytes:
        return path.read_bytes()

    def answer(self, body: bytes, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


def status(code: int) -> Fault:
    return lambda handler, _: handler.answer(b"<html>sorry</html>", code)


def cut(handler: Handler, body: bytes) -> None:
    handler.answer(body[: len(body) // 2], length=len(body))
    handler.hang_up()


def cut_with_a_length_that_fits(handler: Handler, body: bytes) -> None:
    handler.answer(body[: len(body) // 2])


def cut_without_a_length(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.hang_up()


def wrong_bytes(handler: Handler, body: bytes) -> None:
    handler.answer(body[:700] + bytes([body[700] ^ 1]) + body[701:])


def longer(handler: Handler, body: bytes) -> None:
    handler.answer(body + b"x")


def reset(handler: Handler, body: bytes) -> None:
    handler.answer(body[:100], length=len(body))
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.hang_up()
    handler.connection.close()


def stall(handler: Handler, body: bytes) -> None:
    handler.server.over.wait(20)
    handler.hang_up()


def stall_in_the_body(handler: Handler, body: bytes) -> None:
    handler.answer(body[:1000], length=len(body))
    handler.wfile.flush()
    stall(handler, body)


def drip(handler: Handler, body: bytes) -> None:
    """A byte now and then: never silent for long, never done."""
    handler.answer(b"", length=len(body))
    for index in range(400):
        handler.wfile.write(body[index : index + 1])
        handler.wfile.flush()
        if handler.server.over.wait(0.05):
            break
    handler.hang_up()


def endless(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    while not handler.server.over.is_set():
        handler.wfile.write(bytes(2**16))
        handler.server.sent += 2**16


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, no proxy, and a cache that is not the developer's."""
    monkeypatch.setattr(fetch, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(fetch, "_LONGEST_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def server(small: Dataset) -> Iterator[Server]:
    """The small data set, at `server.address`."""
    assert isinstance(small.root, Path)
    one = Server(small.root)
    threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True).start()
    yield one
    one.over.set()
    one.shutdown()
    one.server_close()


def options(cache: Path | None = None, max_bytes: int = 2**30, retries: int = 2, seconds: float = 5) -> FetchOptions:
    return FetchOptions(cache, max_bytes if cache is not None else 0, retries, seconds)


def content(dataset: Dataset, name: str = SHARD) -> list[int]:
    """The ids of a shard of train."""
    (shard,) = (shard for shard in dataset.split("train").shards if shard.name == name)
    blocks = shards.read(dataset.root, shard, dataset.manifest.image_shape, len(dataset.manifest.classes))
    return [i for block in blocks for i in block.ids.tolist()]


def refused(dataset: Dataset) -> str:
    with pytest.raises(ShardError) as caught:
        content(dataset)
    assert str(caught.value).startswith(f"{dataset.root}/{SHARD}: ")
    return str(caught.value)


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The one message that was logged."""
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("distrain", "WARNING")
    return record.getMessage()


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# Addresses


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("pipe:cat /etc/passwd", "would run a command"),
        ("PIPE:cat /etc/passwd", "would run a command"),
        ("pipe:curl http://h/x", "would run a command"),
        ("simplecache::http://h/x", "chained addresses"),
        ("zip://a.zip::http://h/x", "chained addresses"),
        ("http://h/x::http://h/y", "chained addresses"),
        ("ssh://h/x", "ssh:// is not supported"),
        ("memory://x", "memory:// is not supported"),
        ("exec://x", "exec:// is not supported"),
    ],
)
def test_addresses_that_run_a_command_chain_or_are_unknown_are_refused(
    where: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"data\.dir: ") as caught:
        manifest.read(where)
    assert message in str(caught.value)
    assert "passwd" not in str(caught.value)
    assert cli.main(["verify", where]) == 78
    assert "Traceback" not in capsys.readouterr().err


def test_prepare_refuses_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "synthetic", "--out", "s3://bucket/data"]) == 78
    assert "--out: s3:// is an address" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_a_path_even_if_it_looks_odd(small: Dataset, tmp_path: Path) -> None:
    for name in ("a::b", "s3:", "http:x"):
        shutil.copytree(small.root, tmp_path / name)
        assert manifest.read(str(tmp_path / name)).root == tmp_path / name


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_error_for_a_missing_package_has_the_command_that_installs_it(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=rf"pip install 'distrain\[{scheme}\]'"):
        manifest.read(f"{scheme}://bucket/data")


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("https://u:pw@h:80/a/b?sig=pw#pw", "https://h:80/a/b"),
        ("https://pw@h/a", "https://h/a"),
        ("HTTP://u:p@w@h/a", "http://h/a"),
        ("http://u:p/w@h/a", "http://…"),
        ("http://u:1/pw@h/a", "http://…"),
        ("http://u:p?w@h/a", "http://…"),
        ("http://u:1#pw@h/a", "http://…"),
        ("http://[::1]:80/a?pw", "http://[::1]:80/a"),
        ("http://h?pw", "http://h"),
        ("s3://key:pw@bucket/a", "s3://bucket/a"),
        ("hf://datasets/a/b@main/c", "hf://datasets/a/b@main/c"),
        ("file:///a?b", "file:///a?b"),
        ("/a/b?c@d", "/a/b?c@d"),
    ],
)
def test_addresses_are_shown_without_secrets(where: str, shown: str) -> None:
    assert address.without_secrets(where) == shown
    assert address.scrub(f"cannot open '{where}', sorry") == f"cannot open '{shown}', sorry" or " " in where


def test_the_user_s_cache_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.cache_folder(None) == tmp_path / "xdg/distrain"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert fetch.cache_folder(None) == tmp_path / ".cache/distrain"
    assert fetch.cache_folder("~/x") == tmp_path / "x"
    assert FetchOptions.of(config.from_tree({"data": {"cache_gib": "0"}}).data).cache_bytes == 0
    assert FetchOptions.of(config.from_tree({"data": {"cache_gib": "0.5"}}).data).cache_bytes == 2**29


# Fetching


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_remote_data_set_equals_the_local_one(scheme: str, small: Dataset, server: Server, tmp_path: Path) -> None:
    where = server.address if scheme == "http" else f"file://{small.root}"
    dataset = manifest.read(where + "/", options(tmp_path / "cache"))
    assert (dataset.manifest, dataset.digest) == (small.manifest, small.digest)
    assert str(dataset.root) == where
    assert list(dataset.missing(["train", "test"])) == []
    for _ in range(2):
        assert content(dataset) == content(small)
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.read_bytes() == (small.root / SHARD).read_bytes()
    assert entry.name == hashlib.sha256(entry.read_bytes()).hexdigest() + ".cached"
    if scheme == "http":
        assert server.requested == ["manifest.json", SHARD]  # no question before, none after


@pytest.mark.parametrize(
    "fault",
    [
        *(status(code) for code in (500, 502, 503, 429, 408)),
        cut,
        cut_with_a_length_that_fits,
        cut_without_a_length,
        wrong_bytes,
        longer,
        reset,
        stall,
        stall_in_the_body,
        drip,
        endless,
    ],
)
def test_what_may_pass_is_tried_again(fault: Fault, small: Dataset, server: Server, tmp_path: Path) -> None:
    quick = fault not in (stall, stall_in_the_body, drip)
    dataset = manifest.read(server.address, options(tmp_path / "cache", seconds=10 if quick else 1))
    server.faults[SHARD] = [fault, fault] if quick else [fault]
    assert content(dataset) == content(small)
    assert server.requested.count(SHARD) == (3 if quick else 2)
    assert bytes_in(tmp_path / "cache") == (small.root / SHARD).stat().st_size


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (status(503), "HTTP 503 Service Unavailable"),
        (cut, "not completed"),
        (cut_with_a_length_that_fits, "bytes instead of"),
        (cut_without_a_length, "bytes instead of"),
        (wrong_bytes, "differs"),
        (longer, "more than the expected"),
        (reset, ""),
        (stall, "no complete answer within 0.2 s"),
        (drip, "no complete answer within 0.2 s"),
    ],
)
def test_the_error_for_a_lasting_failure_has_the_number_of_attempts(
    fault: Fault, reason: str, server: Server, tmp_path: Path
) -> None:
    quick = fault not in (stall, drip)
    dataset = manifest.read(server.address, options())
    tight = options(tmp_path / "cache", retries=3, seconds=10 if quick else 0.2)
    dataset = dataclasses.replace(dataset, root=locate(server.address, tight))
    server.always = fault
    begun = time.monotonic()
    message = refused(dataset)
    assert reason in message
    assert "(tried 4 times)" in message
    assert server.requested.count(SHARD) == 4
    assert time.monotonic() - begun < 5
    assert not list((tmp_path / "cache").glob("*"))
    while [thread for thread in threading.enumerate() if thread.name == "distrain-fetch"]:
        assert time.monotonic() - begun < 10, "an abandoned fetch still runs"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (404, "restore the file"),
        (410, "restore the file"),
        (403, "credentials"),
        (401, "credentials"),
        (400, "HTTP 400 Bad Request"),
    ],
)
def test_a_refusal_is_final(code: int, cure: str, server: Server) -> None:
    dataset = manifest.read(server.address, options())
    server.faults[SHARD] = [status(code)]
    message = refused(dataset)
    assert f"HTTP {code}" in message
    assert cure in message
    assert "tried" not in message
    assert server.requested.count(SHARD) == 1


class NoCredentialsError(Exception):
    """Named, and without a status, as botocore's is."""


class HttpError(Exception):
    """Error with a code, as gcsfs's has."""

    code = 401


@pytest.mark.parametrize("error", [NoCredentialsError("Unable to locate credentials"), HttpError("Anonymous caller")])
def test_missing_credentials_are_not_cured_by_time(
    error: Exception, small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = manifest.read(f"file://{small.root}", options())

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(dataset.root.file_system, "open", refuse)  # type: ignore[union-attr]
    monkeypatch.setattr(fetch, "_FIRST_WAIT_SECONDS", 0.0)
    with pytest.raises(ShardError, match="check the address and its credentials") as caught:
        content(dataset)
    assert not isinstance(caught.value, UnreachableError)


def test_a_missing_file_is_final(small: Dataset, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(f"file://{tmp_path / 'data'}", options())
    (tmp_path / "data" / SHARD).unlink()
    message = refused(dataset)
    assert "Not Found" in message
    assert "tried" not in message


def test_a_body_without_end_takes_neither_memory_nor_time(server: Server) -> None:
    dataset = manifest.read(server.address, options(retries=0, seconds=30))
    server.always = endless
    begun = time.monotonic()
    assert "more than the expected" in refused(dataset)
    assert time.monotonic() - begun < 5
    before = -1
    while before != server.sent:  # until the server sees that nobody reads
        before = server.sent
        time.sleep(0.2)
    assert server.sent < 64 * 2**20


def test_a_file_system_that_hangs_and_knows_no_time_out_is_given_up(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"file://{small.root}"
    root = locate(where, options(retries=1, seconds=0.2))
    dataset = dataclasses.replace(manifest.read(where, options()), root=root)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # nobody writes: opening it waits for ever
    monkeypatch.setattr(root.file_system, "open", lambda *_, **__: fifo.open("rb"))
    begun = time.monotonic()
    assert "no complete answer within 0.2 s (tried 2 times)" in refused(dataset)
    assert time.monotonic() - begun < 2
    os.close(os.open(fifo, os.O_RDWR))  # lets the threads go


def test_a_fifo_at_an_address_of_a_file_is_refused_at_once(small: Dataset, tmp_path: Path) -> None:
    shutil.copytree(small.root, tmp_path / "data")
    dataset = manifest.read(f"file://{tmp_path / 'data'}", options(retries=5, seconds=60))
    (tmp_path / "data" / SHARD).unlink()
    os.mkfifo(tmp_path / "data" / SHARD)
    begun = time.monotonic()
    assert f"{SHARD}: not a regular file" in refused(dataset)
    assert time.monotonic() - begun < 2


def test_what_is_fetched_must_have_the_digest_whatever_the_reader_checks(server: Server, tmp_path: Path) -> None:
    root = locate(server.address, options(tmp_path / "cache", retries=0))
    assert isinstance(root, Remote)
    with pytest.raises(fetch.FetchError, match="its sha256 differs"):
        root.read(SHARD, 2**20, "0" * 64, fine)
    assert not (tmp_path / "cache").exists()


def test_a_proxy_is_taken_from_the_environment(small: Dataset, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", server.address)
    assert content(manifest.read("http://nowhere.invalid/", options())) == content(small)


def test_a_server_that_does_not_listen_is_reported(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=rf"http://127\.0\.0\.1:{port}/manifest\.json: .*tried 3 times.*network"):
        manifest.read(f"http://127.0.0.1:{port}", options())


def test_a_remote_manifest_is_checked_like_a_local_one(server: Server, tmp_path: Path) -> None:
    server.faults["manifest.json"] = [cut_without_a_length, status(500)]
    assert manifest.read(server.address, options()).manifest.classes
    server.faults["manifest.json"] = [lambda handler, _: handler.answer(b'{"format": "other"}')]
    with pytest.raises(DataError, match="manifest.json: not a manifest of distrain"):
        manifest.read(server.address, options())
    server.root = tmp_path
    with pytest.raises(DataError, match="manifest.json: HTTP 404 Not Found; upload a folder that `distrain prepare`"):
        manifest.read(server.address, options())


def test_verify_reads_from_the_address_and_caches_nothing(
    small: Dataset, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", server.address]) == 0
    assert f"{server.address}: train 1,003 in 24 shards" in capsys.readouterr().out
    assert len(server.requested) == 1 + sum(len(split.shards) for split in small.manifest.splits.values())
    assert not (tmp_path / "xdg").exists()
    server.faults[SHARD] = [wrong_bytes] * 6
    assert cli.main(["verify", server.address]) == 78
    assert f"{SHARD}: changed since it was prepared" in capsys.readouterr().err


# Closing


@pytest.mark.parametrize("fault", [stall, drip, status(503)])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_closing_does_not_wait_for_the_network(
    kind: str, fault: Fault, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.tenacity.wait_random_exponential, "__call__", lambda *_: 1000.0)
    dataset = manifest.read(server.address, options(retries=9, seconds=900))
    if kind == "training":
        good, order = 13, Order(24, 12, 41, 8, 0)  # the manifest and a round
        batches: Any = TrainingBatches(dataset, order, (World(),), range(100), 1, with_random_bits=False)
    else:
        good = 2
        batches = EvaluationBatches(dataset, "train", World(), 7)

    def later(handler: Handler, body: bytes) -> None:
        if len(server.requested) > good:
            fault(handler, body)
        else:
            handler.answer(body)

    server.always = later

    with closing(batches):
        next(batches)
        while len(server.requested) <= good:  # until the thread is at what goes wrong
            time.sleep(0.01)
        time.sleep(0.1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "distrain-read"]


def test_a_shard_that_is_read_early_is_fetched_in_one_attempt(server: Server) -> None:
    dataset = manifest.read(server.address, options(retries=2))
    order = order_of(dataset, 32)
    early = needed(dataset, order, World(0, 2), range(9))
    victim = early[-3]  # not needed in the first two epochs, and not the last one that is read early
    assert victim not in needed(dataset, order, World(0, 2), range(2))
    server.faults[victim] = [status(503)] * 99
    train, steps = MemoryCache(dataset, torch.device("cpu")), range(9 * order.steps_per_epoch)
    batches = TrainingBatches(dataset, order, (World(0, 2),), steps, 1, with_random_bits=False, cache=train)
    with closing(batches):
        next(batches)
        assert reached(lambda: victim in server.requested)
        for _ in range(order.steps_per_epoch):
            next(batches)
        assert reached(lambda: set(early) <= set(server.requested))
        assert server.requested.count(victim) == 1
        with pytest.raises(UnreachableError, match="tried 3 times"):
            list(batches)
    assert server.requested.count(victim) == 4


# The cache


def test_a_damaged_entry_is_fetched_once_again(small: Dataset, server: Server, tmp_path: Path) -> None:
    dataset = manifest.read(server.address, options(tmp_path / "cache"))
    content(dataset)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: entry.write_bytes(whole[:-1]),
        lambda: entry.write_bytes(b""),
        lambda: entry.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:]),
        entry.unlink,
    ]
    for number, damage in enumerate(damages):
        damage()
        assert content(dataset) == content(small)
        assert content(dataset) == content(small)
        assert entry.read_bytes() == whole
        assert server.requested.count(SHARD) == number + 2


def name_of(index: int) -> str:
    return f"{index:064x}"


def fine(_: bytes) -> None:
    return None


@settings(max_examples=50, deadline=None)
@given(
    max_bytes=st.integers(1, 400),
    done=st.lists(st.tuples(st.sampled_from("pg"), st.integers(0, 9), st.integers(1, 200)), max_size=30),
)
def test_the_bound_holds_after_every_use(
    max_bytes: int, done: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder, max_bytes)
    for what, index, size in done:
        if what == "g":
            cache.get(name_of(index), fine, 400)
        else:
            cache.put(name_of(index), bytes(size))
            assert (cache.get(name_of(index), fine, size) is not None) or size > max_bytes
        assert bytes_in(folder) <= max_bytes


def test_the_file_being_written_counts_and_the_least_recently_used_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path, 100)
    for index in range(4):
        cache.put(name_of(index), bytes(25))
        os.utime(tmp_path / f"{name_of(index)}.cached", (1000 + index, 1000 + index))
    assert cache.get(name_of(0), fine, 25)
    cache.put(name_of(5), bytes(26))
    cached = {index for index in range(6) if (tmp_path / f"{name_of(index)}.cached").exists()}
    assert cached == {0, 3, 5}
    # A file that another process is writing is not deleted, but counted.
    (tmp_path / f".{name_of(6)}.{'0' * 32}.partial").write_bytes(bytes(60))
    cache.put(name_of(7), bytes(40))
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [40, 60]
    assert not caplog.records
    cache.put(name_of(8), bytes(41))
    cache.put(name_of(8), bytes(41))
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [40, 60]
    warning = only_warning(caplog)
    assert "data.cache_gib" in warning
    assert str(tmp_path) in warning


def test_leftovers_are_swept_and_the_files_of_others_stay(tmp_path: Path) -> None:
    old, young = (tmp_path / f".{name_of(1)}.{digit * 32}.partial" for digit in "ab")
    others = [tmp_path / "notes.cached", tmp_path / ".partial", tmp_path / f"{name_of(3)}.cached.gz"]
    for path in (old, young, *others):
        path.write_bytes(bytes(10))
        os.utime(path, (1000, 1000))
    os.utime(young)
    Cache(tmp_path, 20).put(name_of(2), bytes(10))
    Cache(tmp_path, 20).put(name_of(4), bytes(10))
    assert {path.name for path in tmp_path.iterdir()} == {young.name, *(p.name for p in others), f"{name_of(4)}.cached"}


@pytest.mark.parametrize("folder", ["file/below", "/proc/nowhere", "taken"])
def test_a_cache_that_cannot_be_written_logs_one_warning_and_is_not_used(
    folder: str, small: Dataset, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for shard in small.split("train").shards:  # something else has the entries' names
        (tmp_path / "taken" / f"{shard.sha256}.cached").mkdir(parents=True)
    dataset = manifest.read(server.address, options(tmp_path / folder))
    for _ in range(2):
        for shard in dataset.split("train").shards[:3]:
            assert content(dataset, shard.name) == content(small, shard.name)
    assert len(server.requested) == 7
    warning = only_warning(caplog)
    assert warning.startswith(f"{tmp_path / folder}")
    assert "data.cache_dir" in warning
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk takes a mount, and this user may not")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_makes_room_and_without_any_warns_once(
    small: Dataset, server: Server, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = manifest.read(server.address, options(tiny_disk / "cache"))
    names = [shard.name for shard in dataset.split("train").shards]
    for name in names:
        assert content(dataset, name) == content(small, name)
    cached = list((tiny_disk / "cache").iterdir())
    assert 2 <= len(cached) < len(names)
    assert {hashlib.sha256(path.read_bytes()).hexdigest() + ".cached" for path in cached} == {
        path.name for path in cached
    }
    assert not caplog.records  # the disk is the limit, and nothing is lost
    for path in cached:
        path.unlink()
    with pytest.raises(OSError, match="No space"):
        (tiny_disk / "others").write_bytes(bytes(2**20))
    for name in names[:3]:
        assert content(dataset, name) == content(small, name)
    warning = only_warning(caplog)
    assert f"{tiny_disk / 'cache'}" in warning
    assert "No space left" in warning
    assert not list((tiny_disk / "cache").iterdir())


READER = """
import hashlib, random, sys
from pathlib import Path
from distrain.data import fetch, manifest
address, cache, max_bytes, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dataset = manifest.read(address, fetch.FetchOptions(cache, max_bytes, 5, 30))
entries, draw = dataset.split("train").shards, random.Random(seed)
for _ in range(6):
    for shard in draw.sample(entries, len(entries)):
        for _ in range(2):
            def check(data):
                return None if hashlib.sha256(data).hexdigest() == shard.sha256 else "differs"
            assert check(dataset.root.read(shard.name, shard.bytes, shard.sha256, check)) is None
print("read all")
"""


@pytest.mark.parametrize("room", [6, 40])
def test_four_processes_share_a_cache(room: int, server: Server, small: Dataset, tmp_path: Path) -> None:
    size = max(shard.bytes for shard in small.split("train").shards)
    command = [sys.executable, "-c", READER, server.address, str(tmp_path / "cache"), str(room * size)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    readers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        for seed in range(4)
    ]
    outputs = [reader.communicate(timeout=120)[0].decode() for reader in readers]
    assert outputs == ["read all\n"] * 4
    cached = list((tmp_path / "cache").iterdir())
    assert sum(path.stat().st_size for path in cached) <= room * size
    for path in cached:
        assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".cached"
    fetched = len(server.requested) - 4
    uses = 4 * 6 * 24
    if room == 6:
        assert len(cached) == 6
        assert 24 < fetched < 2 * uses  # they evict each other's, and half of the uses are the second in a row
    else:
        assert len(cached) == 24
        assert fetched <= 4 * 24


# Whole runs


def run_of(where: str, folder: Path, **data: Any) -> dict[str, Any]:
    return {
        "data": {"dir": where, **data},
        "run": {"dir": str(folder)},
        "train": {"epochs": 2, "global_batch_size": 64},
        "log": {"report": False},
    }


def weights(run: Path) -> bytes:
    return (run / "checkpoints/step-00000030/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def local_weights(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("local") / "run"
    distrain.train(run_of(str(small.root), run))
    return weights(run)


def test_a_run_from_a_server_is_the_local_run(
    server: Server, tmp_path: Path, local_weights: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distrain")
    distrain.train(run_of(server.address, tmp_path / "run"))
    assert weights(tmp_path / "run") == local_weights
    assert f"data     {server.address}: train 1,003" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [line for line in warnings if "above chance" not in line]  # so short a run learns nothing
    assert len(server.requested) == len(set(server.requested))  # the second epoch is read from the cache
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    assert server.requested.count("manifest.json") == 2
    assert len(server.requested) == len(set(server.requested)) + 1


def test_a_run_from_a_flaky_server_without_a_cache_is_the_local_run(
    server: Server, tmp_path: Path, local_weights: bytes
) -> None:
    faults = [status(503), cut, wrong_bytes, reset, cut_without_a_length]

    def flaky(handler: Handler, body: bytes) -> None:
        number = len(handler.server.requested)
        if number % 3:
            handler.answer(body)
        else:
            faults[number // 3 % len(faults)](handler, body)

    server.always = flaky
    distrain.train(run_of(server.address, tmp_path / "run", cache_gib=0, fetch_retries=8))
    assert weights(tmp_path / "run") == local_weights
    assert len(server.requested) > 70


def test_a_server_that_dies_ends_the_run_with_one_message(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults[SHARD] = [status(500)] * 3
    arguments = [f"data.dir={server.address}", f"run.dir={tmp_path / 'run'}", "data.fetch_retries=2", "train.epochs=1"]
    assert cli.main(["train", *arguments]) == 75
    error = capsys.readouterr().err
    assert f"distrain: {server.address}/{SHARD}: HTTP 500 Internal Server Error (tried 3 times)" in error
    assert "Traceback" not in error


def files_with(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_secrets_open_the_door_and_are_shown_nowhere(
    server: Server, tmp_path: Path, local_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    server.needed = {"authorization": f"Basic {basic}", "query": f"sig={TOKEN}"}
    where = server.address.replace("://", f"://{USER}:{PASSWORD}@") + f"?sig={TOKEN}"
    run = tmp_path / "run"
    distrain.train(run_of(where, run))
    assert weights(run) == local_weights
    assert cli.main(["verify", where]) == 0
    assert cli.main(["evaluate", str(run), f"data.dir={where}"]) == 0
    # config.yaml keeps no secret, so it alone opens nothing, and says so.
    assert cli.main(["evaluate", str(run)]) == 78
    assert "give data.dir again" in capsys.readouterr().err
    assert json.loads((run / "result.json").read_text())
    assert server.address in (run / "config.yaml").read_text()
    for secret in (PASSWORD, TOKEN, basic):
        assert files_with(tmp_path, secret) == []


def redirect_with_secrets(handler: Handler, _: bytes) -> None:
    handler.send_response(302)
    handler.send_header("Location", f"ftp://{USER}:{PASSWORD}@elsewhere/x?sig={TOKEN}")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.mark.parametrize(
    "fault", [None, status(404), status(500), cut, reset, stall, wrong_bytes, redirect_with_secrets, "gone"]
)
def test_errors_and_their_tracebacks_show_no_secret(
    fault: Fault | str | None, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    host = server.address.removeprefix("http://") if fault != "gone" else "nowhere.invalid"
    where = f"http://{USER}:{PASSWORD}@{host}/?sig={TOKEN}"
    if callable(fault):
        server.always = fault
    else:
        server.needed = {}
    with pytest.raises(DataError) as caught:
        content(manifest.read(where, options(retries=1, seconds=1)))
    whole = "".join(traceback.format_exception(caught.value))
    assert f"http://{host}" in str(caught.value)
    behind: BaseException | None = caught.value
    while behind is not None:  # what a logger or a debugger may show
        whole += repr(behind)
        behind = behind.__cause__ or behind.__context__
    for secret in (USER, PASSWORD, TOKEN):
        assert secret not in whole
    root = locate(where, options())
    assert isinstance(root, Remote)
    assert PASSWORD not in f"{root} {root!r} {root / 'x'}"
    with pytest.raises(ConfigError) as refused:
        config.load(None, [f"dir={where}", f"data.dirr={where}", f"train.epochs={where}"])
    assert PASSWORD not in str(refused.value)
    assert TOKEN not in str(refused.value)
