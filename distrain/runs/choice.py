"""The choice of a run's checkpoint after training: the best, the last or a named one."""

from __future__ import annotations

from pathlib import Path

from distrain.errors import DataError
from distrain.runs import checkpoint, folder
from distrain.runs.checkpoint import Checkpoint


def choose(run: Path, which: str | None) -> tuple[Path, list[str]]:
    """Choose a checkpoint of a run.

    Args:
        run: the run's folder.
        which: best, last, or a folder's name; None: the checkpoint that the run's result is of.

    Returns:
        Its path, and one message for each newer one that is not readable.

    Raises:
        DataError: there is none.
    """
    checkpoints = run / checkpoint.FOLDER
    if which is not None and which not in ("best", "last"):
        if which not in [each.name for each in checkpoints.glob("*") if each.is_dir()]:  # no path to another folder
            names = [checkpoint.path_of(checkpoints, step).name for step in checkpoint.steps(checkpoints)]
            there = ", ".join(names[:5]) or "none"
            raise DataError(f"{checkpoints / str(which)}: no such checkpoint; there are {there}")
        return checkpoints / which, []
    saved, skipped = checkpoint.newest(checkpoints)
    if saved is None:
        raise DataError("\n  ".join([f"{run}: has no readable checkpoint", *skipped]))
    best = _best(run, saved) if which != "last" else None
    if best is None and which == "best":
        raise DataError(f"{run}: has no best checkpoint, as its data set has no val split; use last")
    return (best if best is not None else saved.path), skipped


def _best(run: Path, last: Checkpoint) -> Path | None:
    """Return the path of the best checkpoint on val; None without a val split.

    The result takes precedence if `last` is the run's last checkpoint: the last evaluation may come after it.
    """
    result = folder.read_result(run) or {}
    if result.get("steps") == last.step and result["val_accuracy"] is not None:
        return run / checkpoint.FOLDER / str(result["checkpoint"])
    best = last.state["best"]
    return checkpoint.path_of(run / checkpoint.FOLDER, best["step"]) if best is not None else None
