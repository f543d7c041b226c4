"""A copy of a run in an object store (run.mirror), from which it resumes where its folder is lost.

    MIRROR/checkpoints/step-00001234.tar  attempts/000001.json  config.yaml  setup.json  metrics.jsonl  result.json  …

1. A checkpoint is one object, so it is there as a whole or not at all. Its digests are verified when it is downloaded.
   The logs that it counts on are copied before it, and old checkpoints deleted after it.
2. The newest file of attempts/ says which job may write here, as in the run's own folder (`lease`): it is created only
   if there is none of its number. A job that starts takes over at once. One that sees a newer attempt than its own,
   before it sends something or makes it appear, must not write any more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distrain import files
from distrain.config import Config
from distrain.data.fetch import FetchError, FetchOptions, TransientError
from distrain.errors import BusyError, ConfigError, DataError
from distrain.runs import attempts, checkpoint, checkpoint_archive, folder, records
from distrain.runs.checkpoint_archive import OpenCheckpoint
from distrain.runs.object_store import Store, check_conditional_writes, open_store

log = logging.getLogger("distrain")

_COPIED = (folder.METRICS, folder.CONFIG, folder.SETUP, "*-id", "pictures/*", "attempts/*.json")
"""Files of a run that are copied before each checkpoint, if they have changed; the result and the report come last."""
_STATES_READ = 20
"""Number of newest checkpoints whose state is read at the start, to know which of them may be deleted later."""
_ATTEMPT_CURE = "delete it from the mirror"
_CURE = "check the address, and that this user may list, read, write and delete there"


class Mirror:
    """The copy of one run, as one job sees it.

    Args:
        store: where it is.
        config: the run's configuration.
    """

    def __init__(self, store: Store, config: Config) -> None:
        self._store, self._run, self._keep = store, Path(config.run.dir), config.checkpoint
        self._states: dict[int, dict[str, Any]] = {}
        self._attempt = 0
        self._copied: dict[str, tuple[int, int]] = {}

    def __str__(self) -> str:
        return str(self._store)

    # At the start

    def newest_of(self, identity: dict[str, Any]) -> int | None:
        """Return the step of the newest checkpoint whose state can be read; None if there is none.

        Raises:
            ConfigError: it belongs to another run.
            DataError: the store cannot be used, or has checkpoints of which none can be read.
        """
        with self._explained():
            steps = sorted(filter(None, map(_step_of, self._store.names(checkpoint.FOLDER))), reverse=True)
            read = {step: self._read_state(step) for step in steps[:_STATES_READ]}
        self._states = {step: state for step, state in read.items() if state is not None}
        newest = max(self._states, default=None)
        if steps and newest is None:  # guard: no-silent-restart-of-mirror
            raise self._unreadable()
        if newest is None:
            self._check_newest_attempt(checkpoint.digest_of_identity(identity))
        lines = checkpoint.differences(self._states[newest]["identity"], identity) if newest is not None else []
        if lines:
            raise ConfigError(
                "\n  ".join([f"{self}: holds another run, which has", *lines]) + "\nchoose another run.mirror"
            )
        self._states |= {step: {} for step in steps[_STATES_READ:]}
        return newest

    def _check_newest_attempt(self, digest: str) -> None:
        """Check that the newest job here, of which there is no checkpoint, had a run of this identity.

        One in this run's folder may have had another: without a checkpoint, a run may be changed.

        Raises:
            ConfigError: it had another run.
        """
        with self._explained():
            number = max(attempts.numbers_in(self._store.names(attempts.FOLDER)), default=0)
            content = self._store.read(attempts.name_of(number)) if number else None
        if content is None:
            return
        entry = records.parse(content, records.Attempt, self._run / attempts.name_of(number), _ATTEMPT_CURE)
        here = attempts.path_of(self._run, number)
        is_here = here.exists() and entry.token.encode() in here.read_bytes()
        if entry.identity not in (None, digest) and not is_here:
            who = attempts.describe(records.content_of(entry))
            raise ConfigError(f"{self}: holds another run, without a checkpoint yet ({who}); choose another run.mirror")

    def download_attempts(self) -> None:
        """Add the attempts of other machines to the run's folder, which are newer than those there.

        One whose end is not recorded counts as ended: only one job at a time may use a mirror.
        """
        with self._explained():
            known = attempts.newest_attempt(self._run)
            for number in attempts.numbers_in(self._store.names(attempts.FOLDER))[-attempts.MOST_READ :]:
                name = attempts.name_of(number)
                content = self._store.read(name) if number > known else None
                if content is not None:
                    entry = records.content_of(records.parse(content, records.Attempt, Path(name), _ATTEMPT_CURE))
                    entry["ended"] = entry["ended"] or entry["renewed"]
                    (self._run / attempts.FOLDER).mkdir(parents=True, exist_ok=True)
                    attempts.create(attempts.path_of(self._run, number), entry)

    def claim(self, attempt: int) -> None:
        """Make this job the one that writes here, from its file in RUN/attempts.

        Raises:
            BusyError: another job has begun at the same time.
            ConfigError: the store cannot make sure that there is only one.
            DataError: the store cannot be used.
        """
        name, content = attempts.name_of(attempt), attempts.path_of(self._run, attempt).read_bytes()
        with self._explained():
            created = self._store.create(name, content) or self._store.read(name) == content
            self._attempt = attempt
            if not created:
                self._raise_busy(attempt)
            self.check_writer()
            check_conditional_writes(self._store, name, content)
            self._store.abort_uploads(checkpoint.FOLDER)

    def restore(self, on_progress: Callable[[], None]) -> bool:
        """Download the newest readable checkpoint, the best one, and the logs, if RUN has no checkpoint as new.

        Returns:
            Whether it did.

        Args:
            on_progress: called now and then.

        Raises:
            DataError: the store cannot be used, or neither it nor RUN has a readable checkpoint.
            OSError: the run's folder cannot be written.
        """
        checkpoints = self._run / checkpoint.FOLDER
        here = checkpoint.newest_verified(checkpoints) or 0
        mirrored = sorted(self._states, reverse=True)
        try:
            with self._explained():
                if any(self._restore(step, on_progress) for step in mirrored if step > here):
                    return True
        except BaseException:  # a full disk, for example: what is not complete would take more of it
            checkpoint.sweep(checkpoints)
            raise
        if not here and mirrored:
            raise self._unreadable()
        return False

    def _restore(self, step: int, on_progress: Callable[[], None]) -> bool:
        """Download a checkpoint, the best one then, and the logs; return False if the first is not readable."""
        checkpoints = self._run / checkpoint.FOLDER
        work = self._download(step, on_progress)
        if work is None:
            return False
        log.info("%s: has no checkpoint as new; resuming from step %s of %s", self._run, f"{step:,}", self)
        self._download_logs()
        self._download_result(step)
        best = (self._states[step].get("best") or {}).get("step", step)
        if best != step and checkpoint.problem(checkpoint.path_of(checkpoints, best)) is not None:
            best_work = self._download(best, on_progress) if best in self._states else None
            if best_work is not None:
                _commit(best_work, checkpoint.path_of(checkpoints, best))
        _commit(work, checkpoint.path_of(checkpoints, step))  # last: now there is something to resume
        return True

    def _unreadable(self) -> DataError:
        return DataError(f"{self}: has no readable checkpoint to resume from; choose another run.mirror")

    def _read_state(self, step: int) -> dict[str, Any] | None:
        """Return the state of a checkpoint; None, with a warning, if it is not readable."""

        def read(stream: BinaryIO) -> bytes:
            with _retried_if_damaged():
                return checkpoint_archive.read_state(stream)

        name = _name_of(step)
        try:
            raw = self._store.consume(name, read)
            state = records.content_of(records.parse(raw, records.State, Path(name), "an older one is used"))
            if state["step"] != step:
                raise DataError(f"has the name of another step (it is of step {state['step']:,})")
        except (FetchError, DataError) as error:
            if isinstance(error, FetchError) and not error.is_damage:
                raise
            log.warning("skipped %s/%s: %s", self, name, error)
            return None
        return state

    def _download(self, step: int, on_progress: Callable[[], None]) -> Path | None:
        """Download a checkpoint to a temporary folder; None, with a warning, if it is not readable."""
        work = checkpoint.partial_path(self._run / checkpoint.FOLDER, step)

        def extract(stream: BinaryIO) -> None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            with _retried_if_damaged():
                checkpoint_archive.extract(stream, work, on_progress)
            problem = checkpoint.problem(work)
            if problem is not None:  # guard: mirrored-digests
                raise TransientError(problem)

        try:
            self._store.consume(_name_of(step), extract)
        except FetchError as error:
            shutil.rmtree(work, ignore_errors=True)
            if not error.is_damage:
                raise
            log.warning("skipped %s/%s: %s", self, _name_of(step), error)
            self._states.pop(step)
            return None
        return work

    def _download_logs(self) -> None:
        for pattern in _COPIED:
            parent, _, name = pattern.rpartition("/")
            if parent == attempts.FOLDER:
                continue
            names = self._store.names(parent) if "*" in name else [name]
            for each in [each for each in names if Path(each).match(name)]:
                content = self._read_log(f"{parent}/{each}" if parent else each)
                if content is not None:
                    (self._run / parent).mkdir(exist_ok=True)
                    files.replace(self._run / parent / each, content)

    def _download_result(self, step: int) -> None:
        """Download the result if the run ended at this step: else its last steps are trained again."""
        content = self._read_log(folder.RESULT)
        result = _parse_result(content)
        if content is not None and result is not None and result.steps == step:
            files.replace(self._run / folder.RESULT, content)

    def _read_log(self, name: str) -> bytes | None:
        """Return the content of a file that training does not need; None if there is none; a folder is skipped."""
        try:
            return self._store.read(name)
        except FetchError as error:
            if not error.is_damage:
                raise
            log.warning("skipped %s/%s: %s", self, name, error)
            return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FetchError as error:
            problem = error.explained(f"run.mirror={self}", DataError, _CURE)
        else:
            return
        raise problem  # not inside `except`: a traceback would show secrets of the address

    def try_out(self) -> None:
        """Create, list, read and delete an object of a random name, as `distrain doctor` does.

        Raises:
            ConfigError: the store cannot make sure that only one job writes.
            DataError: the store cannot be used.
        """
        name, content = f".distrain-doctor-{uuid.uuid4().hex}", b"written by distrain doctor"
        with self._explained():
            self._store.create(name, content)
            try:
                check_conditional_writes(self._store, name, content)
                self._store.names("")
                if self._store.read(name) != content:
                    raise FetchError("an object that was written cannot be read")
            finally:
                self._store.delete(name)

    # While the run trains

    def check_writer(self) -> None:
        """Check that no newer job writes here; call it before anything is written.

        Raises:
            BusyError: one does.
            FetchError: the store cannot be read, or was emptied.
        """
        numbers = attempts.numbers_in(self._store.names(attempts.FOLDER))
        newest = max(numbers, default=0)
        if newest > self._attempt:  # guard: mirror-taken-over
            self._raise_busy(newest)
        if self._attempt not in numbers:
            raise FetchError(
                "the mirror was emptied or replaced while this job was writing there"
                f" ({attempts.name_of(self._attempt)} is missing); nothing more is written",
                "start the same command again: it copies all again",
            )

    def lacks(self, step: int) -> bool:
        """Whether a checkpoint is not in the store."""
        return step not in self._states

    def put(self, saved: OpenCheckpoint, on_progress: Callable[[int], None]) -> int:
        """Copy a checkpoint; return its bytes.

        Args:
            saved: its files.
            on_progress: called with the number of bytes that are sent.

        Raises:
            BusyError: another job has taken over.
            FetchError: it could not be copied.
        """

        def pieces() -> Iterator[bytes]:
            for piece in saved.archive():
                yield piece
                on_progress(len(piece))

        size = saved.archive_bytes
        self._store.put(_name_of(saved.step), pieces, size, self.check_writer)  # guard: check-before-commit
        self._states[saved.step] = json.loads(saved.state())
        return size

    def put_logs(self) -> None:
        """Copy the logs that have changed; a checkpoint counts on those copied before it."""
        for path in [path for pattern in _COPIED for path in sorted(self._run.glob(pattern))]:
            if not path.name.startswith("."):  # one that is being written, and renamed in a moment
                self.put_file(path)

    def put_result(self) -> None:
        """Copy the result of the run, if there is one, after the checkpoint that it names."""
        path = self._run / folder.RESULT
        result = _parse_result(path.read_bytes() if path.exists() else None)
        if result is not None and _step_of(f"{result.checkpoint}.tar") in self._states:
            self.put_file(path)

    def prune(self, best: int | None) -> None:
        """Delete the checkpoints that are no longer needed, by the rules of the run's folder."""
        for step in checkpoint.superseded(self._states, self._keep.keep, self._keep.keep_every, best):
            self._store.delete(_name_of(step))
            self._states.pop(step)

    def has_result(self, config: Config) -> bool:
        """Whether there is the result of a run with this configuration, and the checkpoint that it names."""
        result = _parse_result(self._store.read(folder.RESULT))
        if result is None or f"{result.checkpoint}.tar" not in self._store.names(checkpoint.FOLDER):
            return False
        return self._store.read(folder.CONFIG) == folder.configuration_text(config).encode()

    def put_file(self, path: Path) -> None:
        """Copy a file if it has changed since it was copied."""
        name = str(path.relative_to(self._run))
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        is_of_other_attempt = path.parent.name == attempts.FOLDER and path != attempts.path_of(self._run, self._attempt)
        if self._copied.get(name) == version or (is_of_other_attempt and name in self._copied):
            return
        content = path.read_bytes()
        self._store.put(name, lambda: [content], len(content), lambda: None)
        self._copied[name] = version

    def _raise_busy(self, attempt: int) -> None:
        content = self._store.read(attempts.name_of(attempt))
        who = attempts.describe(json.loads(content)) if content is not None else f"attempt {attempt}"
        raise BusyError(f"{self}: taken over by another job ({who}); only one job at a time can use a mirror")


