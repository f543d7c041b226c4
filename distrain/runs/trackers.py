"""Trackers, which copy a run's metrics to wandb, TensorBoard, MLflow …. metrics.jsonl stays authoritative."""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from distrain import files
from distrain.config import Log, Wandb
from distrain.errors import AgainError, ConfigError, DataError
from distrain.runs import records, results
from distrain.runs.folder import AUGMENTED, METRICS, MISCLASSIFIED, TENSORBOARD, read_lines, read_pictures
from distrain.runs.results import ClassAccuracy, Confusion
from distrain.text import percent, printable

log = logging.getLogger("distrain")

CLOSE_SECONDS = 60.0
_INIT_SECONDS = 30.0
"""Longest wait for wandb's server at the start of a run."""
_MAX_CLASSES = 40
"""Classes of a confusion matrix that fits on a screen: with K classes it has K² cells."""
_MAX_ROWS = 10_000
"""Rows of a table that wandb shows; of more classes those with the lowest accuracies are sent."""
_WANDB_ID, _MLFLOW_ID = "wandb-id", "mlflow-id"
"""Files in a run's folder with its id there."""
_PROJECT = "distrain"
"""Name of the project, or of MLflow's experiment, of all runs."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class FinishedRun:
    """The result of a run that is done, and its images, for a tracker to show."""

    result: dict[str, Any]
    """The content of RUN/result.json."""
    misclassified: dict[str, NDArray[Any]]
    """The arrays of RUN/pictures/misclassified.safetensors; empty if there are none."""
    augmented: dict[str, NDArray[Any]]
    """The arrays of RUN/pictures/augmented.safetensors; empty if there are none."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return list(self.result["accuracy_by_class"])

    def accuracy_by_class(self) -> list[ClassAccuracy]:
        """Return the accuracy of each class, lowest first; classes without samples come last."""
        return results.lowest_first(results.classes_of(self.result))

    def most_confused(self) -> list[int]:
        """Return the classes with the most mistakes, as many as fit on a screen, as labels in ascending order."""
        return Confusion.of_result(self.result).most_confused(_MAX_CLASSES)

    def captioned(self) -> Iterator[tuple[NDArray[Any], str]]:
        """Yield misclassified images uint8 [H, W, C], most confident first, with captions `true → predicted, 87.5%`."""
        columns = ("images", "labels", "predicted", "probabilities")
        arrays = (self.misclassified.get(name, ()) for name in columns)
        for image, label, predicted, probability in zip(*arrays, strict=True):
            yield image, f"{self.classes[label]} → {self.classes[predicted]}, {percent(probability)}"


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a result, but not those of each class and phase: they make a tracker's summary."""
    low, high = result.get("accuracy_interval", (None, None))
    memory = {f"memory/{name}_gib": peak for name, peak in result.get("memory_gib", {}).items()}
    values = {**result, "accuracy_interval/low": low, "accuracy_interval/high": high, **memory}
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def read_finished(run: Path, result: dict[str, Any]) -> FinishedRun:
    """Return the result of a run, with the images from its folder."""
    misclassified = read_pictures(run / MISCLASSIFIED, len(result["accuracy_by_class"]))
    return FinishedRun(result, misclassified, read_pictures(run / AUGMENTED))


class Tracker(abc.ABC):
    """A copy of the metrics. After an error the tracker is off: there is one warning, and the run continues."""

    name: str

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._backend: Any = None
        """The tracker's backend; None: it is off."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Copy one line of metrics.jsonl, without its digests: trackers draw numbers."""
        values = {name: value for name, value in values.items() if name != "digests"}
        self._try(lambda backend: self._log(backend, values, step))

    def result(self, finished: FinishedRun, step: int) -> None:
        """Copy the result of the run and its images."""
        self._try(lambda backend: self._result(backend, finished, step))

    def close(self, summary: dict[str, Any], seconds: float = CLOSE_SECONDS) -> None:
        """Write `summary` and close; wait at most `seconds` for the server or the disk."""
        self._try(lambda backend: self._summarize(backend, summary))
        if self._backend is None:
            return
        finishing = threading.Thread(target=self._try, args=(self._finish,), daemon=True)
        finishing.start()
        finishing.join(seconds)
        if finishing.is_alive():
            self._backend = None  # a later error is not reported
            self._warn(f"{self.name} did not finish within {seconds:g} s; {METRICS} has everything")

    @abc.abstractmethod
    def _log(self, backend: Any, values: dict[str, Any], step: int) -> None: ...

    @abc.abstractmethod
    def _result(self, backend: Any, finished: FinishedRun, step: int) -> None: ...

    @abc.abstractmethod
    def _summarize(self, backend: Any, summary: dict[str, Any]) -> None: ...

    @abc.abstractmethod
    def _finish(self, backend: Any) -> None: ...

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._backend is not None:
            try:
                action(self._backend)
            except Exception as error:
                self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        if self._backend is not None:
            self._backend = None
            self._warn(f"{self.name} is switched off: {error}; {METRICS} has everything")


