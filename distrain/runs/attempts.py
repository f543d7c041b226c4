"""The attempts of a run: one file for each time that a job took its folder.

    RUN/attempts/000001.json  000002.json …

Nothing is ever deleted. The newest file is also the lease on the folder (`lease`).
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

from distrain.files import write
from distrain.runs.json_files import read_object

FOLDER = "attempts"
_NAME = re.compile(r"(\d{6,})\.json")


def newest_attempt(run: Path) -> int:
    """Return the number of the newest attempt; 0 if there was none."""
    folder = run / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


def history(run: Path) -> list[dict[str, Any]]:
    """Return the content of each attempt's file, oldest first."""
    entries = (read_object(path_of(run, attempt)) for attempt in range(1, newest_attempt(run) + 1))
    return [entry for entry in entries if entry is not None]


def path_of(run: Path, attempt: int) -> Path:
    """Return the path of an attempt's file."""
    return run / FOLDER / f"{attempt:06d}.json"


def create(path: Path, content: dict[str, Any]) -> bool:
    """Create a file as a whole; return False if it exists already.

    Of several processes exactly one succeeds: `link` is atomic, on NFS too.
    """
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(work, json.dumps(content, indent=1).encode())
        os.link(work, path)
    except FileExistsError:
        return False
    finally:
        work.unlink(missing_ok=True)
    return True


def replace(path: Path, content: dict[str, Any]) -> None:
    """Replace a file as a whole."""
    # Unlike `files.replace` this does not sync: a renewal must not wait until a checkpoint is on disk.
    work = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        work.write_text(json.dumps(content, indent=1), encoding="utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def describe(entry: dict[str, Any] | None) -> str:
    """Describe the job of an attempt, for messages."""
    if entry is None:
        return "owner unknown"
    job = f", SLURM job {entry['job']}" if entry.get("job") else ""
    return (
        f"attempt {entry.get('attempt')}, host {entry.get('host')}, process {entry.get('process')}{job},"
        f" started {entry.get('start')}, renewed {entry.get('renewed')}"
    )


def now() -> str:
    """Return the time as it is written in these files."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
