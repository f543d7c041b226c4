"""The run's folder: taken by one job, resumed from, saved to. Rank 0 writes; all processes know the result.

A save stops the training only while rank 0 copies weights and optimizer. A thread of rank 0 writes the copy; there is
one such save at a time. Collectives, and decisions for all processes, stay in the main threads: `complete` tells all of
them how the save ended.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from distrain import address, files, models, signals, startup
from distrain.distributed.numerics import differences
from distrain.errors import EXIT_OK, BusyError, ConfigError, DataError, FolderLostError, Stopped
from distrain.failure_report import failure_of, report_failure
from distrain.models.weight_files import CLASSES
from distrain.runs import attempts, checkpoint, lease, logs, origin, records
from distrain.runs import folder as run_folder
from distrain.runs.checkpoint import Checkpoint
from distrain.runs.folder import METRICS, RESULT
from distrain.runs.lease import Lease
from distrain.runs.logs import Logs
from distrain.runs.mirror import Mirror, open_mirror
from distrain.runs.mirror_copier import Copier
from distrain.training import optimizer_state
from distrain.training.background_save import BackgroundSave, HostBuffers
from distrain.training.job import IMAGE_DECODER, TRAINED_WEIGHTS, Job

log = logging.getLogger("distrain")


class Checkpointer:
    """Resumes a run and saves its checkpoints; holds the lease on its folder, on rank 0, in its `with` block."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lease: Lease | None = None
        self._lines = 0
        self._copier: Copier | None = None
        self._stop_copies = threading.Event()
        self._saved_at = time.monotonic()
        self._buffers = HostBuffers()
        self._save: BackgroundSave | None = None
        self.pending_step: int | None = None
        """Step whose checkpoint is being written, or whose outcome is not known to all yet; None without one."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is known to be whole."""
        self.error: str | None = None
        """Why the newest save failed; None if it did not."""
        self.finished = False
        """Whether training is over, and the model holds the weights of the best checkpoint: nothing is saved then."""

    def resume(self) -> dict[str, Any]:
        """Take the folder, and load the newest readable checkpoint; rank 0 decides for all.

        Returns:
            The state in the checkpoint (state.json); empty for a new run.

        Raises:
            UserError, AgainError: on all processes: the folder cannot be used, or another job writes in it.
        """
        collectives, is_main = self._job.runtime.collectives, self._job.runtime.is_main
        path = collectives.from_main(collectives.all_or_none(lambda: self._take_folder() if is_main else None))
        # Lines of metrics.jsonl may be missing: those to come are counted from what is there.
        state = {**self._restore(path), "lines": self._lines} if path is not None else {}
        if self._lease is not None:
            from_step, world_size = state.get("step", 0), self._job.runtime.world.size
            before = round(max(self._lease.started - self._job.started, 0.0), 3)
            self._lease.note(from_step=from_step, world_size=world_size, startup_seconds=before, **origin.describe())
        return state

    def start_clock(self) -> None:
        """Count `checkpoint.every_minutes` from now on."""
        self._saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due by the clock of rank 0; false on all others."""
        minutes = self._job.config.checkpoint.every_minutes
        due = minutes and step and time.monotonic() - self._saved_at >= 60 * minutes
        return bool(self._job.runtime.is_main and due)

    def save(self, step: int, state: dict[str, Any], best_step: int | None, logs: Logs, why: str) -> None:
        """Begin to save a checkpoint after `step` steps; no other one may be pending.

        The logs that it counts on are on disk before, on every process. A thread of rank 0 writes the checkpoint, as it
        is now, while training continues; `complete` waits for it. If it cannot begin (no space, no memory), this is
        logged and changes nothing: the next save is tried. `error` then says why on all processes.
        """
        assert self.pending_step is None
        collectives, is_main = self._job.runtime.collectives, self._job.runtime.is_main
        with self._job.runtime.watchdog.phase("save"):
            self.check_lease()
            collectives.agree()  # not before rank 0 has seen that the folder is still this job's
            error = os_error_of(logs.sync)
            if not any(collectives.agree(error is not None).flags) and is_main:
                error = os_error_of(lambda: self._begin(step, state, best_step, why))
            errors = [each for each in collectives.from_all(error) if each]
        self.start_clock()
        if errors:
            self._note_outcome(step, errors[0])
        else:
            self.pending_step = step

    @property
    def is_written(self) -> bool:
        """Whether the pending checkpoint is written, or has failed: `complete` would not wait. False on other ranks."""
        return self._save is not None and not self._save.is_running

    def complete(self) -> bool:
        """Wait for the pending checkpoint, and agree on its outcome; a collective.

        Returns:
            Whether the checkpoint is whole. If not, `error` says why on all processes.
        """
        assert self.pending_step is not None
        step, self.pending_step = self.pending_step, None
        save, self._save = self._save, None
        with self._job.runtime.watchdog.phase("save"):
            error = os_error_of(save.result) if save is not None else None  # guard: failed-save
            self._job.runtime.watchdog.saving(None)
            self._note_outcome(step, self._job.runtime.collectives.from_main(error))
        return self.error is None

    def write_result(self, result: dict[str, Any]) -> None:
        """Write RUN/result.json; `error` says why if it fails."""
        self.check_lease()
        path, text = self._job.folder / RESULT, records.to_json(result)
        self.error = os_error_of(lambda: files.replace(path, text)) or self.error

    def load_best(self, step: int) -> None:
        """Load the weights of an earlier checkpoint into the eval model; nothing is saved from then on."""
        path = checkpoint.path_of(self._job.checkpoints, step)
        collectives, is_main = self._job.runtime.collectives, self._job.runtime.is_main
        best = collectives.all_or_none(lambda: checkpoint.load(path) if is_main else None)
        weights = collectives.tensors_from_main(best.model if best is not None else {})
        self._job.model.eval_model.load_state_dict(weights)
        self.finished = True

    def finish_copies(self, seconds: float, is_stopped: bool = False) -> str | None:
        """Wait until the mirror of the run has all that is saved; rank 0 alone has one.

        Args:
            seconds: longest wait after a stop request.
            is_stopped: whether a stop was requested; one that comes later counts too.

        Returns:
            Why it is not complete, or None.
        """
        if self._copier is None:
            return None
        watchdog = self._job.runtime.watchdog
        with watchdog.phase("save"):
            problem = self._copier.finish(
                watchdog.heartbeat, lambda: is_stopped or signals.requested() is not None, seconds
            )
        return f"{self._job.folder} has everything, but its mirror does not: {problem}" if problem else None

    def check_lease(self) -> None:
        """Check, before anything is written in the run's folder, that it is still this job's.

        Raises:
            BusyError: another job has taken it over.
            FolderLostError: it was removed, moved or replaced.
        """
        if self._lease is not None:
            with self._job.runtime.collectives.fail_alone():
                self._lease.check()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Complete the pending checkpoint, release the lease, and record in this attempt's file how it ended."""
        self._complete_alone()  # guard: completes-pending-save
        if self._copier is not None:
            self._copier.close()
        if self._lease is not None:
            failure = self._job.runtime.failure_of(error) if error is not None else None
            self._lease.release(*((failure.code, failure.message) if failure is not None else (EXIT_OK, "done")))

    def _take_folder(self) -> Path | None:
        """Take the folder and cut it back to the checkpoint to resume; return that checkpoint's path."""
        job, folder = self._job, self._job.folder
        mirror = open_mirror(job.config, self._stop_copies)
        try:
            saved = _choose(job, mirror.newest_of(job.identity) if mirror is not None else None)
            folder.mkdir(parents=True, exist_ok=True)
            seen = checkpoint.steps(job.checkpoints)
            if mirror is not None:
                mirror.download_attempts()
            self._lease = lease.acquire(folder, job.config.run.wait_seconds, log.info, signals.requested)
            self._lease.renew_in_background(self._exit_with_lost_lease)
            if mirror is not None:
                self._lease.note(identity=checkpoint.digest_of_identity(job.identity))
            restored = mirror is not None and self._restore_from(mirror, self._lease.attempt)
            if checkpoint.steps(job.checkpoints) != seen or restored:  # guard: choose-again
                saved = _choose(job)  # another job was still writing here
            _log_start(job, saved)
            if saved is not None:
                _set_aside_newer(job, saved)
            checkpoint.sweep(job.checkpoints)  # guard: sweep-partial-saves
            self._cut_back(saved)  # guard: cut-back-logs
            run_folder.write_configuration(folder, job.config)
            if mirror is not None:
                self._copier = Copier(mirror, job.checkpoints, self._exit_with_lost_lease, self._stop_copies)
                self._copier.copy(*_steps_of(saved))
        except OSError as error:
            where = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
            raise ConfigError(
                f"run.dir={folder}: cannot be written: {where}{error.strerror}; choose another folder"
            ) from error
        return saved.path if saved is not None else None

    def _restore_from(self, mirror: Mirror, attempt: int) -> bool:
        """Take the mirror of the run; return whether a newer checkpoint was downloaded from it."""
        mirror.claim(attempt)
        startup.waits_for(f"what {mirror} has of the run")

        def on_progress() -> None:
            self._job.runtime.watchdog.heartbeat()
            if signals.requested() is not None:
                raise Stopped(f"stopped{signals.requested_by()} while it read {mirror}; nothing had to be saved")

        return mirror.restore(on_progress)

    def _cut_back(self, saved: Checkpoint | None) -> None:
        """Cut the logs back to the checkpoint to resume; log what they lack."""
        job = self._job
        step, lines = (saved.step, saved.state["lines"]) if saved is not None else (0, 0)
        batch_size = job.order.global_batch_size if job.config.data.audit else 0
        self._lines, messages = logs.cut_back(job.folder, step, lines, batch_size)
        for message in messages:
            log.warning("%s", message)

    def _exit_with_lost_lease(self, error: BusyError | FolderLostError) -> None:
        """End this process at once: the folder is no longer this job's, and not another byte may be written."""
        environment = self._job.runtime.environment
        failure = failure_of(error, environment)
        if not report_failure(failure, environment):
            log.error("%s", error)
        if isinstance(error, FolderLostError):
            self._job.runtime.collectives.abandon(failure)
        os._exit(error.exit_code)

    def _restore(self, path: Path) -> dict[str, Any]:
        """Load the checkpoint on rank 0, and give all processes its content; if one cannot use it, all raise the error.

        So only rank 0 needs the run's folder.
        """
        job, model = self._job, self._job.model
        collectives, is_main = job.runtime.collectives, job.runtime.is_main
        saved = collectives.all_or_none(lambda: checkpoint.load(path) if is_main else None)
        state: dict[str, Any] = collectives.from_main(saved.state if saved is not None else None)
        weights = collectives.tensors_from_main(saved.model if saved is not None else {})
        tensors = collectives.tensors_from_main(saved.optimizer if saved is not None else {})
        collectives.all_or_none(lambda: models.load(model.eval_model, weights, job.config.model.name, path))
        if model.ema is not None:
            model.module.load_state_dict({name: tensors.pop(TRAINED_WEIGHTS + name) for name in weights})
            model.ema.updates = state["step"]
        optimizer_state.load_state_tensors(model.optimizer, model.module, tensors)
        job.runtime.load_scaler_state(state["scaler"])
        self.saved_step = state["step"]
        self._warn_of_other_bits(path, state["bits"])
        return state

    def _warn_of_other_bits(self, path: Path, before: dict[str, str]) -> None:
        """Warn where this attempt computes with other software or hardware than the one that saved the checkpoint."""
        if not self._job.runtime.is_main:
            return
        now = self._job.what_decides_bits
        if self._job.config.train.virtual_ranks is None:  # only the pixels of batches do not depend on rounding
            before, now = ({key: each[key] for key in (IMAGE_DECODER,) if key in each} for each in (before, now))
        changed = differences(before, now)
        if changed:
            changes = "; ".join(f"{name} {new}, before {old}" for name, old, new in changed)
            log.warning(
                "%s was saved with other software or hardware, so the bits of the weights may differ: %s",
                path.name,
                changes,
            )

    def _begin(self, step: int, state: dict[str, Any], best_step: int | None, why: str) -> None:
        """Copy what a checkpoint holds, and start the thread that writes it.

        Raises:
            OSError: there is no memory for the copy.
        """
        job = self._job
        state = {
            **copy.deepcopy(state),
            "why": why,
            "identity": job.identity,
            "scaler": job.runtime.scaler_state,
            "epoch": int(job.epoch(step)),
            "world_size": job.runtime.world.size,
            "cpu_threads": job.config.run.cpu_threads,
            "bits": job.what_decides_bits,
        }
        weights, tensors = self._buffers.copy(job.model.checkpoint_tensors())
        self._save = BackgroundSave(step, lambda: self._write(step, weights, tensors, state, best_step))
        job.runtime.watchdog.saving(self._save)

    def _write(
        self, step: int, weights: dict[str, Tensor], tensors: dict[str, Tensor], state: dict[str, Any], best: int | None
    ) -> None:
        """Write a checkpoint, let it be copied to the mirror, and delete old ones; in the thread: no collectives."""
        folder, settings = self._job.checkpoints, self._job.config.checkpoint
        metadata = {CLASSES: json.dumps(self._job.dataset.manifest.classes)}
        checkpoint.save(folder, step, weights, tensors, state, metadata, self._check_lease_of_thread)
        if self._copier is not None:
            self._copier.copy(step, best)
        try:
            checkpoint.prune(folder, settings.keep, settings.keep_every, best)
        except OSError as error:  # the new checkpoint is committed: an old one that remains is worth a warning only
            log.warning("%s: an old checkpoint cannot be deleted: %s", error.filename, error.strerror)

    def _check_lease_of_thread(self) -> None:
        """End this process if the run's folder is no longer this job's: writing may have taken long."""
        try:
            if self._lease is not None:
                self._lease.check()
        except (BusyError, FolderLostError) as error:
            self._exit_with_lost_lease(error)

    def _note_outcome(self, step: int, error: str | None) -> None:
        """Note, on all processes, how a save ended."""
        self.error = error
        if error is None:
            self.saved_step = step
        elif self._job.runtime.is_main:
            log.warning("step %s: no checkpoint could be saved: %s; training continues", f"{step:,}", error)

    def _complete_alone(self) -> None:
        """Wait for the pending checkpoint when an error ends this process: its steps would be lost with it."""
        save, self._save = self._save, None
        if save is None:
            return
        while not save.wait(1.0):
            self._job.runtime.watchdog.heartbeat()  # it bounds the save itself
        try:
            error = os_error_of(save.result)
        except BaseException:  # the lease must be released all the same
            log.exception("step %s: no checkpoint could be saved", f"{save.step:,}")
        else:
            if error is not None:
                log.warning("step %s: no checkpoint could be saved: %s", f"{save.step:,}", error)


