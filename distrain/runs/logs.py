"""The logs of a run: metrics.jsonl, the audit, and progress for people. Trackers copy the metrics."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain import files
from distrain.errors import DataError, FolderLostError
from distrain.progress import Bar
from distrain.runs import records
from distrain.runs.folder import AUDIT, METRICS
from distrain.runs.trackers import CLOSE_SECONDS, FinishedRun, Tracker
from distrain.text import clock, percent

log = logging.getLogger("distrain")

_ABANDON_SECONDS = 5.0
"""Time for each tracker to close when a run was stopped: schedulers may kill after 30 s, and the files are on disk."""


class JsonLines:
    """An append-only file with one JSON object per line.

    Lines that cannot be written, as the disk is full, stay in memory and are written with the next ones. They are lost
    only if the process ends before there is space again; then no checkpoint depends on them either.
    """

    def __init__(self, path: Path, lines: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor = _open(path)
        self._pending: list[bytes] = []
        self._unsynced: list[bytes] = []
        self._synced = os.fstat(self._descriptor).st_size
        self.lines = lines
        """Number of lines in the file and in memory."""

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. It is in the file after `flush`, and on disk after `sync`."""
        self._pending.append(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self.lines += 1

    def flush(self) -> None:
        """Write all pending lines to the file, where readers see them.

        Raises:
            OSError: they could not be written; the file is unchanged, and the lines stay in memory.
        """
        if not self._path.exists():
            self._write_again()
        data = b"".join(self._pending)
        before = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise  # guard: lines-stay-in-memory
        self._unsynced += self._pending
        self._pending.clear()

    def sync(self) -> None:
        """Write all pending lines to disk; call it before a checkpoint that depends on them is committed.

        Raises:
            OSError: they could not be written; they stay in memory.
        """
        self.flush()
        try:
            os.fsync(self._descriptor)
        except OSError:  # NFS and quotas report only here that there is no space
            os.ftruncate(self._descriptor, self._synced)
            self._pending = self._unsynced + self._pending
            self._unsynced = []
            raise
        self._unsynced = []
        self._synced = os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; lines that were not flushed are lost."""
        os.close(self._descriptor)

    def _write_again(self) -> None:
        """Write a file that was deleted once more, with its lines, which the open descriptor still has."""
        with open(os.dup(self._descriptor), "rb") as deleted:
            deleted.seek(0)
            files.replace(self._path, deleted.read())
        os.close(self._descriptor)
        self._descriptor = _open(self._path)
        log.warning("%s: was deleted while the run writes it; its lines are written again", self._path)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def cut_back(run: Path, steps_done: int, metrics_lines: int, batch_size: int = 0) -> tuple[int, list[str]]:
    """Remove the lines of metrics and audit that were written after a checkpoint, and incomplete lines.

    Args:
        run: the run's folder.
        steps_done: steps trained when the checkpoint was saved; audit lines of steps 0 … steps_done - 1 remain.
        metrics_lines: number of lines of metrics.jsonl when it was saved.
        batch_size: samples of a step, to find steps that the audit lacks; 0: the run has no audit.

    Returns:
        The number of lines of metrics.jsonl that remain, and a message for each file that lacks something.

    Raises:
        OSError: a file cannot be read or written.
    """
    messages = []
    lengths = list(map(len, itertools.islice(records.raw_lines(run / METRICS), metrics_lines)))
    _truncate(run / METRICS, sum(lengths))
    missing = metrics_lines - len(lengths)
    if missing:
        messages.append(
            f"{run / METRICS}: {missing} of {metrics_lines} lines are missing that were there when step {steps_done}"
            " was saved; report and trackers will lack them, the training does not need them"
        )
    samples = Counter[int]()
    for path in sorted((run / AUDIT).glob("rank-*.jsonl")):
        _cut_audit(path, steps_done, samples)
    incomplete = [step for step in range(steps_done if batch_size else 0) if samples[step] != batch_size]
    if incomplete:
        messages.append(
            f"{run / AUDIT}: lacks samples of {len(incomplete)} of the {steps_done} steps done, first of step"
            f" {incomplete[0]}: their lines are gone or on other nodes, or data.audit was off; the training does not"
            " need them"
        )
    return len(lengths), messages


def _cut_audit(path: Path, steps_done: int, samples: Counter[int]) -> None:
    """Remove the lines of later steps from a rank's audit; count the samples of each step that remains."""
    end = position = 0
    for raw in records.raw_lines(path):
        position += len(raw)
        try:
            line = records.parse(raw, records.AuditLine, path, "")
        except DataError:  # it stays if good lines follow
            continue
        if line.step >= steps_done:
            break
        samples[line.step] += len(line.ids)
        end = position
    _truncate(path, end)


def _truncate(path: Path, size: int) -> None:
    if not path.exists() or path.stat().st_size == size:
        return
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def audit_path(run: Path, rank: int) -> Path:
    """Return the path of the file where a rank records the ids of its training samples."""
    return run / AUDIT / f"rank-{rank:05d}.jsonl"


_LINE_SECONDS = 5.0
"""Shortest time between two messages about training, or two about evaluations. metrics.jsonl has all values."""


class Progress:
    """Progress for people: a bar and log messages if stderr is a terminal, log messages alone otherwise.

    Args:
        show: false on all processes but the main one: nothing is shown.
        total: steps of the run.
        done: steps trained by earlier attempts.
    """

    def __init__(self, show: bool, total: int, done: int) -> None:
        self._show, self._total = show, total
        self._bar = Bar("train", total=total, done=done, show=show)
        self._train_shown = self._scores_shown = float("-inf")

    def step(self) -> None:
        """Advance the bar by one step."""
        self._bar.update()

    def train(self, step: int, epoch: float, loss: float, lr: float, rate: float, seconds_left: float) -> None:
        """Show the loss since the last call, the learning rate, images per second and the time left."""
        notes = [f"loss {loss:.4f}", f"{rate:,.0f} images/s", f"lr {lr:.3g}"]
        self._bar.notes = notes
        due = step == self._total or time.monotonic() - self._train_shown >= _LINE_SECONDS
        if self._bar.disable and due:
            self._train_shown = time.monotonic()
            self._info([self._position(step), f"epoch {epoch:.2f}", *notes, f"{clock(seconds_left)} left"])

    def scores(self, step: int, split: str, accuracy: float, loss: float) -> None:
        """Show the scores of an evaluation."""
        if step == self._total or time.monotonic() - self._scores_shown >= _LINE_SECONDS:
            self._scores_shown = time.monotonic()
            self._info([self._position(step), f"{split}: accuracy {percent(accuracy)}", f"loss {loss:.4f}"])

    def _position(self, step: int) -> str:
        return f"step {step:,}/{self._total:,}"

    def _info(self, parts: Sequence[str]) -> None:
        if self._show:
            log.info("%s", "  ".join(parts))

    def close(self) -> None:
        """Close the bar; it stays visible."""
        self._bar.close()


@dataclass
class Logs:
    """All logs of one process of a run. Only the main process has metrics; the audit is of each process."""

    progress: Progress
    metrics: JsonLines | None
    trackers: Sequence[Tracker]
    audit: JsonLines | None
    check: Callable[[], None]
    """Raises BusyError or FolderLostError if this process may no longer write in the run's folder."""
    _warned: bool = False

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl, and copy it to the trackers."""
        if self.metrics is not None:
            self.check()
            self.metrics.write({"step": step, **values})
            for tracker in self.trackers:
                tracker.log(values, step)
            try:
                self.metrics.flush()
            except OSError as error:
                if not self._warned:  # only once: a full disk stays full for a while
                    self._warned = True
                    log.warning("%s: %s; lines stay in memory until they can be written", METRICS, error.strerror)

    def result(self, step: int, finished: FinishedRun) -> None:
        """Send the result of the run to the trackers."""
        for tracker in self.trackers:
            tracker.result(finished, step)

    def sync(self) -> None:
        """Write all pending lines to disk.

        Raises:
            OSError: they could not be written.
        """
        for lines in (self.metrics, self.audit):
            if lines is not None:
                lines.sync()

    @contextlib.contextmanager
    def abandoned_on_failure(self) -> Iterator[None]:
        """Close all logs if the block raises.

        Pending lines are dropped: no checkpoint depends on them, and the next attempt writes them again, or is already
        doing so.
        """
        try:
            yield
        except FolderLostError:  # trackers too have files there
            self.progress.close()
            raise
        except BaseException:
            self._end({}, _ABANDON_SECONDS)
            raise

    def close(self, summary: dict[str, Any]) -> None:
        """Write all pending lines and close all logs; the trackers get `summary`.

        Raises:
            OSError: pending lines could not be written.
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
