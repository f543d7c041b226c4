"""Worker processes for `distrain prepare`. Unlike with a bare pool, it is known what a worker did when it died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from distrain.errors import AgainError, CrashedError
from distrain.text import printable

Task = TypeVar("Task")
Result = TypeVar("Result")

_NONE = -1
_IDLE_SECONDS = 0.5

_KILLED_BY = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
"""Signals that come from outside: from the kernel when memory runs out, from a person, from a scheduler."""


class WorkerDiedError(Exception):
    """A worker process ended before its work was done.

    Attributes:
        exit_code: its exit code, as of `multiprocessing`: −9 after SIGKILL; None if it is not known.
        progress: number of its task and what it last reported in it; None if it had none.
    """

    def __init__(self, exit_code: int | None, progress: tuple[int, int] | None) -> None:
        super().__init__(exit_code, progress)
        self.exit_code, self.progress = exit_code, progress

    def explained(self, what: str | None, remains: str) -> Exception:
        """Return the error that the user sees: one who killed a worker can be asked to stop, a crash will come again.

        Args:
            what: name of what the worker read; None: not known.
            remains: what is left on the disk.
        """
        where = f" while it read {printable(what)}" if what else ""
        if self.exit_code is None or -self.exit_code in _KILLED_BY:
            name = "" if self.exit_code is None else f" by {signal.Signals(-self.exit_code).name}"
            return AgainError(
                f"a worker process was killed{name}{where}; {remains}. If memory ran out, use a machine with more"
                " of it, or fewer cores (taskset); run the same command again"
            )
        how = signal.Signals(-self.exit_code).name if self.exit_code < 0 else f"exit code {self.exit_code}"
        return CrashedError(f"a worker process crashed ({how}){where}; {remains}. Repair or delete what it read")


def run(
    function: Callable[[Any, Task, Callable[[int], None]], Result],
    shared: Any,
    tasks: Sequence[Task],
    workers: int,
    idle: Callable[[list[int]], None] | None = None,
) -> Iterator[Result]:
    """Yield `function(shared, task, report)` for each task, in order. The calls run in worker processes.

    Args:
        function: a function of a module. It may call `report(n)` to record what it is doing.
        shared: an object that is sent to each worker once.
        tasks: the tasks.
        workers: number of processes.
        idle: is called now and then while a result is awaited, with what the tasks in progress have reported.

    Raises:
        WorkerDiedError: a worker was killed, or crashed.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    started, progress = context.Value("q", 0), context.RawArray("q", [_NONE] * 3 * workers)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start, (function, shared, os.getpid(), started, progress))
    processes: list[Any] = []
    complete = False
    try:
        futures = [pool.submit(_work, numbered) for numbered in enumerate(tasks)]
        processes = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for future in futures:
                while idle is not None and not wait([future], _IDLE_SECONDS).done:
                    idle([report for task, report in zip(progress[1::3], progress[2::3], strict=True) if task != _NONE])
                yield future.result()
        except BrokenProcessPool:
            raise _death(processes, progress) from None
        complete = True
    finally:
        if not complete:  # a task may take minutes
            for process in processes:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _death(processes: Sequence[Any], progress: Sequence[int]) -> WorkerDiedError:
    """Find the process that died first: the pool ends the others by SIGTERM."""
    for process in processes:
        process.join(10)
    ended = [process for process in processes if process.exitcode is not None]
    if not ended:
        return WorkerDiedError(None, None)
    first = next((process for process in ended if process.exitcode != -signal.SIGTERM), ended[0])
    for pid, task, report in zip(progress[::3], progress[1::3], progress[2::3], strict=True):
        if pid == first.pid and task != _NONE:
            return WorkerDiedError(first.exitcode, (task, report))
    return WorkerDiedError(first.exitcode, None)


_function: Callable[[Any, Any, Callable[[int], None]], Any]
_shared: Any
_progress: Any
_slot: int
"""The number of this worker process, times the fields of `_progress` for each."""


def _start(function: Any, shared: Any, parent: int, started: Any, progress: Any) -> None:
    global _function, _shared, _progress, _slot  # noqa: PLW0603 - the initializer of a pool can only set globals
    _function, _shared, _progress = function, shared, progress
    with started.get_lock():
        _slot = 3 * started.value
        started.value += 1
    progress[_slot] = os.getpid()
    if "torch" in sys.modules:  # one process per core; and OpenMP's threads of the parent do not exist here
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler would be an exception in the source's code

    def exit_with_parent() -> None:  # a parent that is killed by SIGKILL cannot end its workers
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(numbered_task: tuple[int, Any]) -> Any:
    number, task = numbered_task
    _progress[_slot + 1 : _slot + 3] = [number, _NONE]
    result = _function(_shared, task, _report)
    _progress[_slot + 1] = _NONE
    return result


def _report(value: int) -> None:
    _progress[_slot + 2] = value
