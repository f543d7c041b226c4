"""`distrain launch`: start this node's processes, forward signals, wait for the save, and tell the scheduler the truth.

Our own, and not torchrun's agent: that one kills whoever is still saving 30 seconds after the first process has left,
turns every exit code into 1, leaves orphans when it is killed, and needs seconds and a GiB for importing torch. Workers
get torchrun's environment variables, and meet at a store on a socket that this process opens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml

from distrain import files, signals
from distrain.config import Config, public
from distrain.errors import EXIT_AGAIN, EXIT_FAULT, EXIT_NEVER_AGAIN, EXIT_OK, PeerLostError
from distrain.failures import Failure, read_failure
from distrain.launcher.cluster import LOCAL, Topology
from distrain.runs import attempts, checkpoint
from distrain.runs.folder import EXIT
from distrain.signals import LAUNCHER, STOP
from distrain.worker_status import FOLDER, STORE_SOCKET, WorkerStatus, read_status

NODES = "nodes"
_LEAVE_SECONDS = 5.0
"""For processes that do not save, after another one failed."""
_WORD_SECONDS = 2 * _LEAVE_SECONDS
"""For other nodes' launchers to tell why their processes ended."""
_HANG_SECONDS = 30.0
"""How much later than a process's own watch this one steps in."""
_TICK = 0.05


@dataclass(frozen=True)
class End:
    """How one process of this node ended."""

    rank: int
    code: int
    """As the system has it: negative for a signal."""
    failure: Failure | None
    place: WorkerStatus
    time: float
    by_launcher: bool


@dataclass(frozen=True)
class Outcome:
    """What the scheduler is told."""

    code: int
    reason: str
    first: End | None
    """The process that failed first, if that is why."""


def judge(ends: Sequence[End], asked: str | None, can_go_on: bool) -> Outcome:  # noqa: PLR0911 - one a verdict
    """The exit code of a node from how its processes ended.

    Args:
        ends: one of each process.
        asked: the signal by which this launcher was asked to stop, if it was.
        can_go_on: a verified checkpoint exists, or nothing that could be lost.
    """
    own = [end for end in sorted(ends, key=lambda end: end.time) if end.code and not end.by_launcher]
    kinds = {end.rank: end.failure.kind if end.failure is not None else None for end in own}
    if not any(end.code for end in ends):
        return Outcome(EXIT_OK, "done", None)
    for end in own:
        if end.code == EXIT_NEVER_AGAIN:
            return Outcome(EXIT_NEVER_AGAIN, _told(end), end)
    for end in own:
        if end.code not in (EXIT_AGAIN, *(-number for number in _ENDED_FROM_OUTSIDE)):
            return Outcome(EXIT_FAULT, _told(end), end)
    killed = [end for end in own if end.code < 0]
    peers = [end for end in own if kinds[end.rank] in ("peer", "hang", "busy")]
    stopped = [end for end in own if kinds[end.rank] == "again"]
    if asked or (stopped and not killed and not peers):
        told = _told(stopped[0]) if stopped else f"stopped by {asked} before anything could be saved"
        if not stopped and not can_go_on:
            return Outcome(EXIT_FAULT, f"{told}; no checkpoint can be read", None)
        return Outcome(EXIT_AGAIN, told, None)
    lost = [*killed, *peers, *ends][0]
    if not can_go_on:
        return Outcome(EXIT_FAULT, f"{_told(lost)}; no checkpoint can be read", lost)
    return Outcome(EXIT_AGAIN, _told(lost), lost)


_ENDED_FROM_OUTSIDE = {signal.SIGKILL, *STOP}
"""Signals that somebody sends: others are a crash of the program itself."""


def _told(end: End) -> str:
    if end.failure is not None:
        return end.failure.message.partition("\n")[0] if end.failure.kind == "fault" else end.failure.message
    if end.code < 0:
        name = signal.Signals(-end.code).name
        memory = " (out of memory, or from outside)" if -end.code == signal.SIGKILL else ""
        return f"rank {end.rank} was ended by {name}{memory} in phase {end.place.phase}, step {end.place.step}"
    return f"rank {end.rank} ended with {end.code} in phase {end.place.phase}, step {end.place.step}"


