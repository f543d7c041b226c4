"""The attempts of a run: one file for each time that a job took its folder.

    RUN/attempts/000001.json  000002.json …

Nothing is ever deleted. The newest file is also the lease on the folder (`lease`).
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distrain import files
from distrain.runs import records

FOLDER = "attempts"
_NAME = re.compile("([0-9]{6}|[1-9][0-9]{6,8})[.]json")
MOST_READ = 1000
"""Attempts whose files are read: the newest ones."""
CURE = "nothing depends on it; delete it to be rid of this message"


def numbers(run: Path) -> list[int]:
    """Return the numbers of all attempts, ascending."""
    try:
        return numbers_in(os.listdir(run / FOLDER))
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbers_in(names: Iterable[str]) -> list[int]:
    """Return the numbers of the attempts whose files have these names, ascending."""
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def newest_attempt(run: Path) -> int:
    """Return the number of the newest attempt; 0 if there was none."""
    return max(numbers(run), default=0)


def history(run: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the content of the files of the `MOST_READ` newest attempts, oldest first.

    Args:
        run: the run's folder.
        problems: gets a message for each file that cannot be read and is passed over.
    """
    problems = problems if problems is not None else []
    read = (
        records.read_or_warn(path_of(run, attempt), records.Attempt, problems, CURE)
        for attempt in numbers(run)[-MOST_READ:]
    )
    return [records.content_of(entry) for entry in read if entry is not None]


def path_of(run: Path, attempt: int) -> Path:
    """Return the path of an attempt's file."""
    return run / name_of(attempt)


def name_of(attempt: int) -> str:
    """Return the path of an attempt's file below the run's folder."""
    return f"{FOLDER}/{attempt:06d}.json"


def create(path: Path, content: dict[str, Any]) -> bool:
    """Create the file of an attempt; return False if it exists already: of several jobs exactly one succeeds."""
    return files.create(path, records.to_json(content).encode())


def replace(path: Path, content: dict[str, Any]) -> None:
    """Replace a file as a whole."""
    # Unlike `files.replace` this does not sync: a renewal must not wait until a checkpoint is on disk.
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        work.write_text(records.to_json(content), encoding="utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def describe(entry: dict[str, Any]) -> str:
    """Describe the job of an attempt, for messages."""
    job = f", SLURM job {entry['job']}" if entry.get("job") else ""
    return (
        f"attempt {entry.get('attempt')}, host {entry.get('host')}, process {entry.get('process')}{job},"
        f" started {entry.get('start')}, renewed {entry.get('renewed')}"
    )


def now() -> str:
    """Return the time as it is written in these files."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
