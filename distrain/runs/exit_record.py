"""RUN/exit.json and files like it: how an attempt ended, for the next one and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain import files


def read(path: Path) -> dict[str, Any]:
    """Read a record; empty where there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write(path: Path, content: Mapping[str, object]) -> None:
    """Replace a record, whole.

    Raises:
        OSError: it cannot be written.
    """
    files.replace(path, json.dumps(content, indent=1) + "\n")