@dataclass(frozen=True)
class WandbRun:
    """The settings of a run at wandb: the section `wandb` of the configuration with its defaults filled in."""

    mode: Literal["disabled", "offline", "online"]
    project: str
    name: str
    id: str
    group: str | None = None
    job_type: str = "train"

    @classmethod
    def of(cls, settings: Wandb, run: Path, id_: str) -> WandbRun:
        """Return the settings of a run.

        Args:
            settings: section `wandb` of its configuration.
            run: its folder.
            id_: its id at wandb.
        """
        group = settings.group or (id_ if settings.nodes == "all" else None)
        return cls(settings.mode, settings.project, settings.name or run.resolve().name, id_, group, settings.job_type)

    def of_node(self, node: int) -> WandbRun:
        """Return the settings for the system metrics of another node than the first, which are a run of their own."""
        return replace(self, name=f"{self.name}-node-{node}", id=f"{self.id}-node-{node}", job_type="node")


_ID_CURE = "delete it, and the run gets a new id"


def wandb_id(run: Path) -> str:
    """Return the id in RUN/wandb-id, which is created if it is missing: all attempts of a run are one run at wandb.

    A copy of a run's folder is another run, and gets an id of its own; a folder that was moved keeps its id.

    Raises:
        DataError: the file is damaged.
        OSError: the file cannot be written.
    """
    return _known_id(run, _WANDB_ID) or _write_id(run, _WANDB_ID, uuid.uuid4().hex[:12])


def _known_id(run: Path, file: str) -> str | None:
    """Return the id of a run at a tracker, from a file in its folder; None if it has none yet, as a copy has."""
    known = _read_id(run, file)
    if known is None:
        return None
    path = run.resolve()
    if _is_copy(path, file, known):
        log.info("%s: is a copy of %s; it is another run, and gets another id in %s", run, known.path, file)
        return None
    if str(path) != known.path:
        _write_id(run, file, known.id)
    return known.id


def _write_id(run: Path, file: str, id_: str) -> str:
    """Write the id of a run at a tracker into a file of its folder, and return it."""
    status = run.stat()
    content = {"id": id_, "path": str(run.resolve()), "device": status.st_dev, "inode": status.st_ino}
    files.replace(run / file, records.to_json(content))
    return id_


def _read_id(run: Path, file: str) -> records.TrackerId | None:
    return records.read(run / file, records.TrackerId, _ID_CURE)


def _is_copy(run: Path, file: str, known: records.TrackerId) -> bool:
    """Whether a folder is a copy of the one that its id was written in: that one is still there, with this id."""
    status = run.stat()
    if (status.st_dev, status.st_ino) == (known.device, known.inode) or str(run) == known.path:
        return False
    try:
        original = _read_id(Path(known.path), file)
    except (DataError, AgainError):
        return False
    return original is not None and original.id == known.id


