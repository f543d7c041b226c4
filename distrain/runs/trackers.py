"""Copies of a run's metrics for others to look at: wandb and TensorBoard. metrics.jsonl stays the truth."""

from __future__ import annotations

import abc
import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from distrain.config import Wandb
from distrain.errors import ConfigError
from distrain.runs.folder import AUGMENTED, METRICS, TENSORBOARD, WRONG, read_lines, read_pictures

CLOSE_SECONDS = 60.0
_MOST_CLASSES = 40
"""Classes of a confusion matrix on a screen: with K it has K² cells."""
_ID = "wandb-id"

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What came of a run, as it is shown: RUN/result.json and its pictures."""

    result: dict[str, Any]
    wrong: dict[str, NDArray[Any]]
    augmented: dict[str, NDArray[Any]]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in their order."""
        return list(self.result["accuracy_by_class"])

    def by_class(self) -> list[list[Any]]:
        """Class, accuracy, samples: the worst first, those without samples last."""
        samples = map(sum, self.result["confusion_matrix"])
        accuracies = self.result["accuracy_by_class"].items()
        rows = [[name, accuracy, count] for (name, accuracy), count in zip(accuracies, samples, strict=True)]
        return sorted(rows, key=lambda row: 2.0 if row[1] is None else row[1])

    def confused(self) -> list[int]:
        """The classes, ascending, that most mistakes have to do with: as many as a screen shows."""
        matrix = np.array(self.result["confusion_matrix"])
        mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
        return sorted(np.argsort(-mistakes, kind="stable")[:_MOST_CLASSES].tolist())

    def captioned(self) -> Iterator[tuple[NDArray[Any], str]]:
        """The pictures that were got wrong, most probable first: uint8 [H, W, C], and what was taken for what."""
        for image, label, predicted, probability in zip(
            *(self.wrong.get(name, ()) for name in ("images", "labels", "predicted", "probabilities")), strict=True
        ):
            yield image, f"{self.classes[label]} → {self.classes[predicted]}, {probability:.1%}"


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """What of a result is one number: a tracker's summary."""
    return {key: value for key, value in result.items() if isinstance(value, (int, float))}


def outcome(run: Path, result: dict[str, Any]) -> Outcome:
    """The outcome of a run, with the pictures in its folder."""
    return Outcome(result, read_pictures(run / WRONG), read_pictures(run / AUGMENTED))


class Tracker(abc.ABC):
    """Keeps a copy of the metrics. Whatever goes wrong there costs one warning, never the run."""

    name: ClassVar[str]

    def __init__(self, warn: Warn) -> None:
        self._warn = warn
        self._to: Any = None
        """What is written to; None: nothing, from here on."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Copy one line of the metrics."""
        self._try(lambda to: self._log(to, values, step))

    def result(self, found: Outcome, step: int) -> None:
        """Show what came of the run."""
        self._try(lambda to: self._result(to, found, step))

    def close(self, summary: dict[str, Any], seconds: float = CLOSE_SECONDS) -> None:
        """Write `summary` and close; wait a bounded time for a server or a disk."""
        self._try(lambda to: self._summarize(to, summary))
        if self._to is None:
            return
        finishing = threading.Thread(target=self._try, args=(self._finish,), daemon=True)
        finishing.start()
        finishing.join(seconds)
        if finishing.is_alive():
            self._to = None  # what becomes of it is told no more
            self._warn(f"{self.name} did not finish within {seconds:g} s; {METRICS} has everything")

    @abc.abstractmethod
    def _log(self, to: Any, values: dict[str, Any], step: int) -> None: ...

    @abc.abstractmethod
    def _result(self, to: Any, found: Outcome, step: int) -> None: ...

    @abc.abstractmethod
    def _summarize(self, to: Any, summary: dict[str, Any]) -> None: ...

    @abc.abstractmethod
    def _finish(self, to: Any) -> None: ...

    def _try(self, action: Callable[[Any], Any]) -> None:
        if self._to is not None:
            try:
                action(self._to)
            except Exception as error:
                if self._to is None:
                    return
                self._to = None
                self._warn(f"{self.name} is off from here: {error}; {METRICS} has everything")


