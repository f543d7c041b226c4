"""Reads from a run's files what tests compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrain.api.result import Result
from distrain.runs.results import Confusion


def ids_by_step(run: Path) -> dict[int, list[int]]:
    """Read the audit: for each step the ids that all ranks together trained on, sorted; each rank has a step once."""
    steps: dict[int, list[int]] = {}
    for path in sorted((run / "audit").glob("rank-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines), f"{path}: a step twice"
        for line in lines:
            steps.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


def metrics_but_times(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl without values that depend on the time."""
    timed = (
        "seconds",
        "train_seconds",
        "compile_seconds",
        "train/images_per_second",
        "train/tflops_per_second",
        "train/mfu",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in timed and not key.startswith(("profile/", "memory/", "train/slowest_"))
        }
        for line in lines
    ]


def as_record(result: Result) -> dict[str, Any]:
    """The fields of a result as JSON has them."""
    record: dict[str, Any] = json.loads(json.dumps(asdict(result), default=str))
    return record


def confusion_matrix(result: dict[str, Any]) -> list[list[int]]:
    """The confusion in a result as K rows of K counts: row = true class, column = predicted class."""
    return Confusion.of_result(result).matrix(range(len(result["accuracy_by_class"]))).tolist()
