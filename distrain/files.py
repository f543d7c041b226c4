"""Files that are on disk when they are said to be, and whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a file, and put it on disk."""
    path.write_bytes(content)
    sync(path)


def replace(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or as it was before."""
    work = path.with_name(f".{path.name}.partial")
    write(work, content if isinstance(content, bytes) else content.encode())
    work.replace(path)
    sync(path.parent)
