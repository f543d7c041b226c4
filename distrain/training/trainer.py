"""The run: `fit` trains; after each step it logs, evaluates, saves and leaves. `finish` scores the test split."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import torch

from distrain import files, machine, signals
from distrain.config import Config, from_tree, load, public
from distrain.data.stream import TrainingBatches
from distrain.distributed.runtime import POLL_SECONDS, StopAgreed
from distrain.errors import DataError, DivergedError, SaveError, Stopped
from distrain.runs import checkpoint, trackers
from distrain.runs.folder import METRICS, RESULT, TRACE
from distrain.runs.logs import JsonLines, Logs, Progress, audit_path
from distrain.training import augment, evaluation, pictures, profiling, setup
from distrain.training.checkpointing import os_error_of, save
from distrain.training.evaluation import Scores
from distrain.training.job import Job
from distrain.training.step import Feed, train_step
from distrain.training.summary import tell_end

_MOST_STEPS_UNASKED = 256
"""Steps between two questions whether to stop, at most."""


def train(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Train, evaluate and save a run; the same as `distrain train`.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are stop requests while it runs.

    Args:
        config: a `Config`, nested mappings of its keys, or the path of a YAML file.

    Returns:
        What is in RUN/result.json.

    Raises:
        UserError: configuration, data or sources cannot be used, or the loss diverged.
        AgainError: stopped on request, or a peer was lost; called again, it goes on.
        PeerFailedError: another process failed, and left word why.
        SaveError: the run's last checkpoint could not be saved.
    """
    started = time.monotonic()
    if isinstance(config, Mapping):
        config = from_tree(config)
    elif not isinstance(config, Config):
        config = load(Path(config))
    with (
        signals.noted(),
        closing(setup.watch(config)) as watchdog,
        setup.start_runtime(config, watchdog) as rt,
        closing(setup.set_up(config, started, rt)) as job,
    ):
        return _run(job)


def _run(job: Job) -> dict[str, Any]:
    logs = _open_logs(job)
    with logs.abandoned_on_failure():
        try:
            fit(job, logs)
            result = finish(job, logs)
        except StopAgreed as stop:
            _leave(job, logs, stop)
        except DataError:
            # All processes are here, between two steps: what was trained since the last checkpoint is not lost.
            _keep(job, logs, "data")
            raise
    job.runtime.watch.enter("end")
    problem = os_error_of(lambda: logs.close(trackers.numbers(result))) or job.save_problem
    if problem is not None:
        raise SaveError(f"the end of the run could not be saved: {problem}")
    return result


def fit(job: Job, logs: Logs) -> None:
    """Train the steps that are left."""
    config, state = job.config, job.state
    batches = TrainingBatches(
        job.dataset,
        job.order,
        job.runtime.world,
        range(state.step, job.total_steps),
        config.data.read_ahead,
        with_random_bits=augment.draws(config.augment),
        pin=job.runtime.device.type == "cuda",
        cache=job.cache,
    )
    first = state.step
    job.runtime.watch.enter("first step")
    job.runtime.watch.step(first)
    job.next_poll = job.polled_step = first
    job.polled = time.monotonic()
    job.saved_at = job.clock = time.monotonic()
    feed = Feed(batches, job.runtime.device)
    trace = profiling.traced(job.run / TRACE, config.profile.steps, job.runtime.world.rank)
    begins_round = True  # for this attempt's thread, whatever the step
    with closing(batches), trace as tracer:
        while True:
            _after_step(job, logs)
            if state.step == job.total_steps:
                return
            with job.profile.phase("data" if state.step > first else "start"):
                if begins_round:
                    _await_data(job, batches)
                batch = feed.take()
            if logs.audit is not None:
                with job.profile.phase("log"):
                    epoch = state.step // job.order.steps_per_epoch
                    logs.audit.write({"step": state.step, "epoch": epoch, "ids": batch.ids.tolist()})
            if state.step == 0 and job.runtime.is_main:
                _try_pictures(logs, functools.partial(pictures.save_augmented, job, batch))
            job.losses.append(train_step(job, batch))
            begins_round = job.order.begins_round(state.step + 1)
            if state.step + 1 < job.total_steps and not begins_round:
                feed.copy_ahead()
            state.step += 1
            logs.progress.step()
            if state.step == first + 1:
                job.runtime.watch.enter("train")
            job.runtime.watch.step(state.step)
            if tracer is not None:
                tracer.step()