def open_mirror(config: Config, stop: threading.Event) -> Mirror | None:
    """Return the mirror of a run; None without run.mirror. Nothing is asked of the store yet.

    Args:
        config: the run's configuration.
        stop: ends all requests when it is set.

    Raises:
        ConfigError: a package that it needs is missing.
    """
    if config.run.mirror is None:
        return None
    options = FetchOptions.of(config.data, cached=False)
    return Mirror(open_store(config.run.mirror, options, stop), config)


def copy_report(config: Config) -> None:
    """Copy the report of a finished run to its mirror, if it has one; a failure is a warning."""
    mirror = open_mirror(config, threading.Event())
    if mirror is None:
        return
    try:
        for path in sorted((Path(config.run.dir) / folder.REPORT).glob("*")):
            mirror.put_file(path)
    except (FetchError, OSError) as error:
        log.warning("%s: the report could not be copied: %s", mirror, error)


def is_done(config: Config) -> bool:
    """Whether a run has a mirror that holds its result, with this configuration; False if that cannot be read."""
    try:
        mirror = open_mirror(config, threading.Event())
        return mirror is not None and mirror.has_result(config)
    except (FetchError, ConfigError):
        return False  # the worker processes report it


def _parse_result(content: bytes | None) -> records.Result | None:
    """Return the content of result.json; None if there is none, or if it is damaged: then the run writes it again."""
    try:
        return records.parse(content, records.Result, Path(folder.RESULT), "") if content is not None else None
    except DataError:
        return None


def _name_of(step: int) -> str:
    return str(checkpoint.path_of(Path(checkpoint.FOLDER), step)) + ".tar"


def _step_of(name: str) -> int | None:
    """Return the step of an object in checkpoints/; None if it is none of ours."""
    digits = name.removeprefix("step-").removesuffix(".tar")
    return int(digits) if digits.isdecimal() and Path(_name_of(int(digits))).name == name else None


@contextlib.contextmanager
def _retried_if_damaged() -> Iterator[None]:
    """Turn a tar file that cannot be read into a failure that is retried: it may be damaged on its way only."""
    try:
        yield
    except tarfile.TarError as error:
        raise TransientError(f"damaged ({error})") from None


def _commit(work: Path, target: Path) -> None:
    """Give a downloaded checkpoint its name; one of this name is damaged, and set aside."""
    if target.exists():
        checkpoint.set_aside(target)
    files.sync(work)
    work.rename(target)
    files.sync(target.parent)
