"""File systems that lack something, made by replacing a function of Python."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest


def refuse_to_sync_folders(monkeypatch: pytest.MonkeyPatch, number: int = errno.EINVAL) -> None:
    """Let fsync fail for folders, as some network and FUSE file systems do."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def hold_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[threading.Event, threading.Event]:
    """Let the creation of a folder wait, as on a disk that does not answer.

    Returns:
        `begun`, which is set when it is created, and `answers`, which the test sets to let it be created.
    """
    begun, answers, real = threading.Event(), threading.Event(), os.mkdir

    def mkdir(path: os.PathLike[str], mode: int = 0o777) -> None:
        if os.path.basename(path) == name:
            begun.set()
            assert answers.wait(60), f"{name}: nobody let the disk answer"
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    return begun, answers


def refuse_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the creation of a folder fail: there is no space."""
    real = os.mkdir

    def mkdir(path: os.PathLike[str], mode: int = 0o777) -> None:
        if os.path.basename(path) == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
