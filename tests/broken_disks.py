"""File systems that lack something, made by replacing a function of Python."""

from __future__ import annotations

import errno
import os
import stat

import pytest


def refuse_to_sync_folders(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    """Let fsync fail for folders, as some network and FUSE file systems do."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
