"""The origin of a run: its command, git commit, dates and attempts."""

from __future__ import annotations

from typing import Any

from distrain.runs import checkpoint, results
from distrain.runs.folder import RunRecord
from distrain.text import percent
from distrain.tools.report.epochs import Table


def about(record: RunRecord) -> list[tuple[str, str]]:
    """Return when and from what the run was made: names and values; what is not known is omitted."""
    result, newest = record.result, newest_attempt(record)
    rows = [("date", _date(record)), ("command", newest.get("command")), ("git commit", _commit(newest))]
    rows += [("seed", str(record.config.run.seed)), ("run", str(record.folder))]
    if result is not None:
        rows.append(("checkpoint", f"{checkpoint.FOLDER}/{result['checkpoint']}, {results.why_chosen(result)}"))
        interval = result.get("accuracy_interval")
        if interval is not None:
            low, high = map(percent, interval)
            rows.append(("accuracy", f"{percent(result['accuracy'])}, 95 % confidence interval {low} to {high}"))
    job = newest.get("job") or record.exit_record.get("job")
    return [(name, text) for name, text in [*rows, ("job", job)] if text]


def newest_attempt(record: RunRecord) -> dict[str, Any]:
    """Return the newest attempt that trained; empty if there is none."""
    return (_that_trained(record) or [{}])[-1]


def _that_trained(record: RunRecord) -> list[dict[str, Any]]:
    """Return the attempts without those after the end, to which nothing remained to be done."""
    end = record.result["steps"] if record.result is not None else None
    trained = [attempt for attempt in record.attempts if end is None or (attempt.get("from_step") or 0) < end]
    return trained or record.attempts


def _date(record: RunRecord) -> str:
    """Return when the first attempt started and the last one ended, in UTC."""
    trained = _that_trained(record)
    if not trained:
        return ""
    start, end = _time(trained[0]["start"]), _time(trained[-1].get("ended"))
    if not end:
        return f"since {start} UTC"
    same_day = start[:10] == end[:10]
    return f"{start} to {end[11:] if same_day else end} UTC"


def _commit(attempt: dict[str, Any]) -> str | None:
    commit = attempt.get("git_commit")
    changes = ", with changes that are not committed" if attempt.get("git_changes") else ""
    return f"{commit}{changes}" if commit else None


def short_commit(attempt: dict[str, Any]) -> str:
    """Return the first digits of the commit, with + if there were other changes; empty if not known."""
    return (attempt.get("git_commit") or "")[:12] + ("+" if attempt.get("git_changes") else "")


def attempts(record: RunRecord) -> Table:
    """Return a row for each attempt."""
    head = ["attempt", "resumed after step", "processes", "host", "start (UTC)", "end (UTC)", "git commit", "reason"]
    rows = [
        [
            str(attempt.get("attempt")),
            f"{attempt['from_step']:,}" if attempt.get("from_step") is not None else "training did not start",
            str(attempt.get("world_size") or ""),
            str(attempt.get("host")),
            _time(attempt.get("start")),
            _time(attempt.get("ended")) or "not released",
            short_commit(attempt),
            attempt.get("reason") or "",
        ]
        for attempt in record.attempts
    ]
    shown = [at for at, name in enumerate(head) if name != "git commit" or any(row[at] for row in rows)]
    return Table("Attempts", [head[at] for at in shown], [[row[at] for at in shown] for row in rows])


def _time(text: str | None) -> str:
    """Return a time of an attempt's file, `2026-01-31T12:00:00Z`, for people."""
    return (text or "").replace("T", " ").rstrip("Z")
