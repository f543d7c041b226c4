"""The names of the files in a run's folder, and reading them. Imports no torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from distrain import config, files
from distrain.config import Config, Overrides
from distrain.errors import ConfigError, DataError
from distrain.runs import attempts, checkpoint, exit_record, records

log = logging.getLogger("distrain")

CONFIG = "config.yaml"
"""The configuration with all its defaults. Its first line is `CONFIG_MARK`."""
CONFIG_MARK = f"# distrain run, version {records.VERSION}"
SETUP = "setup.json"
"""The data set, model, processes and machine of the newest attempt (`distrain.training.summary.facts`)."""
METRICS = "metrics.jsonl"
RESULT = "result.json"
EXIT = "exit.json"
"""The end of the newest attempt, if `distrain launch` started it."""
AUDIT, STACKS, TRACE, REPORT, WANDB, TENSORBOARD = "audit", "stacks", "trace", "report", "wandb", "tensorboard"
EVALUATIONS = "evaluations"
"""Folder of the scores that `distrain evaluate` wrote: SPLIT-CHECKPOINT.json."""
AUGMENTED = "pictures/augmented.safetensors"
"""The first training images, and augmented variants of them."""
MISCLASSIFIED = "pictures/misclassified.safetensors"
"""Test images whose predicted class is wrong, most confident first."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder, without weights."""

    folder: Path
    config: Config
    setup: dict[str, Any]
    """RUN/setup.json; empty if no attempt has written it yet."""
    lines: list[dict[str, Any]]
    """The lines of RUN/metrics.jsonl, without damaged ones and a last line that is incomplete."""
    result: dict[str, Any] | None
    """RUN/result.json; None until the run is done."""
    attempts: list[dict[str, Any]]
    """The files in RUN/attempts, oldest first."""
    checkpoints: list[int]
    """Steps of the checkpoints in the folder, ascending, without those that were renamed or copied."""
    exit_record: dict[str, Any]
    """RUN/exit.json; empty if there is none."""
    problems: list[str]
    """One message for each file that cannot be read and was passed over."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty if no attempt has written RUN/setup.json yet."""
        return list(self.setup.get("data", {}).get("classes", []))


def configuration(folder: Path, overrides: Overrides = ()) -> Config:
    """Load the configuration of a run.

    Args:
        folder: the run's folder.
        overrides: values that replace the run's own, as for `config.load`.

    Raises:
        DataError: the folder holds no run, or its configuration is damaged.
        ConfigError: an override is not valid.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder}: holds no run (no {CONFIG}); give the folder that was run.dir")
    if not _has_mark(path):
        raise DataError(
            f"{path}: damaged, or not written by this version of distrain (its first line is not {CONFIG_MARK!r});"
            " give the folder that was run.dir, or move this file away and run the train command again"
        )
    try:
        settings = config.load(path)
        missing = _missing_keys(settings)
        reason = f"{missing[0]}: missing" if missing else ""
    except (ConfigError, RecursionError) as error:
        reason = str(error).partition("\n")[2].strip().replace(f"{path}:", "line ") or type(error).__name__
    if reason:
        raise DataError(
            f"{path}: damaged, or written by another version of distrain ({reason}); {_RUN_AGAIN}, or restore it"
        )
    return config.load(path, overrides) if overrides else settings


def _missing_keys(settings: Config) -> list[str]:
    """Return the keys that a file lacked: a run's has all of them, so that its end cannot be lost unnoticed."""
    return [
        f"{section}.{name}"
        for section, name, *_ in config.every_key()
        if name not in getattr(settings, section).model_fields_set
    ]


def write_configuration(folder: Path, settings: Config) -> None:
    """Write RUN/config.yaml, without the secrets of an address.

    Raises:
        OSError: it cannot be written.
    """
    files.replace(folder / CONFIG, configuration_text(settings))


def configuration_text(settings: Config) -> str:
    """Return the content of RUN/config.yaml."""
    return f"{CONFIG_MARK}\n{yaml.safe_dump(config.public(settings), sort_keys=False)}"


