"""The run's folder: taken, gone on from, saved to. The main process writes; all know how it went."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from distrain import files, models, signals
from distrain.config import public
from distrain.errors import EXIT_AGAIN, BusyError, ConfigError, DataError
from distrain.failures import fail, failure_of
from distrain.runs import attempts, checkpoint, logs
from distrain.runs.checkpoint import Saved
from distrain.runs.folder import CONFIG, METRICS, RESULT
from distrain.runs.logs import Logs
from distrain.training import optim
from distrain.training.job import Job, State

_FOLLOWED = "weights."
"""Of the model that is trained, in optimizer.safetensors, where model.safetensors holds their average."""


def resume(job: Job) -> None:
    """Go on from the newest readable checkpoint, or start fresh: the main process decides for all."""
    rt = job.runtime
    path = rt.from_main(rt.all_or_none(lambda: _take_folder(job) if rt.is_main else None))
    if path is not None:
        _restore(job, path)
    if job.lease is not None:
        job.lease.note(from_step=job.state.step, world_size=rt.world.size)


def _take_folder(job: Job) -> Path | None:
    """The checkpoint to go on from; the folder is this job's alone, and cut back to that checkpoint."""
    saved = _choose(job)
    try:
        job.run.mkdir(parents=True, exist_ok=True)
        seen = checkpoint.steps(job.checkpoints)
        wait, say = job.config.run.wait_seconds, lambda line: print(line, flush=True)
        job.lease = attempts.acquire(job.run, wait, say, signals.requested)
        job.lease.keep(_leave_to_another)
        if checkpoint.steps(job.checkpoints) != seen:
            saved = _choose(job)  # another job was still at work here
        _say_and_clear(job, saved)
        done, lines = (saved.step, saved.state["lines"]) if saved is not None else (0, 0)
        checkpoint.sweep(job.checkpoints)
        logs.cut_back(job.run, done, lines)
        files.replace(job.run / CONFIG, yaml.safe_dump(public(job.config), sort_keys=False))
    except OSError as error:
        raise ConfigError(f"run.dir={job.run}: cannot be written: {error.strerror}; choose another folder") from error
    return saved.path if saved is not None else None


