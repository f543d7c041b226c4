"""A run's folder as others read it: the names of its files, and what stands in them so far. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from distrain import config
from distrain.config import Config
from distrain.errors import DataError
from distrain.runs import attempts, checkpoint

CONFIG = "config.yaml"
"""The resolved configuration."""
SETUP = "setup.json"
"""Data set, model, processes and machine of the newest attempt (`distrain.training.summary.facts`)."""
METRICS = "metrics.jsonl"
RESULT = "result.json"
EXIT = "exit.json"
"""How the newest attempt ended, where `distrain launch` started it."""
AUDIT, STACKS, TRACE, REPORT, WANDB, TENSORBOARD = "audit", "stacks", "trace", "report", "wandb", "tensorboard"
AUGMENTED, WRONG = "pictures/augmented.safetensors", "pictures/wrong.safetensors"
"""What augmentation does to the first pictures; those that were taken for another class, most probable first."""


@dataclass(frozen=True)
class Record:
    """What a run has written down so far."""

    folder: Path
    config: Config
    setup: dict[str, Any]
    """Empty where no attempt came so far."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl; a last line that is only half there is left out."""
    result: dict[str, Any] | None
    """None unless the run is done."""
    attempts: list[dict[str, Any]]
    """What each attempt noted, oldest first."""
    checkpoints: list[int]
    """Steps of those that are kept, ascending."""
    ended: dict[str, Any]
    """RUN/exit.json; empty where there is none."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty where no attempt came so far."""
        return list(self.setup.get("data", {}).get("classes", []))


def configuration(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """That of a run, with `section.key=value` over it.

    Raises:
        DataError: the folder holds no run.
        ConfigError: the overrides cannot be used.
    """
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder}: holds no run (no {CONFIG}); name the folder that run.dir named")
    return config.load(folder / CONFIG, overrides)


def read(folder: Path) -> Record:
    """What a run has written down.

    Raises:
        DataError: the folder holds no run.
    """
    return Record(
        folder,
        configuration(folder),
        _read(folder / SETUP) or {},
        read_lines(folder / METRICS),
        _read(folder / RESULT),
        attempts.history(folder),
        sorted(checkpoint.steps(folder / checkpoint.FOLDER)),
        _read(folder / EXIT) or {},
    )


def read_begun(folder: Path) -> Record:
    """The same of a run that knows its data set and model.

    Raises:
        DataError: the folder holds no run, or its run has not begun.
    """
    record = read(folder)
    if not record.setup:
        raise DataError(f"{folder}: its run has not begun, or is of an older distrain (no {SETUP})")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of one JSON object a line; none where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # being written now, or cut off by a kill
            break
    return found


def read_pictures(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of `AUGMENTED` or `WRONG`; empty where there is no such file, or it is damaged."""
    import safetensors.numpy

    try:
        return dict(safetensors.numpy.load(path.read_bytes()))
    except (OSError, safetensors.SafetensorError):
        return {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
