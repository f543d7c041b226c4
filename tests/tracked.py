"""Reading the files that wandb and TensorBoard write."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
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
        if kind in (1, 4):  # a complete record, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    """Return the values of protobuf items by their keys."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history."""
    return [values(record.history.item) for record in records(path) if record.HasField("history")]


def as_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl from which rows were made."""
    plain = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    return [line for line in plain if not any(key.startswith("result/") for key in line)]


def wandb_files(folder: Path) -> list[Path]:
    """Return the .wandb files of a folder's offline runs, oldest first, once they are complete.

    A separate process of wandb writes them and may be late. The file of a killed run stays incomplete: after 10 seconds
    the files are returned as they are.
    """
    deadline = time.monotonic() + 10
    while True:
        paths = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
        complete = paths and all(any(record.HasField("exit") for record in records(path)) for path in paths)
        if complete or time.monotonic() > deadline:
            return paths
        time.sleep(0.05)


def events(folder: Path) -> Any:
    """Return TensorBoard's reader of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader
