"""The tar files that patterns name, and the folder or address that all of them are below.

A pattern is a path or an address, with braces as in webdataset (`train-{0000..0146}.tar`), several of them joined by
`::`. A path may also have the wildcards `*`, `**` and `?`. `@FILE` is a text file with one pattern in each line.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from braceexpand import braceexpand

from distrain import address, files
from distrain.errors import ConfigError, DataError
from distrain.text import printable, shown

MAX_TARS = 1_000_000
"""Largest number of tar files that patterns may name."""

_MAX_LIST_BYTES = 2**28
"""Size of the largest file with patterns."""

_JOINT = re.compile(r"::(?![0-9A-Fa-f:.]*\])")
"""The separator of patterns; `[::1]` is a host."""

_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?\d+)?")
_WILDCARDS = re.compile(r"[*?]")
_HTTP = ("http", "https")


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the tar files that patterns name, in the order of the patterns; those of a wildcard sorted by name.

    Returns:
        Absolute paths, and addresses as they were given.

    Raises:
        ConfigError: a pattern cannot be used, or they name no tar file or too many.
        DataError: a local file is missing or not a regular file, or a tar file is named twice.
    """
    every = itertools.chain.from_iterable(_expand(pattern, os.getcwd()) for pattern in patterns)
    names = list(itertools.islice(every, MAX_TARS + 1))
    if not names:
        raise ConfigError("no tar files are given; name them, such as 'train-{0000..0146}.tar'")
    if len(names) > MAX_TARS:
        raise _too_many("the patterns name")
    _refuse_repeated(names)
    return names


