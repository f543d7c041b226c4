"""Checkpoints that are whole or not there.

    RUN/checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json  digests.json

Commit: write a temporary folder, fsync its files, digests last, fsync the folder, rename, fsync the parent; only then
prune. `step-N` was saved after N steps. torch is imported by `save` and `load` alone: the launcher verifies without it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from distrain.errors import AgainError, DataError
from distrain.files import sync, write

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
_PARTIAL = ".partial-"
_FOLDER = re.compile(r"step-(\d{8,})")
MODEL, _OPTIMIZER, _STATE, _DIGESTS = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "digests.json",
)

STOP = "stop"
"""`why` in the state.json of a checkpoint that a stop request asked for."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.state["step"])


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Any) -> Path:
    """Commit a checkpoint.

    Args:
        folder: RUN/checkpoints.
        step: steps done.
        model: the model's state dict.
        optimizer: the optimizer's tensors (`optim.state_tensors`).
        state: what else the run needs, for JSON; gets `step` added.

    Raises:
        OSError: no space, no permission …; what was written of it is removed.
    """
    import safetensors.torch

    target = path_of(folder, step)
    work = folder / f"{_PARTIAL}{target.name}"
    files = {
        MODEL: safetensors.torch.save(_owned(model)),
        _OPTIMIZER: safetensors.torch.save(_owned(optimizer)),
        _STATE: json.dumps({**state, "step": step}, indent=1).encode(),
    }
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in files.items()}
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, data in {**files, _DIGESTS: json.dumps(digests, indent=1).encode()}.items():
            write(work / name, data)
        sync(work)
        work.rename(target)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync(folder)
    return target


def sweep(folder: Path) -> None:
    """Remove what saves that were cut short have left."""
    for work in folder.glob(f"{_PARTIAL}*") if folder.is_dir() else ():
        shutil.rmtree(work, ignore_errors=True)


def load(path: Path) -> Saved:
    """A checkpoint, every file checked against its digest.

    Raises:
        DataError: not a whole checkpoint.
    """
    import safetensors.torch

    files = _read_verified(path)
    try:
        state = json.loads(files[_STATE])
        model, optimizer = (safetensors.torch.load(files[name]) for name in (MODEL, _OPTIMIZER))
    except Exception as error:
        raise DataError(f"{path}: no checkpoint ({error})") from error
    return Saved(path, state, model, optimizer)


def _read_verified(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        digests = json.loads((path / _DIGESTS).read_bytes())
        for name in (MODEL, _OPTIMIZER, _STATE):
            files[name] = (path / name).read_bytes()
            if xxhash.xxh3_128_hexdigest(files[name]) != digests[name]:  # guard: digest-of-checkpoint
                raise DataError(f"{path / name}: damaged (its digest differs)")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{path}: no whole checkpoint ({error.filename}: {error.strerror})") from error  # guard: halved
    except OSError as error:  # a disk or server that does not answer now says nothing about the checkpoint
        raise AgainError(f"{error.filename or path}: cannot be read now: {error.strerror}") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path}: no checkpoint ({error})") from error
    return files


def set_aside(path: Path) -> None:
    """Take a damaged checkpoint out of the way of the ones to come; the newest such one stays to be looked at."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first, readable or not."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [int(match[1]) for entry in entries if (match := _FOLDER.fullmatch(entry.name)) and entry.is_dir()]
    return sorted((step for step in found if path_of(folder, step).is_dir()), reverse=True)


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest readable checkpoint, and one line for each newer one that is not readable."""
    skipped: list[str] = []
    for step in steps(folder):
        try:
            return load(path_of(folder, step)), skipped
        except DataError as error:
            skipped.append(str(error))  # guard: skip-damaged-checkpoint
    return None, skipped


def newest_verified(folder: Path) -> int | None:
    """Steps of the newest checkpoint whose digests fit; None where there is none."""
    for step in steps(folder):
        try:
            _read_verified(path_of(folder, step))
        except (DataError, AgainError):
            continue
        return step
    return None


def prune(folder: Path, keep: int, every: int, best: int | None) -> None:
    """Delete all but the `keep` newest (0: none is deleted), every `every`-th step's (0: none), the newest one of a
    stop, the best, and what the newest ones call the best: a run that has to go on from one of them needs it.
    """
    if not keep:
        return
    found = steps(folder)
    states = {step: _state_of(path_of(folder, step)) for step in found}
    wanted = {best, *found[:keep]}
    wanted |= {(states[step].get("best") or {}).get("step") for step in found[:keep]}
    wanted |= set([step for step in found if states[step].get("why") == STOP][:1])
    wanted |= {step for step in found if every and step % every == 0}
    for step in found:
        if step not in wanted:
            shutil.rmtree(path_of(folder, step))


def _state_of(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_bytes())
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}  # damaged: nothing goes on from it


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line for each identity field in which a checkpoint's run differs from the one asked for."""
    differ = [key for key in sorted({*saved, *asked}) if saved.get(key) != asked.get(key)]
    if "data.manifest" in differ:  # its mean and std are other ones, too
        differ = [key for key in differ if key not in ("data.mean", "data.std")]
    return [
        _IN_WORDS.get(key) or f"{key}: {saved.get(key)!r} in the checkpoint, {asked.get(key)!r} now" for key in differ
    ]


_IN_WORDS = {
    "data.manifest": "data.dir: another data set now (its manifest.json has another digest)",
    "model.init": "model.init: other weights to begin with now",
}
"""Of what is known by its digest."""


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory (tied weights): each gets its own.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
