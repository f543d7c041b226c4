"""What wandb and TensorBoard wrote, as tests read it back."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """wandb's records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), _HEADER, b""
    assert data.startswith(b":W&B")
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        parts += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    """What protobuf items hold, by their keys."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return [values(record.history.item) for record in records(path) if record.HasField("history")]


def as_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the lines of metrics.jsonl that they were made of."""
    plain = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    return [line for line in plain if not any(key.startswith("result/") for key in line)]


def wandb_files(folder: Path) -> list[Path]:
    """The .wandb files of a folder's offline runs, oldest first: whole, as wandb's own process writes them and may be
    behind. A run that was killed has no end, and is waited for in vain.
    """
    deadline = time.monotonic() + 10
    while True:
        found = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
        whole = found and all(any(record.HasField("exit") for record in records(path)) for path in found)
        if whole or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def events(folder: Path) -> Any:
    """TensorBoard's own view of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found
