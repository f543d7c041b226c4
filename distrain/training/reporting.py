"""The logs of a run: metrics.jsonl, audit, progress and trackers."""

from __future__ import annotations

import dataclasses
import logging

from distrain.config import public
from distrain.errors import AgainError, DataError
from distrain.runs import trackers
from distrain.runs.folder import METRICS
from distrain.runs.logs import JsonLines, Logs, Progress, audit_path
from distrain.training.checkpointing import Checkpointer
from distrain.training.job import Job

log = logging.getLogger("distrain")


def open_logs(job: Job, checkpointer: Checkpointer, step: int, lines: int) -> Logs:
    """Open the logs of a run that has done `step` steps and written `lines` lines of metrics.jsonl."""
    runtime, config = job.runtime, job.config
    audit = JsonLines(audit_path(job.folder, runtime.world.rank)) if config.data.audit else None
    progress = Progress(runtime.is_main, job.total_steps, step)
    mirrors: list[trackers.Tracker] = []
    if config.wandb.mode != "disabled":
        mirrors += _open_wandb(job, lines)
    if not runtime.is_main:
        return Logs(progress, None, mirrors, audit, lambda: None)
    if config.log.tensorboard:
        mirrors.append(trackers.TensorBoardMirror(job.folder, public(config), log.warning, from_step=step))
    for name in dict.fromkeys(config.log.trackers):
        mirrors.append(trackers.open_by_name(name, job.folder, public(config), log.warning))
    metrics = JsonLines(job.folder / METRICS, lines)
    return Logs(progress, metrics, mirrors, audit, checkpointer.check_lease)


def _open_wandb(job: Job, lines: int) -> list[trackers.Tracker]:
    """Open the run at wandb on the main process; with `wandb.nodes=all`, also one for each other node."""
    runtime, settings, config = job.runtime, job.config.wandb, public(job.config)
    mirrors: list[trackers.Tracker] = []
    run = None
    if runtime.is_main:
        try:
            run = trackers.WandbRun.of(settings, job.folder, trackers.wandb_id(job.folder))
        except (OSError, DataError, AgainError) as error:
            log.warning("wandb is off: %s; %s has everything", error, METRICS)
        else:
            mirror = trackers.WandbMirror(run, job.folder, config, log.warning, lines=lines, run=job.folder)
            mirrors.append(mirror)
            run = dataclasses.replace(run, id=mirror.id or run.id)
    if settings.nodes == "all":
        run = runtime.collectives.from_main(run)
        environment = runtime.environment
        if run is not None and environment.local_rank == 0 and not runtime.is_main:
            mirrors.append(trackers.WandbMirror(run.of_node(environment.node), job.folder, config, log.warning))
    return mirrors
