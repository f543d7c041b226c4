"""Restarts in place: seconds from the SIGKILL of a process to the next step, of a run of three processes.

`distrain launch --restarts`, with and without standby processes, beside `torchrun --max-restarts`. The end is when
another process can read the first line of RUN/metrics.jsonl after the checkpoint, as in the part startup.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.commands import CommandError, environment, train_command
from benchmarks.context import Context, take_turns
from benchmarks.table import Table, ratio
from distrain.runs import attempts

_PROCESSES, _RANK = 3, 1
_STANDBY, _COLD, _TORCHRUN = "distrain launch --restarts", "… launch.standby=false", "torchrun --max-restarts"
_TIMEOUT_SECONDS = 300.0
_TRAIN_SECONDS = 10.0
"""Training before a process is killed: standby processes have done their imports by then."""


def measure(context: Context) -> Table:
    """Measure the seconds of each."""
    contestants = {name: partial(_seconds_to_next_step, context, name) for name in (_STANDBY, _COLD, _TORCHRUN)}
    rows = take_turns("restarts", "s", contestants, context.repeats)
    ratios = [ratio(rows[_STANDBY], rows[name]) for name in (_TORCHRUN, _COLD)]
    return Table(f"From SIGKILL to the next step, {_PROCESSES} processes", list(rows.values()), ratios)


def _seconds_to_next_step(context: Context, name: str) -> float:
    """Start a run, kill a process of it, and time the next step."""
    run = context.work / "restarts"
    shutil.rmtree(run, ignore_errors=True)
    keys = {"train.epochs": "null", "train.max_steps": 10**6, "log.every_steps": 1, "checkpoint.every_steps": 20}
    standby = {"launch.standby": "false"} if name == _COLD else {}
    train = train_command(context, run, {**keys, **standby})
    launch = [*train[:3], "launch", "--nproc", str(_PROCESSES), "--restarts", "1", "--", *train[3:]]
    if name == _TORCHRUN:
        agent = str(Path(sys.executable).with_name("torchrun"))
        options = ["--standalone", "--nproc-per-node", str(_PROCESSES), "--max-restarts", "1"]
        launch = [agent, *options, "-m", "distrain", *train[3:]]
    with _Running(launch, run) as running:
        running.wait_for_step(1)
        time.sleep(_TRAIN_SECONDS)
        started = time.perf_counter()
        os.kill(running.worker(), signal.SIGKILL)
        running.wait_for_step(2)
        return time.perf_counter() - started


class _Running(contextlib.AbstractContextManager["_Running"]):
    """A job in a process of its own; it is stopped at the end of the `with` block."""

    def __init__(self, command: list[str], run: Path) -> None:
        self._command, self._run, self._log = command, run, run.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=environment(1), stdout=log, stderr=log)

    def worker(self) -> int:
        """Return the process that is killed: it has mapped the status of its rank, or has the rank as a variable."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for child in children.read_text(encoding="ascii").split():
            maps, environ = (Path("/proc", child, name).read_bytes() for name in ("maps", "environ"))
            if re.search(rb"/%d\.status$" % _RANK, maps, re.MULTILINE) or b"\0RANK=%d\0" % _RANK in environ:
                return int(child)
        raise CommandError(self._command, f"has no rank {_RANK}", self._log.read_text(errors="replace"))

    def wait_for_step(self, attempt: int) -> None:
        """Wait for the first step of an attempt."""
        started = time.perf_counter()
        while True:
            if self._process.poll() is not None or time.perf_counter() - started > _TIMEOUT_SECONDS:
                raise CommandError(self._command, "did not make a step", self._log.read_text(errors="replace"))
            history = attempts.history(self._run) if attempts.newest_attempt(self._run) == attempt else []
            from_step = history[-1].get("from_step") if history else None
            if from_step is not None and self._last_step() > from_step:
                return
            time.sleep(0.005)

    def _last_step(self) -> int:
        metrics = self._run / "metrics.jsonl"
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_TIMEOUT_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