def has_configuration(folder: Path, settings: Config) -> bool:
    """Whether the run in a folder has this configuration."""
    try:
        return config.public(configuration(folder)) == config.public(settings)
    except (ConfigError, DataError):
        return False


def _has_mark(path: Path) -> bool:
    """Whether a configuration was written into a run's folder; one that a user wrote has another first line."""
    try:
        with files.open_regular(path) as file:
            return file.readline(100).decode("utf-8", "replace").rstrip("\r\n") == CONFIG_MARK
    except OSError:
        return False


_RUN_FILES = (CONFIG, METRICS, RESULT, SETUP)
_RUN_FOLDERS = (AUDIT, TRACE, TENSORBOARD, "pictures", attempts.FOLDER, checkpoint.FOLDER)
"""Names that a run writes, or cuts back, in its folder."""
_RUN_CHECKPOINTS = re.compile("(damaged-|[.]partial-)?step-[0-9]{8,18}")


def foreign(folder: Path) -> Path | None:
    """Return something in a folder that a run would overwrite or cut, although distrain did not write it; else None.

    A folder is known as a run's by its attempts, and by the first line of its config.yaml.
    """
    for name in _RUN_FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            return folder / name
    for name in _RUN_FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            return folder / name
    if (folder / CONFIG).exists():
        return None if _has_mark(folder / CONFIG) else folder / CONFIG
    return None if attempts.numbers(folder) else _unknown(folder)


def _unknown(folder: Path) -> Path | None:
    """Return something with a name that a run uses, in a folder that is not known as a run's."""
    for name in _RUN_FILES:
        if (folder / name).exists():
            return folder / name
    for name in _RUN_FOLDERS:
        entries = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        if name == checkpoint.FOLDER:
            entries = [path for path in entries if not _RUN_CHECKPOINTS.fullmatch(path.name)]
        if entries:
            return entries[0]
    return folder / EXIT if exit_record.is_foreign(folder / EXIT) else None


_RUN_AGAIN = "the same train command, run again, replaces it"
_CURES = {
    SETUP: _RUN_AGAIN,
    RESULT: _RUN_AGAIN,
    METRICS: "other lines are used; delete what is damaged to be rid of this message",
    EXIT: exit_record.CURE,
}


def read(folder: Path, required: Collection[str] = ()) -> RunRecord:
    """Read a run's folder.

    Args:
        folder: the run's folder.
        required: names of files without which the caller cannot work; others that are damaged are passed over.

    Raises:
        DataError: the folder holds no run, or a required file is damaged.
    """
    problems: list[str] = []

    def record(name: str, kind: type[records.R]) -> dict[str, Any] | None:
        path = folder / name
        if name in required:
            content = records.read(path, kind, _CURES[name])
        else:
            content = records.read_or_warn(path, kind, problems, _CURES[name])
        return records.content_of(content) if content is not None else None

    settings, saved_lines = configuration(folder), _saved_lines(folder)  # before the lines, which may become more
    setup, result = record(SETUP, records.Setup), record(RESULT, records.Result)
    bad_lines: list[str] = []
    lines = _lines(folder / METRICS, bad_lines)
    if bad_lines and METRICS in required:
        raise DataError(bad_lines[0])
    if not bad_lines and len(lines) < saved_lines:
        bad_lines.append(f"{folder / METRICS}: has {len(lines)} of the {saved_lines} lines that a checkpoint counts on")
    problems += bad_lines
    history = attempts.history(folder, problems)
    number = len(attempts.numbers(folder))
    if number > attempts.MOST_READ:
        problems.append(f"{folder / attempts.FOLDER}: only the newest {attempts.MOST_READ:,} of {number:,} are shown")
    ended = record(EXIT, records.Exit) or {}
    renamed = checkpoint.renamed(folder / checkpoint.FOLDER)
    problems += renamed.values()
    checkpoints = sorted(set(checkpoint.steps(folder / checkpoint.FOLDER)) - renamed.keys())
    return RunRecord(folder, settings, setup or {}, lines, result, history, checkpoints, ended, problems)


