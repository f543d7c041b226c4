"""The records in a run's folder: a schema for each kind of JSON file, and reading and writing them. Imports no torch.

A file may be damaged, or come from another version of distrain: nothing in it is used before it is checked. A schema
has the keys that are read; a file may have more.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distrain import config, files
from distrain.errors import AgainError, DataError
from distrain.text import printable

VERSION = 1
"""Version of the files in a run's folder, which each of them has."""

_MISSING = (errno.ENOENT, errno.ENOTDIR)
NOT_A_FILE = (errno.EISDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Reasons for not reading a file that are not a disk or server that fails for a while."""
_MAX_PIXELS = 2**26
"""Most pixels of the images of a bundle: its numbers must not ask for more memory than a machine has."""
_MAX_REASON = 200
_MAX_LINE = 2**30


def _is_time(text: str) -> str:
    time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    return text


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
"""Seconds, epochs, images per second or another rate."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Time = Annotated[str, AfterValidator(_is_time)]
Step = Annotated[str, Field(pattern=r"^step-[0-9]{8,18}$")]
"""Name of a checkpoint's folder."""


class Part(BaseModel):
    """A part of a record, or a line of a file."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Record(Part):
    """A JSON file with a version."""

    version: Literal[1]
    max_bytes: ClassVar[int] = 2**24


class Attempt(Record):
    """RUN/attempts/000001.json, the lease on the folder while it is the newest."""

    attempt: Positive
    token: Annotated[str, Field(min_length=1)]
    host: str
    process: Positive
    machine: str | None
    process_start: str | None
    job: str | None
    start: Time
    renewed: Time
    beat: Count
    ended: Time | None
    code: Annotated[int, Field(ge=0, le=255)] | None = None
    reason: str = ""
    seconds: Amount | None = None
    """Time for which it had the folder when the file was written."""
    startup_seconds: Amount | None = None
    """Time for which it had existed when it took the folder."""
    from_step: Count | None = None
    world_size: Positive | None = None
    command: str | None = None
    git_commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    git_changes: bool | None = None
    identity: str | None = None
    """Digest of the run's identity, where it has a mirror."""


class Exit(Record):
    """RUN/exit.json: the end of the newest attempt that `distrain launch` started; `code` is null while it runs."""

    launch: Count
    attempts_without_progress: Count
    code: Annotated[int, Field(ge=0, le=255)] | None
    reason: str
    step: Count | None
    attempt: Count
    job: str | None = None


class NodeExit(Record):
    """RUN/nodes/00001.json: the end of another node than the first one."""

    code: Annotated[int, Field(ge=0, le=255)]
    reason: str
    host: str
    killed: bool
    time: Amount
    job: str | None = None
    step: Count = 0
    attempts_without_progress: Count = 0


_Side = Annotated[int, Field(ge=1, le=2**20)]
_Shape = Annotated[list[_Side], Field(min_length=3, max_length=3)]


class _Resizing(Part):
    crop: Annotated[list[_Side], Field(min_length=2, max_length=2)]
    resize: _Side | None


class _SetupData(Part):
    dir: str
    source: dict[str, Any]
    manifest: str
    classes: Annotated[list[str], Field(min_length=1)]
    image_shape: _Shape
    evaluation: _Resizing | None = None
    splits: dict[str, Count]
    shards: Count
    lanes: Count

    @model_validator(mode="after")
    def _has_train(self) -> _SetupData:
        if "train" not in self.splits:
            raise ValueError("no split train")
        return self


class _SetupModel(Part):
    name: str
    parameters: Count
    dependent: list[str]


class _SetupProcesses(Part):
    number: Positive
    nodes: Positive
    device: str
    device_name: str | None


class _SetupMachine(Part):
    processor: str
    cores: Any
    memory_gib: Any
    system: str


class Setup(Record):
    """RUN/setup.json: the data set, model, processes and machine of the newest attempt."""

    max_bytes: ClassVar[int] = 2**28
    data: _SetupData
    model: _SetupModel
    processes: _SetupProcesses
    steps: Count
    steps_per_epoch: Count
    from_step: Count
    machine: _SetupMachine
    versions: dict[str, str]
    bits: dict[str, str]


class _Scores(Record):
    """The scores of a checkpoint on a split."""

    max_bytes: ClassVar[int] = 2**28
    accuracy: Fraction
    correct: Count
    total: Positive
    loss: Finite
    accuracy_interval: Annotated[list[Fraction], Field(min_length=2, max_length=2)]
    top5_accuracy: Fraction | None
    macro_f1: Fraction
    calibration_error: Fraction
    accuracy_by_class: Annotated[dict[str, Fraction | None], Field(min_length=1)]
    precision_by_class: dict[str, Fraction | None]
    confusion: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    checkpoint: Annotated[str, Field(min_length=1)]
    world_size: Positive

    @model_validator(mode="after")
    def _fits(self) -> _Scores:
        classes = len(self.accuracy_by_class)
        if any(true >= classes or predicted >= classes for true, predicted, _ in self.confusion):
            raise ValueError(f"confusion: has classes beyond the {classes} of accuracy_by_class")
        if sum(count for *_, count in self.confusion) != self.total:
            raise ValueError(f"confusion: its counts do not sum to {self.total}")
        if self.precision_by_class.keys() != self.accuracy_by_class.keys():
            raise ValueError("precision_by_class: has other classes than accuracy_by_class")
        return self


class Evaluation(_Scores):
    """RUN/evaluations/SPLIT-CHECKPOINT.json: the scores of `distrain evaluate`."""

    split: Literal["train", "val", "test"]


class _PeakMemory(Part):
    host: Amount
    device: Amount | None


class Result(_Scores):
    """RUN/result.json: the scores of a run that is done."""

    steps: Count
    epochs: Amount
    dropped_per_epoch: Count
    seconds: Amount
    compile_seconds: Amount
    train_seconds: Amount
    attempt_seconds: Amount | None = None
    pause_seconds: Amount | None = None
    goodput: Fraction | None = None
    images_per_second: Amount
    tflops_per_second: Amount | None = None
    mfu: Amount | None = None
    memory_gib: _PeakMemory
    train_accuracy: Fraction | None
    checkpoint: Step
    val_accuracy: Fraction | None
    profile: dict[str, Finite]
    stopped_early: str | None = None
    warnings: list[str]
    unreadable: list[str] = []
    precision: str
    device: str
    dependent_layers: list[str]


class _Best(Part):
    step: Count
    accuracy: Fraction


class State(Record):
    """state.json of a checkpoint."""

    step: Count
    identity: dict[str, Any]
    best: _Best | None
    why: str
    lines: Count
    evaluated_step: Count
    seconds: Amount
    compile_seconds: Amount = 0
    losses: dict[str, Any]
    scaler: Any
    evaluations_since_best: Count = 0
    peak: _Best | None = None
    collapsed: bool = False
    warnings: list[str] = []
    bad: dict[str, str] = {}
    ids: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    bits: dict[str, str]


class Digests(Record):
    """digests.json of a checkpoint, which is written last: the xxh3 digests of the other files."""

    files: dict[str, str]


class _Decoding(Part):
    background: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
    bit_depth: Annotated[int, Field(ge=1, le=16)]
    max_pixels: Positive


_Channels = Annotated[list[Finite], Field(min_length=1)]


class Description(Part):
    """A model without its weights: all that is needed to build it, and to prepare images for it."""

    model: config.Model
    seed: Count
    classes: Annotated[list[str], Field(min_length=1)]
    image_shape: _Shape
    """H, W, C of the images that the model was built for."""
    evaluation: _Resizing
    flip: bool
    decoding: _Decoding
    mean: _Channels
    std: _Channels
    precision: config.Precision
    deterministic: bool
    checkpoint: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Description:
        if not self.image_shape[2] == len(self.mean) == len(self.std):
            raise ValueError(f"mean, std: not one number for each of {self.image_shape[2]} channels")
        return self


class Bundle(Description, Record):
    """config.json of a bundle; `files`: the sha256 digests of its other files that are not for people to edit."""

    max_bytes: ClassVar[int] = 2**28
    library_name: Literal["distrain"]
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]

    @model_validator(mode="after")
    def _is_usable(self) -> Bundle:
        if "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: a name is empty, or there twice")
        sides = {
            "image_shape": self.image_shape[:2],
            "evaluation.crop": self.evaluation.crop,
            "evaluation.resize": [self.evaluation.resize or 1] * 2,
        }
        for name, (height, width) in sides.items():
            if height * width > _MAX_PIXELS:
                raise ValueError(f"{name}: images of more than {_MAX_PIXELS:,} pixels")
        return self


