"""Standby processes: they have imported torch, and wait to become the workers of the next attempt.

Importing takes most of the time between the end of an attempt and the first step of the next one. A standby process is
started as a program of its own, and not forked: a fork cannot use the GPU if its parent has looked for one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from distrain import signals, startup
from distrain.environment import STORE_SOCKET

SOCKET = "DISTRAIN_STANDBY_SOCKET"
"""Environment variable: descriptor of the socket from which a standby process receives its work."""
_IMPORTED = "distrain.api.training"
_CHUNK = 65536


class Standby:
    """The standby processes of this node.

    Args:
        command: the program and its arguments, the same as a worker's.
        environ: environment variables of all workers.
        number: number of processes that are to wait.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], number: int) -> None:
        self._command, self._environ, self._number = list(command), dict(environ), number
        self._waiting: list[_Process] = []

    def start(self) -> None:
        """Start the processes that are missing.

        Raises:
            OSError: one cannot be started.
        """
        self._waiting = [process for process in self._waiting if process.popen.poll() is None]
        while len(self._waiting) < self._number:
            self._waiting.append(_Process(self._command, self._environ))

    def become_worker(
        self, variables: Mapping[str, str], store: socket.socket | None, output: IO[bytes] | None
    ) -> subprocess.Popen[bytes] | None:
        """Let a standby process become a worker; return None if none waits.

        Args:
            variables: environment variables of this worker, beside those of all.
            store: socket on which it will serve the store; None if it does not.
            output: where its output goes; None: where the launcher's goes.
        """
        while self._waiting:
            process = self._waiting.pop(0)
            with contextlib.suppress(OSError):  # it has ended  # guard: standby-that-ended
                process.send(variables, store, output)
                return process.popen
            process.end()
        return None

    def close(self) -> None:
        """End the processes that wait."""
        for process in self._waiting:
            process.end()
        self._waiting.clear()


class _Process:
    """A standby process, seen from the launcher."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with other:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env={**environ, SOCKET: str(other.fileno())},
                pass_fds=(other.fileno(),),
            )

    def send(self, variables: Mapping[str, str], store: socket.socket | None, output: IO[bytes] | None) -> None:
        named = {"store": store, "output": output}
        descriptors = {name: each.fileno() for name, each in named.items() if each is not None}
        content = json.dumps({"variables": dict(variables), "descriptors": list(descriptors)}).encode()
        with self._socket:
            socket.send_fds(self._socket, [content], list(descriptors.values()))

    def end(self) -> None:
        self._socket.close()
        self.popen.kill()
        self.popen.wait()


def wait_for_work() -> None:
    """Import what training needs, and wait for work; then take over a worker's environment and output.

    Only a standby process does this; others return at once. It ends here if its launcher needs it no longer.
    """
    descriptor = os.environ.pop(SOCKET, None)
    if descriptor is None:
        return
    with startup.quick_imports():
        importlib.import_module(_IMPORTED)
    with socket.socket(fileno=int(descriptor)) as launcher:
        content, received, _, _ = socket.recv_fds(launcher, _CHUNK, 2)
        while chunk := launcher.recv(_CHUNK):
            content += chunk
    if not content:
        os._exit(0)
    signals.forget()  # one that came before was not for this worker: its launcher forwards those that are
    message = json.loads(content)
    os.environ.update(message["variables"])
    descriptors = dict(zip(message["descriptors"], received, strict=True))
    if "store" in descriptors:
        os.environ[STORE_SOCKET] = str(descriptors["store"])
    if "output" in descriptors:
        os.dup2(descriptors["output"], 1)
        os.dup2(descriptors["output"], 2)
        os.close(descriptors["output"])
