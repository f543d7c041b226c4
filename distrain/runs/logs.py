"""What a run writes down: metrics.jsonl (the truth), the audit, progress for people; trackers copy the metrics."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distrain.runs.folder import AUDIT, METRICS
from distrain.runs.trackers import CLOSE_SECONDS, Outcome, Tracker

_ABANDON_SECONDS = 5.0
"""For trackers when a run was stopped: schedulers kill after as little as 30 s, and their files are on disk."""


class JsonLines:
    """An append-only file of one JSON object a line.

    Lines that cannot be written (a full disk) are kept, and written with the next ones: nothing is lost unless the
    process ends before there is room again. Then no checkpoint counted on them either.
    """

    def __init__(self, path: Path, lines: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._kept: list[bytes] = []
        self._unsynced: list[bytes] = []
        self._synced = os.fstat(self._descriptor).st_size
        self.lines = lines
        """Lines in the file and kept."""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it is on disk after `sync`."""
        self._kept.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self.lines += 1

    def flush(self) -> None:
        """Let readers see what was written.

        Raises:
            OSError: it could not be written; the file is as it was, the lines are kept.
        """
        data = b"".join(self._kept)
        before = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise  # guard: lines-stay-in-memory
        self._unsynced += self._kept
        self._kept.clear()

    def sync(self) -> None:
        """Put what was written on disk: before the checkpoint that counts on it commits."""
        self.flush()
        try:
            os.fsync(self._descriptor)
        except OSError:  # NFS and quotas say only here that there was no room
            os.ftruncate(self._descriptor, self._synced)
            self._kept = self._unsynced + self._kept
            self._unsynced = []
            raise
        self._unsynced = []
        self._synced = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close; what was not flushed is dropped."""
        os.close(self._descriptor)


def cut_back(run: Path, steps_done: int, metrics_lines: int) -> None:
    """Drop what came after a checkpoint, half-written lines included: of metrics all but the first so many lines, of
    every rank's audit all steps but those done (it names the step trained, 0 … N-1).
    """
    _cut(run / METRICS, lambda number, line: number < metrics_lines)
    for path in sorted((run / AUDIT).glob("rank-*.jsonl")):
        _cut(path, lambda number, line: line["step"] < steps_done)


def _cut(path: Path, keep: Callable[[int, Any], bool]) -> None:
    if not path.exists():
        return
    end = 0
    with path.open("r+b") as file:
        for number, line in enumerate(file):
            try:
                if not line.endswith(b"\n") or not keep(number, json.loads(line)):
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        file.truncate(end)
        os.fsync(file.fileno())


def audit_path(run: Path, rank: int) -> Path:
    """Where a rank writes the ids that it trained on."""
    return run / AUDIT / f"rank-{rank:05d}.jsonl"


_LINE_SECONDS = 5.0
"""Between two lines about training in a log, or two about evaluations, at least: they are read by people.
metrics.jsonl has them all.
"""


class Progress:
    """Progress on the main process: a bar in a terminal, plain lines elsewhere. Silent where `show` is false."""

    def __init__(self, show: bool, total: int, done: int) -> None:
        self._show = show
        self._bar: Any = None
        if show and _has_bar():
            self._bar = tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True)
        self._total = total
        self._told = self._told_scores = float("-inf")

    def step(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def train(self, step: int, epoch: float, loss: float, lr: float, rate: float, seconds_left: float) -> None:
        """Loss since the last call, learning rate, images per second, time left."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2g}, {rate:,.0f} images/s")
        elif step == self._total or time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            self._say(
                f"step {step}/{self._total}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.3g}  "
                f"{rate:,.0f} images/s  {clock(seconds_left)} left"
            )

    def scores(self, step: int, split: str, accuracy: float, loss: float) -> None:
        """What an evaluation found: a line above the bar, if there is one."""
        if step == self._total or time.monotonic() - self._told_scores >= _LINE_SECONDS:
            self._told_scores = time.monotonic()
            self._say(f"step {step}/{self._total}  {split}: accuracy {accuracy:.2%}  loss {loss:.4f}")

    def _say(self, line: str) -> None:
        if self._show:
            tqdm.write(line, file=sys.stdout) if self._bar is not None else print(line, flush=True)

    def warn(self, line: str) -> None:
        """A warning, on stderr."""
        if self._show:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _has_bar() -> bool:
    """Whether stderr is a terminal on which a bar can be seen: some have no columns."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


@dataclass
class Logs:
    """Where a run reports to; on other processes than the main one, only the audit is real."""

    progress: Progress
    metrics: JsonLines | None
    trackers: Sequence[Tracker]
    audit: JsonLines | None
    check: Callable[[], None]
    """Raises where this process may no longer write in the run's folder."""
    _told: bool = False

    def record(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its copies."""
        if self.metrics is not None:
            self.check()
            self.metrics.write({"step": step, **values})
            for tracker in self.trackers:
                tracker.log(values, step)
            try:
                self.metrics.flush()
            except OSError as error:
                if not self._told:  # once: a full disk stays full for a while
                    self._told = True
                    print(f"warning: {METRICS}: {error.strerror}; lines are kept until there is room", file=sys.stderr)

    def result(self, step: int, found: Outcome) -> None:
        """Show trackers what came of the run."""
        for tracker in self.trackers:
            tracker.result(found, step)

    def sync(self) -> None:
        """Put everything on disk.

        Raises:
            OSError: it could not be.
        """
        for lines in (self.metrics, self.audit):
            if lines is not None:
                lines.sync()

    @contextlib.contextmanager
    def abandoned_on_failure(self) -> Iterator[None]:
        """Close everything where the block fails. Lines that no checkpoint counts on are dropped: the next attempt writes
        them again, and may already be doing so.
        """
        try:
            yield
        except BaseException:
            self._end({}, _ABANDON_SECONDS)
            raise

    def close(self, summary: dict[str, Any]) -> None:
        """Close everything; `summary` goes to trackers.

        Raises:
            OSError: lines that were kept could not be written to the end.
        """
        try:
            self.sync()
        finally:
            self._end(summary)

    def _end(self, summary: dict[str, Any], seconds: float = CLOSE_SECONDS) -> None:
        self.progress.close()
        for lines in (self.metrics, self.audit):
            if lines is not None:
                lines.close()
        for tracker in self.trackers:
            tracker.close(summary, seconds)