class TrackerId(Record):
    """RUN/wandb-id, RUN/mlflow-id: the run's id there, and the folder that it belongs to: a copy is another run."""

    id: Annotated[str, Field(pattern=r"^[^/\\#?%:\s\x00-\x1f\x7f]{1,128}$")]
    path: str
    device: int
    inode: int


class Line(Part):
    """A line of RUN/metrics.jsonl; what is not named here is a number as well."""

    __pydantic_extra__: dict[str, float]
    step: Count
    seconds: Amount | None = None
    train_seconds: Amount | None = None
    epoch: Amount | None = None
    digests: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Line:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if key.endswith("/accuracy") and not 0 <= value <= 1:
                raise ValueError(f"{key}: not between 0 and 1")
        return self


class AuditLine(Part):
    """A line of RUN/audit/rank-00000.jsonl."""

    step: Count
    ids: list[int]


R = TypeVar("R", bound=Record)
P = TypeVar("P", bound=Part)


def read(path: Path, kind: type[R], cure: str) -> R | None:
    """Read a record; return None if there is no such file.

    Args:
        path: the file.
        kind: its schema.
        cure: what to do if it is damaged, for the message.

    Raises:
        DataError: it is damaged, or was written by another version.
        AgainError: the disk or server does not answer now.
    """
    try:
        raw = files.read(path, kind.max_bytes)
    except OSError as error:
        if error.errno in _MISSING:
            return None
        reason = error.strerror or str(error)
        if error.errno not in NOT_A_FILE:
            raise AgainError(f"{path}: cannot be read now: {reason}") from error
        raise DataError(f"{path}: cannot be read: {reason}; {cure}") from error
    return parse(raw, kind, path, cure)


