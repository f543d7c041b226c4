"""Training from Python, and for the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distrain import signals
from distrain.api.result import TrainingResult, of_record
from distrain.config import Config
from distrain.environment import Environment
from distrain.runs.mirror import copy_report
from distrain.training import train as training

log = logging.getLogger("distrain")


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> TrainingResult:
    """Train, evaluate and save a run, and write its report, as `distrain train` does.

        result = distrain.train({"data": {"dir": "data/synthetic"}, "run": {"dir": "runs/first"}})

    A run that was interrupted resumes. In a script that torchrun or accelerate launch starts, each process calls this
    with the same configuration. Messages go to `logging.getLogger("distrain")`, which has no handler of its own.

    While it runs, SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU ask it to save and stop, if this is
    called in the main thread.

    Args:
        config: a `Config`, nested mappings of the keys that `distrain config` prints, or the path of a YAML file.

    Returns:
        The result of the run, on all processes.

    Raises:
        distrain.UserError: the configuration or the data cannot be used, or the loss diverged.
        distrain.Stopped: stopped on request; called again, it resumes.
        distrain.AgainError: a process or a GPU was lost, or another job writes to the folder; called again, it resumes.
        distrain.PeerFailedError: another process failed, and recorded why.
        distrain.SaveError: the run's last checkpoint could not be saved.

    Where another process has failed and this one does not detect it within seconds, because it waits for a GPU or for
    code of the user, the process is ended with the exit code of the other one: no `except` or `finally` runs.
    """
    resolved = Config.load(config)
    return with_report(resolved, train_run(resolved))


def train_run(config: Config) -> TrainingResult:
    """Train, evaluate and save a run; the first half of `train`."""
    content = training.train(config, Environment.read(os.environ))
    return of_record(TrainingResult, content, run=Path(config.run.dir), split="test")


def with_report(config: Config, result: TrainingResult) -> TrainingResult:
    """Write the report of a finished run, in its main process; the second half of `train`.

    Errors here never change the run, and a stop request ends the report only.
    """
    is_main = dist.get_rank() == 0 if dist.is_initialized() else Environment.read(os.environ).is_main
    if not (config.log.report and is_main):
        return result
    run = result.run
    try:
        with _interrupted_by_stop_requests():
            from distrain.tools import report

            page = report.write([run])
            copy_report(config)
            return replace(result, report=page)
    except KeyboardInterrupt:
        problem = "stopped"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    log.warning("no report was written: %s; `distrain report %s` tries again", problem, run)
    return result


@contextlib.contextmanager
def _interrupted_by_stop_requests() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block for a stop request, also for one of the last steps."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with signals.handled_by(interrupt):
        if signals.requested():
            interrupt()
        yield
