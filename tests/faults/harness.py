"""A real job under `distrain launch`, observed from outside: wait for an event, inject a fault, check how the job ends.

Events are read from the status of the worker processes (`distrain.worker_status`), so no test relies on sleeping.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import torch
from runs import ids_by_step, metrics_but_times
from safetensors.torch import load_file

from distrain.worker_status import WorkerStatus, read_status

REPO = Path(__file__).parent.parent.parent
SECONDS = 120
"""Longest wait for anything."""


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS, pause: float = 0.001) -> Any:
    """Wait until a condition holds, checked after each pause of so many seconds; return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(pause)
    return value


def arguments(tree: dict[str, dict[str, Any]]) -> list[str]:
    """Return nested keys as overrides of the command line."""
    flat = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
    return [f"{name}={'null' if value is None else value}" for name, value in flat.items()]


def small_run(data: Path, run: Path, /, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a run of 60 steps whose checkpoints, evaluations and log lines fall on different steps."""
    tree: dict[str, dict[str, Any]] = {
        # Without a cache every epoch reads its shards, and so meets what happened to them.
        "data": {"dir": str(data), "audit": "true", "cache": "off"},
        "run": {"dir": str(run), "seed": 7},
        "model": {"name": "models_for_tests:Faulty"},
        "train": {"max_steps": 60, "global_batch_size": 16, "lr": 0.05},
        "eval": {"every_steps": 7},
        "checkpoint": {"every_steps": 10, "keep": 3},
        "log": {"every_steps": 4, "report": "false"},
        "timeouts": {"start_seconds": 100, "step_seconds": 60, "eval_seconds": 60, "save_seconds": 60},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


@contextlib.contextmanager
def served(dataset: Path) -> Iterator[tuple[str, threading.Event]]:
    """Serve a data set on the loopback; yield its address, and an event from which on no shard of train is answered."""
    silent, over = threading.Event(), threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if silent.is_set() and self.path.startswith("/train/"):
                over.wait(SECONDS)
            with contextlib.suppress(ConnectionError):  # the job has ended
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(dataset))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", silent
        over.set()
        server.shutdown()


class Job:
    """`distrain launch` and its processes."""

    def __init__(
        self,
        tree: dict[str, dict[str, Any]],
        folder: Path,
        processes: int = 2,
        options: Sequence[str] = (),
        environ: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.run = Path(tree["run"]["dir"])
        self.size = processes
        self._folder = folder / f"launch-{time.monotonic_ns()}"
        self._folder.mkdir(parents=True)
        self.log = self._folder / "log"
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                [*prefix, sys.executable, "-m", "distrain", "launch", "--nproc", str(processes), *options,
                 "--", "train", *arguments(tree)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                env={**clean_environ(), "TMPDIR": str(self._folder), **(environ or {})},
                start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes by rank; fewer while they start, or after some have ended."""
        by_rank = {}
        for process in self._children():
            with contextlib.suppress(psutil.Error):
                rank = rank_of(process)
                if rank is not None:
                    by_rank[rank] = process
        return [by_rank[rank] for rank in sorted(by_rank)]

    def wait_for_standby(self, seconds: float = 0.5) -> None:
        """Wait until all standby processes have done their imports: until none has used the CPU for a while."""

        def started() -> list[psutil.Process] | None:
            assert self.launcher.poll() is None, f"it ended:\n{self.output}"
            waiting = [process for process in self._children() if rank_of(process) is None]
            return waiting if len(waiting) == self.size else None

        processes = until(started, "standby processes start", pause=0.1)
        last: list[float] = []
        since = time.monotonic()

        def idle() -> bool:
            nonlocal last, since
            before, last = last, [sum(process.cpu_times()[:2]) for process in processes]
            since = since if before == last else time.monotonic()
            return time.monotonic() - since > seconds

        until(idle, "standby processes are ready", pause=0.05)

    def _children(self) -> list[psutil.Process]:
        """Return the processes that the launcher has started, without those that have ended."""
        running = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.launcher.pid).children():
                with contextlib.suppress(psutil.Error, KeyError):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        running.append(process)
        return running

    def status(self, rank: int = 0) -> WorkerStatus:
        """Return the status of a rank."""
        folder = next(self._folder.glob("distrain-launch-*"), None)
        return read_status(folder, rank) if folder is not None else WorkerStatus(step=-1)

    def wait_for(self, phase: str, step: int = 0, rank: int = 0, pause: float = 0.001) -> WorkerStatus:
        """Wait until a rank is in a phase, at a step or later."""

        def reached() -> WorkerStatus | None:
            assert self.launcher.poll() is None, f"it ended before {phase}, step {step}:\n{self.output}"
            status = self.status(rank)
            return status if status.phase == phase and status.step >= step else None

        status: WorkerStatus = until(reached, f"{phase}, step {step}", pause=pause)
        return status

    def wait_until_stuck(self, seconds: float = 1.0) -> None:
        """Wait until rank 0 has made no progress for a while; a step of these runs takes milliseconds."""
        last, since = self.status(), time.monotonic()

        def stuck() -> bool:
            nonlocal last, since
            assert self.launcher.poll() is None, f"it ended:\n{self.output}"
            if self.status() != last:
                last, since = self.status(), time.monotonic()
            return time.monotonic() - since > seconds

        until(stuck, "no progress")

    def signal(self, *targets: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to `launcher`, `group` (its process group), `rank0`, `rank1` …, `workers`, `everything`."""
        workers = self.workers() if set(targets) - {"launcher", "group"} else []
        for target in targets:
            if target == "group":
                os.killpg(self.launcher.pid, number)
            processes = workers if target in ("workers", "everything") else []
            if target.startswith("rank"):
                processes = [workers[int(target.removeprefix("rank"))]]
            if target in ("launcher", "everything"):
                self.launcher.send_signal(number)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end, and for the end of all processes; return the exit code."""
        code = self.launcher.wait(seconds)
        self.all_gone(10)
        return code

    def all_gone(self, seconds: float) -> None:
        """Wait until no process of the launcher's session is left."""
        until(lambda: not session(self.launcher.pid), f"processes left: {session(self.launcher.pid)}", seconds)

    def close(self) -> None:
        """Kill all processes that are left, and remove the launcher's temporary files."""
        for process in session(self.launcher.pid):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.launcher.wait(10)
        for leftover in self._folder.glob("distrain-launch-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is not None:
            print(self.output[-6000:])
        self.close()


def rank_of(process: psutil.Process) -> int | None:
    """Return the rank of a worker; None of a standby process. One that was a standby process has mapped its status."""
    environ = process.environ()
    if "DISTRAIN_STANDBY_SOCKET" not in environ:
        return int(environ.get("RANK", "0"))
    files = (Path(each.path) for each in process.memory_maps())
    return next((int(file.stem) for file in files if file.suffix == ".status"), None)


def clean_environ() -> dict[str, str]:
    """Return the environment of a job: one thread per process, this repository's code and models."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "SLURM_"))}
    paths = [str(REPO), str(REPO / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)}


def session(leader: int) -> list[psutil.Process]:
    """Return the running processes of a session."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


@dataclass(frozen=True)
class TrainedRun:
    """The outcome of a run: the last weights, the ids of every step, the metrics without times."""

    weights: dict[str, torch.Tensor]
    ids: dict[int, list[int]]
    metrics: list[dict[str, Any]]

    def same_as(self, other: TrainedRun) -> None:
        """Check that every bit, every id and every line is the same."""
        assert self.ids == other.ids
        assert self.metrics == other.metrics
        assert self.weights.keys() == other.weights.keys()
        for name, value in self.weights.items():
            assert torch.equal(value, other.weights[name]), name


def trained(run: Path) -> TrainedRun:
    """Read what a finished run trained."""
    assert (run / "result.json").exists()
    newest = max((run / "checkpoints").glob("step-*"))
    return TrainedRun(load_file(newest / "model.safetensors"), ids_by_step(run), metrics_but_times(run))


def ip(*arguments: str) -> None:
    """Run a command of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def exit_file(run: Path) -> dict[str, Any]:
    """Read RUN/exit.json."""
    content: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return content


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)
