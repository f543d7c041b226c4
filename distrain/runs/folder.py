"""The names of the files in a run's folder, and reading them. Imports no torch."""

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
from distrain.runs import attempts, checkpoint, exit_record
from distrain.runs.json_files import read_object

CONFIG = "config.yaml"
"""The configuration with all its defaults."""
SETUP = "setup.json"
"""The data set, model, processes and machine of the newest attempt (`distrain.training.summary.facts`)."""
METRICS = "metrics.jsonl"
RESULT = "result.json"
EXIT = "exit.json"
"""The end of the newest attempt, if `distrain launch` started it."""
AUDIT, STACKS, TRACE, REPORT, WANDB, TENSORBOARD = "audit", "stacks", "trace", "report", "wandb", "tensorboard"
AUGMENTED = "pictures/augmented.safetensors"
"""The first training images, and augmented variants of them."""
MISCLASSIFIED = "pictures/misclassified.safetensors"
"""Test images whose predicted class is wrong, most confident first."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder, without weights."""

    folder: Path
    config: Config
    setup: dict[str, Any]
    """RUN/setup.json; empty if no attempt has written it yet."""
    lines: list[dict[str, Any]]
    """The lines of RUN/metrics.jsonl, without a last line that is incomplete."""
    result: dict[str, Any] | None
    """RUN/result.json; None until the run is done."""
    attempts: list[dict[str, Any]]
    """The files in RUN/attempts, oldest first."""
    checkpoints: list[int]
    """Steps of the checkpoints in the folder, ascending."""
    exit_record: dict[str, Any]
    """RUN/exit.json; empty if there is none."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty if no attempt has written RUN/setup.json yet."""
        return list(self.setup.get("data", {}).get("classes", []))


def configuration(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration of a run.

    Args:
        folder: the run's folder.
        overrides: `section.key=value`, which replace the run's own values.

    Raises:
        DataError: the folder holds no run.
        ConfigError: an override is not valid.
    """
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder}: holds no run (no {CONFIG}); give the folder that was run.dir")
    return config.load(folder / CONFIG, overrides)


def read(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        DataError: the folder holds no run.
    """
    return RunRecord(
        folder,
        configuration(folder),
        read_object(folder / SETUP) or {},
        read_lines(folder / METRICS),
        read_object(folder / RESULT),
        attempts.history(folder),
        sorted(checkpoint.steps(folder / checkpoint.FOLDER)),
        exit_record.read(folder / EXIT),
    )


def read_started(folder: Path) -> RunRecord:
    """Read a run's folder; the run must have started, so that its data set and model are known.

    Raises:
        DataError: the folder holds no run, or its run has not started.
    """
    record = read(folder)
    if not record.setup:
        raise DataError(f"{folder}: its run has not started, or was written by an older distrain (no {SETUP})")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, up to the first incomplete line; a missing file has no lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # it is being written now, or its writer was killed
            break
    return lines


def read_pictures(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays in `AUGMENTED` or `MISCLASSIFIED`; return an empty dict if the file is missing or damaged."""
    import safetensors.numpy

    try:
        return dict(safetensors.numpy.load(path.read_bytes()))
    except (OSError, safetensors.SafetensorError):
        return {}
