"""`distrain status`: show the progress of a run from the files in its folder alone, so it may be training elsewhere."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Any, Literal

from distrain.errors import EXIT_AGAIN
from distrain.runs import attempts, checkpoint, folder, goodput, lease, results
from distrain.runs.folder import RunRecord
from distrain.runs.goodput import Goodput
from distrain.text import clock, percent, plural

log = logging.getLogger("distrain")

_CENTURY = 3e9

State = Literal["not started", "running", "done", "stopped", "failed", "killed", "unknown"]
"""States of a run.

stopped: on request, or because a process, node, link or server was lost; failed: any other error; killed: its process
ended without a report; unknown: no record says, or it runs on another host and does not renew its lease.
"""
_RESUME = "not running; run the same command to resume"


def run_status(run: Path) -> dict[str, Any]:
    """Return the progress of a run, as values for JSON.

    Raises:
        DataError: the folder holds no run.
    """
    record = folder.read(run)
    for problem in record.problems:
        log.warning("%s", problem)
    train_lines = [line for line in record.lines if "train/loss" in line]
    newest = train_lines[-1] if train_lines else {}
    # Steps after the newest line have no line of their own yet: the newest checkpoint may be ahead of it.
    done, total = max([newest.get("step", 0), *record.checkpoints[-1:]]), record.setup.get("steps")
    rate = newest.get("train/images_per_second")
    seconds_left = None
    if rate and rate > 0 and total is not None and record.result is None:
        left = max(0, total - done) * record.config.train.global_batch_size / rate
        seconds_left = left if left < _CENTURY else None
    return {
        "run": str(run),
        "state": state_of(record)[1],
        "step": done,
        "steps": total,
        "epoch": newest.get("epoch"),
        "loss": newest.get("train/loss"),
        "images_per_second": rate,
        "tflops_per_second": newest.get("train/tflops_per_second"),
        "mfu": newest.get("train/mfu"),
        "slowest_rank": newest.get("train/slowest_rank"),
        "slowest_factor": newest.get("train/slowest_factor"),
        "memory_gib": {name: newest.get(f"memory/{name}_gib") for name in ("host", "device")},
        "goodput": _describe_goodput(goodput_of(record)),
        "seconds_left": seconds_left,
        "stopped_early": (record.result or {}).get("stopped_early"),
        "accuracy": _accuracy(record),
        "checkpoint": _checkpoint(record),
        "attempts": attempts.newest_attempt(run),
        "attempt": record.attempts[-1] if record.attempts else None,
        "ended": record.exit_record or None,
    }


def format_status(status: dict[str, Any]) -> str:
    """Format what `run_status` returned for people, one value per line."""
    step, total = status["step"], status["steps"]
    rows = [("step", f"{step:,}" + (f" of {total:,} ({100 * step / total:.0f} %)" if total else ""))]
    if status["stopped_early"] is not None:
        rows.append(("stopped", status["stopped_early"]))
    if status["epoch"] is not None:
        rows[0] = ("step", f"{rows[0][1]}, epoch {status['epoch']:.2f}")
    if status["images_per_second"] is not None:
        left = f", {clock(status['seconds_left'])} left" if status["seconds_left"] is not None else ""
        rate = results.format_rate(status["images_per_second"], status["tflops_per_second"], status["mfu"])
        rows.append(("rate", f"{rate}{left}"))
    if status["loss"] is not None:
        rows.append(("loss", f"{status['loss']:.4f}"))
    result = status["accuracy"]
    if result is not None:
        why = f" ({result['why']})" if result.get("why") else ""
        text = f"{percent(result['accuracy'])} on {result['split']} after step {result['step']:,}{why}"
        rows.append(("accuracy", text))
    saved = status["checkpoint"]
    rows.append(("saved", f"step {saved['step']:,}, {clock(saved['age'])} ago" if saved else "nothing yet"))
    host, device = (status["memory_gib"][name] for name in ("host", "device"))
    if host is not None:
        of_device = f", {device:.2f} GiB of its GPU" if device is not None else ""
        rows.append(("memory", f"at most {host:.2f} GiB of a process{of_device}"))
    if status["slowest_rank"] is not None and status["slowest_factor"] is not None:
        text = f"rank {status['slowest_rank']:.0f}: {status['slowest_factor']:.2f} × the median of the others"
        rows.append(("slowest", text))
    spent = status["goodput"]
    if spent["fraction"] is not None:
        pauses = f"; {clock(spent['pause_seconds'])} between them" if spent["pause_seconds"] >= 1 else ""
        of_all = f"{clock(spent['train_seconds'])} in steps that counted, of {clock(spent['attempt_seconds'])}"
        rows.append(("goodput", f"{percent(spent['fraction'])}: {of_all} of all attempts{pauses}"))
    attempt = status["attempt"]
    if attempt is not None:
        rows.append(("attempts", f"{status['attempts']}; {_describe_attempt(attempt)}"))
    return "\n".join([f"{status['run']}: {status['state']}", *(f"{label:9}{text}" for label, text in rows)])


def goodput_of(record: RunRecord) -> Goodput:
    """Return the seconds of a run: those of its result, or so far.

    Steps after the newest checkpoint count while the run is running: if it is killed, they are trained again.
    """
    result = record.result
    if result is not None and result.get("attempt_seconds") is not None:
        return Goodput(result["train_seconds"], result["attempt_seconds"], result.get("pause_seconds") or 0.0)
    seconds = [_saved_seconds(record)]
    if result is not None or state_of(record)[0] == "running":
        seconds += [(line.get("train_seconds") or 0.0, line.get("seconds") or 0.0) for line in record.lines]
    return goodput.measure(*max(seconds), record.attempts)


def _saved_seconds(record: RunRecord) -> tuple[float, float]:
    """Return the seconds in steps, and of all attempts, up to the newest checkpoint; 0 if there is none."""
    if not record.checkpoints:
        return 0.0, 0.0
    path = checkpoint.path_of(record.folder / checkpoint.FOLDER, record.checkpoints[-1])
    state = checkpoint.read_state(path) or {"losses": {}, "seconds": 0.0}
    in_steps = state["losses"].get("train_seconds")
    return (float(in_steps) if isinstance(in_steps, (int, float)) else 0.0), state["seconds"]


def _describe_goodput(spent: Goodput) -> dict[str, float | None]:
    return {"fraction": spent.fraction, **spent._asdict()}


def _describe_attempt(attempt: dict[str, Any]) -> str:
    size = attempt.get("world_size")
    on_processes = f" on {plural(size, 'process')}" if size else ""
    return (
        f"the newest on {attempt.get('host')}, process {attempt.get('process')}, from step"
        f" {attempt.get('from_step') or 0:,}{on_processes},"
        f" since {attempt.get('start')}"
    )


def state_of(record: RunRecord) -> tuple[State, str]:
    """Return the state of a run, and the same in a sentence for people."""
    result = record.result
    if result is not None and (result.get("stopped_early") or result.get("steps") == record.setup.get("steps")):
        return "done", "done"
    newest = record.attempts[-1] if record.attempts else {}
    if lease.owner(record.folder) is not None:
        age = _age(newest.get("renewed"))
        if age is not None and age > lease.STALE_SECONDS:
            return "unknown", f"lease not renewed for {clock(age)}; run the same command to resume"
        return "running", "running"
    # The launcher has seen more than the process, but other launchers write no record.
    launched = record.exit_record if record.exit_record.get("attempt", 0) >= newest.get("attempt", 0) else {}
    ending = launched if launched.get("code") else newest
    code = ending.get("code")
    if code:
        return "stopped" if code == EXIT_AGAIN else "failed", f"exited with code {code}: {ending.get('reason')}"
    if not newest:
        return "not started", "not started"
    return "unknown" if newest.get("ended") else "killed", _RESUME


def _accuracy(record: RunRecord) -> dict[str, Any] | None:
    """The result's accuracy, or else that of the newest evaluation."""
    if record.result is not None:
        step, why = results.step_of(record.result), results.why_chosen(record.result)
        return {"accuracy": record.result["accuracy"], "split": "test", "step": step, "why": why}
    for line in reversed(record.lines):
        for split in ("val", "test"):
            if f"{split}/accuracy" in line:
                return {"accuracy": line[f"{split}/accuracy"], "split": split, "step": line["step"]}
    return None


def _checkpoint(record: RunRecord) -> dict[str, Any] | None:
    """The newest checkpoint's step and age in seconds."""
    if not record.checkpoints:
        return None
    step = record.checkpoints[-1]
    written = checkpoint.path_of(record.folder / checkpoint.FOLDER, step).stat().st_mtime
    return {"step": step, "age": max(0.0, datetime.datetime.now().timestamp() - written)}


def _age(timestamp: str | None) -> float | None:
    """Return the seconds since a time that another host's clock gave: good enough for people, not for decisions."""
    if timestamp is None:
        return None
    then = datetime.datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds())
