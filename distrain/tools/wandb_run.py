"""`distrain wandb`: send a run from its folder to wandb, as one run however many attempts it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distrain.config import public
from distrain.errors import AgainError, ConfigError
from distrain.runs import folder, trackers
from distrain.runs.trackers import WandbMirror, WandbRun
from distrain.text import plural

_CLOSE_SECONDS = 600.0
"""Longer than for a run that is training: only this command waits for the server."""


def send(run: Path, online: bool, out: Path | None) -> str:
    """Send metrics.jsonl, which has each line once, with configuration, result and images.

    Args:
        run: the run's folder.
        online: send to the server; otherwise write an offline run.
        out: folder for the offline run.

    Returns:
        A message for people.

    Raises:
        DataError: the folder holds no run.
        ConfigError: no API key, or an offline run cannot be written.
        AgainError: the server cannot be reached, or did not receive everything.
    """
    if online == (out is not None):
        raise ConfigError("--mode offline needs --out FOLDER" if not online else "--out is for --mode offline")
    record = folder.read(run, (folder.RESULT, folder.METRICS))
    if online and not trackers.has_wandb_key():
        raise ConfigError(
            "wandb: no API key; set WANDB_API_KEY (or run `wandb login`), or write an offline run by"
            " --mode offline --out FOLDER"
        )
    problems: list[str] = []
    mirror = WandbMirror(
        _settings(record, online),
        _make_folder(out or run),
        public(record.config),
        problems.append,
        replays=True,
        run=run,
    )
    for line in record.lines:
        mirror.log({name: value for name, value in line.items() if name != "step"}, line["step"])
    if record.result is not None:
        mirror.result(trackers.read_finished(run, record.result), record.result["steps"])
    location = mirror.location
    mirror.close(trackers.scalars(record.result or {}), _CLOSE_SECONDS)
    if problems:
        raise (AgainError if online else ConfigError)("\n".join(problems))
    content = plural(len(record.lines), "line") + (
        " and the result" if record.result is not None else "; no result yet"
    )
    return f"{run}: {content}: {location}" + ("" if online else f"\nto send it: wandb sync {location}")


def _settings(record: folder.RunRecord, online: bool) -> WandbRun:
    try:
        id_ = trackers.wandb_id(record.folder)
    except OSError as error:
        raise ConfigError(f"{record.folder}: wandb-id cannot be written: {error.strerror}") from error
    return replace(WandbRun.of(record.config.wandb, record.folder, id_), mode="online" if online else "offline")


def _make_folder(path: Path) -> Path:
    """Create a folder. If it were missing, wandb would silently write to a temporary folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be created: {error.strerror}; choose another folder") from error
    return path