@dataclass(frozen=True)
class WandbRun:
    """How a run is filed at wandb: the keys of section wandb, worked out."""

    mode: Literal["disabled", "offline", "online"]
    project: str
    name: str
    id: str
    group: str | None = None
    job_type: str = "train"

    @classmethod
    def of(cls, settings: Wandb, run: Path, id_: str) -> WandbRun:
        """A run's, by its configuration."""
        group = settings.group or (id_ if settings.nodes == "all" else None)
        return cls(settings.mode, settings.project, settings.name or run.resolve().name, id_, group, settings.job_type)

    def of_node(self, node: int) -> WandbRun:
        """The run beside this one for another node's system metrics; its id is the same in every attempt."""
        return replace(self, name=f"{self.name}-node-{node}", id=f"{self.id}-node-{node}", job_type="node")


def wandb_id(run: Path) -> str:
    """RUN/wandb-id, made where there is none: all attempts of a run are one run at wandb.

    Raises:
        OSError: it cannot be written.
    """
    path = run / _ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def has_wandb_key() -> bool:
    """Whether wandb knows whom to send as: WANDB_API_KEY, or `wandb login`."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):  # without asking the server, for which `login` waits
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # older ones do not know `prompt`; newer ones will not know this
        return bool(wandb.api.api_key)
    except wandb.Error:  # a key of the wrong form
        return False


class WandbMirror(Tracker):
    """wandb. Every line of metrics.jsonl is a row of its history, and the row's number (`_step`) is the line's: two
    lines of one step both stay, and one that is written again after a resume is known by its number and left out.
    The step is a metric, against which the charts are drawn.
    """

    name = "wandb"

    def __init__(
        self,
        filed: WandbRun,
        folder: Path,
        config: dict[str, Any],
        warn: Warn,
        *,
        lines: int = 0,
        replays: bool = False,
    ) -> None:
        """Begin, or go on with, a run at wandb.

        Args:
            filed: what it is called there.
            folder: wandb writes in its folder `wandb`.
            config: as it may be written down.
            warn: told what goes wrong.
            lines: of metrics.jsonl that were logged before.
            replays: this process did not train: its machine is not the run's, and nobody waits for it to go on, so
                without a server there is nothing.
        """
        super().__init__(warn)
        self._row, self._offline = lines, True
        if filed.mode == "disabled":
            return
        try:
            run = self._begin(filed, folder, replays)
            # Not given to `init`, which keeps the server's values where an attempt came with others.
            run.config.update(config, allow_val_change=True)
            run.define_metric("step", hidden=True)
            for group in ("train", "val", "test", "profile"):
                run.define_metric(f"{group}/*", step_metric="step")
            for metric in ("epoch", "seconds"):
                run.define_metric(metric, step_metric="step")
            self._to = run
        except Exception as error:
            warn(f"wandb is off: {error}; {METRICS} has everything")

    def _begin(self, filed: WandbRun, folder: Path, replays: bool) -> Any:
        """wandb's run: an offline one where there is no key, or, for a run that trains, no server."""
        import wandb

        def begin(offline: bool) -> Any:
            self._offline = offline
            settings = wandb.Settings(
                silent=True, init_timeout=30, console="off", x_disable_stats=replays, x_disable_meta=replays
            )
            with _no_arguments():
                return wandb.init(
                    mode="offline" if offline else "online",
                    project=filed.project,
                    name=filed.name,
                    group=filed.group,
                    job_type=filed.job_type,
                    dir=str(folder),
                    id=filed.id,
                    resume="allow",
                    settings=settings,
                )

        if filed.mode == "offline":
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
    def place(self) -> str:
        """Where the run is shown, or the folder of an offline one; empty where wandb is off."""
        if self._to is None:
            return ""
        return str(self._to.settings.sync_dir if self._offline else self._to.url)

    def _log(self, to: Any, values: dict[str, Any], step: int) -> None:
        if self._row >= to.starting_step:  # what the server has already; wandb would print a warning a row
            to.log({"step": step, **values}, step=self._row, commit=True)
        self._row += 1

    def _result(self, to: Any, found: Outcome, step: int) -> None:
        import wandb
        from PIL import Image

        shown, names = found.confused(), found.classes
        matrix = found.result["confusion_matrix"]
        cells = [[names[i], names[j], matrix[i][j]] for i in shown for j in shown]
        some = f", {len(shown)} of {len(names)} classes: most mistakes" if len(shown) < len(names) else ""
        columns = ["Actual", "Predicted", "nPredictions"]
        by_class = wandb.Table(columns=["class", "accuracy", "samples"], data=found.by_class())
        confusion = wandb.Table(columns=columns, data=cells)
        # As files of the run alone: as artifacts too, they would lie in a home directory until they are sent, and
        # `wandb sync` on another machine would not find them.
        by_class.bind_to_run(to, "result/by_class", self._row)
        confusion.bind_to_run(to, "result/confusion_table", self._row)
        title, fields = f"Confusion matrix of test{some}", {name: name for name in columns}
        values: dict[str, Any] = {
            "result/by_class": by_class,
            "result/confusion": wandb.plot_table("wandb/confusion_matrix/v1", confusion, fields, {"title": title}),
        }
        # As PIL's: of an array whose values are all 0 or 1, wandb makes 0 or 255.
        wrong = [
            wandb.Image(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), caption=caption)
            for image, caption in found.captioned()
        ]
        if wrong:
            values["result/wrong"] = wrong
        self._log(to, values, step)

    def _summarize(self, to: Any, summary: dict[str, Any]) -> None:
        to.summary.update(summary)

    def _finish(self, to: Any) -> None:
        to.finish()


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """wandb files the command line; one may hold an address with its secrets, and the configuration is filed anyway."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def check_tensorboard() -> None:
    """Whether TensorBoard's files can be written.

    Raises:
        ConfigError: its package is missing, or cannot be imported.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401 - what accelerate imports when it starts
    except ImportError as error:
        raise ConfigError(
            f"log.tensorboard=true: {error}; pip install 'distrain[tensorboard]', or set log.tensorboard=false"
        ) from error