def read_or_warn(path: Path, kind: type[R], problems: list[str], cure: str) -> R | None:
    """Read a record that can be done without; if it cannot be read, add a message to `problems` and return None."""
    try:
        return read(path, kind, cure)
    except (DataError, AgainError) as error:
        problems.append(str(error))
        return None


def parse(raw: bytes, kind: type[P], path: Path, cure: str) -> P:
    """Check the content of a file.

    Raises:
        DataError: it is damaged, or was written by another version.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        reason = _reason(error)
    except RecursionError:
        reason = "nested too deeply"
    raise DataError(f"{path}: damaged, or written by another version of distrain ({reason}); {cure}")


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = f"{where}: {first['msg']}" if where else first["msg"]
    message = printable(message.replace("Value error, ", ""))
    return message if len(message) <= _MAX_REASON else f"{message[:_MAX_REASON]}…"


def content_of(record: Part) -> dict[str, Any]:
    """Return the keys that the file had, without its version."""
    return record.model_dump(exclude_unset=True, exclude={"version"})


def to_json(content: Mapping[str, Any]) -> str:
    """Format a record with its version."""
    return json.dumps({"version": VERSION, **content}, indent=1, ensure_ascii=False) + "\n"


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file but a last one without an end, which is being written or whose writer was killed.

    Raises:
        OSError: the file cannot be read; a missing one has no lines.
    """
    try:
        file = files.open_regular(path)
    except OSError as error:
        if error.errno in _MISSING:
            return
        raise
    with file:
        while (raw := file.readline(_MAX_LINE)).endswith(b"\n"):
            yield raw


def lines(path: Path, kind: type[P], problems: list[str], cure: str) -> Iterator[P]:
    """Yield the records in a file with one of them a line.

    Args:
        path: the file.
        kind: the schema of a line.
        problems: gets a message if lines are damaged, which are passed over, or the file cannot be read.
        cure: what to do then, for the message.
    """
    damaged, first = 0, ""
    try:
        for number, raw in enumerate(raw_lines(path), 1):
            try:
                yield parse(raw, kind, path, cure)
            except DataError as error:
                damaged += 1
                first = first or str(error).replace(": damaged", f", line {number}: damaged", 1)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error}; {cure}")
    if damaged:
        problems.append(first if damaged == 1 else f"{first} ({damaged} lines are damaged)")