def common_root(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the deepest folder or address that tar files have in common, and their names below it.

    Args:
        names: absolute paths, or addresses, as `expand` returns them; at least one.

    Returns:
        The folder or address, and the names; `%20` in a name of http is a space.

    Raises:
        ConfigError: they are not all local, or not all of one host; or an address cannot be split at its slashes.
    """
    schemes = {address.scheme(name) for name in names}
    if schemes == {None}:
        root = os.path.commonpath([os.path.dirname(name) for name in names])
        return root, [os.path.relpath(name, root) for name in names]
    if None in schemes:
        raise ConfigError("some tar files are local and some remote; make one data set of each, or copy them together")
    addresses = [_split(name) for name in names]
    first = addresses[0]
    for name, each in zip(names, addresses, strict=True):
        if each.host != first.host:
            cure = "make one data set of each, or copy them together"
            raise ConfigError(f"{_public(names[0])} and {_public(name)}: are on different hosts; {cure}")
        if each.query != first.query:
            raise ConfigError(
                f"{_public(name)}: has another query (?…) than the first address; use one"
                " token for all of them, or s3:// or gs:// with credentials, or download the tar files"
            )
    folders = [each.parts[:-1] for each in addresses]
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False))
    common = [part for part, _ in pairs]
    root = "/".join([first.host, *common]) + first.query
    below = ["/".join(each.parts[len(common) :]) for each in addresses]
    # Names are quoted again when they are fetched.
    return root, [unquote(name) for name in below] if schemes <= {"http", "https"} else below


def _expand(pattern: str, folder: str, in_file: bool = False) -> Iterator[str]:
    """Yield the tar files of one pattern; relative paths are below `folder`."""
    if "\0" in pattern:
        raise ConfigError(f"{shown(pattern)}: is no pattern; give a path or an address of tar files")
    if pattern.startswith("@"):
        if in_file:
            raise ConfigError(f"{_public(pattern)}: a file with patterns cannot name another one; give both with @")
        yield from _expand_file(_absolute(pattern[1:], folder))
        return
    parts = _JOINT.split(pattern)
    for part, following in itertools.zip_longest(parts, parts[1:], fillvalue=""):
        if address.scheme(following) and re.fullmatch(r"[a-z0-9]+", part):
            raise ConfigError(f"{_public(part)}::…: chained addresses are not supported; give plain addresses")
        for text in _expand_braces(part):
            yield from _locate(text, folder)


def _expand_file(path: str) -> Iterator[str]:
    try:
        lines = files.read(path, _MAX_LIST_BYTES).decode().splitlines()
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}; @ is followed by a text file with patterns") from None
    except UnicodeDecodeError:
        raise DataError(f"{printable(path)}: is not UTF-8 text; @ is followed by a text file with patterns") from None
    patterns = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not patterns:
        raise DataError(f"{printable(path)}: names no tar files; write one pattern in each line")
    for pattern in patterns:
        yield from _expand(pattern, os.path.dirname(path), in_file=True)


def _expand_braces(pattern: str) -> Iterator[str]:
    try:
        number = _count(pattern)
        texts = braceexpand(pattern) if number <= MAX_TARS else iter(())
    except ValueError:
        cure = "close each {, or write a \\ before one that is part of a name"
        raise ConfigError(f"{_public(pattern)}: its braces are not balanced; {cure}") from None
    if number > MAX_TARS:
        raise _too_many(f"{_public(pattern)}: names")
    yield from texts


def _count(pattern: str) -> int:
    """Return how many texts a pattern with braces names. braceexpand would first put all of them in memory."""
    text = re.sub(r"\\.", "", pattern)
    counts: list[int] = []

    def product(part: str) -> int:
        return math.prod(counts[int(number)] for number in re.findall("\0([0-9]+)\0", part))

    while match := _INNERMOST.search(text):
        content = match[1]
        limits = _RANGE.fullmatch(content)
        if limits is None:
            counts.append(sum(product(part) for part in content.split(",")))
        else:
            counts.append(_length(*limits.groups()))
        text = f"{text[: match.start()]}\0{len(counts) - 1}\0{text[match.end() :]}"
    return product(text)


def _length(first: str | None, last: str | None, step: str | None, *letters: str) -> int:
    if first is None or last is None:
        return abs(ord(letters[0]) - ord(letters[1])) + 1
    return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1


def _locate(text: str, folder: str) -> Iterator[str]:
    """Yield the tar files of a pattern without braces."""
    if not text.strip():
        raise ConfigError("a pattern is empty; give a path or an address of tar files")
    if text.lstrip().lower().startswith("pipe:"):
        raise ConfigError(f"{_public(text)}: pipe: would run a command; give paths or addresses")
    scheme = address.scheme(text)
    if scheme not in (None, "file"):
        _check_address(text)
        yield text
        return
    if scheme == "file":
        text = text[len("file://") :]
        if not text.startswith("/"):
            raise ConfigError(f"file://{_public(text)}: names another host; write file:///FOLDER/…, or the path alone")
    path = _absolute(text, folder)
    if not _WILDCARDS.search(text) or os.path.lexists(path):
        yield _checked(path)
        return
    pattern = _absolute(text.replace("[", "[[]"), glob.escape(folder))  # a bracket is part of a name
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise DataError(f"{_public(text)}: matches no file; check the pattern")
    yield from map(_checked, matches)


def _absolute(path: str, folder: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{printable(path)}: there is no such home folder; write the whole path")
    return os.path.normpath(os.path.join(folder, expanded))


def _checked(path: str) -> str:
    """Return the path of a file that is there, and regular."""
    try:
        path.encode()
        mode = os.stat(path).st_mode
    except UnicodeEncodeError:
        raise DataError(f"{printable(path)}: its name is not UTF-8 text, as a manifest needs; rename it") from None
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}; check the pattern, or bring the file back") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{printable(path)}: is a folder; give its tar files: {printable(os.path.join(path, '*.tar'))}")
    if not stat.S_ISREG(mode):
        raise DataError(f"{printable(path)}: is neither a tar file nor a folder; give tar files")
    return path


def _check_address(text: str) -> None:
    """Check that an address names one file."""
    path = "/".join(_split(text).parts)
    wildcards = "*" if address.scheme(text) in _HTTP else "*?["
    if any(each in path for each in wildcards):
        public = _public(text)
        raise ConfigError(
            f"{public}: remote folders are not listed; name the files with braces, such as {{0000..0146}}"
        )


class _Address(NamedTuple):
    """An address: scheme and host, the parts of its path, and its query with the question mark."""

    host: str
    parts: list[str]
    query: str


def _split(text: str) -> _Address:
    scheme, _, rest = text.partition("://")
    public = _public(text)
    query = ""
    if scheme.lower() in _HTTP:
        if "#" in rest:
            raise ConfigError(f"{public}: has a fragment (#…), which no server receives; remove it, or write %23")
        rest, mark, query = rest.partition("?")
        query = mark + query
    host, *parts = rest.split("/")
    if not host or not parts or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(f"{public}: has an empty part, or . or .., or names no file; give the address of a tar file")
    return _Address(f"{scheme.lower()}://{host}", parts, query)


def _refuse_repeated(names: list[str]) -> None:
    seen: set[str | tuple[int, int]] = set()
    for name in names:
        identity: str | tuple[int, int] = name
        if address.scheme(name) is None:
            status = os.stat(name)
            identity = status.st_dev, status.st_ino
        if identity in seen:
            raise DataError(
                f"{_public(name)}: is named twice, so each of its samples would be in the data set twice; name it once"
            )
        seen.add(identity)


def _public(text: str) -> str:
    """Return a pattern or name for messages, without the secrets of its addresses."""
    return printable(address.scrub(text))


def _too_many(what: str) -> ConfigError:
    return ConfigError(f"{what} more than {MAX_TARS:,} tar files; make fewer and larger ones")
