"""Saves: how long a checkpoint stops the training, on the disk of OUT and on one of 100 MB/s.

The model has about as many weights as `resnet50`, and SGD has momentum: 2 × 25.2 million numbers in fp32, 202 MB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from benchmarks import slow_disk
from benchmarks.commands import TIMEOUT_SECONDS, CommandError, environment
from benchmarks.context import Context
from benchmarks.table import Row, Table

_RATE = 100e6
_STALL, _COST = "steps that a save stops the training", "steps that a save costs, until the next one"


def measure(context: Context, every: int = 12) -> Table:
    """Measure the time of steps, and what a save adds."""
    library = slow_disk.build(context.out / "slow_disk")
    disks: dict[str, dict[str, str]] = {
        "this disk": {},
        "100 MB/s": {"LD_PRELOAD": str(library), slow_disk.RATE: str(_RATE)},
    }
    rows = []
    for disk, variables in disks.items():
        samples = [_run(context, every, variables) for _ in range(context.repeats)]
        rows.append(Row(f"{disk}: a step without a save", "s", [each["step"] for each in samples]))
        for name, key in ((_STALL, "stalls"), (_COST, "costs")):
            per_save = [max(value / each["step"], 0.0) for each in samples for value in each[key]]
            rows.append(Row(f"{disk}: {name}", "steps", per_save))
    return Table(f"Saves of 202 MB, on {context.device}", rows)


def _run(context: Context, every: int, variables: dict[str, str]) -> dict[str, Any]:
    run = context.work / "saves"
    shutil.rmtree(run, ignore_errors=True)
    arguments = [context.dataset.root, run, context.device, every]
    command = [sys.executable, "-m", "benchmarks.saved_run", *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(1, **variables), capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
    )
    if done.returncode:
        raise CommandError(command, f"exit code {done.returncode}", done.stderr)
    times: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return times
