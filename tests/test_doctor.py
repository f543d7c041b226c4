"""`distrain doctor` finds the problems that would end a job: each one is created, and reported with its cure."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_disks import refuse_to_sync_folders
from harness import arguments, clean_environ, small_run

from distrain import cli, config, machine
from distrain.environment import Environment, World
from distrain.tools import doctor

SECONDS = 60


class Doctor:
    """`distrain launch … -- doctor …`; `shell` runs before it, in separate name spaces."""

    def __init__(self, data: Path, run: Path, *keys: str, nproc: int = 2, options: str = "", shell: str = "") -> None:
        tree = small_run(data, run)
        del tree["timeouts"]
        command = [sys.executable, "-m", "distrain", "launch", "--nproc", str(nproc), *options.split(), "--", "doctor",
                 *arguments(tree), *keys]  # fmt: skip
        if shell:
            command = ["unshare", "--mount", "bash", "-ec", f'{shell}; exec "$@"', "bash", *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=clean_environ(),
        )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Return its exit code and its output."""
        try:
            output, _ = self._process.communicate(timeout=SECONDS)
        finally:
            self.close()
        return self._process.returncode, output

    def close(self) -> None:
        """Kill it."""
        self._process.kill()


@contextmanager
def free_port() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("", 0)) as free:
        yield free, str(free.getsockname()[1])


def needs_name_spaces() -> None:
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("needs root and util-linux")


@pytest.mark.ranks
def test_without_problems_nothing_is_left_on_disk(data: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    code, output = Doctor(data, tmp_path / "run").end()
    assert code == 0, output
    assert time.monotonic() - start < 30
    assert "bad " not in output
    for subject in ("versions", "device", "cores", "open files", "/dev/shm", "data", "memory", "model",
                    "run folder", "grace", "processes   2 on 1 node", "all-reduce  correct",
                    "bits        torch ", "seen by all", "steps       8 images in 1 pass a process"):  # fmt: skip
        assert subject in output, subject
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "subject", "message"),
    [
        ("data.dir=/nowhere", "data", "/nowhere"),
        ("run.device=cuda", "device", "no GPU is seen"),
        ("train.global_batch_size=1", "processes", "smaller than the number of processes"),
        ("model.name=models_for_tests:Picky", "model", "models_for_tests:Picky"),
        ("model.name=models_for_tests:Idle", "model", "does not depend on head.weight"),
        ("model.name=models_for_tests:Counting train.virtual_ranks=4", "model", "gives other logits"),
        ("model.name=models_for_tests:Heavy launch.grace_seconds=1", "grace", "takes"),
        ("run.dir=/dev/null/run", "run folder", "cannot make a folder: Not a directory"),
    ],
)
def test_problems_that_one_process_finds(key: str, subject: str, message: str, data: Path, tmp_path: Path) -> None:
    if subject == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    keys = [f"data.dir={data}", f"run.dir={tmp_path / 'run'}", "model.name=models_for_tests:Faulty", *key.split()]
    findings = doctor.check_node(config.load(None, keys), Environment(world=World(0, 2)))
    (bad,) = (each for each in findings if each.level == "bad")
    assert bad.subject == subject
    assert message in bad.message
    assert list(tmp_path.iterdir()) == []


def findings(check: Any, tmp_path: Path, *keys: str) -> list[doctor.Finding]:
    """Return the findings of one check for a run in tmp_path/run, where nothing is left."""
    result = list(check(config.load(None, [f"run.dir={tmp_path / 'run'}", *keys]), Environment()))
    assert list(tmp_path.iterdir()) == []
    return result