def launch(
    arguments: Sequence[str],
    config: Config,
    topology: Topology,
    processes: int,
    grace: float,
    logs: Path | None,
) -> Outcome:
    """Run a command of distrain in this node's processes, to the end.

    Args:
        arguments: the command and its arguments.
        config: the run's configuration.
        topology: this node among the others.
        processes: how many to start here.
        grace: seconds from a stop request until processes that still save are killed.
        logs: folder for what ranks other than 0 write, a file each; None: where this process writes.

    Raises:
        ConfigError: the topology cannot be used.
    """
    trains = arguments[0] == "train"
    if topology.nodes > 1 and trains and _is_done(config):
        # A pod that was lost at the very end comes back to find the others gone, for good.
        print(f"{config.run.dir}: the run is done", flush=True)
        return Outcome(EXIT_OK, "the run is done", None)
    book = _Book(config) if trains and topology.node == 0 else None
    if book is not None and book.exhausted is not None:
        return book.close(book.exhausted)
    stops = _Stops()
    with tempfile.TemporaryDirectory(prefix="distrain-launch-") as folder, signals.handled_by(stops.note):
        earlier = signals.requested()  # while this module was imported
        if earlier:
            stops.note(signal.Signals[earlier])
        try:
            if topology.nodes > 1:
                _wait_for_name(topology.host, config.timeouts.start_seconds, stops)
            with _store_socket(topology) as store:
                workers = _Workers(arguments, topology, processes, store, Path(folder), logs)
                ends = workers.wait(stops, grace)
            outcome = judge(ends, stops.first, book is None or book.can_go_on())
        except PeerLostError as error:
            outcome = Outcome(EXIT_AGAIN, str(error), None)
        except OSError as error:
            outcome = Outcome(EXIT_FAULT, f"processes could not be started: {error}", None)
    if trains and topology.node:
        _leave_word(Path(config.run.dir), topology.node, outcome)
    if book is None or _is_busy(outcome.first):
        return outcome
    if outcome.code == EXIT_AGAIN and outcome.first is not None and topology.nodes > 1:
        outcome = book.hear(topology.nodes, outcome)
    return book.close(outcome)


def _is_busy(end: End | None) -> bool:
    """Whether the folder belongs to another job: then nothing is written there."""
    return end is not None and end.failure is not None and end.failure.kind == "busy"


def show(outcome: Outcome) -> str:
    """One screen for people."""
    lines = []
    end = outcome.first
    if end is not None:
        told = end.failure
        if told is not None:  # it may be a peer's, on another node, which this one ended with
            rank, host, phase, step = told.rank, told.host, told.phase, told.step
        else:
            rank, host, phase, step = end.rank, socket.gethostname(), end.place.phase, end.place.step
        if told is None or told.kind != "user" or step:
            lines += [
                f"distrain: rank {rank} failed first",
                f"  host   {host}",
                f"  phase  {phase}, step {step}",
            ]
        elif host != socket.gethostname():
            lines.append(f"distrain: on {host}:")
        if end.failure is not None and end.failure.traceback:
            lines.append(end.failure.traceback.rstrip())
    meaning = {EXIT_OK: "done", EXIT_AGAIN: "run it again", EXIT_NEVER_AGAIN: "not again unchanged"}
    prefix = "" if outcome.code in (EXIT_OK, EXIT_AGAIN) else "error: "
    if outcome.code != EXIT_OK:
        lines.append(f"distrain: {prefix}{outcome.reason}")
        lines.append(f"distrain: exit {outcome.code}: {meaning.get(outcome.code, 'a fault')}")
    return "\n".join(lines)