def _after_step(job: Job, logs: Logs) -> None:
    """Log, evaluate and save what is due after the steps done, and has not been done: a resumed run comes here too.

    Raises:
        StopAgreed: one process was asked to stop, and all know.
    """
    config, state = job.config, job.state
    last = state.step == job.total_steps
    eval_every = config.eval.every_steps if config.eval.every_steps is not None else job.order.steps_per_epoch
    # Where there is no val, `finish` scores test after the last step.
    evaluates = "val" in job.dataset.manifest.splits if last else _due(state.step, eval_every)
    saves = (last and state.step > 0) or _due(state.step, config.checkpoint.every_steps)
    by_clock = _poll(job) if state.step >= job.next_poll else False
    logs_now = (evaluates or saves or _due(state.step, config.log.every_steps)) and state.logged < state.step
    if not (logs_now or evaluates or saves or by_clock):
        return
    _fold(job)  # nothing is evaluated or saved before the loss is known to be finite
    if logs_now:
        _log_train(job, logs)
    if evaluates or saves or by_clock:
        _check_weights(job)
    best = state.best
    if evaluates and state.evaluated < state.step and _evaluate(job, logs):
        saves = True
    if saves or by_clock:
        save(job, logs, "last" if last else "interval")
        if job.saved_step != state.step:
            state.best = best  # one that was not saved cannot be gone back to
    job.clock = time.monotonic()


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _poll(job: Job) -> bool:
    """Meet: does anyone want to stop, is a checkpoint due by the main process's clock, and when to meet next.

    Asking costs a collective, so it is done a few times a second, not at every step.
    """
    now = time.monotonic()
    minutes = job.config.checkpoint.every_minutes
    due = bool(job.runtime.is_main and minutes and job.state.step and now - job.saved_at >= 60 * minutes)
    steps = job.state.step - job.polled_step
    fitting = int(POLL_SECONDS * steps / max(now - job.polled, 1e-6))
    # At most twice as long as before: a first step, or a few quick ones, say little about those to come.
    interval = max(1, min(fitting, 2 * (job.next_poll - job.polled_step), _MOST_STEPS_UNASKED))
    agreed = job.runtime.agree(due, main=interval)
    if agreed.stop:
        raise StopAgreed
    job.polled_step, job.polled = job.state.step, time.monotonic()
    job.next_poll = job.state.step + agreed.main
    return agreed.flags[0] > 0


def _await_data(job: Job, batches: TrainingBatches) -> None:
    """Wait, between two steps and together, until every process has its data of the round that begins.

    Raises:
        StopAgreed: one process was asked to stop, and all know.
        DataError: on all processes, where one cannot read its shards.
    """
    rt = job.runtime
    while True:
        ready, problem = False, None
        shards_read = batches.shards_read
        try:
            ready = batches.ready(job.state.step, POLL_SECONDS)
        except DataError as error:
            problem = error
        rt.watch.waits_for = None if ready else "its data"
        if not rt.still_busy(not ready, batches.shards_read > shards_read, problem):
            return


def _leave(job: Job, logs: Logs, stop: StopAgreed) -> NoReturn:
    """Save, and leave with the others.

    Raises:
        Stopped: saved, or there was nothing to save.
        SaveError: the steps since the last checkpoint are lost.
    """
    if job.state.step == 0:
        raise Stopped(f"stopped{stop.by} before the first step; nothing had to be saved")
    _keep(job, logs, checkpoint.STOP)
    job.runtime.watch.enter("end")
    if job.save_problem is not None:
        raise SaveError(f"stopped{stop.by} at step {job.state.step}, but it could not be saved: {job.save_problem}")
    raise Stopped(f"stopped{stop.by}: step {job.state.step} is saved; the same command goes on from there")


