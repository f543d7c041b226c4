"""The results of the suite for GPUs: one table, and one JSON file, which is written after every test."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distrain import files

LONGEST_SECONDS = 600
"""The time that the suite may take on one GPU."""


@dataclass
class Check:
    """A test of the suite: its outcome, and what it measured."""

    part: str
    name: str
    outcome: str = "not run"
    reason: str = ""
    """Why it failed or was skipped."""
    seconds: float = 0.0
    measured: list[tuple[str, float, str]] = field(default_factory=list)
    """Name, value and unit."""


class Results:
    """The checks of a run of the suite, by the id of the test.

    Attributes:
        machine: what the results were measured on.
    """

    def __init__(self, device: str, out: Path | None) -> None:
        self.checks: dict[str, Check] = {}
        self.machine = _describe(device)
        self._started, self._out = time.monotonic(), out

    def write(self) -> None:
        """Write the file, if one is wanted. After a crash it has the results so far; the first test not run crashed."""
        if self._out is None:
            return
        content = {
            "machine": self.machine,
            "seconds": time.monotonic() - self._started,
            "checks": [asdict(check) for check in self.checks.values()],
        }
        self._out.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self._out, json.dumps(content, indent=1) + "\n")

    def table(self) -> list[str]:
        """Return the lines of the table."""
        return table(self.machine, list(self.checks.values()), time.monotonic() - self._started)


def table(machine: dict[str, Any], checks: list[Check], seconds: float) -> list[str]:
    """Format the results: a line for each test, followed by what it measured; the last line has the total."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    for check in checks:
        lines.append(f"{check.part:11} {check.outcome:8} {check.seconds:6.1f} s  {check.name}  {check.reason}".rstrip())
        lines += [f"{'':31}{name}: {value:,.4g} {unit}".rstrip() for name, value, unit in check.measured]
    counts = sorted(Counter(check.outcome for check in checks).items())
    total = f"{', '.join(f'{count} {outcome}' for outcome, count in counts)}, in {seconds:,.0f} s"
    if seconds > LONGEST_SECONDS:
        total += f"; warning: longer than the {LONGEST_SECONDS} s that one GPU should take"
    return [*lines, total]


def _describe(device: str) -> dict[str, Any]:
    """Return what the results are measured on."""
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda" and torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": _first_line(query),
        }
    return facts


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""