def _leave_to_another(error: BusyError) -> None:
    """Another job has taken the folder over: this one must not write another byte."""
    if not fail(failure_of(error)):
        print(f"distrain: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_AGAIN)


def _choose(job: Job) -> Saved | None:
    mode = job.config.run.resume
    if job.run.exists() and not job.run.is_dir():
        raise ConfigError(f"run.dir={job.run}: is a file; choose another folder")
    if not holds_run(job.run):
        if mode == "must":
            raise DataError(f"run.resume=must: {job.run} holds no run to go on from")
        return None
    if mode == "never":
        raise ConfigError(
            f"{job.run}: already holds a run; go on with it by run.resume=auto, or choose another run.dir"
        )
    saved, skipped = checkpoint.newest(job.checkpoints)
    for line in skipped:
        print(f"warning: skipped {line}", file=sys.stderr)
    if saved is None:
        if skipped or mode == "must":
            raise DataError(f"{job.run}: has no readable checkpoint to go on from; choose another run.dir")
        if (job.run / RESULT).exists() or any(entry.get("from_step") for entry in attempts.history(job.run)):
            raise DataError(f"{job.run}: its checkpoints are gone; bring them back, or choose another run.dir")
        return None
    differ = checkpoint.differences(saved.state["identity"], job.identity)
    if differ:
        cure = "set that back to go on with it, or choose another run.dir"
        if any(line.startswith(("train.epochs:", "train.max_steps:")) for line in differ):
            weights = saved.path / checkpoint.MODEL
            cure += f"; to train for longer, begin a run with its weights: another run.dir, and model.init={weights}"
        raise ConfigError("\n  ".join([f"{saved.path}: belongs to another run, which has", *differ]) + f"\n{cure}")
    return saved


def _say_and_clear(job: Job, saved: Saved | None) -> None:
    """Say what the run starts from, and clear newer checkpoints, all damaged: they would stand in the way."""
    if saved is None:
        nothing = "has no checkpoint yet; starting from the beginning" if holds_run(job.run) else "a new run"
        print(f"{job.run}: {nothing}", flush=True)
        return
    for step in checkpoint.steps(job.checkpoints):
        if step > saved.step:
            checkpoint.set_aside(checkpoint.path_of(job.checkpoints, step))
    print(f"{job.run}: going on from {saved.path.name}", flush=True)


def holds_run(run: Path) -> bool:
    """Whether a folder has anything of a run in it that would be lost: a step logged, a checkpoint, a result."""
    metrics = run / METRICS
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (run / RESULT).exists() or bool(checkpoint.steps(run / checkpoint.FOLDER))


def _restore(job: Job, path: Path) -> None:
    """Every process loads the checkpoint; if one cannot, all leave together."""
    saved = job.runtime.all_or_none(lambda: _load_into(job, path))
    tensors = saved.optimizer
    if job.average is not None:  # the weights that it follows lie beside the optimizer's memory of them
        following = {name: tensors.pop(_FOLLOWED + name) for name in saved.model}
        job.module.load_state_dict(following)
        job.average.n_averaged.fill_(saved.step)
    optim.load_state_tensors(job.optimizer, tensors)
    job.runtime.load_scaler_state(saved.state["scaler"])
    job.state = State(**{name: saved.state[name] for name in State.__dataclass_fields__})
    job.saved_step = saved.step


def _load_into(job: Job, path: Path) -> Saved:
    saved = checkpoint.load(path)
    models.load(job.scored, saved.model, job.config.model.name, path)
    return saved


def save(job: Job, logs: Logs, why: str) -> None:
    """Commit a checkpoint of this step. What it counts on, on every process, is on disk before.

    A save that fails (no space, no permission) is told and leaves everything as it was: the run goes on, and the next
    one is tried. `Job.save_problem` says so on all processes.
    """
    if job.saved_step == job.state.step:
        return
    rt = job.runtime
    with rt.watch.phase("save"):
        job.check_lease()
        rt.agree()  # not before the main process has seen that the folder is still this job's
        problem = os_error_of(logs.sync)
        if not any(rt.agree(problem is not None).flags) and rt.is_main:
            problem = os_error_of(lambda: _write(job, logs, why))
        problems = [line for line in rt.from_all(problem) if line]
    job.save_problem = problems[0] if problems else None
    if not problems:
        job.saved_step = job.state.step
    elif rt.is_main:
        logs.progress.warn(f"step {job.state.step}: no checkpoint could be saved: {problems[0]}; training goes on")
    job.saved_at = time.monotonic()
    job.next_poll = job.state.step


def os_error_of(action: Callable[[], object]) -> str | None:
    """What an action that writes failed with."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or 'disk'}: {error.strerror}"
    return None


def _write(job: Job, logs: Logs, why: str) -> None:
    job.check_lease()  # once more: syncing may have taken long
    state = {
        **vars(job.state),
        "lines": logs.metrics.lines if logs.metrics is not None else 0,
        "seconds": job.elapsed,
        "why": why,
        "identity": job.identity,
        "scaler": job.runtime.scaler_state,
        "epoch": job.state.step // job.order.steps_per_epoch,
        "world_size": job.runtime.world.size,
        "cpu_threads": job.config.run.cpu_threads,
    }
    tensors = optim.state_tensors(job.optimizer)
    if job.average is not None:
        tensors |= {_FOLLOWED + name: value for name, value in job.module.state_dict().items()}
    checkpoint.save(job.checkpoints, job.state.step, job.scored.state_dict(), tensors, state)
    best = job.state.best["step"] if job.state.best else None
    settings = job.config.checkpoint
    try:
        checkpoint.prune(job.checkpoints, settings.keep, settings.keep_every, best)
    except OSError as error:  # the new one stands: an old one that stays is not worth more than a word
        logs.progress.warn(f"{error.filename}: an old checkpoint cannot be deleted: {error.strerror}")