def _keep(job: Job, logs: Logs, why: str) -> None:
    """A checkpoint that no interval asked for, of weights that are good."""
    if job.state.step and job.saved_step != job.state.step and not job.holds_best:
        _fold(job)
        _check_weights(job)
        save(job, logs, why)


def _fold(job: Job) -> None:
    """Take the losses since the last time, over all ranks, into the state.

    Raises:
        DivergedError: on every rank, naming the first step whose loss is not finite.
    """
    state = job.state
    if not job.losses:
        return
    sums = job.runtime.sum(torch.stack(job.losses)).tolist()
    job.losses.clear()
    for number, value in enumerate(sums, state.step - len(sums)):
        if not math.isfinite(value):
            raise _diverged(job, number, f"the loss is {value / job.config.train.global_batch_size}")
        state.loss_sum += value
    seconds = time.monotonic() - job.clock
    state.loss_steps += len(sums)
    state.loss_seconds += seconds
    state.train_seconds += seconds
    job.clock = time.monotonic()


def _check_weights(job: Job) -> None:
    """The last update is seen by no loss yet: nothing is saved or scored before its weights are known to be finite."""
    if not bool(torch.stack([parameter.isfinite().all() for parameter in job.module.parameters()]).all()):
        raise _diverged(job, job.state.step - 1, "the weights are no longer finite")


def _diverged(job: Job, step: int, what: str) -> DivergedError:
    # The checkpoint of `step` steps done holds the weights that this step failed with.
    good = [done for done in checkpoint.steps(job.checkpoints) if done < max(step, 1)]
    where = checkpoint.path_of(job.checkpoints, good[0]) if good else "none"
    return DivergedError(
        f"{what} at step {step + 1}, at learning rate {job.learning_rate(step):.3g};"
        f" last good checkpoint: {where}. Lower train.lr, or set train.clip_norm"
    )


def _log_train(job: Job, logs: Logs) -> None:
    """One line on the steps since the last one."""
    state, batch = job.state, job.config.train.global_batch_size
    step, steps, seconds = state.step, state.loss_steps, state.loss_seconds
    loss = state.loss_sum / (steps * batch)
    rate = steps * batch / max(seconds, 1e-9)
    lr = job.learning_rate(step - 1)
    epoch = step / job.order.steps_per_epoch
    left = (job.total_steps - step) * seconds / steps
    parts = job.profile.shares(seconds, profiling.reducing(job.ddp))
    state.logged, state.loss_sum, state.loss_steps, state.loss_seconds = step, 0.0, 0, 0.0
    logs.progress.train(step, epoch, loss, lr, rate, left)
    logs.record(
        step,
        {
            "epoch": epoch,
            "train/loss": loss,
            "train/lr": lr,
            "train/images_per_second": rate,
            "seconds": job.elapsed,
            **{f"profile/{name}": round(part, 5) for name, part in parts.items()},
        },
    )


def _evaluate(job: Job, logs: Logs) -> bool:
    """Score val (test where there is no val). Whether it is the best on val so far."""
    split = "val" if "val" in job.dataset.manifest.splits else "test"
    scores = _score(job, split)
    job.state.evaluated = job.state.step
    logs.progress.scores(job.state.step, split, scores.accuracy, scores.loss)
    logs.record(job.state.step, _as_metrics(job, split, scores))
    if split != "val":
        return False
    if job.state.best is not None and scores.accuracy <= job.state.best["accuracy"]:
        return False
    job.state.best = {"step": job.state.step, "accuracy": scores.accuracy}
    return True


def _as_metrics(job: Job, split: str, scores: Scores) -> dict[str, float]:
    return {f"{split}/accuracy": scores.accuracy, f"{split}/loss": scores.loss, "seconds": job.elapsed}


def _score(job: Job, split: str, keep: evaluation.Keep | None = None) -> Scores:
    job.runtime.broadcast_buffers(job.scored)
    size = job.config.eval.batch_size
    return evaluation.evaluate(job.scored, job.dataset, split, job.mean, job.std, size, job.runtime, keep)


