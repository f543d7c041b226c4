"""Checks of the arguments of the public functions, for callers without a type checker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from distrain.errors import ConfigError
from distrain.text import shown

T = TypeVar("T")


def address_of(name: str, value: object) -> str:
    """Return the path or address that an argument gives, as text.

    Raises:
        ConfigError: it is neither; `name` is that of the argument.
    """
    if isinstance(value, (str, os.PathLike)) and isinstance(text := os.fspath(value), str):
        return text
    raise ConfigError(f"{name}: should be a path or an address; got {shown(value)}")


def path_of(name: str, value: object) -> Path:
    """Return the path that an argument gives.

    Raises:
        ConfigError: it is no path; `name` is that of the argument.
    """
    if isinstance(value, (str, os.PathLike)) and (text := os.fspath(value)) and isinstance(text, str):
        return Path(text)
    raise ConfigError(f"{name}: should be a path; got {shown(value)}")


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """Return an argument that is one of several texts.

    Raises:
        ConfigError: it is another one.
    """
    if value not in choices:
        raise ConfigError(f"{name}: should be {', '.join(choices[:-1])} or {choices[-1]}; got {shown(value)}")
    return value


def checked(name: str, value: T) -> T:
    """Check the fields of a dataclass against their types and limits; return it with fields of these types.

    Raises:
        ConfigError: a field has another type, or is outside its limits. The message names all of them.
    """
    try:
        return TypeAdapter(type(value)).validate_python(vars(value))
    except ValidationError as error:
        problems = dict.fromkeys(
            f"{each['loc'][0]}: {each['msg'].removeprefix('Input ')}; got {shown(vars(value)[str(each['loc'][0])])}"
            for each in error.errors(include_url=False)
        )
        raise ConfigError("\n  ".join([f"{name}: cannot be used:", *problems])) from None
