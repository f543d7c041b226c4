"""Code of the user's own, named `package.module:Class`: found, called, and its mistakes told in one line."""

from __future__ import annotations

import importlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError

CATCHABLE = (Exception, SystemExit)
"""What the user's code may raise: a script that is imported may call sys.exit."""

_OURS = str(Path(__file__).parent)
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
_PYTHONS = ("<", sysconfig.get_path("stdlib"))


def make(asked: str, name: str, /, **arguments: Any) -> Any:
    """What the class `name`, `package.module:Class`, makes of the arguments.

    Args:
        asked: how messages begin: what the user wrote.
        name: looked up in the current folder, then where Python looks.
        arguments: what the class is called with.

    Raises:
        ConfigError: no such class, or its code raises.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{asked}: should be package.module:Class")
    here = str(Path.cwd())
    if here not in sys.path:  # the command `distrain` does not look into the current folder by itself
        sys.path.insert(0, here)
    with telling(asked):
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the user's module is there; what it imports is not
            raise ModuleNotFoundError(
                f"no module {error.name} in {here}, nor where Python looks; start from the folder that holds it, or"
                " name that in PYTHONPATH"
            ) from error
        return getattr(found, attribute)(**arguments)


@contextmanager
def telling(asked: str) -> Iterator[None]:
    """Turn whatever the user's code raises, which may be anything, into a ConfigError."""
    try:
        yield
    except CATCHABLE as error:
        raise ConfigError(f"{asked}: {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception of the user's code in one line, with the place in that code."""
    return " ".join(f"{type(error).__name__}: {error}".split()) + _place(error)


def _place(error: BaseException) -> str:
    """The innermost line that is the user's; else of an installed package; Python's and distrain's tell nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    # Of equals, max would take the outermost.
    frame = max(reversed(frames), key=lambda frame: _whose(frame.filename))
    return f" ({frame.filename}:{frame.lineno})" if _whose(frame.filename) else ""


def _whose(file: str) -> int:
    """2: the user's; 1: an installed package's; 0: distrain's or Python's."""
    if file.startswith(_OURS):
        return 0
    if file.startswith(_INSTALLED):  # below Python's own folder, or not
        return 1
    return 0 if file.startswith(_PYTHONS) else 2
