"""Checkpoints: written atomically, verified when they are read.

    RUN/checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json  digests.json

To commit one: write a temporary folder, fsync its files, the digests last, fsync the folder, rename it, fsync the
parent; only then delete old ones. `step-N` was saved after N steps; a folder of this name that holds another step was
renamed or copied by somebody, and is neither used nor touched. Only `save` and `load` import torch, because the
launcher verifies checkpoints without it. `save` and `prune` may run in a thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distrain import files
from distrain.errors import AgainError, DataError
from distrain.files import sync, write
from distrain.runs import records, tensor_file

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
_PARTIAL = ".partial-"
_FOLDER = re.compile("step-([0-9]{8}|[1-9][0-9]{8,17})")
_CURE = "another checkpoint of the run may be whole"
MODEL, _OPTIMIZER, _STATE, _DIGESTS = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "digests.json",
)

FILES = (_STATE, _DIGESTS, MODEL, _OPTIMIZER)
"""The files of a checkpoint, the small ones first."""

STOP = "stop"
"""Value of `why` in the state.json of a checkpoint that was saved because of a stop request."""


class RenamedError(DataError):
    """A checkpoint is whole, but its folder has the name of another step."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Number of steps trained when it was saved."""
        return int(self.state["step"])


def path_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint saved after `step` steps."""
    return folder / f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Any,
    metadata: dict[str, str] | None = None,
    check: Callable[[], object] = lambda: None,
) -> Path:
    """Write a checkpoint, so that it is complete on disk or not there at all; return its path.

    Args:
        folder: RUN/checkpoints.
        step: number of steps trained.
        model: the model's state dict.
        optimizer: the optimizer's tensors (`optimizer_state.state_tensors`).
        state: whatever else the run needs, as JSON; `step` is added.
        metadata: of the file with the model's weights, so that a copy of this file has it too.
        check: called when all is written, before it counts; it raises if this job may not commit it.

    Raises:
        OSError: no space, no permission …; the part that was written is removed.
    """
    target = path_of(folder, step)
    work = partial_path(folder, step)
    content = {
        MODEL: tensor_file.pieces(model, metadata),
        _OPTIMIZER: tensor_file.pieces(optimizer),
        _STATE: [records.to_json({**state, "step": step}).encode()],
    }
    try:
        shutil.rmtree(work, ignore_errors=True)
        folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was removed stays so
        work.mkdir()
        digests = {name: _write_hashed(work / name, pieces) for name, pieces in content.items()}
        write(work / _DIGESTS, records.to_json({"files": digests}).strip().encode())
        sync(work)
        check()  # guard: checked-before-commit
        work.rename(target)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync(folder)
    return target


def _write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file and sync it to disk; return the digest of what it should hold."""
    digest = xxhash.xxh3_128()

    def hashed() -> Iterable[bytes | memoryview]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    write(path, hashed())
    return digest.hexdigest()


def partial_path(folder: Path, step: int) -> Path:
    """Return the path of the temporary folder in which a checkpoint is written; `sweep` removes it."""
    return folder / f"{_PARTIAL}{path_of(folder, step).name}"


def sweep(folder: Path) -> None:
    """Remove the temporary folders of saves that were interrupted."""
    for work in folder.glob(f"{_PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(work, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Load a checkpoint; every file is compared with its digest.

    Raises:
        RenamedError: its folder has the name of another step.
        DataError: a file is missing or damaged, or was written by another version.
        AgainError: the disk or server does not answer now.
    """
    import safetensors.torch

    content, state = _read_verified(path)
    try:
        model, optimizer = (safetensors.torch.load(content[name]) for name in (MODEL, _OPTIMIZER))
    except Exception as error:
        raise DataError(f"{path}: not a checkpoint ({error})") from error
    return Checkpoint(path, state, model, optimizer)


def _read_verified(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the content of the files that have the right digest, and that of state.json."""
    content = {}
    digests = records.read(path / _DIGESTS, records.Digests, _CURE)
    if digests is None:
        missing = f"no {_DIGESTS}" if path.is_dir() else "no such folder"
        raise DataError(f"{path}: not a complete checkpoint ({missing})")  # guard: halved
    for name in (MODEL, _OPTIMIZER, _STATE):
        content[name] = _read_file(path / name)
        if xxhash.xxh3_128_hexdigest(content[name]) != digests.files.get(name):  # guard: digest-of-checkpoint
            raise DataError(f"{path / name}: damaged (its digest differs)")
    state = records.content_of(records.parse(content[_STATE], records.State, path / _STATE, _CURE))
    _check_name(path, state["step"])
    return content, state


def _read_file(path: Path) -> bytes:
    try:
        with files.open_regular(path) as file:
            return file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, *records.NOT_A_FILE):
            raise DataError(f"{path.parent}: not a complete checkpoint ({path.name}: {error.strerror})") from error
        # The disk or server fails now: the checkpoint itself may be good.
        raise AgainError(f"{path}: cannot be read now: {error.strerror}") from error
    except MemoryError as error:
        raise DataError(f"{path}: too large for the memory of this machine") from error


