"""Reads of regular files only, and writes that are complete or absent."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_disks import refuse_to_sync_folders

from distrain import files


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_socket(path: Path) -> Path:
    os.mknod(path, stat.S_IFSOCK | 0o600)  # bind() takes only paths of up to 107 bytes
    return path


def make_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
def test_only_regular_files_are_read(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not a regular file") as caught:
        files.read(make(tmp_path / "x"), 100)
    assert caught.value.strerror == "not a regular file"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "Is a directory"),
        ("none", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "not a valid file name"),
        ("\ud800", "not a valid file name"),
    ],
)
def test_every_reason_why_a_file_cannot_be_read_is_an_os_error(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=reason):
        files.read(tmp_path / name, 100)


def test_a_file_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    assert files.read(file, 1000) == b"x" * 1000
    with pytest.raises(OSError, match="too large: 1,000 bytes instead of at most 999"):
        files.read(file, 999)
    with pytest.raises(OSError, match="too large"):
        files.read("/proc/self/status", 10)  # its size is said to be 0
    assert files.read("/proc/self/status", 10**6).startswith(b"Name:")


def test_a_write_does_not_wait_for_a_fifo_or_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.partial").symlink_to("mine")
    make_fifo(tmp_path / ".b.partial")
    for name in "ab":
        with pytest.raises(OSError, match="No such device|Too many levels"):
            files.replace(tmp_path / name, "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_written_file_has_the_mode_of_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.replace(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    files.replace(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large"):
            files.replace(tmp_path / "file", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_its_file_system_cannot_sync_is_passed_over(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_sync_folders(monkeypatch, number)
    files.replace(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert files.sync(tmp_path) is False
    assert files.sync(tmp_path / "file") is True


def test_a_real_folder_that_cannot_be_synced() -> None:
    assert files.sync(Path("/proc")) is False


def test_other_errors_of_a_sync_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync(tmp_path)