def os_error_of(action: Callable[[], object]) -> str | None:
    """Run `action`; return its OSError as text, or None."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or 'disk'}: {error.strerror}"
    return None


def holds_run(folder: Path) -> bool:
    """Whether a folder holds something of a run that would be lost: a logged step, a checkpoint, a result."""
    metrics = folder / METRICS
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (folder / RESULT).exists() or bool(checkpoint.steps(folder / checkpoint.FOLDER))


def _choose(job: Job, mirrored: int | None = None) -> Checkpoint | None:
    """Choose the checkpoint in the run's folder to resume; None to start a run.

    Args:
        job: the run.
        mirrored: step of the newest checkpoint in the run's mirror, before that is downloaded; then the folder needs
            none.
    """
    mode, folder = job.config.run.resume, job.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir={folder}: is a file; choose another folder")
    foreign = run_folder.foreign(folder)
    if foreign is not None:
        raise ConfigError(
            f"{foreign}: was not written by this version of distrain, and would be overwritten; choose another run.dir,"
            " or move it away"
        )
    if mirrored is not None and mode == "never":
        where = address.without_secrets(str(job.config.run.mirror))
        cure = "choose another run.mirror" + (" and run.dir" if holds_run(folder) else "")
        raise ConfigError(f"{where}: already holds a run; {cure}")
    if not holds_run(folder):
        if mode == "must" and mirrored is None:
            raise DataError(f"run.resume=must: {folder} holds no run to resume")
        return None
    if mode == "never":
        raise ConfigError(f"{folder}: already holds a run; resume it with run.resume=auto, or choose another run.dir")
    renamed = checkpoint.renamed(job.checkpoints)
    if renamed:
        raise DataError("\n  ".join([f"{folder}: checkpoints have wrong names:", *renamed.values()]))
    saved, skipped = checkpoint.newest(job.checkpoints)
    for line in skipped:
        log.warning("skipped %s", line)
    if saved is None:
        if mirrored is not None:
            return None
        if skipped or mode == "must":  # guard: no-silent-restart
            raise DataError(f"{folder}: has no readable checkpoint to resume from; choose another run.dir")
        if (folder / RESULT).exists() or any(entry.get("from_step") for entry in attempts.history(folder)):
            raise DataError(f"{folder}: its checkpoints are gone; bring them back, or choose another run.dir")
        return None
    _check_identity(job, saved)
    return saved


def _steps_of(saved: Checkpoint | None) -> tuple[int | None, int | None]:
    """Return the step of a checkpoint and that of the best one then."""
    return (saved.step, (saved.state["best"] or {}).get("step")) if saved is not None else (None, None)


def _check_identity(job: Job, saved: Checkpoint) -> None:
    lines = checkpoint.differences(saved.state["identity"], job.identity)
    if not lines:
        return
    cure = "set that back to resume it, or choose another run.dir"
    if any(line.startswith(("train.epochs:", "train.max_steps:")) for line in lines):
        weights = saved.path / checkpoint.MODEL
        cure += f"; to train for longer, begin a run with its weights: another run.dir, and model.init={weights}"
    raise ConfigError("\n  ".join([f"{saved.path}: belongs to another run, which has", *lines]) + f"\n{cure}")


def _log_start(job: Job, saved: Checkpoint | None) -> None:
    if saved is not None:
        log.info("%s: resuming from %s", job.folder, saved.path.name)
    elif holds_run(job.folder):
        log.info("%s: has no checkpoint yet; starting from the beginning", job.folder)
    else:
        log.info("%s: a new run", job.folder)


def _set_aside_newer(job: Job, saved: Checkpoint) -> None:
    """Move newer checkpoints, all damaged, out of the way of those to come."""
    for step in checkpoint.steps(job.checkpoints):
        if step > saved.step:
            checkpoint.set_aside(checkpoint.path_of(job.checkpoints, step))
