"""Exit records: RUN/exit.json and RUN/nodes/*.json, which hold an exit code and the reason for it. Imports no torch."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain import files
from distrain.errors import AgainError, DataError
from distrain.runs import attempts, records

log = logging.getLogger("distrain")

CURE = "`distrain launch` replaces it at the next attempt"


def read(path: Path) -> dict[str, Any]:
    """Read RUN/exit.json; return an empty dict if it is missing or, with a warning, if it cannot be read."""
    problems: list[str] = []
    record = records.read_or_warn(path, records.Exit, problems, CURE)
    for problem in problems:
        log.warning("%s", problem)
    return records.content_of(record) if record is not None else {}


def read_node(path: Path) -> dict[str, Any]:
    """Read a file of RUN/nodes; return an empty dict if it is missing or cannot be read."""
    record = records.read_or_warn(path, records.NodeExit, [], CURE)
    return records.content_of(record) if record is not None else {}


def write(path: Path, content: Mapping[str, object]) -> None:
    """Write a record as a whole: after a failure the file is as it was before.

    Raises:
        OSError: it cannot be written, or a file of this name is there that distrain did not write.
    """
    if is_foreign(path) and not attempts.numbers(path.parent):
        raise FileExistsError(errno.EEXIST, "distrain did not write this file, and leaves it as it is", str(path))
    files.replace(path, records.to_json(content))


def is_foreign(path: Path) -> bool:
    """Whether something is there that is not RUN/exit.json or one of RUN/nodes."""
    try:
        kind = records.NodeExit if path.parent.name == "nodes" else records.Exit
        return records.read(path, kind, CURE) is None and path.exists()
    except (DataError, AgainError):
        return True
