"""The user's own classes and functions, given as `package.module:name`: importing and calling them, showing errors."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from distrain.errors import ConfigError

CATCHABLE = (Exception, SystemExit)
"""Exceptions of the user's code that are caught; an imported script may call sys.exit."""

_DISTRAIN = str(Path(__file__).parent)
_SITE_PACKAGES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
_STANDARD_LIBRARY = ("<", sysconfig.get_path("stdlib"))


def make(subject: str, name: str, /, **arguments: Any) -> Any:
    """Import a class and call it with keyword arguments; return the object.

    Raises:
        ConfigError: there is no such class, or its code raises.
    """
    kind = find(subject, name)
    with user_code(subject):
        return kind(**arguments)


def find(subject: str, name: str) -> Any:
    """Import a class or function.

    Args:
        subject: the beginning of error messages, such as the key and its value.
        name: `package.module:name`, looked up in the current folder first, then in Python's path. What that module
            imports is looked up in Python's path first.

    Raises:
        ConfigError: there is nothing of this name that can be called, or its module raises.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{subject}: should be package.module:Class")
    with user_code(subject):
        value = getattr(_imported(module), attribute)
    if not callable(value):
        raise ConfigError(f"{subject}: is a {type(value).__name__}, and neither a class nor a function")
    return value


def _imported(name: str) -> ModuleType:
    """Import a module from the current folder, or else from Python's path.

    The folder is last in Python's path, where the module finds others beside it. First, its random.py would replace
    Python's own in whatever library imports that later.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    package = name.partition(".")[0]
    beside = PathFinder.find_spec(package, [here])
    if beside is not None and beside.origin is not None and package != "distrain":
        _import_beside(package, beside)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the user's module exists, but not one that it imports
        raise ModuleNotFoundError(
            f"no module {error.name} in {here} or in Python's path; run the command in the folder of the module, or add"
            " that folder to PYTHONPATH"
        ) from error


def _import_beside(package: str, spec: ModuleSpec) -> None:
    """Import a module or package of the current folder under its name, which must be free."""
    file = Path(str(spec.origin))
    if package in sys.stdlib_module_names:
        raise ImportError(f"{file} has the name of a module of Python's standard library: rename it")
    loaded = sys.modules.get(package)
    if loaded is not None:
        other = Path(getattr(loaded, "__file__", None) or package)
        if other.exists() and other.samefile(file):
            return
        raise ImportError(f"{file} has the name of another module that is in use, {other}: rename it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    assert spec.loader is not None  # only that of a namespace package has none
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[package]
        raise


@contextmanager
def user_code(subject: str) -> Iterator[None]:
    """Context manager around the user's code: any exception becomes a ConfigError that begins with `subject`.

    One that is a ConfigError already is raised as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except CATCHABLE as error:
        raise ConfigError(f"{subject}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Describe an exception of the user's code in one line, with file and line number."""
    return " ".join(f"{type(error).__name__}: {error}".split()) + _location(error)


def _location(error: BaseException) -> str:
    """Return ` (file:line)` of the innermost frame in the user's code, or else in an installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    # Reversed: of equal frames max returns the first, which must be the innermost.
    frame = max(reversed(frames), key=lambda frame: _relevance(frame.filename))
    return f" ({frame.filename}:{frame.lineno})" if _relevance(frame.filename) else ""


def _relevance(file: str) -> int:
    """Return 2 for the user's files, 1 for installed packages, 0 for distrain and the standard library."""
    if file.startswith(_DISTRAIN):
        return 0
    if file.startswith(_SITE_PACKAGES):  # may be a folder of the standard library
        return 1
    return 0 if file.startswith(_STANDARD_LIBRARY) else 2
