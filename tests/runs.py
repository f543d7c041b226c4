"""What a run wrote down, as tests compare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ids_by_step(run: Path) -> dict[int, list[int]]:
    """step → the ids that all ranks together trained on, sorted; no rank names a step twice."""
    steps: dict[int, list[int]] = {}
    for path in sorted((run / "audit").glob("rank-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines), f"{path}: a step twice"
        for line in lines:
            steps.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in sorted(steps.items())}


def metrics_but_times(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    timed = ("seconds", "train/images_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in timed and not key.startswith("profile/")}
        for line in lines
    ]
