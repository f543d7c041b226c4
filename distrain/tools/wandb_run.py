"""`distrain wandb`: a run as it stands in its folder, sent to wandb as one run, however many attempts it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distrain.config import public
from distrain.errors import AgainError, ConfigError
from distrain.runs import folder, trackers
from distrain.runs.trackers import WandbMirror, WandbRun

_CLOSE_SECONDS = 600.0
"""Nothing but this command waits for the server."""


def send(run: Path, online: bool, out: Path | None) -> str:
    """Replay RUN/metrics.jsonl, which holds nothing twice, with configuration, result and pictures; what to tell.

    Raises:
        DataError: the folder holds no run.
        ConfigError: no API key, or an offline run cannot be written.
        AgainError: the server cannot be reached, or did not take everything.
    """
    if online == (out is not None):
        raise ConfigError("--mode offline needs --out FOLDER" if not online else "--out is for --mode offline")
    found = folder.read(run)
    if online and not trackers.has_wandb_key():
        raise ConfigError(
            "wandb: no API key; set WANDB_API_KEY (or run `wandb login`), or write an offline run by"
            " --mode offline --out FOLDER"
        )
    problems: list[str] = []
    mirror = WandbMirror(_filed(found, online), _made(out or run), public(found.config), problems.append, replays=True)
    for line in found.lines:
        mirror.log({name: value for name, value in line.items() if name != "step"}, line["step"])
    if found.result is not None:
        mirror.result(trackers.outcome(run, found.result), found.result["steps"])
    place = mirror.place
    mirror.close(trackers.numbers(found.result or {}), _CLOSE_SECONDS)
    if problems:
        raise (AgainError if online else ConfigError)("\n".join(problems))
    what = f"{len(found.lines)} lines" + (" and the result" if found.result is not None else "; there is no result yet")
    return f"{run}: {what}: {place}" + ("" if online else f"\nto send it: wandb sync {place}")


def _filed(found: folder.Record, online: bool) -> WandbRun:
    try:
        id_ = trackers.wandb_id(found.folder)
    except OSError as error:
        raise ConfigError(f"{found.folder}: wandb-id cannot be written: {error.strerror}") from error
    return replace(WandbRun.of(found.config.wandb, found.folder, id_), mode="online" if online else "offline")


def _made(path: Path) -> Path:
    """wandb would write to a temporary folder where it cannot write, and say nothing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be made: {error.strerror}; choose another folder") from error
    return path