@pytest.mark.parametrize(
    ("function", "action"),
    [
        ("os.link", "link a file"),
        ("pathlib.Path.rename", "rename a folder"),
        ("pathlib.Path.replace", "replace a file by a rename"),
        ("os.ftruncate", "append to a file and cut it"),
    ],
)
def test_all_that_a_run_does_in_its_folder_is_tried(
    function: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(function, refuse)
    (finding,) = findings(lambda keys, _: doctor._run_folder(keys), tmp_path)
    assert (finding.level, finding.message) == ("bad", f"{tmp_path}: cannot {action}: Operation not permitted")
    assert "choose a run.dir" in finding.line


def test_a_file_system_that_cannot_sync_folders_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_sync_folders(monkeypatch)
    works, note = findings(lambda keys, _: doctor._run_folder(keys), tmp_path)
    assert (works.level, note.level) == ("ok", "note")
    assert note.message == f"{tmp_path}: its file system cannot sync folders, which is passed over"


def test_a_temporary_folder_that_cannot_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (works,) = findings(doctor.temporary_folder, tmp_path)
    assert works.level == "ok"
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    (note,) = findings(doctor.temporary_folder, tmp_path)
    assert note.level == "note"
    assert "set TMPDIR" in note.line


@pytest.mark.parametrize(
    ("keys", "level"),
    [
        (["data.dir=s3://bucket/data", "data.cache_dir=/proc/nowhere"], "note"),
        (["data.dir=s3://bucket/data", "data.cache_dir=TMP/cache", "data.cache_gib=0.001"], "ok"),
        (["data.dir=s3://bucket/data", "data.cache_dir=TMP/cache", "data.cache_gib=1e9"], "note"),
        (["data.dir=s3://bucket/data", "data.cache_dir=/proc/nowhere", "data.cache_gib=0"], None),
        (["data.dir=data", "data.cache_dir=/proc/nowhere"], None),
        (["data.dir=data", "data.tars=s3://bucket/tars", "data.cache_dir=/proc/nowhere"], "note"),
    ],
)
def test_the_cache_of_a_remote_data_set_is_tried(keys: list[str], level: str | None, tmp_path: Path) -> None:
    result = findings(doctor.cache_folder, tmp_path, *(key.replace("TMP", str(tmp_path)) for key in keys))
    assert [each.level for each in result] == ([] if level is None else [level])


@pytest.mark.parametrize(("free", "level"), [(9, "bad"), (10, "note"), (39, "note"), (40, "ok")])
def test_free_space_is_compared_with_the_checkpoints(
    free: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    assert doctor._space(config.load(None, [f"run.dir={tmp_path}"]), size=10).level == level


@pytest.mark.parametrize(
    ("processes", "threads", "level", "cure"),
    [(1, 1, "note", "--nproc"), (2, 2, "ok", ""), (5, 1, "note", "request more cores"), (1, 4, "ok", "")],
)
def test_cores_that_are_missing_or_idle_are_a_note(
    processes: int, threads: int, level: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    keys = config.load(None, [f"run.cpu_threads={threads}", "run.device=cpu"])
    (finding,) = doctor.cores(keys, Environment(local_world_size=processes))
    assert (finding.level, cure in finding.cure) == (level, True)


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1)])
def test_a_limit_of_processor_time_counts_as_fewer_cores(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(machine, "_CPU_LIMITS", {str(tmp_path): ["cpu.max"]})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert machine.cores() == cores


def test_a_problem_is_an_error_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "data.dir=/nowhere", f"run.dir={tmp_path / 'run'}", "run.device=cpu"]) == 78
    shown = capsys.readouterr()
    assert "/nowhere" in shown.out
    assert "number of problems: 1" in shown.err
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.ranks
def test_problems_of_a_container(data: Path, tmp_path: Path) -> None:
    needs_name_spaces()
    (tmp_path / "run").mkdir()
    shell = f"ulimit -n 200; mount -t tmpfs -o size=1m none /dev/shm; mount -t tmpfs -o ro none {tmp_path / 'run'}"
    code, output = Doctor(data, tmp_path / "run", shell=shell).end()
    assert code == 78, output
    assert re.search(r"bad   open files +200 allowed", output), output
    assert re.search(r"note  /dev/shm +1 MiB free, 128 needed by NCCL", output), output
    assert re.search(r"bad   run folder .+Read-only file system", output), output
    assert re.search(r"error: .+ number of problems: 2;", output), output  # a note is none
    assert "Traceback" not in output


@pytest.mark.ranks
def test_too_little_memory(data: Path, tmp_path: Path) -> None:
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if os.access(root / "cgroup.procs", os.W_OK)), None)
    if root is None:
        pytest.skip("needs a memory control group to write to")
    group = root / f"distrain-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / ("memory.limit_in_bytes" if root.name == "memory" else "memory.max")
        if not limit.exists():
            pytest.skip("no memory controller")
        limit.write_text(str(1900 * 2**20))
        code, output = Doctor(data, tmp_path / "run", shell=f"echo $$ > {group}/cgroup.procs").end()
        assert code == 78, output
        assert "GiB, 2.0 needed by 2 processes here" in output
    finally:
        group.rmdir()


@pytest.mark.ranks
def test_a_host_name_that_cannot_be_resolved(data: Path, tmp_path: Path) -> None:
    options = "--nodes 2 --node 1 --host no-such-host.invalid --port 29400"
    code, output = Doctor(data, tmp_path / "run", "timeouts.start_seconds=3", nproc=1, options=options).end()
    assert code == 78, output
    assert "no-such-host.invalid, cannot be resolved" in output


@pytest.mark.ranks
def test_a_port_that_is_in_use(data: Path, tmp_path: Path) -> None:
    with free_port() as (_, port):
        options = f"--nodes 2 --node 0 --host localhost --port {port}"
        code, output = Doctor(data, tmp_path / "run", nproc=1, options=options).end()
    assert code == 78, output
    assert f"port {port} cannot be opened" in output


@pytest.mark.ranks
def test_a_node_that_is_missing(data: Path, tmp_path: Path) -> None:
    with free_port() as (_, port):
        pass
    options = f"--nodes 2 --node 0 --host localhost --port {port}"
    code, output = Doctor(data, tmp_path / "run", "timeouts.start_seconds=6", nproc=1, options=options).end()
    assert code == 78, output
    assert "rank 1 did not arrive" in output


@pytest.mark.ranks
def test_a_node_that_has_other_folders_and_other_kernels(data: Path, tmp_path: Path) -> None:
    needs_name_spaces()
    with free_port() as (_, port):
        pass
    run = tmp_path / "run"
    run.mkdir()
    other = f"mount -t tmpfs none {run}; mount -t tmpfs none {data}; export ATEN_CPU_CAPABILITY=default"
    nodes = [
        Doctor(data, run, nproc=1, options=f"--nodes 2 --node {node} --host localhost --port {port}",
               shell=other if node else "")
        for node in range(2)
    ]  # fmt: skip
    with closing(nodes[1]):
        ends = [node.end() for node in nodes]
    assert [code for code, _ in ends] == [78, 78], ends
    output = ends[0][1]
    assert re.search(r"bad   run folder .+rank 1 does not see what rank 0 writes", output), output
    assert re.search(r"bad   data .+manifest.json", output), output
    assert re.search(r"note  bits +rank 1 has torch's CPU kernels DEFAULT, on rank 0 AVX", output), output