class _Stops:
    """Stop requests to the launcher, to be forwarded."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.pending: list[int] = []

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """The handler."""
        self.first = self.first or signal.Signals(number).name
        self.pending.append(number)


class _Workers:
    """This node's processes."""

    def __init__(
        self,
        arguments: Sequence[str],
        topology: Topology,
        processes: int,
        store: socket.socket | None,
        folder: Path,
        logs: Path | None,
    ) -> None:
        self._folder = folder
        size = topology.nodes * processes
        port = store.getsockname()[1] if store is not None and not topology.port else topology.port
        group: dict[str, object] = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": processes,
            "GROUP_RANK": topology.node,
            "MASTER_ADDR": topology.host,
            "MASTER_PORT": port,
        }
        common: dict[str, object] = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PYTHONFAULTHANDLER": "1",
            LAUNCHER: os.getpid(),
            FOLDER: folder,
        }
        inherited = {name: value for name, value in os.environ.items() if name not in (*group, "RANK", "LOCAL_RANK")}
        first_rank = topology.node * processes
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._hung: dict[int, tuple[int, float]] = {}
        self._ended_by_launcher: set[int] = set()
        self._aborted: set[int] = set()
        for local in range(processes):
            # One process alone is told of no group: accelerate would make one of it.
            own = {**group, "RANK": first_rank + local, "LOCAL_RANK": local} if size > 1 else {}
            passed: tuple[int, ...] = ()
            if store is not None and first_rank + local == 0 and size > 1:
                passed = (store.fileno(),)
                own[STORE_SOCKET] = store.fileno()
            with _output(logs, first_rank + local) as output:
                self._running[first_rank + local] = subprocess.Popen(
                    [sys.executable, "-m", "distrain", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT if output is not None else None,
                    env={**inherited, **{name: str(value) for name, value in {**common, **own}.items()}},
                    pass_fds=passed,
                )

    def wait(self, stops: _Stops, grace: float) -> list[End]:
        """Until all have ended; those that stay behind when others have failed, or after the grace, are killed."""
        ends: list[End] = []
        asked_at = left_at = None
        now, looked = 0.0, time.monotonic()
        while self._running:
            # Not the clock: a job that was suspended as a whole, and goes on, has not used up its time.
            now, looked = now + min(time.monotonic() - looked, 1.0), time.monotonic()
            while stops.pending:
                number = stops.pending.pop(0)
                asked_at = now if asked_at is None else asked_at
                self._send(self._running, number)
            ends += self._collect()
            if left_at is None and any(end.code for end in ends):
                left_at = now
            if asked_at is not None and now - asked_at > grace:
                self._kill(self._running)
            if left_at is not None:
                # Who still saves may, unless somebody waited for that too long already.
                hung = any(end.failure is not None and end.failure.kind == "hang" for end in ends)
                if hung and now - left_at > _LEAVE_SECONDS / 2:
                    self._abort(self._running)
                for rank in list(self._running):
                    saves = self._place(rank).phase in ("save", "end") and not hung
                    if now - left_at > (max(grace, _LEAVE_SECONDS) if saves else _LEAVE_SECONDS):
                        self._kill([rank])
            self._end_hung(now)
            time.sleep(_TICK)
        return ends

    def _collect(self) -> list[End]:
        found = []
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[rank]
                by_launcher = rank in self._ended_by_launcher | self._aborted
                failure = read_failure(self._folder, rank)
                when = failure.time if failure is not None else time.time()
                found.append(End(rank, code, failure, self._place(rank), when, by_launcher))
        return found

    def _end_hung(self, now: float) -> None:
        """A process whose own watch cannot run (it never lets go of the interpreter) writes its stacks on SIGABRT."""
        for rank in list(self._running):
            place = self._place(rank)
            beats, since = self._hung.get(rank, (-1, now))
            if place.beats != beats or not place.limit:
                self._hung[rank] = (place.beats, now)
            elif now - since > place.limit + _HANG_SECONDS:
                self._send([rank], signal.SIGABRT)
                self._hung[rank] = (place.beats, now)

    def _abort(self, ranks: Iterable[int]) -> None:
        """Python's fault handler writes the stacks on SIGABRT, even of a process that holds the interpreter."""
        for rank in list(ranks):
            if rank not in self._aborted:
                self._aborted.add(rank)
                self._send([rank], signal.SIGABRT)

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            if rank not in self._ended_by_launcher:
                self._ended_by_launcher.add(rank)
                self._send([rank], signal.SIGKILL)

    def _send(self, ranks: Iterable[int], number: int) -> None:
        for rank in list(ranks):
            with contextlib.suppress(ProcessLookupError):
                self._running[rank].send_signal(number)

    def _place(self, rank: int) -> WorkerStatus:
        return read_status(self._folder, rank)


class _Book:
    """RUN/exit.json: how this attempt ended, and how many ended without progress before it."""

    def __init__(self, config: Config) -> None:
        self._run, self._most = Path(config.run.dir), config.launch.max_attempts_without_progress
        self._resume = config.run.resume
        self._checkpoints = self._run / checkpoint.FOLDER
        self._before = read_exit(self._run)
        self._attempt = attempts.newest_attempt(self._run)
        # Attempts are counted by leases: a launch that ended before it had one leaves their number as it is.
        self._launch = int(self._before.get("launch", 0)) + 1
        self._words_before = [read_exit(path.parent, path.name) for path in (self._run / NODES).glob("*.json")]
        self._step = self._before.get("step") or 0
        self._idle = int(self._before.get("attempts_without_progress", 0))
        if self._run.is_dir() and attempts.owner(self._run) is None:
            step = checkpoint.newest_verified(self._checkpoints)
            if (
                self._before.get("code", 0) is None
            ):  # a launcher that was killed: it could not say how its attempt ended
                self._idle = 0 if (step or 0) > self._step else self._idle + 1
            self._step = step or 0
            self._write({"code": None, "reason": "running", "step": step, "attempt": self._attempt + 1})

    @property
    def exhausted(self) -> Outcome | None:
        """Set where launchers were killed again and again, before they could count."""
        reason = f"{self._idle} attempts in a row without progress (launch.max_attempts_without_progress), killed without a word"
        return Outcome(EXIT_FAULT, reason, None) if self._idle >= self._most else None

    def hear(self, nodes: int, outcome: Outcome) -> Outcome:
        """A peer was lost: if it crashed, only its own node's launcher knows, which leaves word in RUN/nodes."""
        deadline = time.monotonic() + _WORD_SECONDS
        while True:
            told = [read_exit(self._run / NODES, f"{node:05d}.json") for node in range(1, nodes)]
            new = [word for word in told if word and word not in self._words_before]
            for word in new:
                if word["code"] not in (EXIT_OK, EXIT_AGAIN):
                    return Outcome(int(word["code"]), f"{word['host']}: {word['reason']}", outcome.first)
            if len(new) == nodes - 1 or time.monotonic() > deadline:
                return outcome
            time.sleep(0.2)

    def can_go_on(self) -> bool:
        """Whether the next attempt finds a verified checkpoint, or nothing at all."""
        if not checkpoint.steps(self._checkpoints):
            return True
        return self._newest_at_end is not None and self._resume != "never"

    def close(self, outcome: Outcome) -> Outcome:
        """Write down an outcome; too many attempts without progress turn `run it again` into a fault."""
        step = self._newest_at_end
        idle = 0 if (step or 0) > self._step or outcome.code == EXIT_OK else self._idle + 1
        if outcome.code == EXIT_AGAIN and idle >= self._most:
            reason = (
                f"{idle} attempts in a row without progress (launch.max_attempts_without_progress); {outcome.reason}"
            )
            outcome = Outcome(EXIT_FAULT, reason, outcome.first)
        if (self._run.is_dir() or outcome.code == EXIT_AGAIN) and attempts.owner(self._run) is None:
            attempt = max(attempts.newest_attempt(self._run), self._attempt + 1)
            idle = idle if outcome.code == EXIT_AGAIN else 0  # after a fault, a person looks and starts anew
            self._write(
                {
                    "code": outcome.code,
                    "reason": outcome.reason,
                    "step": step,
                    "attempt": attempt,
                    "attempts_without_progress": idle,
                }
            )
        return outcome

    @functools.cached_property
    def _newest_at_end(self) -> int | None:
        """Once: to verify a checkpoint is to read all of it."""
        return checkpoint.newest_verified(self._checkpoints)

    def _write(self, content: dict[str, object]) -> None:
        kept = {"launch": self._launch, "attempts_without_progress": self._idle}
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            files.replace(self._run / EXIT, json.dumps({**kept, **content}, indent=1) + "\n")
        except OSError as error:
            print(f"warning: {self._run / EXIT}: cannot be written: {error.strerror}", file=sys.stderr)


def _is_done(config: Config) -> bool:
    """Whether the run ended well, with this configuration."""
    run = Path(config.run.dir)
    try:
        done = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return read_exit(run).get("code") == EXIT_OK and bool(done == public(config))


def _leave_word(run: Path, node: int, outcome: Outcome) -> None:
    """How another node than the first one ended, for the first one's launcher; where there is a run at all."""
    if not run.is_dir():
        return
    word = {"code": outcome.code, "reason": outcome.reason, "host": socket.gethostname(), "time": time.time()}
    with contextlib.suppress(OSError):
        (run / NODES).mkdir(exist_ok=True)
        files.replace(run / NODES / f"{node:05d}.json", json.dumps(word, indent=1) + "\n")


def read_exit(folder: Path, name: str = EXIT) -> dict[str, Any]:
    """RUN/exit.json, or a file like it; empty where there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _output(logs: Path | None, rank: int) -> Iterator[IO[bytes] | None]:
    """Where a rank writes; None: where the launcher does, as rank 0 always does."""
    if logs is None or rank == 0:
        yield None
        return
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"rank-{rank:05d}.log").open("ab") as file:
        yield file


def default_processes() -> int:
    """One for each GPU of this node; one where there is none."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return max(1, int(found)) if found.isdigit() else 1


@contextlib.contextmanager
def _store_socket(topology: Topology) -> Iterator[socket.socket | None]:
    """On the first node, the socket at which rank 0 will serve the store: the port cannot be taken in between."""
    if topology.node:
        yield None
        return
    try:
        address = (LOCAL, topology.port) if topology.nodes == 1 else ("", topology.port)
        listening = socket.create_server(address, backlog=4096)
    except OSError as error:
        # The attempt before may still hold it for a moment: another time it may be free.
        raise PeerLostError(f"port {topology.port} cannot be had: {error.strerror}; or give another --port") from error
    with listening:
        yield listening


def _wait_for_name(host: str, seconds: float, stops: _Stops) -> None:
    """Until the first node's name is known: pods start in any order.

    Raises:
        PeerLostError: not within `seconds`, or asked to stop.
    """
    start = told = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            now = time.monotonic()
            if now - start > seconds or stops.first:
                why = f"stopped by {stops.first}" if stops.first else f"waited {seconds:g} s"
                raise PeerLostError(
                    f"the first node's name, {host}, cannot be found ({error.strerror}; {why}): has its pod or node"
                    " started, and does its headless Service publish addresses that are not ready?"
                ) from error
            if now - told > 15:
                told = now
                print(f"distrain: waiting for the name {host}: {error.strerror}", file=sys.stderr, flush=True)
            time.sleep(0.5)


def describe(topology: Topology, processes: int) -> str:
    """What is about to start, in one line."""
    where = f", collective at {topology.host}:{topology.port}" if topology.nodes > 1 else ""
    return f"distrain: node {topology.node} of {topology.nodes} ({topology.source}), {processes} processes here{where}"