def has_wandb_key() -> bool:
    """Whether wandb has an API key, from WANDB_API_KEY or `wandb login`."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):  # `login` would wait for the server
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # older versions have no `prompt`; newer ones may lack `wandb.api`
        return bool(wandb.api.api_key)
    except wandb.Error:  # the key has the wrong form
        return False


class WandbMirror(Tracker):
    """A copy at wandb.

    Each line of metrics.jsonl is a row of wandb's history, and the number of the row (`_step`) is the number of the
    line. So two lines of one step both stay, and a line that is written again after a resume is recognised by its
    number and skipped. The step is a metric of its own, and the x-axis of the charts.
    """

    name = "wandb"

    def __init__(
        self,
        settings: WandbRun,
        folder: Path,
        config: dict[str, Any],
        warn: Warn,
        *,
        lines: int = 0,
        replays: bool = False,
        run: Path | None = None,
    ) -> None:
        """Start a run at wandb, or resume it.

        Args:
            settings: project, name, id … of the run.
            folder: folder in which wandb makes its folder `wandb`.
            config: the configuration to show, without secrets.
            warn: called with a message when something fails.
            lines: number of lines of metrics.jsonl that earlier attempts logged.
            replays: this process sends a run that was trained before. Then the metrics of this machine are not
                recorded, and there is no offline run in place of a server that cannot be reached.
            run: the run's folder, where an id that wandb chose is written down; None: it is not.
        """
        super().__init__(warn)
        self.id: str | None = None
        """The run's id at wandb; None: wandb is off."""
        self._run = run
        self._row, self._offline = lines, True
        if settings.mode == "disabled":
            return
        try:
            started = self._begin(settings, folder, replays)
            # Not given to `init`, which would keep the server's values where this attempt has other ones.
            started.config.update(config, allow_val_change=True)
            started.define_metric("step", hidden=True)
            for group in ("train", "val", "test", "profile"):
                started.define_metric(f"{group}/*", step_metric="step")
            for metric in ("epoch", "seconds"):
                started.define_metric(metric, step_metric="step")
            self._backend = started
            self._keep_id(settings, str(started.id))
        except Exception as error:
            warn(f"wandb is off: {error}; {METRICS} has everything")

    def _keep_id(self, settings: WandbRun, id_: str) -> None:
        """Write down the id that the run has at wandb: under `wandb agent` it is the agent's, not the one asked for."""
        self.id = id_
        if id_ != settings.id and self._run is not None:
            log.info("wandb: the run has the id %s, which its agent or environment chose", id_)
            _write_id(self._run, _WANDB_ID, id_)

    def _begin(self, settings: WandbRun, folder: Path, replays: bool) -> Any:
        """Start wandb's run: offline if there is no key or, unless `replays`, no server."""
        import wandb

        def begin(offline: bool) -> Any:
            self._offline = offline
            options = wandb.Settings(
                silent=True, init_timeout=_INIT_SECONDS, console="off", x_disable_stats=replays, x_disable_meta=replays
            )
            with _no_arguments():
                return wandb.init(
                    mode="offline" if offline else "online",
                    project=settings.project,
                    name=settings.name,
                    group=settings.group,
                    job_type=settings.job_type,
                    dir=str(folder),
                    id=settings.id,
                    resume="allow",
                    settings=options,
                )

        if settings.mode == "offline":
            return begin(offline=True)
        if not has_wandb_key():
            self._warn("wandb.mode=online: no API key (set WANDB_API_KEY or run `wandb login`); logging offline")
            return begin(offline=True)
        try:
            return begin(offline=False)
        except Exception as error:
            if replays:
                raise
            self._warn(f"wandb cannot be reached ({error}); logging offline")
            with contextlib.suppress(Exception):
                wandb.teardown()
            return begin(offline=True)

    @property
    def location(self) -> str:
        """The web address of the run, or the folder of an offline run; empty if wandb is off."""
        if self._backend is None:
            return ""
        return str(self._backend.settings.sync_dir if self._offline else self._backend.url)

    def _log(self, backend: Any, values: dict[str, Any], step: int) -> None:
        if self._row >= backend.starting_step:  # the server has the rows before; wandb would warn for each of them
            backend.log({"step": step, **values}, step=self._row, commit=True)
        self._row += 1

    def _result(self, backend: Any, finished: FinishedRun, step: int) -> None:
        import wandb
        from PIL import Image

        shown, names = finished.most_confused(), finished.classes
        matrix = Confusion.of_result(finished.result).matrix(shown).tolist()
        cells = [
            [names[i], names[j], count]
            for i, row in zip(shown, matrix, strict=True)
            for j, count in zip(shown, row, strict=True)
        ]
        selection = f", the {len(shown)} of {len(names)} classes with most mistakes" if len(shown) < len(names) else ""
        columns = ["Actual", "Predicted", "nPredictions"]
        by_class = wandb.Table(
            columns=["class", "accuracy", "samples"],
            data=[list(row) for row in finished.accuracy_by_class()[:_MAX_ROWS]],
        )
        confusion = wandb.Table(columns=columns, data=cells)
        # As files of the run, not as artifacts: these would be in a home directory until they are sent, where
        # `wandb sync` on another machine does not find them.
        by_class.bind_to_run(backend, "result/by_class", self._row)
        confusion.bind_to_run(backend, "result/confusion_table", self._row)
        title, fields = f"Confusion matrix of test{selection}", {name: name for name in columns}
        values: dict[str, Any] = {
            "result/by_class": by_class,
            "result/confusion": wandb.plot_table("wandb/confusion_matrix/v1", confusion, fields, {"title": title}),
        }
        # As PIL images: in an array that has only 0 and 1, wandb replaces 1 by 255.
        images = [
            wandb.Image(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), caption=caption)
            for image, caption in finished.captioned()
        ]
        if images:
            values["result/misclassified"] = images
        self._log(backend, values, step)

    def _summarize(self, backend: Any, summary: dict[str, Any]) -> None:
        backend.summary.update(summary)

    def _finish(self, backend: Any) -> None:
        backend.finish()


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """Hide the command line from wandb, which would record it: it may hold an address with secrets."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


_WITH_KEYS = {"wandb": "wandb.mode=online", "tensorboard": "log.tensorboard=true"}
"""Trackers of accelerate that have keys of their own, and how they are turned on."""


def check_installed(settings: Log) -> None:
    """Check that the packages of TensorBoard and of `log.trackers` are there.

    Raises:
        ConfigError: one is missing, or accelerate knows no tracker of this name.
    """
    if settings.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401 - accelerate imports it later
        except ImportError as error:
            raise ConfigError(
                f"log.tensorboard=true: {error}; pip install 'distrain[tensorboard]', or set log.tensorboard=false"
            ) from error
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in settings.trackers:
        if name in _WITH_KEYS:
            raise ConfigError(f"log.trackers: {name}: has keys of its own; set {_WITH_KEYS[name]} instead")
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(set(LOGGER_TYPE_TO_CLASS) - set(_WITH_KEYS)))
            raise ConfigError(f"log.trackers: {printable(name)}: accelerate has no such tracker; it has {known}")
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"log.trackers: {name}: is not installed; pip install {name}, or remove it from the list")


class TensorBoardMirror(Tracker):
    """TensorBoard's files in RUN/tensorboard, written by accelerate's tracker.

    Steps that are trained again after a resume are shown once.
    """

    name = "tensorboard"

    def __init__(self, run: Path, config: dict[str, Any], warn: Warn, *, from_step: int = 0) -> None:
        """Start, or resume after `from_step`; metrics from before TensorBoard was turned on are copied too."""
        super().__init__(warn)
        folder = run / TENSORBOARD
        try:
            from accelerate.tracking import TensorBoardTracker

            # TensorBoard drops everything from this step on; the lines of metrics.jsonl from there are written again.
            first = from_step if folder.exists() else 0
            tracker = TensorBoardTracker(TENSORBOARD, run, purge_step=first)
            tracker.start()
            self._backend = tracker
            for line in read_lines(run / METRICS):
                if line["step"] >= first:
                    self.log({name: value for name, value in line.items() if name != "step"}, line["step"])
            self.log({"configuration": _block(yaml.safe_dump(config, sort_keys=False).splitlines())}, from_step)
        except Exception as error:
            warn(f"tensorboard is off: {error}; {METRICS} has everything")

    def _log(self, backend: Any, values: dict[str, Any], step: int) -> None:
        backend.log(values, step=step)

    def _result(self, backend: Any, finished: FinishedRun, step: int) -> None:
        if len(finished.misclassified):
            images = {"pictures/misclassified": finished.misclassified["images"]}
            backend.log_images(images, step=step, dataformats="NHWC")
            captions = (" ".join(caption.split()) for _, caption in finished.captioned())
            backend.log({"pictures/misclassified": _block(captions)}, step=step)
        if len(finished.augmented):
            originals, variants = finished.augmented["images"], finished.augmented["variants"]
            rows = [[image, *changed] for image, changed in zip(originals, variants, strict=True)]
            backend.log_images({"pictures/augmented": _grid(rows)}, step=step, dataformats="NHWC")

    def _summarize(self, backend: Any, summary: dict[str, Any]) -> None:
        """Nothing to do: the last scalars have the same values."""

    def _finish(self, backend: Any) -> None:
        backend.finish()


class AccelerateMirror(Tracker):
    """A copy at one of accelerate's trackers: metrics and configuration.

    A thread of its own makes all calls, since they may wait for a server. Each call logs one line of metrics.jsonl,
    beginning with the first one, and `line` is its number: lines that the tracker has already are not sent again.
    """

    def __init__(self, name: str, run: Path, config: Mapping[str, Mapping[str, Any]], warn: Warn) -> None:
        super().__init__(warn)
        self.name, self._run = name, run
        self._config = {
            f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for section, part in config.items()
            for key, value in part.items()
        }
        self._lines = 0
        self._backend = calls = queue.SimpleQueue[tuple[dict[str, Any], int] | None]()
        for line in read_lines(run / METRICS):
            self.log({key: value for key, value in line.items() if key != "step"}, line["step"])
        self._thread = threading.Thread(target=self._work, args=(calls,), name=name, daemon=True)
        self._thread.start()

    def _work(self, calls: queue.SimpleQueue[tuple[dict[str, Any], int] | None]) -> None:
        """Make the calls until None comes, or the tracker is off."""
        try:
            tracker, lines_there = self._begin()
            while self._backend is not None and (call := calls.get()) is not None:
                values, step = call
                if values["line"] > lines_there:
                    tracker.log(values, step=step)
            tracker.finish()
        except Exception as error:
            self._switch_off(error)

    def _begin(self) -> tuple[Any, int]:
        """Start the tracker; return it, and how many lines it has."""
        kind = self._kind()
        tracker = kind(_PROJECT, str(self._run)) if kind.requires_logging_directory else kind(_PROJECT)
        tracker.start()
        tracker.store_init_configuration(self._config)
        return tracker, 0

    def _kind(self) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        return LOGGER_TYPE_TO_CLASS[self.name]

    def _log(self, backend: Any, values: dict[str, Any], step: int) -> None:
        self._lines += 1
        backend.put(({**values, "line": self._lines}, step))

    def _result(self, backend: Any, finished: FinishedRun, step: int) -> None:
        """Nothing to do: the last line has the scores."""

    def _summarize(self, backend: Any, summary: dict[str, Any]) -> None:
        """Nothing to do, likewise."""

    def _finish(self, backend: Any) -> None:
        backend.put(None)
        self._thread.join()


class MlflowMirror(AccelerateMirror):
    """A copy at MLflow, where all attempts are one run."""

    def _begin(self) -> tuple[Any, int]:
        id_ = _known_id(self._run, _MLFLOW_ID)
        tracker = self._kind()(_PROJECT, run_id=id_, run_name=self._run.resolve().name)
        tracker.start()
        started = tracker.tracker
        if started.info.run_id != id_:
            _write_id(self._run, _MLFLOW_ID, started.info.run_id)
        if not started.data.params:  # MLflow refuses other values later
            tracker.store_init_configuration(self._config)
        return tracker, int(started.data.metrics.get("line", 0))


def open_by_name(name: str, run: Path, config: Mapping[str, Mapping[str, Any]], warn: Warn) -> Tracker:
    """Open the tracker of accelerate that has a name; `config` is shown and has no secrets."""
    return (MlflowMirror if name == "mlflow" else AccelerateMirror)(name, run, config, warn)


def _block(lines: Iterable[str]) -> str:
    """Indent lines as a Markdown code block, so that TensorBoard shows them unchanged."""
    return "\n".join(f"    {line}" for line in lines)


def _grid(rows: list[list[NDArray[Any]]]) -> NDArray[Any]:
    """Join rows of images of the same size into one image uint8 [1, H, W, C]."""
    return np.concatenate([np.concatenate(row, 1) for row in rows])[None]
