"""Exit records: RUN/exit.json and RUN/nodes/*.json, which hold an exit code and the reason for it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain import files
from distrain.runs.json_files import read_object


def read(path: Path) -> dict[str, Any]:
    """Read a record; return an empty dict if it is missing or damaged."""
    return read_object(path) or {}


def write(path: Path, content: Mapping[str, object]) -> None:
    """Write a record as a whole: after a failure the file is as it was before.

    Raises:
        OSError: it cannot be written.
    """
    files.replace(path, json.dumps(content, indent=1) + "\n")
