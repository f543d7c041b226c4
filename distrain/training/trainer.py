"""The training loop: `Trainer.fit` trains the steps; after each one it logs, evaluates and saves what is due."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, NoReturn

from distrain import startup
from distrain.data.cache import Cache
from distrain.data.decoded import DecodedBatches
from distrain.data.decoding import Bad
from distrain.data.encoded import EncodedCache
from distrain.data.rounds import Batch
from distrain.data.stream import TrainingBatches
from distrain.distributed.collectives import StopAgreed
from distrain.errors import DataError, DivergedError, SaveError, Stopped, UnreadableImagesError
from distrain.models.mirror_average import as_evaluated
from distrain.runs import attempts, checkpoint, goodput, trackers
from distrain.runs.folder import TRACE
from distrain.text import plural
from distrain.training import augment, digests, evaluation, health, inputs, pictures, profiling
from distrain.training.checkpointing import Checkpointer, os_error_of
from distrain.training.digests import TrainedIds
from distrain.training.evaluation import Scores
from distrain.training.feed import Feed
from distrain.training.job import Job
from distrain.training.meters import LossMeter, check_weights, diverged, peak_memory_of_all, with_cure
from distrain.training.profiling import Profile
from distrain.training.reporting import open_logs
from distrain.training.step import TrainingStep
from distrain.training.stopping import StopPoll, wait_for_data
from distrain.training.summary import log_result

_EXIT_SECONDS = 10.0
"""Time for the processes to exit, after all is saved."""

log = logging.getLogger("distrain")


class _Due(NamedTuple):
    """Whether an evaluation, a checkpoint and a line of metrics.jsonl are due; a line comes before the others."""

    evaluation: bool
    checkpoint: bool
    line: bool


class Trainer:
    """Trains a run that was set up, to its end or until a stop is requested.

    Args:
        job: what the run works with.
        checkpointer: the run's folder.
        state: state of the checkpoint that is resumed (`state_dict`); empty for a new run.
    """

    def __init__(self, job: Job, checkpointer: Checkpointer, state: dict[str, Any]) -> None:
        self.job, self.checkpointer = job, checkpointer
        self.step: int = state.get("step", 0)
        self.evaluated_step: int = state.get("evaluated_step", 0)
        self.best: dict[str, Any] | None = state.get("best")
        self._saved_best = self.best
        """The best step so far as the newest whole checkpoint has it."""
        self._evaluations_since_best: int = state.get("evaluations_since_best", 0)
        self._peak: dict[str, Any] | None = state.get("peak")
        self._collapsed: bool = state.get("collapsed", False)
        self._warnings: list[str] = state.get("warnings", [])
        self._bad: dict[str, str] = state.get("bad", {})
        self._reader: TrainingBatches | DecodedBatches | None = None
        self._seconds_before: float = state.get("seconds", 0.0)
        self.compile_seconds: float = state.get("compile_seconds", 0.0) + job.compile_seconds
        self.losses, self.profile = LossMeter(job), Profile(job.runtime.device)
        if state:
            self.losses.load_state_dict(state["losses"])
        self.ids = TrainedIds(job, state.get("ids", "0"))
        self.stops = StopPoll(job.runtime.collectives, self.step)
        self.train_step = TrainingStep(job, self.profile)
        self.logs = open_logs(job, checkpointer, self.step, state.get("lines", 0))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, beside weights and optimizer, to resume at this step; a collective."""
        return {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "evaluations_since_best": self._evaluations_since_best,
            "peak": self._peak,
            "collapsed": self._collapsed,
            "warnings": self._warnings,
            "bad": self._bad,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "lines": self.logs.metrics.lines if self.logs.metrics is not None else 0,
            "losses": self.losses.state_dict(),
            "ids": self.ids.digest(),
        }

    @property
    def stopped_early(self) -> str | None:
        """Why the run ends before its last step, the same on all processes; None if it does not."""
        number = self.job.config.train.stop_after
        if number is None or self._evaluations_since_best < number or self.step == self.job.total_steps:
            return None
        return f"after {plural(number, 'evaluation')} without a better one on val"

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all attempts, each up to its last checkpoint."""
        return self._seconds_before + time.monotonic() - self.job.started

    def run(self) -> dict[str, Any]:
        """Train to the end, score the test split and return the result; or save and stop.

        Raises:
            Stopped: a stop was requested; everything is saved.
            SaveError: the last steps could not be saved.
            DataError: shards cannot be read; everything before is saved.
        """
        with self.logs.abandoned_on_failure():
            try:
                self.fit()
                result = self.finish()
            except StopAgreed as stop:
                self._stop(stop)
            except DivergedError as divergence:
                self._complete_save()  # it may be the last good checkpoint
                raise with_cure(self.job, divergence) from None
            except UnreadableImagesError:
                raise  # the steps since the last checkpoint were trained with substitutes
            except DataError:
                # All processes are here, between two steps: the steps since the last checkpoint are not lost.
                self._save_before_exit("data")  # guard: save-on-data-error
                self.checkpointer.finish_copies(self._seconds_to_copy, is_stopped=True)
                raise
        self.job.runtime.watchdog.enter("end")
        error = os_error_of(lambda: self.logs.close(trackers.scalars(result))) or self.checkpointer.error
        error = error or self.checkpointer.finish_copies(self._seconds_to_copy)  # guard: mirror-error-at-end
        if self.job.config.run.mirror is not None:  # all exit with the same code: rank 0 alone knows of the mirror
            error = next(filter(None, self.job.runtime.collectives.from_all(error)), None)
        if error is not None:  # guard: save-error-at-end
            raise SaveError(f"the end of the run could not be saved: {error}")
        return result

    @property
    def _seconds_to_copy(self) -> float:
        """Longest wait for the mirror after a stop request: the launcher kills this process after its grace."""
        given = self.job.runtime.environment.grace_seconds
        grace = given if given is not None else self.job.config.launch.grace_seconds
        return max(1.0, grace - _EXIT_SECONDS)

    def fit(self) -> None:
        """Train the steps that are left."""
        job, watchdog, first = self.job, self.job.runtime.watchdog, self.step
        watchdog.enter("first step")
        startup.waits_for("the first step, which reads shards")
        watchdog.step(first)
        self.checkpointer.start_clock()
        self.losses.restart_clock()
        with self._batches() as reader, self._tracer() as tracer:
            busy = job.model.distributed.busy
            wait = partial(wait_for_data, job.runtime, reader, busy)
            feed = Feed(reader, job.order, job.runtime.device, wait, self.profile, busy)
            while True:
                self._log_evaluate_save()
                if self.step == job.total_steps or self.stopped_early:
                    return
                batches = feed.take(self.step)
                if self.step == first:
                    self.losses.restart_clock()  # reading before the first step is not training
                self._record_batches(batches)
                self.losses.add(self.train_step(self.step, batches, self._due(self.step + 1).line))
                self.ids.add(self.step, batches)
                self.step += 1
                if self.step < job.total_steps:
                    feed.prefetch(self.step)
                if self.step == first + 1:
                    watchdog.enter("train")
                    startup.waits_for(None)
                watchdog.step(self.step)
                self.logs.progress.step()
                self.profile.step()
                tracer.step()

    def finish(self) -> dict[str, Any]:
        """Score the test split, with the best checkpoint on val or else the last one; write and return the result."""
        self._complete_save()
        job, step = self.job, self.best["step"] if self.best else self.step
        if step != self.step:
            self.checkpointer.load_best(step)
        collector = pictures.Collector()
        scores = self._score("test", collector.add)
        misclassified = collector.over_all(job.runtime)
        memory, wall_time = peak_memory_of_all(job.runtime), job.runtime.collectives.from_main(self._wall_time())
        job.runtime.leave_peers(is_loss=False)  # a peer that fails now does not take the result away
        self._check_result(scores)
        result = {**self._result(scores, step, memory), **wall_time}
        self._record("test", scores)
        self.logs.progress.close()
        if job.runtime.is_main:
            self.checkpointer.write_result(result)
            self._try_pictures(lambda: pictures.save_misclassified(job.folder, misclassified))
            if self.logs.trackers:
                self.logs.result(self.step, trackers.read_finished(job.folder, result))
            log_result(job, result)
        return result

    @contextlib.contextmanager
    def _batches(self) -> Iterator[TrainingBatches | DecodedBatches]:
        job, steps = self.job, range(self.step, self.job.total_steps)
        what = (job.dataset, job.order, job.virtual_ranks, steps, job.config.data.read_ahead)
        device, cache = job.runtime.device, job.cache
        if job.preprocessing is not None:
            assert not isinstance(cache, Cache)
            self._reader = DecodedBatches(*what, job.preprocessing, device, cache)
        else:
            assert not isinstance(cache, EncodedCache)
            self._reader = TrainingBatches(*what, augment.needs_random_bits(job.config.augment), device, cache)
        with closing(self._reader):
            yield self._reader

    def _tracer(self) -> contextlib.AbstractContextManager[profiling.Tracer]:
        job = self.job
        return profiling.trace(job.folder / TRACE, job.config.profile.steps, job.runtime.world.rank)

    def _log_evaluate_save(self) -> None:
        """Log, evaluate and save what is due after the steps done; a resumed run makes up here for what was missed.

        Raises:
            StopAgreed: on all processes, if one was asked to stop.
        """
        step = self.step
        evaluate, save, write_line = self._due(step)
        by_clock = self.stops.is_due(step) and self._poll()
        if not (write_line or by_clock):
            if self.losses.is_full:
                self._free_memory()
            return
        self._check_images()
        self.losses.read(step)  # nothing is evaluated or saved before the loss is known to be finite
        if write_line and self.losses.logged_step < step:
            self._log(with_digests=evaluate or save)
        if evaluate or save or by_clock:
            check_weights(self.job, step)
        if evaluate and self.evaluated_step < step and self._evaluate():  # guard: evaluation-due
            save = True
        if save or by_clock or self.stopped_early:
            self._save("last" if step == self.job.total_steps else "interval")
        self.losses.restart_clock()

    def _poll(self) -> bool:
        """Agree with the others on stopping; return whether a checkpoint is due by the clock.

        Raises:
            StopAgreed: on all processes, if one was asked to stop.
        """
        checkpointer = self.checkpointer
        is_due, is_written = self.stops.poll(self.step, checkpointer.is_due(self.step), checkpointer.is_written)
        if is_written:
            self._complete_save()
        return is_due

    def _due(self, step: int) -> _Due:
        """Return what is due after `step` steps."""
        config, last = self.job.config, step == self.job.total_steps
        eval_every = config.eval.every_steps if config.eval.every_steps is not None else self.job.order.steps_per_epoch
        # Without a val split, `finish` scores test after the last step.
        evaluate = "val" in self.job.dataset.manifest.splits if last else _is_due(step, eval_every)
        save = (last and step > 0) or _is_due(step, config.checkpoint.every_steps)
        return _Due(evaluate, save, evaluate or save or _is_due(step, config.log.every_steps))

    def _check_images(self) -> None:
        """Record which images of the steps so far could not be decoded; a collective for an index.

        Raises:
            UnreadableImagesError: on all processes, if they are more than allowed. Nothing is saved of these steps.
        """
        if self._reader is not None and self.job.preprocessing is not None:
            self._record_bad("train", inputs.bad_of_all(self.job.runtime.collectives, self._reader))

    def _record_bad(self, split: str, bad: Sequence[Bad]) -> None:
        """Record images that could not be decoded, the same on all processes."""
        job = self.job
        try:
            new = inputs.record_bad(self._bad, job.dataset, split, bad, job.config.data.skip_bad)
        except UnreadableImagesError as error:
            if split == "train":
                raise
            raise DataError(str(error)) from None  # no step was trained with a substitute, so all can be saved
        for name, reason in new.items() if job.runtime.is_main else ():
            log.warning("%s cannot be decoded (%s): %s", name, reason, evaluation.WHAT_INSTEAD)

    def _free_memory(self) -> None:
        """Read losses and write audit lines that would stay in memory until the next save."""
        self.losses.read(self.step)
        if self.logs.audit is not None:
            self.checkpointer.check_lease()
            os_error_of(self.logs.audit.sync)  # lines that cannot be written now stay in memory

    def _log(self, with_digests: bool) -> None:
        """Write a line about the steps since the last one, where they are evaluated or saved with digests."""
        steps_left = self.job.total_steps - self.step
        line = {**self.losses.take_line(self.step, self.profile), "seconds": self.seconds}
        line["train_seconds"] = self.losses.train_time.seconds
        if self.job.compilation.is_on:
            line["compile_seconds"] = self.compile_seconds
        rate = line["train/images_per_second"]
        seconds_left = steps_left * self.job.order.global_batch_size / max(rate, 1e-9)
        self.logs.progress.train(self.step, line["epoch"], line["train/loss"], line["train/lr"], rate, seconds_left)
        if with_digests:
            ids = self.ids.digest()
            line |= {"digests": digests.of_run(self.job, ids)} if self.job.runtime.is_main else {}
        self.logs.record(self.step, line)

    def _evaluate(self) -> bool:
        """Score val, or test without a val split; return whether it is the best on val so far."""
        split = "val" if "val" in self.job.dataset.manifest.splits else "test"
        scores = self._score(split)
        self.evaluated_step = self.step
        self.logs.progress.scores(self.step, split, scores.accuracy, scores.loss)
        self._record(split, scores)
        self._check_accuracy(split, scores)
        if split != "val":
            return False
        self._complete_save()  # if the checkpoint of the best one so far fails, this one is compared with that before
        if self.best is not None and scores.accuracy <= self.best["accuracy"]:
            self._evaluations_since_best += 1
            return False
        self.best, self._evaluations_since_best = {"step": self.step, "accuracy": scores.accuracy}, 0
        return True

    def _check_accuracy(self, split: str, scores: Scores) -> None:
        """Warn where the accuracy on the split that is evaluated during the run falls back to chance."""
        peak = self._peak or {"step": self.step, "accuracy": scores.accuracy}
        before, self._collapsed = self._collapsed, health.has_collapsed(scores.confusion, peak["accuracy"])
        if self._collapsed and not before:
            classes = self.job.dataset.manifest.classes
            self._warnings.append(
                health.collapse_warning(split, self.step, scores.confusion, peak["step"], peak["accuracy"], classes)
            )
            if self.job.runtime.is_main:
                log.warning("%s", self._warnings[-1])
        if scores.accuracy >= peak["accuracy"]:
            peak = {"step": self.step, "accuracy": scores.accuracy}
        self._peak = peak

    def _check_result(self, scores: Scores) -> None:
        """Add the warnings about the result on test."""
        peak, has_val = self._peak, "val" in self.job.dataset.manifest.splits
        if not has_val:
            self._check_accuracy("test", scores)
            if peak is not None and health.has_dropped(scores.accuracy, peak["accuracy"], scores.total):
                self._warnings.append(health.drop_warning(scores.accuracy, peak["step"], peak["accuracy"]))
        if not self._collapsed and health.is_near(scores.accuracy, health.chance(scores.confusion), scores.total):
            self._warnings.append(health.chance_warning(scores.confusion))

    def _score(self, split: str, collect: evaluation.Collect | None = None) -> Scores:
        job, model = self.job, self.job.model
        job.runtime.collectives.broadcast_buffers(model.eval_model)
        evaluated, batch_size = as_evaluated(model.eval_model, job.config.eval.flip), job.config.eval.batch_size
        with job.compilation.suspended():
            scores = evaluation.evaluate(
                evaluated, job.dataset, split, model.mean, model.std, batch_size, job.runtime,
                job.preprocessing, collect,
            )  # fmt: skip
        self._record_bad(split, scores.bad)
        if not math.isfinite(scores.loss):
            raise diverged(job, self.step - 1, f"the loss on {split} is {scores.loss}")
        return scores

    def _record(self, split: str, scores: Scores) -> None:
        self.logs.record(self.step, {**scores.as_line(split), "seconds": self.seconds})

    def _save(self, why: str) -> None:
        """Begin to save this step, unless that was done; an earlier save is completed first."""
        self._complete_save()
        if self.checkpointer.saved_step == self.step:
            return
        best_step = self.best["step"] if self.best else None
        self.checkpointer.save(self.step, self.state_dict(), best_step, self.logs, why)
        if self.checkpointer.pending_step is None:
            self.best = self._saved_best
        self.stops.poll_at(self.step)  # this took long: a stop may have been requested

    def _complete_save(self) -> None:
        """Wait for the pending checkpoint, if there is one, and agree on its outcome."""
        if self.checkpointer.pending_step is None:
            return
        if self.checkpointer.complete():
            self._saved_best = self.best
        else:
            self.best = self._saved_best  # without a checkpoint it could not be loaded at the end

    def _save_before_exit(self, why: str) -> None:
        """Save the steps since the last checkpoint, if their weights are good; wait until it is done."""
        self._complete_save()
        if self.step and self.checkpointer.saved_step != self.step and not self.checkpointer.finished:
            self._check_images()
            self.losses.read(self.step)
            check_weights(self.job, self.step)
            self._save(why)
            self._complete_save()

    def _stop(self, stop: StopAgreed) -> NoReturn:
        """Save, and stop on all processes.

        Raises:
            Stopped: saved, or there was nothing to save.
            SaveError: the steps since the last checkpoint are lost.
        """
        if self.step == 0:
            raise Stopped(f"stopped{stop.by} before the first step; nothing had to be saved")
        self._save_before_exit(checkpoint.STOP)
        self.job.runtime.watchdog.enter("end")
        error = self.checkpointer.error
        if error is None and self.job.config.run.mirror is not None:
            error = self.job.runtime.collectives.from_main(
                self.checkpointer.finish_copies(self._seconds_to_copy, is_stopped=True)
            )
        if error is not None:
            raise SaveError(f"stopped{stop.by} at step {self.step:,}, but it could not be saved: {error}")
        raise Stopped(f"stopped{stop.by}: step {self.step:,} is saved; the same command resumes there")

    def _record_batches(self, batches: list[Batch]) -> None:
        """Record local batches: their ids if `data.audit` is on, and pictures if they are the first of the run."""
        if self.logs.audit is not None:
            with self.profile.phase("log"):
                epoch = self.step // self.job.order.steps_per_epoch
                ids = [each for batch in batches for each in batch.ids.tolist()]
                self.logs.audit.write({"step": self.step, "epoch": epoch, "ids": ids})
        if self.step == 0 and self.job.runtime.is_main:
            self._try_pictures(lambda: pictures.save_augmented(self.job, batches[0]))

    def _try_pictures(self, action: Callable[[], None]) -> None:
        """Save pictures; an error only causes a warning, because training does not depend on them."""
        try:
            action()
        except Exception as error:
            log.warning("pictures could not be written: %s: %s", type(error).__name__, error)

    def _wall_time(self) -> dict[str, float | None]:
        """Return the seconds of all attempts and between them, and the part in steps that counted, on rank 0."""
        if not self.job.runtime.is_main:
            return {}
        try:
            history = attempts.history(self.job.folder)
        except OSError:  # the disk fails now: the scores do not depend on these files
            return {}
        here, seconds = time.monotonic() - self.job.started, self.seconds
        for newest in history[-1:]:  # its file is some seconds old
            newest["seconds"] = here - (newest.get("startup_seconds") or 0.0)
        spent = goodput.measure(self.losses.train_time.seconds, seconds, history)
        return {
            "seconds": seconds,
            "attempt_seconds": spent.attempt_seconds,
            "pause_seconds": spent.pause_seconds,
            "goodput": spent.fraction,
        }

    def _result(self, scores: Scores, best_step: int, memory: dict[str, float | None]) -> dict[str, Any]:
        """Return the content of RUN/result.json."""
        job, order = self.job, self.job.order
        epochs = job.epoch(self.step)
        images, time_used = self.step * order.global_batch_size, self.losses.train_time
        return {
            **scores.as_dict(job.dataset.manifest.classes),
            "steps": self.step,
            "epochs": int(epochs) if epochs.is_integer() else epochs,
            "world_size": job.runtime.world.size,
            "dropped_per_epoch": job.dataset.split("train").samples - order.steps_per_epoch * order.global_batch_size,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "train_seconds": time_used.seconds,
            "images_per_second": images / max(time_used.seconds, 1e-9),
            **job.flops.rates(range(self.step), order.global_batch_size, time_used),
            "checkpoint": checkpoint.path_of(job.checkpoints, best_step).name,
            "val_accuracy": self.best["accuracy"] if self.best else None,
            "train_accuracy": self.losses.accuracy.of_last_epoch(self.step),
            "memory_gib": memory,
            "stopped_early": self.stopped_early,
            "precision": job.config.train.precision,
            "device": str(job.runtime.device.type),
            "dependent_layers": job.dependent_layers,
            "warnings": self._warnings,
            "unreadable": [f"{name}: {reason}" for name, reason in sorted(self._bad.items())],
            "profile": {name: round(part, 5) for name, part in self.profile.total().items()},
        }


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
