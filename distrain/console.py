"""What a run prints is for people: where it cannot be written (the log's disk is full, its reader is gone), the run
goes on without. metrics.jsonl and exit.json have what counts.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def keep_going() -> None:
    """Let no print end this process, from here on."""
    sys.stdout, sys.stderr = _Tolerant(sys.stdout), _Tolerant(sys.stderr)


class _Tolerant:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
