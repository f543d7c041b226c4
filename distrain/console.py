"""Output of commands for people: standard streams that never end a command, and log messages on stderr.

Text that cannot be written (the stream is closed, the disk is full, the reader has exited) is dropped. The files of
a run hold everything that counts; a command whose answer is nowhere else calls `check_answer` at its end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from distrain import text
from distrain.errors import ConfigError

LOGGER = logging.getLogger("distrain")
"""The logger of the whole package. Only the command line installs a handler."""

_STRICT = ("strict", "surrogateescape", "surrogatepass")
"""Error handlers of encodings that raise for some characters."""


def set_up() -> None:
    """Make the standard streams of this process safe: from here on, no write to them raises an OSError.

    Characters that a stream's encoding lacks are written as escapes: ``\\xd7`` for a multiplication sign.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one. Otherwise the next file to be opened gets it, and prints go there.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the process exits
    sys.stdout, sys.stderr = _tolerant(sys.stdout, 1), _tolerant(sys.stderr, 2)


def show(answer: object) -> None:
    """Print what a command answers to stdout. No control sequence in a name reaches the terminal."""
    print(text.without_controls(str(answer)), flush=True)


def check_answer() -> None:
    """Check that what a command answered is in the file that stdout is redirected to.

    Raises:
        ConfigError: a part was dropped, because there was no space for it.
    """
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    lost = getattr(getattr(buffer, "raw", buffer), "lost", None)
    if lost is not None:
        raise ConfigError(f"the answer could not be written to standard output: {lost}; make room there")


def show_error(message: object) -> None:
    """Print a message to stderr. No control sequence in a name or value reaches the terminal."""
    print(text.message(str(message)), file=sys.stderr, flush=True)


def encodable(content: str) -> str:
    """Return the text as stdout shows it, with escapes for the characters that its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"  # none: a StringIO in its place
    return content.encode(encoding, "backslashreplace").decode(encoding)


@contextlib.contextmanager
def logging_to_stderr(rank: int | None = None) -> Iterator[None]:
    """Show the package's log messages on stderr within the block: level INFO, unless `set_level` changes it.

    A rank, if given, precedes each line.
    Messages do not reach the root logger meanwhile: a handler that a library installed there would show them twice.
    A block inside another one changes nothing.
    """
    if any(isinstance(handler, _StderrHandler) for handler in LOGGER.handlers):
        yield
        return
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(rank))
    before = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


def set_level(name: str) -> None:
    """Show log messages of this level (``debug``, ``info``, ``warning`` or ``error``) and above."""
    LOGGER.setLevel(name.upper())


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _TolerantFile(io.FileIO):
    """A file descriptor that drops what it cannot write."""

    lost: str | None = None
    """Why something was dropped that was to be kept in a file; None if nothing was."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                count = super().write(view[written:])
                if count is None:  # a non-blocking descriptor that takes nothing at the moment
                    select.select([], [self], [])
                written += count or 0
        except OSError as error:
            if error.errno in _NO_SPACE:
                self.lost = error.strerror
        except ValueError:
            pass
        return len(view)


class _TolerantText(io.TextIOWrapper):
    """A text stream that stays open, so that a later write cannot fail."""

    def close(self) -> None:
        self.flush()


def _tolerant(stream: Any, descriptor: int) -> TextIO:
    """Return a stream to write to in place of `stream`, which is None if the descriptor was closed."""
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return cast(TextIO, stream)  # not Python's own: whoever replaced it decides
    raw = _TolerantFile(descriptor, "wb", closefd=False)
    if stream is None:
        return _TolerantText(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    unbuffered = stream.write_through  # python -u, PYTHONUNBUFFERED
    return _TolerantText(
        cast(io.BufferedWriter, raw) if unbuffered else io.BufferedWriter(raw),
        stream.encoding,
        "backslashreplace" if stream.errors in _STRICT else stream.errors,
        newline="\n",
        line_buffering=True,  # what user code printed is not lost if a watchdog or a signal ends the process
        write_through=unbuffered,
    )


class _StderrHandler(logging.Handler):
    """A handler that writes to the stderr of the moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message that cannot be shown ends nothing
            line = self.format(record) + "\n"
            bar = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not imported: no bar is active
            if bar is not None:
                bar.write(line, file=sys.stderr, end="")
            else:
                sys.stderr.write(line)
            sys.stderr.flush()


class _Formatter(logging.Formatter):
    """A format for people: the bare message, `warning: message`, and `[rank 1] ` in front if a rank is given."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._rank = "" if rank is None else f"[rank {rank}] "

    def format(self, record: logging.LogRecord) -> str:
        try:
            content = super().format(record)
        except Exception:  # arguments that do not fit the message
            content = f"{record.msg} {record.args}"
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return "\n".join(self._rank + line for line in text.message(f"{level}{content}").split("\n"))
