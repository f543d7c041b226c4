"""Files of weights: safetensors, or a state dict that `torch.save` wrote. What a file is, is read from its content."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain import machine
from distrain.errors import ConfigError
from distrain.text import printable, shortened

CLASSES = "classes"
"""Key of the names of the classes, as JSON, in the metadata of a safetensors file."""

_ENTRIES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
"""Entries of a training checkpoint that hold the model's state dict."""
_PREFIXES = ("module.", "model.", "net.")
"""Prefixes that DDP and AveragedModel, or training frameworks, put before each name."""
_COMPILED = "_orig_mod."
"""Part of the names of weights that torch.compile inserts for each compiled module."""
_FOREIGN = {
    b"version https://git-lfs": "is a pointer of Git LFS; fetch the file itself by `git lfs pull`",
    b"<": "is a web page, not the file; download it again",
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"\xfd7zXZ": "is compressed by xz; unpack it first",
    b"BZh": "is compressed by bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first",
    b"\x89HDF": "is an HDF5 file, of Keras perhaps; convert it to a state dict of PyTorch",
}
"""Beginnings of other files, and what to do."""


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes:
        weights: the tensors by name, on the CPU.
        classes: the names of the classes that the weights were trained on; None if the file does not say.
        notes: what was guessed, for the user.
        mean: mean of each channel that was subtracted from the images of their training; None if it is not known.
        std: standard deviation of each channel that these were divided by; None if it is not known.
    """

    weights: dict[str, Tensor]
    classes: list[str] | None
    notes: list[str]
    mean: list[float] | None = None
    std: list[float] | None = None


def read(path: Path) -> WeightFile:
    """Read a file of weights. Only tensors are unpickled, so no code of the file runs.

    Raises:
        ConfigError: it cannot be read, or holds no state dict.
    """
    try:
        beginning, size = _beginning(path)
        if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= size - 8:
            return _read_safetensors(path)
        if beginning.startswith((b"PK", b"\x80")) or beginning[257:262] == b"ustar":
            return _read_pickle(path)
    except FileNotFoundError as error:
        expected = "give a file, the folder of a run, or a name such as torchvision:DEFAULT"
        raise ConfigError(f"model.init={path}: cannot be read: {error.strerror}; {expected}") from error
    except OSError as error:
        raise ConfigError(f"model.init={path}: cannot be read: {error.strerror}") from error
    except MemoryError:
        raise ConfigError(f"model.init={path}: does not fit into the memory") from None
    foreign = (text for magic, text in _FOREIGN.items() if beginning.lstrip().startswith(magic))
    expected = "is neither a safetensors file nor a state dict saved by torch.save"
    raise ConfigError(f"model.init={path}: has no weights: it {next(foreign, expected)}")


def _beginning(path: Path) -> tuple[bytes, int]:
    """Return the first bytes of a file and its size."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"model.init={path}: is not a regular file; save the weights in one")
    if status.st_size > machine.free_memory():
        gib = status.st_size / 2**30
        raise ConfigError(f"model.init={path}: has {gib:,.1f} GiB, more than the memory that is free here")
    with path.open("rb") as file:
        return file.read(512), status.st_size


def _read_safetensors(path: Path) -> WeightFile:
    import safetensors.torch

    content = path.read_bytes()
    try:
        weights = safetensors.torch.load(content)
    except Exception as error:  # of several kinds
        raise ConfigError(f"model.init={path}: has no weights: it is a damaged safetensors file ({error})") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return WeightFile(weights, _class_names(header.get("__metadata__", {}).get(CLASSES)), [])


def _class_names(text: Any) -> list[str] | None:
    try:
        names = json.loads(text)
    except (TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _read_pickle(path: Path) -> WeightFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises various errors for other files
        raise ConfigError(f"model.init={path}: has no weights: {_explain(path, str(error))}") from error
    notes = []
    while not _is_state_dict(content):
        entry = next(
            (name for name in _ENTRIES if isinstance(content, dict) and isinstance(content.get(name), dict)), ""
        )
        if not entry:
            raise ConfigError(f"model.init={path}: is not a state dict{_described(content)}; save `model.state_dict()`")
        others = [printable(str(name)) for name in content if name != entry]
        notes.append(
            f"of its entries, {entry} is taken" + (f", not {', '.join(shortened(others, 5))}" if others else "")
        )
        content = content[entry]
    return WeightFile(dict(content), None, notes)


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def _described(content: Any) -> str:
    """Return ` (it …)` for a message."""
    if not isinstance(content, dict):
        return f" (it is a {type(content).__name__})"
    names = [printable(str(name)) for name, value in content.items() if not isinstance(value, Tensor)]
    return f" (it holds {', '.join(shortened(names, 5))})" if names else " (it is empty)"


def _explain(path: Path, message: str) -> str:
    """Say why `torch.load` refuses a file, and the cure."""
    objects = re.search(r"GLOBAL (\S+)", message)
    if objects is None:
        first = (message.splitlines() or [""])[0][:200]
        return f"torch.load cannot read it ({printable(first)}); save `model.state_dict()` by torch.save"
    return (
        f"it holds Python objects ({printable(objects[1])[:100]}), which could run code; if you trust it, save its"
        f" state dict alone: content = torch.load({str(path)!r}, weights_only=False), and torch.save what is"
        " content['state_dict'], or content.state_dict() of a whole model"
    )


def match(weights: Mapping[str, Tensor], expected: Set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove known prefixes from the names of weights, where that gives names of the model.

    Args:
        weights: tensors by name.
        expected: the names in the model.

    Returns:
        The tensors by their new names, and notes for the user. Weights that match no name stay as they are.
    """
    names = {name: name for name in weights if name in expected or name != "n_averaged"}  # AveragedModel's counter
    removed: list[str] = []
    if any(_COMPILED in name and name not in expected for name in weights):
        names = {key: name.replace(_COMPILED, "") for key, name in names.items()}
        removed.append(_COMPILED)
    while names and not expected & set(names.values()):
        prefix = next((each for each in _PREFIXES if all(name.startswith(each) for name in names.values())), None)
        if prefix is None:
            return dict(weights), []
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        removed.append(prefix)
    notes = [f"{' and '.join(removed)} is removed from its names"] if removed else []
    return {name: weights[key] for key, name in names.items()}, notes