class TensorBoardMirror(Tracker):
    """TensorBoard's files in RUN/tensorboard, by accelerate's tracker. What an attempt trains again is shown once."""

    name = "tensorboard"

    def __init__(self, run: Path, config: dict[str, Any], warn: Warn, *, from_step: int = 0) -> None:
        """Begin, or go on after `from_step`."""
        super().__init__(warn)
        folder = run / TENSORBOARD
        try:
            from accelerate.tracking import TensorBoardTracker

            # TensorBoard drops everything from this step on; lines that metrics.jsonl has of it are written again.
            first = from_step if folder.exists() else 0
            tracker = TensorBoardTracker(TENSORBOARD, run, purge_step=first)
            tracker.start()
            self._to = tracker
            for line in read_lines(run / METRICS):
                if line["step"] >= first:
                    self.log({name: value for name, value in line.items() if name != "step"}, line["step"])
            self.log({"configuration": _block(yaml.safe_dump(config, sort_keys=False).splitlines())}, from_step)
        except Exception as error:
            warn(f"tensorboard is off: {error}; {METRICS} has everything")

    def _log(self, to: Any, values: dict[str, Any], step: int) -> None:
        to.log(values, step=step)

    def _result(self, to: Any, found: Outcome, step: int) -> None:
        if len(found.wrong):
            to.log_images({"pictures/wrong": found.wrong["images"]}, step=step, dataformats="NHWC")
            captions = (" ".join(caption.split()) for _, caption in found.captioned())
            to.log({"pictures/wrong": _block(captions)}, step=step)
        if len(found.augmented):
            originals, variants = found.augmented["images"], found.augmented["variants"]
            rows = [[image, *changed] for image, changed in zip(originals, variants, strict=True)]
            to.log_images({"pictures/augmented": _grid(rows)}, step=step, dataformats="NHWC")

    def _summarize(self, to: Any, summary: dict[str, Any]) -> None:
        """The last scalars say the same."""

    def _finish(self, to: Any) -> None:
        to.finish()


def _block(lines: Iterable[str]) -> str:
    """Lines that TensorBoard, which reads Markdown, shows as they are."""
    return "\n".join(f"    {line}" for line in lines)


def _grid(rows: list[list[NDArray[Any]]]) -> NDArray[Any]:
    """One picture, uint8 [1, H, W, C], of rows of pictures of one size."""
    return np.concatenate([np.concatenate(row, 1) for row in rows])[None]
