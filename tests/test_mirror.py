"""Runs that are copied to a folder or to S3 (moto's server), and resume from there; stores that fail."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import make
from group import Group, GroupError
from object_stores import FaultyStore, faulty_store
from runs import metrics_but_times
from safetensors.torch import load_file

import distrain
from distrain import config
from distrain.data import fetch
from distrain.data.fetch import FetchError, FetchOptions
from distrain.errors import EXIT_NEVER_AGAIN, BusyError, ConfigError, DataError, SaveError, Stopped, UserError
from distrain.launcher.attempt import is_done
from distrain.runs import attempts, checkpoint, checkpoint_archive, lease, mirror, object_store
from distrain.runs.checkpoint_archive import OpenCheckpoint
from distrain.runs.mirror_copier import Copier
from distrain.runs.object_store import Store, check_conditional_writes, open_store
from distrain.tools import doctor

STEPS = 40


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyStore]:
    with faulty_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environ.items():
            patch.setenv(name, value)
        patch.setattr(fetch, "_FIRST_WAIT_SECONDS", 0.02)
        yield store


@pytest.fixture
def server(proxy: FaultyStore) -> Iterator[FaultyStore]:
    """The proxy, without faults before and after the test."""
    proxy.requests.clear()
    yield proxy
    proxy.fault = lambda *_: None
    proxy.released.set()


@pytest.fixture(params=["file", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty mirror."""
    if request.param == "file":
        return f"file://{tmp_path}/mirror"
    request.getfixturevalue("server")
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirror") / "data"
    make(folder, 403, 100, image_size=8, shards=12, lanes=6, val_fraction=0.2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    distrain.train(tree(data, run, None, checkpoint={"keep": 0}))
    return run


def tree(data: Path, run: Path, where: str | None, /, **sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "data": {"dir": str(data), "fetch_retries": 8},
        "run": {"dir": str(run), "mirror": where},
        "model": {"name": "models_for_tests:Faulty"},
        "train": {"max_steps": STEPS, "global_batch_size": 16},
        "eval": {"every_steps": 7},
        "checkpoint": {"every_steps": 10},
        "log": {"report": False, "every_steps": 4},
    }
    for section, part in sections.items():
        values[section] = {**values.get(section, {}), **part}
    return values


def store_at(where: str) -> Store:
    return open_store(where, FetchOptions(None, 0, retries=8, timeout_seconds=20), threading.Event())


def mirror_of(data: Path, run: Path, where: str, **sections: dict[str, Any]) -> mirror.Mirror:
    opened = mirror.open_mirror(config.load(tree(data, run, where, **sections)), threading.Event())
    assert opened is not None
    return opened


def identity_of(run: Path) -> dict[str, Any]:
    state = max((run / "checkpoints").glob("step-*")) / "state.json"
    identity: dict[str, Any] = json.loads(state.read_text())["identity"]
    return identity


def claimed(data: Path, run: Path, where: str, identity: dict[str, Any] | None = None) -> mirror.Mirror:
    """The mirror as the next job opens it."""
    opened = mirror_of(data, run, where)
    if identity is not None:
        opened.newest_of(identity)
    (run / "attempts").mkdir(parents=True, exist_ok=True)
    opened.download_attempts()
    job = lease.acquire(run, 0)
    if identity is not None:
        job.note(identity=checkpoint.digest_of_identity(identity))
    opened.claim(job.attempt)
    return opened


def put_checkpoint(opened: mirror.Mirror, run: Path, step: int) -> None:
    saved = OpenCheckpoint(checkpoint.path_of(run / "checkpoints", step), step)
    opened.put(saved, lambda _: None)
    saved.close()


def same_run(run: Path, other: Path) -> bool:
    """Whether the last weights and all lines of two runs are the same, bit for bit."""
    weights, others = (
        load_file(max((each / "checkpoints").glob("step-*")) / "model.safetensors") for each in (run, other)
    )
    same = all(weights[name].numpy().tobytes() == others[name].numpy().tobytes() for name in weights)
    return same and metrics_but_times(run) == metrics_but_times(other)


def put(store: Store, name: str, *pieces: bytes, before_commit: Callable[[], None] = lambda: None) -> None:
    store.put(name, lambda: iter(pieces), sum(map(len, pieces)), before_commit)


# The store


def test_an_object_is_there_as_a_whole_or_not_at_all(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at(location)
    assert (store.names(""), store.read("a/b"), store.names("a")) == ([], None, [])
    assert (store.create("a/b", b"first"), store.create("a/b", b"second")) == (True, False)
    check_conditional_writes(store, "a/b", b"second")
    assert store.read("a/b") == b"first"
    put(store, "a/c", b"small")
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 * 2**20)
    large = [os.urandom(2**20) for _ in range(7)]
    put(store, "a/c", *large)
    assert store.consume("a/c", lambda file: file.read()) == b"".join(large)

    def refuse() -> None:
        raise BusyError("refused")

    def aborted_by_another_job() -> None:
        store.abort_uploads("a")
        monkeypatch.setattr(store, "abort_uploads", lambda _: refuse())

    for pieces in ([b"x"], large[:6]):
        with pytest.raises(BusyError, match="refused"):
            put(store, "a/c", *pieces, before_commit=refuse)
    with pytest.raises((FetchError, BusyError)):
        put(store, "a/c", *large[1:], before_commit=aborted_by_another_job)
    assert store.read("a/c") == b"".join(large)
    assert store.names("a") == ["b", "c"]
    store.delete("a/c")
    store.delete("a/c")
    assert store.names("a") == ["b"]


def test_503s_and_cut_answers_are_retried(server: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_at("s3://bucket/retries")
    faults = ["503", "503", None, "cut", None, "503", None]
    server.fault = lambda method, path, number: faults[number % 7]
    assert store.create("a", b"content") or store.read("a") == b"content"  # the answer may be what was lost
    put(store, "b", b"content" * 100)
    assert store.consume("b", lambda file: file.read()) == b"content" * 100
    assert store.names("") == ["a", "b"]
    assert len(server.requests) > 8
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 * 2**20)
    large, first = [os.urandom(2**20) for _ in range(6)], len(server.requests)
    server.fault = lambda method, path, number: {2: "503", 5: "cut", 8: "503"}.get(number - first)
    put(store, "b", *large)
    assert store.consume("b", lambda file: file.read()) == b"".join(large)


def test_a_store_that_ignores_conditions_is_refused(data: Path, tmp_path: Path, server: FaultyStore) -> None:
    server.fault = lambda *_: "ignore-condition"
    with pytest.raises(ConfigError, match=r"s3://bucket/none: this store ignores the condition of a write"):
        distrain.train(tree(data, tmp_path / "run", "s3://bucket/none"))
    (finding,) = doctor._mirror(config.load(tree(data, tmp_path / "run", "s3://bucket/none")))
    assert (finding.level, "ignores the condition" in finding.message) == ("bad", True)


@pytest.mark.parametrize("where", ["/mnt/disk", "gs://bucket/x", "file://relative", "https://host/x", "3"])
def test_other_addresses_are_refused(where: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.mirror: should be s3://bucket/prefix or file:///path; a mirror needs"):
        config.load(None, [f"run.mirror={where}"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://", "with the name of a bucket"),
        ("s3:///prefix", "with the name of a bucket"),
        ("s3://bucket/x?versionId=abc", r"s3://bucket/prefix without \? and #"),
        ("S3://bucket/x#secret", r"s3://bucket/prefix without \? and #"),
    ],
)
def test_an_address_without_a_bucket_or_with_a_query_is_refused(where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(None, [f"run.mirror={where}"])
    assert "secret" not in str(caught.value)


def test_schemes_may_be_capitals_and_folders_may_be_loops(tmp_path: Path, data: Path) -> None:
    assert config.load(None, ["run.mirror=S3://Bucket/X"]).run.mirror == "s3://Bucket/X"
    assert config.load(None, ["run.mirror=FILE:///A?b"]).run.mirror == "file:///A?b"
    loop, good = tmp_path / "loop", tmp_path / "good"
    loop.symlink_to(loop)
    for run, where in ((loop, good), (good, loop)):
        with pytest.raises(UserError, match="run.(dir|mirror)=.*: .*(symbolic links|File exists)") as caught:
            distrain.train(tree(data, run, f"file://{where}"))
        assert caught.value.exit_code == EXIT_NEVER_AGAIN


def test_a_mirror_in_the_folder_of_the_run_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for where in (run, run / "mirror"):
        with pytest.raises(ConfigError, match="mirror must be outside dir"):
            config.load(None, [f"run.dir={run}", f"run.mirror=file://{where}"])
    config.load(None, [f"run.dir={run}", f"run.mirror=file://{tmp_path}/run-mirror"])


# Runs


def test_a_run_resumes_from_its_mirror_to_the_same_bits(
    location: str,
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if location.startswith("s3"):
        faults = ["503", None, "cut", None, None]
        request.getfixturevalue("server").fault = lambda method, path, number: faults[number % 5]
    run = tmp_path / "run"
    monkeypatch.setenv("FAULT", "stop:0:26")
    with pytest.raises(Stopped):
        distrain.train(tree(data, run, location))
    monkeypatch.delenv("FAULT")
    (tmp_path / "before").mkdir()
    shutil.move(run, tmp_path / "before")
    elsewhere = tmp_path / "elsewhere"
    with caplog.at_level(logging.INFO, "distrain"):
        distrain.train(tree(data, elsewhere, location))
    stopped_at = checkpoint.steps(tmp_path / "before/run/checkpoints")[0]
    assert stopped_at % 10
    assert f"has no checkpoint as new; resuming from step {stopped_at} of {location}" in caplog.text
    assert same_run(elsewhere, undisturbed)
    assert attempts.numbers(elsewhere) == [1, 2]
    best = json.loads((elsewhere / "result.json").read_text())["checkpoint"]
    store = store_at(location)
    assert {f"{best}.tar", f"step-{STEPS:08d}.tar"} <= set(store.names("checkpoints"))
    assert store.read("metrics.jsonl") == (elsewhere / "metrics.jsonl").read_bytes()
    assert store.read("result.json") == (elsewhere / "result.json").read_bytes()
    assert is_done(config.load(tree(data, elsewhere, location)))  # the folder has no exit.json
    assert not is_done(config.load(tree(data, elsewhere, location, train={"lr": 1})))
    store.delete(f"checkpoints/{best}.tar")
    assert not is_done(config.load(tree(data, elsewhere, location)))
    with pytest.raises(ConfigError, match="already holds a run; choose another run.mirror"):
        distrain.train(tree(data, tmp_path / "new", location, run={"resume": "never"}))
    with pytest.raises(ConfigError, match="holds another run, which has\n  run.seed: 0 in the checkpoint, 5 now"):
        distrain.train(tree(data, tmp_path / "new", location, run={"seed": 5}))


def test_data_and_run_in_s3(data: Path, undisturbed: Path, tmp_path: Path, server: FaultyStore) -> None:
    store = store_at("s3://bucket/data")
    for path in [path for path in data.rglob("*") if path.is_file()]:
        put(store, str(path.relative_to(data)), path.read_bytes())
    faults = ["503", None, "cut", None, None]
    server.fault = lambda method, path, number: faults[number % 5]
    where = {"dir": "s3://bucket/data", "cache_dir": str(tmp_path / "cache")}
    distrain.train(tree(data, tmp_path / "run", "s3://bucket/run", data=where))
    server.fault = lambda *_: None
    assert any("GET /bucket/data/train/" in each for each in server.requests)
    assert same_run(tmp_path / "run", undisturbed)


def test_only_rank_0_needs_the_folder(data: Path, tmp_path: Path, group: Callable[[int], Group]) -> None:
    where = f"file://{tmp_path}/mirror"
    for name in ("first", "second"):
        folders = [tmp_path / name / f"node-{rank}" for rank in range(2)]
        configs = [tree(data, folder, where, train={"max_steps": STEPS}) for folder in folders]
        group(2).call("train_each", configs)
    # The second one has nothing but the mirror, and scores the best checkpoint again.
    results = [json.loads((tmp_path / name / "node-0/result.json").read_text()) for name in ("first", "second")]
    assert results[0]["confusion"] == results[1]["confusion"]
    assert not (tmp_path / "second/node-1/checkpoints").exists()


def test_a_full_bucket_ends_in_an_error_and_the_next_attempt_completes_the_copy(
    data: Path, tmp_path: Path, server: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    run, where = tmp_path / "run", "s3://bucket/full"
    settings = tree(data, run, where, data={"fetch_retries": 1})
    server.fault = lambda method, path, _: "507" if method == "PUT" and "step-" in path else None
    with pytest.raises(
        SaveError, match=r"run has everything, but its mirror does not: s3://bucket/full: .*the bucket is"
    ):
        distrain.train(settings)
    assert caplog.text.count("training continues, and the next checkpoint is copied") == 1
    assert checkpoint.newest_verified(run / "checkpoints") == STEPS
    server.fault = lambda *_: None
    assert store_at(where).read("metrics.jsonl") is not None
    assert store_at(where).read("result.json") is None  # with it the run would count as done
    distrain.train(settings)
    assert store_at(where).names("checkpoints")[-1] == f"step-{STEPS:08d}.tar"
    assert store_at(where).read("result.json") == (run / "result.json").read_bytes()


def test_all_processes_know_that_the_copy_is_not_complete(
    data: Path, tmp_path: Path, group: Callable[[int], Group]
) -> None:
    (tmp_path / "mirror/result.json").mkdir(parents=True)
    with pytest.raises(GroupError, match="mirror: result.json: Is a directory") as caught:
        group(2).call("train", tree(data, tmp_path / "run", f"file://{tmp_path}/mirror"))
    assert caught.value.kinds == ["SaveError", "SaveError"]


def test_an_unreadable_checkpoint_is_skipped(
    data: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, where = tmp_path / "run", f"file://{tmp_path}/mirror"
    shutil.copytree(undisturbed, run)
    opened = claimed(data, run, where)
    opened.put_logs()
    for step in checkpoint.steps(run / "checkpoints"):
        put_checkpoint(opened, run, step)
    archives = sorted((tmp_path / "mirror/checkpoints").iterdir())
    archives[-1].write_bytes(archives[-1].read_bytes()[:1000])  # the state is unreadable
    content = bytearray(archives[-2].read_bytes())
    content[-5000] ^= 1  # of the weights
    archives[-2].write_bytes(content)
    shutil.rmtree(run)
    distrain.train(tree(data, run, where))
    assert f"skipped {where}/checkpoints/{archives[-1].name}: damaged" in caplog.text
    assert f"skipped {where}/checkpoints/{archives[-2].name}: " in caplog.text
    assert same_run(run, undisturbed)
    with tarfile.open(archives[-1]) as tar:  # it was written again
        assert [Path(name).name for name in tar.getnames()] == list(checkpoint.FILES)
    shutil.copy(archives[-1], archives[-1].with_name("step-00000099.tar"))
    assert mirror_of(data, run, where).newest_of(identity_of(run)) == STEPS
    assert "step-00000099.tar: has the name of another step (it is of step 40)" in caplog.text
    for size in (5000, 100):  # of the weights, then of the state
        for path in (tmp_path / "mirror/checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DataError, match=f"{where}: has no readable checkpoint to resume from"):
            distrain.train(tree(data, tmp_path / "new", where))


def test_only_damage_is_skipped(
    data: Path, undisturbed: Path, tmp_path: Path, server: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    run, where = tmp_path / "run", "s3://bucket/forbidden"
    put_checkpoint(claimed(data, tmp_path / "first", where), undisturbed, STEPS)
    opened = claimed(data, run, where, identity_of(undisturbed))
    server.fault = lambda method, path, _: "403" if path.endswith(".tar") else None
    for action in (lambda: opened.restore(lambda: None), lambda: opened.newest_of(identity_of(undisturbed))):
        with pytest.raises(DataError, match=f"run.mirror={where}: Forbidden; check the address and its credentials"):
            action()
    assert "skipped" not in caplog.text


def test_a_full_disk_leaves_no_half_checkpoint(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, where = tmp_path / "run", f"file://{tmp_path}/mirror"
    put_checkpoint(claimed(data, tmp_path / "first", where), undisturbed, STEPS)

    def fill_disk(stream: Any, folder: Path, on_progress: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_archive, "extract", fill_disk)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        distrain.train(tree(data, run, where))
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("status", ["301", "400"])
def test_a_bucket_of_another_region_is_named_at_once(
    status: str, data: Path, tmp_path: Path, server: FaultyStore
) -> None:
    server.fault = lambda *_: status
    with pytest.raises(DataError, match="in another region, or on another server .*; set AWS_DEFAULT_REGION") as caught:
        distrain.train(tree(data, tmp_path / "run", "s3://bucket/elsewhere"))
    assert caught.value.exit_code == EXIT_NEVER_AGAIN


def test_what_is_no_file_is_skipped_and_an_old_result_is_not_downloaded(
    data: Path, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, where = tmp_path / "run", f"file://{tmp_path}/mirror"
    shutil.copytree(undisturbed, run)
    opened = claimed(data, run, where)
    for step in (30, STEPS):
        put_checkpoint(opened, run, step)
    opened.put_logs()
    opened.put_file(run / "result.json")
    for name in ("pictures/@eaDir", "x-id"):
        (tmp_path / "mirror" / name).mkdir(parents=True)
    for number, has_result in enumerate((True, False)):
        elsewhere = tmp_path / f"elsewhere-{number}"
        assert claimed(data, elsewhere, where, identity_of(run)).restore(lambda: None)
        assert (elsewhere / "result.json").exists() == has_result
        archive = tmp_path / f"mirror/checkpoints/step-{STEPS:08d}.tar"
        archive.write_bytes(archive.read_bytes()[:-3000])  # of the weights: the steps after 30 are trained again
    for name in ("pictures/@eaDir", "x-id"):
        assert f"skipped {where}/{name}: {name}: Is a directory" in caplog.text


def test_a_mirror_of_another_run_without_a_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    where = f"file://{tmp_path}/mirror"
    claimed(data, tmp_path / "first", where, {"seed": 1})
    with pytest.raises(ConfigError, match=r"holds another run, without a checkpoint yet \(attempt 1, .*choose another"):
        mirror_of(data, tmp_path / "second", where).newest_of({"seed": 2})
    for run, seed in (("second", 1), ("first", 2)):  # a run without a checkpoint may be changed in its folder
        assert mirror_of(data, tmp_path / run, where).newest_of({"seed": seed}) is None
    distrain.train(tree(data, tmp_path / "first", where))
    entry = json.loads((tmp_path / "mirror/attempts/000002.json").read_text())
    assert entry["identity"] == checkpoint.digest_of_identity(identity_of(tmp_path / "first"))


# Two jobs


def test_nothing_is_written_to_a_mirror_that_was_emptied(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, where = tmp_path / "run", f"file://{tmp_path}/mirror"
    shutil.copytree(undisturbed, run)
    opened = claimed(data, run, where)
    put_checkpoint(opened, run, 30)
    shutil.rmtree(tmp_path / "mirror")
    copier = Copier(opened, run / "checkpoints", lambda _: None, threading.Event())
    copier.copy(STEPS, None)
    problem = copier.finish(lambda: None, is_stopped=lambda: False, seconds=0)
    copier.close()
    assert "emptied or replaced while this job was writing there (attempts/" in str(problem)
    assert not (tmp_path / "mirror/checkpoints").exists()
    distrain.train(tree(data, run, where))
    store = store_at(where)
    assert f"step-{STEPS:08d}.tar" in store.names("checkpoints")
    assert {"metrics.jsonl", "setup.json", "result.json"} <= set(store.names(""))


def test_the_wait_after_a_stop_request_is_within_the_grace_of_the_launcher(
    data: Path, tmp_path: Path, server: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.released.clear()
    server.fault = lambda method, path, _: "hold" if "/step-" in path else None
    monkeypatch.setenv("FAULT", "stop:0:6")
    monkeypatch.setenv("DISTRAIN_GRACE_SECONDS", "11.5")
    with pytest.raises(SaveError, match=r"not complete 1\.5 s after a stop request"):
        distrain.train(tree(data, tmp_path / "run", "s3://bucket/grace"))


def test_copies_that_are_ended_give_no_warning(
    data: Path, undisturbed: Path, tmp_path: Path, server: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    opened = mirror.open_mirror(config.load(tree(data, tmp_path / "run", "s3://bucket/ended")), stop)
    assert opened is not None
    server.released.clear()
    server.is_waiting.clear()
    server.fault = lambda *_: "hold"
    copier = Copier(opened, undisturbed / "checkpoints", lambda _: None, stop)
    copier.copy(STEPS, None)
    assert server.is_waiting.wait(20)
    copier.close()
    assert caplog.text == ""


def test_a_job_that_was_replaced_writes_nothing_more(
    location: str, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    first = claimed(data, tmp_path / "first", location)
    put_checkpoint(first, undisturbed, STEPS)
    second = claimed(data, tmp_path / "second", location)
    for action in (first.check_writer, lambda: put_checkpoint(first, undisturbed, 30), lambda: first.claim(1)):
        with pytest.raises(BusyError, match=f"{location}: taken over by another job \\(attempt 2, host "):
            action()
    assert store_at(location).names("checkpoints") == [f"step-{STEPS:08d}.tar"]
    put_checkpoint(second, undisturbed, 30)


def test_the_newest_checkpoint_is_copied_next_even_if_it_was_deleted(
    data: Path, undisturbed: Path, tmp_path: Path, server: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    run, where = tmp_path / "run", "s3://bucket/slow"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    source = max((run / "checkpoints").iterdir())
    for step in (50, 60, 70):
        shutil.copytree(source, checkpoint.path_of(run / "checkpoints", step))
    opened = claimed(data, run, where)
    server.released.clear()
    server.is_waiting.clear()
    server.fault = lambda method, path, _: "hold" if "step-00000050" in path else None
    copier = Copier(opened, run / "checkpoints", lambda _: None, threading.Event())
    with caplog.at_level(logging.INFO, "distrain"):
        for step in (50, 60, 70):
            copier.copy(step, None)
            assert server.is_waiting.wait(20)
        shutil.rmtree(run / "checkpoints")
        problem = copier.finish(lambda: None, is_stopped=lambda: True, seconds=0.1)
        assert problem == f"{where}: not complete 0.1 s after a stop request"
        server.released.set()
        assert copier.finish(lambda: None, is_stopped=lambda: False, seconds=0) is None
    copier.close()
    assert "step 60 is not copied to s3://bucket/slow, which is slower than the saves" in caplog.text
    store = store_at(where)
    assert store.names("checkpoints") == ["step-00000050.tar", "step-00000070.tar"]
    content = store.read("checkpoints/step-00000070.tar")
    assert content is not None
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.extractfile("step-00000070/model.safetensors").read() == (  # type: ignore[union-attr]
            (undisturbed / "checkpoints" / source.name / "model.safetensors").read_bytes()
        )


# Addresses


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://missing/x", "run.mirror=s3://missing/x: there is no such bucket; check the address"),
        ("s3://with space/x", "run.mirror=s3://with space/x: the name of the bucket, or of a file, is not valid"),
        ("s3://user:secret@bucket/x", "run.mirror: an s3:// address has no user or password; set AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_wrong_address_is_named_at_once(
    where: str, message: str, data: Path, tmp_path: Path, server: FaultyStore
) -> None:
    with pytest.raises(UserError) as caught:
        distrain.train(tree(data, tmp_path / "run", where))
    assert caught.value.exit_code == EXIT_NEVER_AGAIN
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert len(server.requests) <= 1
    assert not (tmp_path / "run").exists()


# Doctor


def test_doctor_tries_the_mirror_and_leaves_nothing(location: str, data: Path, tmp_path: Path) -> None:
    (finding,) = doctor._mirror(config.load(tree(data, tmp_path / "run", location)))
    assert (finding.level, finding.message) == (
        "ok", f"{location}: conditional writes, lists, reads and deletes work",
    )  # fmt: skip
    assert store_at(location).names("") == []


def test_doctor_names_a_mirror_that_cannot_be_used(data: Path, tmp_path: Path, server: FaultyStore) -> None:
    for where in ("s3://no-such-bucket/x", "file:///proc/nowhere"):
        settings = config.load(tree(data, tmp_path / "run", where))
        (finding,) = doctor._mirror(settings)
        assert finding.level == "bad"
        assert finding.message.startswith(f"run.mirror={where}: ")
        with pytest.raises(DataError, match=f"run.mirror={where}: "):
            distrain.train(tree(data, tmp_path / "run", where))
