"""`distrain status`: how far a run is, from its folder alone, so it may go on anywhere."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from distrain.runs import attempts, checkpoint, folder
from distrain.runs.folder import Record
from distrain.runs.logs import clock


def look(run: Path) -> dict[str, Any]:
    """How far a run is, for JSON.

    Raises:
        DataError: the folder holds no run.
    """
    record = folder.read(run)
    trained = [line for line in record.lines if "train/loss" in line]
    scored = [line for line in record.lines if "val/accuracy" in line or "test/accuracy" in line]
    newest = trained[-1] if trained else {}
    done, total = newest.get("step", 0), record.setup.get("steps")
    # Those evaluated or saved since have no line of their own: the newest checkpoint may be further on.
    done = max([done, *record.checkpoints[-1:]])
    rate = newest.get("train/images_per_second")
    left = None
    if rate and total is not None and record.result is None:
        left = (total - done) * record.config.train.global_batch_size / rate
    return {
        "run": str(run),
        "state": _state(record),
        "step": done,
        "steps": total,
        "epoch": newest.get("epoch"),
        "loss": newest.get("train/loss"),
        "images_per_second": rate,
        "seconds_left": left,
        "accuracy": _accuracy(record, scored),
        "checkpoint": _checkpoint(record),
        "attempts": len(record.attempts),
        "attempt": record.attempts[-1] if record.attempts else None,
        "ended": record.ended or None,
    }


def tell(found: dict[str, Any]) -> str:
    """The same for people."""
    step, total = found["step"], found["steps"]
    lines = [f"{found['run']}: {found['state']}"]
    lines.append(f"step     {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else ""))
    if found["epoch"] is not None:
        lines[-1] += f", epoch {found['epoch']:.2f}"
    if found["images_per_second"] is not None:
        left = f", {clock(found['seconds_left'])} left" if found["seconds_left"] is not None else ""
        lines.append(f"rate     {found['images_per_second']:,.0f} images/s{left}")
    if found["loss"] is not None:
        lines.append(f"loss     {found['loss']:.4f}")
    if found["accuracy"] is not None:
        lines.append("accuracy {accuracy:.2%} on {split} after step {step:,}".format(**found["accuracy"]))
    saved = found["checkpoint"]
    lines.append("saved    " + (f"step {saved['step']:,}, {clock(saved['age'])} ago" if saved else "nothing yet"))
    attempt = found["attempt"]
    if attempt is not None:
        lines.append(
            f"attempts    {found['attempts']}; the newest on {attempt.get('host')}, process {attempt.get('process')}, from step"
            f" {attempt.get('from_step') or 0:,} on {attempt.get('world_size') or '?'} process(es), since {attempt.get('start')}"
        )
    return "\n".join(lines)


def _state(record: Record) -> str:
    if record.result is not None and record.result.get("steps") == record.setup.get("steps"):
        return "done"
    owner = attempts.owner(record.folder)
    if owner is not None:
        age = _age(record.attempts[-1].get("renewed")) if record.attempts else None
        if age is not None and age > attempts.STALE_SECONDS:
            return f"no renewal of its lease for {clock(age)}; the same command goes on"
        return "running"
    if record.ended.get("code") is not None and record.ended["code"] != 0:
        return f"ended with {record.ended['code']}: {record.ended.get('reason')}"
    return "not running; the same command goes on" if record.attempts else "has not begun"


def _accuracy(record: Record, scored: list[dict[str, Any]]) -> dict[str, Any] | None:
    if record.result is not None:
        return {"accuracy": record.result["accuracy"], "split": "test", "step": record.result["steps"]}
    if not scored:
        return None
    split = "val" if "val/accuracy" in scored[-1] else "test"
    return {"accuracy": scored[-1][f"{split}/accuracy"], "split": split, "step": scored[-1]["step"]}


def _checkpoint(record: Record) -> dict[str, Any] | None:
    if not record.checkpoints:
        return None
    step = record.checkpoints[-1]
    written = checkpoint.path_of(record.folder / checkpoint.FOLDER, step).stat().st_mtime
    return {"step": step, "age": max(0.0, datetime.datetime.now().timestamp() - written)}


def _age(told: str | None) -> float | None:
    """Seconds since a time that another host told by its own clock: good for people, not for decisions."""
    if told is None:
        return None
    then = datetime.datetime.strptime(told, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds())
