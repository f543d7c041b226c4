"""A terminal for tests: a command on a pseudo-terminal of a given width, and what a person sees there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

TESTS = Path(__file__).parent


def run(arguments: list[str], columns: int, folder: Path, interrupt: bytes | None = None) -> tuple[int, bytes]:
    """Run `distrain` on a terminal; press Ctrl-C once the pattern `interrupt` was shown. Exit code, and all output.

    It is killed after a minute.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        # Ctrl-C goes to the processes whose controlling terminal it is.
        ["setsid", "--ctty", sys.executable, "-m", "distrain", *arguments], stdin=slave, stdout=slave, stderr=slave,
        env={**environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}, cwd=folder,
    )  # fmt: skip
    os.close(slave)
    shown, killer = b"", threading.Timer(60, process.kill)
    killer.start()
    with contextlib.suppress(OSError):  # EIO: all that had the terminal open are gone
        while piece := os.read(master, 65536):
            shown += piece
            if interrupt is not None and re.search(interrupt, shown):
                os.write(master, b"\x03")
                interrupt = None
    os.close(master)
    code = process.wait(60)
    killer.cancel()
    return code, shown


def screen(shown: bytes, columns: int) -> list[str]:
    """The lines that remain on the screen: a line that is full continues in the next one."""
    rows: list[list[str]] = [[]]
    row = column = 0
    for token in re.findall(r"\x1b\[\d*[A-Za-z]|.", shown.decode(), re.DOTALL):
        if token == "\r":
            column = 0
        elif token.startswith("\x1b"):
            assert token[-1] == "A", f"{token!r}: not known here"
            row -= int(token[2:-1] or 1)
        else:
            if token == "\n" or column == columns:
                row += 1
                column = column if token == "\n" else 0
                rows += [[]] * (row == len(rows))
                rows[row] = list(rows[row])
            if token != "\n":
                rows[row] += " " * (column - len(rows[row]))
                rows[row][column : column + 1] = token
                column += 1
    return ["".join(line).rstrip() for line in rows]
