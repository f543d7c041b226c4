"""The start of a run under unusual conditions: signals, users without a home, too many processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distrain import cli, config, signals
from distrain.data.fetch import FetchOptions, locate
from distrain.data.manifest import Dataset
from distrain.errors import ConfigError, Stopped
from distrain.launcher import workers
from distrain.launcher.attempt import was_killed
from distrain.launcher.cluster import Topology
from distrain.launcher.launch import check_number
from distrain.launcher.verdict import decide, may_restart
from distrain.launcher.workers import StopRequests, Workers

TORCHRUN = Path(__file__).parent.parent / "launch/torchrun.sh"


def test_the_limit_of_cpu_time_is_a_stop_request() -> None:
    with signals.recorded():
        os.kill(os.getpid(), signal.SIGXCPU)
        assert signals.requested() == "SIGXCPU"
    signals.forget()


def test_the_kernel_s_own_signal_at_the_limit_of_cpu_time_is_recorded() -> None:
    code = "from distrain import signals as s\ns.install()\nwhile not s.requested(): pass\nprint(s.requested())"
    limit = lambda: resource.setrlimit(resource.RLIMIT_CPU, (1, 60))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "SIGXCPU\n", done.stderr


def test_a_local_data_set_needs_no_home_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000 - 1)  # a user without an entry in /etc/passwd
    local, remote = ({"data": {"dir": where}} for where in ("data/photos", "https://example.com/photos"))
    local_data, remote_data = (config.from_tree(tree).data for tree in (local, remote))
    assert locate(local_data.dir, FetchOptions.of(local_data)) == Path("data/photos")
    with pytest.raises(ConfigError, match="there is no home folder; set data.cache_dir"):
        locate(remote_data.dir, FetchOptions.of(remote_data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, "auto", 0, 2, False), "64 processes for 2 cores, more than 4 for each: .* give --oversubscribe"),
        (
            (2, "auto", 1, 16, True),
            "2 processes for 1 GPU: each process needs one",
        ),
        ((2, "cuda", 1, 16, False), "2 processes for 1 GPU:"),
    ],
)
def test_more_processes_than_a_node_can_run_are_refused(
    arguments: tuple[int, str, int, int, bool], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_number(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [(8, "auto", 0, 2, False), (64, "auto", 0, 2, True), (5, "cpu", 1, 2, False), (4, "cuda", 4, 2, False)],
)
def test_processes_that_a_node_can_run_are_accepted(arguments: tuple[int, str, int, int, bool]) -> None:
    check_number(*arguments)


def test_launch_refuses_too_many_processes_in_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        cli.main(["launch", "--nproc", "100000", "--", "train", f"run.dir={tmp_path / 'run'}", "run.device=cpu"]) == 78
    )
    error = capfd.readouterr().err
    assert error.startswith("distrain: error: launch: 100000 processes for ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        (["--restarts", "3"], "doctor", "--restarts is for train; run doctor again instead"),
        (["--min-nodes", "1"], "train", "--min-nodes takes effect at a restart: give --restarts too"),
        (["--restarts", "1", "--min-nodes", "2"], "train", "--min-nodes 2: the job has 1 node"),
    ],
)
def test_restarts_without_effect_are_refused(
    options: list[str], command: str, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["launch", "--nproc", "1", *options, "--", command, f"run.dir={tmp_path / 'run'}"]) == 78
    assert f"distrain: error: launch: {message}" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stop_while_processes_are_started_ends_them_at_once(tmp_path: Path) -> None:
    stops = StopRequests()
    before = time.monotonic()
    signal.signal(signal.SIGALRM, stops.record)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Stopped, match="stopped by SIGALRM while processes were started; nothing had to be saved"):
            Workers(
                [sys.executable, "--version"],
                {},
                Topology(1, 0, "127.0.0.1", 1, ""),
                5000,
                None,
                tmp_path,
                tmp_path / "logs",
                stops,
            )
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert time.monotonic() - before < 10


def test_a_process_that_never_gets_to_its_status_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_HANG_SECONDS", 0.1)
    command = [sys.executable, "-c", "import signal, os; os.kill(os.getpid(), signal.SIGSTOP)"]
    stops = StopRequests()
    group = Workers(command, dict(os.environ), Topology(1, 0, "127.0.0.1", 1, ""), 1, None, tmp_path, None, stops)
    [end] = group.wait(stops, 1.0, start_seconds=0.2, is_over=lambda: False, restarts_left=0)
    assert end.code == -signal.SIGABRT


def test_processes_whose_attempt_is_over_elsewhere_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.2)
    command, stops = [sys.executable, "-c", "import time; time.sleep(1000)"], StopRequests()
    group = Workers(command, dict(os.environ), Topology(1, 0, "127.0.0.1", 1, ""), 1, None, tmp_path, None, stops)
    exits = group.wait(stops, 1.0, start_seconds=0, is_over=lambda: True, restarts_left=1)
    verdict = decide(exits, None, can_resume=True)
    assert (verdict.code, may_restart(verdict), was_killed(verdict)) == (75, True, False)


def test_torchrun_s_script_starts_one_process_without_gpus(small: Dataset, tmp_path: Path) -> None:
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there are GPUs here")
    program = tmp_path / "torchrun"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [TORCHRUN, "--config", "x.yaml"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": ""},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    started = "--standalone --nproc-per-node 1 --max-restarts 0 -m distrain train --config x.yaml"
    assert done.stdout.strip() == started, done.stderr
