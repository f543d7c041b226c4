"""Seconds from the start of the command, to the moment when another process can read the line of the first step in
RUN/metrics.jsonl: of a new run, and of one that goes on from the checkpoint of its stop. So the interpreter, all
imports, the set-up, the first read and the first step are counted. The file is looked at every 5 ms.

Beside them the imports that they cannot do without: `python -c 'import torch, accelerate'`, to its end.
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

from distrain.errors import EXIT_AGAIN
from distrain.tools.bench.context import Context, take_turns
from distrain.tools.bench.processes import CommandError, call, environment, train_command
from distrain.tools.bench.table import Row, Table, ratio

_FRESH, _RESUMED, _IMPORTS = "distrain train, fresh", "distrain train, resumed", "import torch, accelerate"
_SECONDS = 300.0


def measure(context: Context) -> Table:
    """Seconds of each."""
    run = context.work / "startup"

    def fresh() -> float:
        shutil.rmtree(run, ignore_errors=True)
        return _until_first_step(context, run)

    contestants: dict[str, Callable[[], float]] = {
        _IMPORTS: _imports,
        _FRESH: fresh,
        _RESUMED: lambda: _until_first_step(context, run),
    }
    found = take_turns("startup", contestants, context.repeats)
    rows = {name: Row(name, "s", samples) for name, samples in found.items()}
    ratios = [ratio(rows[name], rows[_IMPORTS]) for name in (_FRESH, _RESUMED)]
    return Table(f"From the command to the first step, on {context.device}", list(rows.values()), ratios)


def _imports() -> float:
    started = time.perf_counter()
    call([sys.executable, "-c", "import torch, accelerate"])
    return time.perf_counter() - started


def _until_first_step(context: Context, run: Path) -> float:
    """Start a run, or go on with it; once its next step is told, ask it to save and leave."""
    metrics, words = run / "metrics.jsonl", context.work / "startup.log"
    before = _newest_step(metrics)
    keys = {"train.epochs": "null", "train.max_steps": 10**6, "log.every_steps": 1}
    command = train_command(context, run, keys)
    with words.open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment(1), stdout=log, stderr=log)
        try:
            size = -1
            while True:
                if process.poll() is not None or time.perf_counter() - started > _SECONDS:
                    raise CommandError(command, "came to no step", words.read_text(errors="replace"))
                grown = metrics.stat().st_size if metrics.exists() else 0
                if grown != size and _newest_step(metrics) > before:
                    seconds = time.perf_counter() - started
                    break
                size = grown
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            if process.wait(_SECONDS) != EXIT_AGAIN:
                raise CommandError(command, f"ended with {process.returncode}", words.read_text(errors="replace"))
        finally:
            process.kill()
            process.wait()
    return seconds


def _newest_step(metrics: Path) -> int:
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0
