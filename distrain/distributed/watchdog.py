"""Time-outs by phase. A thread sees whether its process makes progress; where it makes none for too long, it writes
the stacks of all threads, finds out which process is behind, and ends this one.

Processes compare how often they met: every collective is counted, entered and left. Who is behind has met the least
often, or does not answer at all. Nothing is sent while all goes well.

A process that waits in vain also asks whether another one failed: NCCL waits for the dead without a word.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from distrain.distributed.peer_store import PeerStore
from distrain.errors import EXIT_AGAIN
from distrain.failures import Failure, fail, failure
from distrain.worker_status import StatusWriter, WorkerStatus

_TICK = 0.5
_ASK_SECONDS = 5.0
"""How long a stuck process waits for what the others say of themselves."""


class Watchdog:
    """Where this process is, and how long it may stay there."""

    def __init__(self, limits: Mapping[str, float], stacks: Path) -> None:
        """`limits`: seconds without progress, by phase; `stacks`: folder for stack traces, made when needed."""
        self._limits, self._stacks = dict(limits), stacks
        self.rank = int(os.environ.get("RANK", "0"))
        self._size = int(os.environ.get("WORLD_SIZE", "1"))
        self._peer_store: PeerStore | None = None
        self._phase, self._step, self._beats, self._collectives = "start", 0, 0, 0
        self.waits_for: str | None = None
        """What this process waits for, while it meets the others again and again."""
        self._status = StatusWriter(self.rank)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="distrain-watch", daemon=True)
        self._tell()
        self._thread.start()

    @property
    def place(self) -> WorkerStatus:
        """Where this process is now."""
        return WorkerStatus(self._phase, self._step, self._beats, self._limits.get(self._phase, 0.0))

    def connect(self, peer_store: PeerStore) -> None:
        """Where processes tell of themselves when they are stuck, or fail."""
        self._peer_store = peer_store

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase within another one."""
        before = self._phase
        self.enter(name)
        yield  # not left when it fails: this is where it did
        self.enter(before)

    def enter(self, name: str) -> None:
        """Go on to a phase."""
        self._phase = name
        self.beat()

    def step(self, done: int) -> None:
        """So many steps are done."""
        self._step = done
        self.beat()

    def beat(self) -> None:
        """Progress was made."""
        self._beats += 1
        self._tell()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around a collective: outside, this process is at work; inside, it waits for the others."""
        self._collectives += 1
        yield  # not left when it fails: then this process still waits
        self._collectives += 1

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(_ASK_SECONDS)

    def _tell(self) -> None:
        self._status.tell(self.place)

    def _work(self) -> None:
        # Ticks are counted, not seconds: a job that was suspended as a whole, and goes on, is not stuck.
        seen, ticks = -1, 0
        while not self._closed.wait(_TICK):
            beats, limit = self._beats, self._limits.get(self._phase, 0.0)
            ticks = ticks + 1 if beats == seen else 0
            seen = beats
            idle = ticks * _TICK
            if idle and idle % _ASK_SECONDS == 0:
                self._leave_with_peer()
            if limit and idle >= limit / 2:
                self._publish()
            if limit and idle >= limit:
                self._expire(limit)

    def _leave_with_peer(self) -> None:
        """End where this process waits for one that has failed; not in the midst of a save."""
        waits = self._collectives % 2 == 1
        peer = self._peer_store.failed() if waits and self._peer_store is not None else None
        if peer is not None:
            _end(peer)

    def _publish(self) -> None:
        if self._peer_store is not None:
            told = {
                "meetings": self._collectives,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "waits_for": self.waits_for,
            }
            self._peer_store.tell_stuck(self.rank, told)

    def _expire(self, limit: float) -> None:
        place = self.place
        self._dump()
        message = f"no progress for {limit:g} s in phase {place.phase}, step {place.step}: {self._behind()}"
        _end(failure("hang", EXIT_AGAIN, message))

    def _dump(self) -> None:
        """The stacks of all threads, to RUN/stacks/ and to stderr."""
        title = f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}: no progress; all threads:\n"
        print(title, end="", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # stderr may be something without a descriptor
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # What is stuck may be the very file system of the run: it must not hold up the end.
        writing = threading.Thread(target=self._dump_to_file, args=(title,), daemon=True)
        writing.start()
        writing.join(_ASK_SECONDS)

    def _dump_to_file(self, title: str) -> None:
        with contextlib.suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"{time.strftime('%Y%m%dT%H%M%S')}-rank-{self.rank:05d}.txt").open("w") as file:
                file.write(title)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _behind(self) -> str:
        """Which process keeps the others waiting, as far as it can be known."""
        if self._size == 1:
            return "the only process is stuck; see its stacks"
        if self._peer_store is None:
            return behind({}, self._size)
        self._publish()
        time.sleep(_ASK_SECONDS / 2)  # the others' time-outs pass at nearly the same time
        return behind(self._peer_store.all_stuck(self._size), self._size)


def _end(why: Failure) -> NoReturn:
    """End this process, whatever its main thread waits for."""
    if not fail(why):
        print(f"distrain: rank {why.rank}: {why.message}", file=sys.stderr, flush=True)
    os._exit(why.code)


def behind(found: Mapping[int, Mapping[str, Any]], size: int) -> str:
    """A sentence on who keeps the others waiting, from what each said of itself."""
    if not found:
        return "rank 0, which all ask, does not answer (stopped, ended, or its node or link is lost)"
    silent = [other for other in range(size) if other not in found]
    if silent:
        names = ", ".join(str(other) for other in silent[:8]) + (" …" if len(silent) > 8 else "")
        return f"rank {names} is behind: it does not answer (stopped, ended, or its node or link is lost)"
    waiting = [f"rank {other} waits for {entry['waits_for']}" for other, entry in found.items() if entry["waits_for"]]
    if waiting:
        return "; ".join(waiting[:8])
    least = min(entry["meetings"] for entry in found.values())
    late = [other for other, entry in found.items() if entry["meetings"] == least]
    if len(late) == size:
        return "all ranks wait for each other: the link between them is lost, or one is stuck inside a collective"
    who = ", ".join(f"{other} (host {found[other]['host']}, process {found[other]['pid']})" for other in late[:8])
    return f"rank {who} is behind: it has not come to where the others wait; see its stacks"
