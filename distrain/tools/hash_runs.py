"""`distrain hash`: the digests of runs, from their metrics alone, and the first line where runs part."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.config import identity
from distrain.distributed.numerics import differences
from distrain.errors import DataError
from distrain.runs import folder
from distrain.runs.folder import RunRecord
from distrain.text import plural, shortened

log = logging.getLogger("distrain")

_OF_THE_CLOCK = (
    "seconds",
    "train_seconds",
    "compile_seconds",
    "train/images_per_second",
    "train/tflops_per_second",
    "train/mfu",
    "profile/",
    "memory/",
    "train/slowest_",
)
"""Beginnings of the keys of a line that differ between equal runs."""
_IDS = "digest of ids"
_MAX_NAMES = 5


def hash_runs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the newest digests of each run, and how each of the others compares with the first one, for JSON.

    Raises:
        DataError: a folder holds no run, or a run has no digests yet.
    """
    records = [folder.read(run) for run in runs]
    for problem in itertools.chain.from_iterable(record.problems for record in records):
        log.warning("%s", problem)
    hashes = [_newest(record) for record in records]
    for entry, record in zip(hashes[1:], records[1:], strict=True):
        entry["comparison"] = _compare(records[0], record)
    return hashes


def _newest(record: RunRecord) -> dict[str, Any]:
    lines = [line for line in record.lines if "digests" in line]
    if not lines:
        raise DataError(f"{record.folder}: has no digests yet; they are written where a run evaluates or saves")
    return {"run": str(record.folder), "step": lines[-1]["step"], **lines[-1]["digests"]}


def _compare(first: RunRecord, other: RunRecord) -> dict[str, Any]:
    """Compare the lines of two runs that are about the same, in what both have: they may log at other steps."""
    one, two = (_comparable(record.lines) for record in (first, other))
    common = [key for key in one if key in two]
    parted = next((key for key in common if _differing(one[key], two[key])), None)
    equal = common if parted is None else common[: common.index(parted)]
    both = [(key[0], one[key][_IDS], two[key][_IDS]) for key in common if _IDS in one[key] and _IDS in two[key]]
    comparison: dict[str, Any] = {
        "equal_lines": len(equal),
        "equal_to_step": max((step for step, _ in equal), default=0),
        "ids": _compare_ids(both),
        "parted": None,
    }
    if parted is not None:
        line, differing = list(one).index(parted) + 1, _differing(one[parted], two[parted])
        comparison["parted"] = {"line": line, "step": parted[0], "differing": differing}
        comparison["unlike"] = _unlike(first, other)
    return comparison


def _compare_ids(digests: Sequence[tuple[int, str, str]]) -> str:
    """Return up to which step the trained ids are equal, or by which they part, as text."""
    equal_to = 0
    for step, one, two in digests:
        if one != two:
            return f"the trained ids part between steps {equal_to:,} and {step:,}"
        equal_to = step
    return f"the trained ids are equal up to step {equal_to:,}"


def _comparable(lines: Sequence[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Return the values of each line but for those of the clock, by its step and what it is about.

    Loss and accuracy of training are means since the line before, so their names have the step of that.
    """
    comparable, since = {}, 0
    for line in lines:
        values = {name: value for name, value in line.items() if not name.startswith(_OF_THE_CLOCK)}
        about = min((name.partition("/")[0] for name in values if "/" in name), default="")
        digests = {f"digest of {name}": value for name, value in values.pop("digests", {}).items()}
        for name in ("train/loss", "train/accuracy"):
            if name in values:
                values[f"{name} since step {since:,}"] = values.pop(name)
        since = line["step"] if "train/loss" in line else since
        comparable[line["step"], about] = {**digests, **values}
    return comparable


def _differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the values that both lines have, and that differ."""
    return {name: [value, other[name]] for name, value in one.items() if name in other and value != other[name]}


def _unlike(first: RunRecord, other: RunRecord) -> list[str]:
    """Return what may be why two runs part: their configurations, data, software and hardware."""
    keys = [identity(record.config) for record in (first, other)]
    unlike = [f"{name} {keys[0][name]} and {keys[1][name]}" for name in keys[0] if keys[0][name] != keys[1][name]]
    manifests = [record.setup.get("data", {}).get("manifest") for record in (first, other)]
    if manifests[0] != manifests[1]:
        unlike.append("other data sets")
    bits = [record.setup.get("bits", {}) for record in (first, other)]
    unlike += [f"{name} {one} and {two}" for name, one, two in differences(*bits)]
    sizes = [record.setup.get("processes", {}).get("number") for record in (first, other)]
    if sizes[0] != sizes[1] and None in (record.config.train.virtual_ranks for record in (first, other)):
        unlike.append(f"{sizes[0]} and {sizes[1]} processes, without train.virtual_ranks")
    return unlike


def format_hashes(hashes: Sequence[dict[str, Any]]) -> str:
    """Format what `hash_runs` returned for people."""
    lines = []
    for entry in hashes:
        lines.append(f"{entry['run']}: step {entry['step']:,}")
        lines += [f"  {name:9}  {entry[name]}" for name in ("weights", "optimizer", "ids")]
    lines += [_format_comparison(hashes[0]["run"], entry) for entry in hashes[1:] if _is_equal(entry)]
    return "\n".join(lines)


def _is_equal(entry: dict[str, Any]) -> bool:
    return entry["comparison"]["parted"] is None and entry["comparison"]["equal_lines"] > 0


def _format_comparison(first: str, entry: dict[str, Any]) -> str:
    comparison = entry["comparison"]
    lines = plural(comparison["equal_lines"], "line")
    return f"{entry['run']}: equals {first} in {lines}, up to step {comparison['equal_to_step']:,}"


def check_equal(hashes: Sequence[dict[str, Any]]) -> None:
    """Check that no run parts from the first one.

    Raises:
        DataError: one does, or has nothing to compare; the message names the line, what differs there, and what might
            be why.
    """
    messages = []
    for entry in hashes[1:]:
        parted = entry["comparison"]["parted"]
        if parted is None:
            if not entry["comparison"]["equal_lines"]:
                messages.append(f"{entry['run']}: has no line about the same step as one of {hashes[0]['run']}")
            continue
        values = [f"{name} {_short(one)} and {_short(other)}" for name, (one, other) in parted["differing"].items()]
        message = (
            f"{entry['run']}: parts from {hashes[0]['run']} at step {parted['step']:,} (line {parted['line']} of the"
            f" metrics): {'; '.join(shortened(values, _MAX_NAMES))}"
        )
        message += f"; {entry['comparison']['ids']}"
        unlike = entry["comparison"]["unlike"]
        messages.append(f"{message}\n  the runs have {'; '.join(shortened(unlike, _MAX_NAMES))}" if unlike else message)
    if messages:
        raise DataError("\n".join(messages))


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else str(value)
