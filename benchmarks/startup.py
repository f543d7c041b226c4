"""Start-up: seconds from the start of the command to the first step, of a new run and of a resumed one.

The end is when another process can read the first step's line in RUN/metrics.jsonl. This includes the
interpreter, all imports, the set-up, the first read and the first step. The file is checked every 5 ms.

Compared with the imports that both need: the whole of `python -c 'import torch, accelerate'`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.commands import CommandError, call, environment, train_command
from benchmarks.context import Context, take_turns
from benchmarks.table import Table, ratio
from distrain.errors import EXIT_AGAIN

_NEW, _RESUMED, _IMPORTS = "distrain train, fresh", "distrain train, resumed", "import torch, accelerate"
_TIMEOUT_SECONDS = 300.0


def measure(context: Context) -> Table:
    """Measure the seconds of each."""
    run = context.work / "startup"

    def new() -> float:
        shutil.rmtree(run, ignore_errors=True)
        return _seconds_to_first_step(context, run)

    contestants: dict[str, Callable[[], float]] = {
        _IMPORTS: _import_seconds,
        _NEW: new,
        _RESUMED: lambda: _seconds_to_first_step(context, run),
    }
    rows = take_turns("startup", "s", contestants, context.repeats)
    ratios = [ratio(rows[name], rows[_IMPORTS]) for name in (_NEW, _RESUMED)]
    return Table(f"From the command to the first step, on {context.device}", list(rows.values()), ratios)


def _import_seconds() -> float:
    started = time.perf_counter()
    call([sys.executable, "-c", "import torch, accelerate"])
    return time.perf_counter() - started


def _seconds_to_first_step(context: Context, run: Path) -> float:
    """Start or resume a run, time its next step, and then stop it, so that it saves a checkpoint."""
    metrics, log = run / "metrics.jsonl", context.work / "startup.log"
    previous_step = _last_step(metrics)
    command = train_command(context, run, {"train.epochs": "null", "train.max_steps": 10**6, "log.every_steps": 1})
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment(1), stdout=output, stderr=output)
        try:
            previous_size = -1
            while True:
                if process.poll() is not None or time.perf_counter() - started > _TIMEOUT_SECONDS:
                    raise CommandError(command, "did not make a step", log.read_text(errors="replace"))
                size = metrics.stat().st_size if metrics.exists() else 0
                if size != previous_size and _last_step(metrics) > previous_step:
                    seconds = time.perf_counter() - started
                    break
                previous_size = size
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            if process.wait(_TIMEOUT_SECONDS) != EXIT_AGAIN:
                raise CommandError(command, f"exit code {process.returncode}", log.read_text(errors="replace"))
        finally:
            process.kill()
            process.wait()
    return seconds


def _last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