def _check_name(path: Path, step: int) -> None:
    """Check that a folder called `step-N` holds step N; other names say nothing about the step."""
    right = path_of(path.parent, step)
    if _FOLDER.fullmatch(path.name) and path.name != right.name:
        copied = f"move it out of {path.parent}" if right.exists() else f"rename it back to {right.name}"
        raise RenamedError(f"{path}: was renamed or copied, it holds step {step}; {copied}")


def is_one(path: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not; a file model.safetensors alone may come from elsewhere."""
    return (path / MODEL).exists() and ((path / _DIGESTS).exists() or (path / _STATE).exists())


def problem(path: Path) -> str | None:
    """Return why a checkpoint cannot be read; None if its files have the right digests."""
    try:
        _read_verified(path)
    except (DataError, AgainError) as error:
        return str(error)
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to `damaged-…`, so that a new one of that step can be saved.

    One that was set aside before for the same step is deleted.
    """
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in a folder, newest first, readable or not."""
    entries = folder.iterdir() if folder.is_dir() else ()
    numbers = [int(match[1]) for entry in entries if (match := _FOLDER.fullmatch(entry.name)) and entry.is_dir()]
    return sorted((step for step in numbers if path_of(folder, step).is_dir()), reverse=True)


def renamed(folder: Path) -> dict[int, str]:
    """Return a message for each step whose checkpoint's folder holds another step."""
    messages = {}
    for step in steps(folder):
        try:
            _check_name(path_of(folder, step), (read_state(path_of(folder, step)) or {}).get("step", step))
        except RenamedError as error:
            messages[step] = str(error)
    return messages


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint's state.json; None if it cannot be read."""
    state = records.read_or_warn(path / _STATE, records.State, [], _CURE)
    return records.content_of(state) if state is not None else None


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest readable checkpoint; also return one message for each newer one that is not readable."""
    skipped: list[str] = []
    for step in steps(folder):
        try:
            return load(path_of(folder, step)), skipped
        except DataError as error:
            skipped.append(str(error))  # guard: skip-damaged-checkpoint
    return None, skipped


def newest_verified(folder: Path) -> int | None:
    """Return the step of the newest checkpoint whose files have the right digests; None if there is none."""
    for step in steps(folder):
        if problem(path_of(folder, step)) is None:
            return step
    return None


def prune(folder: Path, keep: int, every: int, best: int | None) -> None:
    """Delete the checkpoints that are no longer needed.

    Retained are also the newest one that was saved because of a stop request, and the best one according to each of
    the `keep` newest: a run that resumes from one of these needs it.

    Args:
        folder: RUN/checkpoints.
        keep: number of newest checkpoints to retain; 0: nothing is deleted.
        every: retain the checkpoints whose step is a multiple of this; 0: none.
        best: step of the best checkpoint, which is retained.
    """
    states = {step: read_state(path_of(folder, step)) or {} for step in steps(folder) if keep}
    for step in superseded(states, keep, every, best):
        shutil.rmtree(path_of(folder, step))


def superseded(states: Mapping[int, Mapping[str, Any]], keep: int, every: int, best: int | None) -> list[int]:
    """Return the steps of the checkpoints that `prune` deletes.

    Args:
        states: state of each checkpoint by step; empty if it is damaged, as nothing resumes from it.
        keep: as for `prune`.
        every: as for `prune`.
        best: as for `prune`.
    """
    if not keep:
        return []
    existing = sorted(states, reverse=True)
    retained = {best, *existing[:keep]}
    retained |= {(states[step].get("best") or {}).get("step") for step in existing[:keep]}
    retained |= set([step for step in existing if states[step].get("why") == STOP][:1])
    retained |= {step for step in existing if every and step % every == 0}
    retained |= {step for step in existing if states[step].get("step", step) != step}  # not ours to delete
    return [step for step in existing if step not in retained]


def differences(saved: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Return one message for each identity field in which a checkpoint's run differs from the requested run."""
    differ = [key for key in sorted({*saved, *requested}) if saved.get(key) != requested.get(key)]
    if "data.manifest" in differ:  # then mean and std differ too
        differ = [key for key in differ if key not in ("data.mean", "data.std")]
    if "train.virtual_ranks" in differ:  # without them, an identity has fewer fields
        differ = [key for key in differ if key == "model.init" or (key in saved and key in requested)]
    return [
        _DIGEST_MESSAGES.get(key) or f"{key}: {saved.get(key)!r} in the checkpoint, {requested.get(key)!r} now"
        for key in differ
    ]


def digest_of_identity(identity: Mapping[str, Any]) -> str:
    """Return the sha256 digest of a run's identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


_DIGEST_MESSAGES = {
    "data.manifest": "data.dir: another data set now (its manifest.json has another digest)",
    "model.init": "model.init: other initial weights now",
}
"""Messages for the fields whose values are digests, which say nothing to people."""
