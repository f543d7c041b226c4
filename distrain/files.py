"""Durable and atomic writes of files."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk."""
    path.write_bytes(content)
    sync(path)


def replace(path: Path, content: str | bytes) -> None:
    """Write a file atomically: after a crash it has either the new content or the old one."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial, content if isinstance(content, bytes) else content.encode())
    partial.replace(path)
    sync(path.parent)