def finish(job: Job, logs: Logs) -> dict[str, Any]:
    """Score the test split with the best checkpoint on val, or the last one where there is no val."""
    step = job.state.best["step"] if job.state.best else job.state.step
    if step != job.state.step:
        best = job.runtime.all_or_none(lambda: checkpoint.load(checkpoint.path_of(job.checkpoints, step)))
        job.scored.load_state_dict(best.model)
        job.holds_best = True
    wrong = pictures.Collector()
    scores = _score(job, "test", wrong.add)
    found = wrong.over_all(job.runtime)
    classes = job.dataset.manifest.classes
    order, world = job.order, job.runtime.world
    epochs, parts = job.state.step / order.steps_per_epoch, job.profile.total()
    result = {
        **scores.as_dict(classes),
        "steps": job.state.step,
        "epochs": int(epochs) if epochs.is_integer() else epochs,
        "world_size": world.size,
        "dropped_per_epoch": job.dataset.split("train").samples - order.steps_per_epoch * order.global_batch_size,
        "seconds": job.elapsed,
        "images_per_second": job.state.step * order.global_batch_size / max(job.state.train_seconds, 1e-9),
        "checkpoint": checkpoint.path_of(job.checkpoints, step).name,
        "val_accuracy": job.state.best["accuracy"] if job.state.best else None,
        "precision": job.config.train.precision,
        "device": str(job.runtime.device.type),
        "invariant": not job.dependent,
        "profile": {name: round(part, 5) for name, part in parts.items()},
    }
    logs.record(job.state.step, _as_metrics(job, "test", scores))
    logs.progress.close()
    if job.runtime.is_main:
        text = json.dumps(result, indent=1) + "\n"
        job.save_problem = os_error_of(lambda: files.replace(job.run / RESULT, text)) or job.save_problem
        _try_pictures(logs, lambda: pictures.save_wrong(job.run, found))
        if logs.trackers:
            logs.result(job.state.step, trackers.outcome(job.run, result))
        tell_end(job, scores, result)
    return result


def _try_pictures(logs: Logs, action: Callable[[], None]) -> None:
    """They are for people: whatever goes wrong costs a warning, never the run."""
    try:
        action()
    except Exception as error:
        logs.progress.warn(f"pictures could not be written: {type(error).__name__}: {error}")


def _open_logs(job: Job) -> Logs:
    rt, config = job.runtime, job.config
    audit = JsonLines(audit_path(job.run, rt.world.rank)) if config.data.audit else None
    progress = Progress(rt.is_main, job.total_steps, job.state.step)
    mirrors: list[trackers.Tracker] = []
    if config.wandb.mode != "disabled":
        mirrors += _open_wandb(job)
    if not rt.is_main:
        return Logs(progress, None, mirrors, audit, lambda: None)
    if config.log.tensorboard:
        mirrors.append(trackers.TensorBoardMirror(job.run, public(config), _warn, from_step=job.state.step))
    metrics = JsonLines(job.run / METRICS, job.state.lines)
    return Logs(progress, metrics, mirrors, audit, job.check_lease)


def _open_wandb(job: Job) -> list[trackers.Tracker]:
    """The run at wandb on the main process, and with `wandb.nodes=all` one beside it on every other node."""
    rt, asked = job.runtime, job.config.wandb
    id_ = None
    if rt.is_main:
        try:
            id_ = trackers.wandb_id(job.run)
        except OSError as error:
            _warn(f"wandb is off: {error}; {METRICS} has everything")
    if asked.nodes == "all":
        id_ = rt.from_main(id_)
    node, number = machine.place(rt.world.rank)
    if id_ is None or not (rt.is_main or (asked.nodes == "all" and number == 0)):
        return []
    filed, settings = trackers.WandbRun.of(asked, job.run, id_), public(job.config)
    if rt.is_main:
        return [trackers.WandbMirror(filed, job.run, settings, _warn, lines=job.state.lines)]
    return [trackers.WandbMirror(filed.of_node(node), job.run, settings, _warn)]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