def _saved_lines(folder: Path) -> int:
    """Return how many lines metrics.jsonl had when the newest checkpoint was saved; 0 if that is not known."""
    checkpoints = folder / checkpoint.FOLDER
    newest = checkpoint.steps(checkpoints)[:1]
    state = checkpoint.read_state(checkpoint.path_of(checkpoints, newest[0])) if newest else None
    return int(state["lines"]) if state is not None else 0


def read_started(folder: Path, required: Collection[str] = ()) -> RunRecord:
    """Read a run's folder; the run must have started, so that its data set and model are known.

    Raises:
        DataError: the folder holds no run, or its run has not started, or a required file is damaged.
    """
    record = read(folder, (SETUP, *required))
    if not record.setup:
        raise _not_started(folder)
    return record


def read_setup(folder: Path) -> dict[str, Any]:
    """Return the content of RUN/setup.json.

    Raises:
        DataError: the run has not started, or the file is damaged.
    """
    setup = records.read(folder / SETUP, records.Setup, _RUN_AGAIN)
    if setup is None:
        raise _not_started(folder)
    return records.content_of(setup)


def _not_started(folder: Path) -> DataError:
    return DataError(f"{folder}: its run has not started (no {SETUP}); {_RUN_AGAIN}")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the content of RUN/result.json; None until the run is done.

    Raises:
        DataError: the file is damaged.
    """
    result = records.read(folder / RESULT, records.Result, f"{_RUN_AGAIN}; or name a checkpoint with --checkpoint")
    return records.content_of(result) if result is not None else None


def read_evaluations(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the content of the files in RUN/evaluations, by name; damaged ones add a message to `problems`."""
    read = (
        records.read_or_warn(path, records.Evaluation, problems, "`distrain evaluate` replaces it")
        for path in sorted((folder / EVALUATIONS).glob("*.json"))
    )
    return [records.content_of(evaluation) for evaluation in read if evaluation is not None]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of RUN/metrics.jsonl but an incomplete last one and, with a warning, damaged ones."""
    problems: list[str] = []
    lines = _lines(path, problems)
    for problem in problems:
        log.warning("%s", problem)
    return lines


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    return [records.content_of(line) for line in records.lines(path, records.Line, problems, _CURES[METRICS])]


_MAX_PICTURES = 2**31


def read_pictures(path: Path, classes: int | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays in `AUGMENTED` or `MISCLASSIFIED`.

    Returns:
        The arrays; an empty dict if the file is missing or, with a warning, if it is damaged or names a label that is
        not among the `classes`.
    """
    import safetensors.numpy

    try:
        arrays = dict(safetensors.numpy.load(files.read(path, _MAX_PICTURES)))
        reason = _wrong_pictures(arrays, classes)
    except FileNotFoundError:
        return {}
    except OSError as error:
        reason = error.strerror or str(error)
    except Exception as error:  # safetensors raises its own errors, and others for types that numpy lacks
        reason = f"not a file of pictures: {error}"
    if reason is None:
        return arrays
    log.warning("%s: damaged, or written by another version of distrain (%s); its pictures are not shown", path, reason)
    return {}


def _wrong_pictures(arrays: dict[str, NDArray[Any]], classes: int | None) -> str | None:
    """Return what is wrong with the arrays of a file of pictures, or None."""
    if not arrays:  # no sample was misclassified
        return None
    images = arrays.get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        return "images: not uint8 [n, H, W, C]"
    if "variants" in arrays:
        variants = arrays["variants"]
        right = variants.dtype == np.uint8 and variants.ndim == 5 and variants.shape[0] == images.shape[0]
        return None if right and variants.shape[2:] == images.shape[1:] else "variants: do not fit the images"
    for name in ("ids", "labels", "predicted", "probabilities"):
        values = arrays.get(name)
        kind = "f" if name == "probabilities" else "i"
        if values is None or values.shape != images.shape[:1] or values.dtype.kind != kind:
            return f"{name}: not one for each image"
        if (
            name in ("labels", "predicted")
            and len(values)
            and not 0 <= values.min() <= values.max() < (classes or 2**63)
        ):
            return f"{name}: not a class of this run"
    return None
