"""Files of weights that are fetched once into torch.hub's cache, as torchvision does."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch

from distrain.errors import ConfigError
from distrain.text import printable

_SILENCE_SECONDS = 60.0
"""Time without an answer or data from the server after which an attempt fails; torch.hub alone would wait for ever."""


def fetch(subject: str, url: str) -> Path:
    """Return the file of an address in torch.hub's cache; fetch it if it is not there.

    What is fetched has the sha256 digest whose beginning is in its name, or is not kept. It gets its name when it is
    complete.

    Args:
        subject: the beginning of messages, such as the key and its value.
        url: address of the file, `…/NAME-DIGEST.pth`.

    Raises:
        ConfigError: it cannot be fetched; the message says how to do that on another machine.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _time_out(_SILENCE_SECONDS):
            torch.hub.download_url_to_file(url, str(path), _digest_in(path), progress=False)
    except Exception as error:  # of several kinds: network, server, disk, digest
        raise ConfigError(
            f"{subject}: {url} cannot be fetched: {printable(error)}; fetch it on a machine with a network (curl -O"
            f" {url}), and copy it to {path}"
        ) from error
    return path


@contextlib.contextmanager
def _time_out(seconds: float) -> Iterator[None]:
    """Within the block, new connections of Python fail after so long without data."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def remarks(path: Path) -> list[str]:
    """Return a message if a file is not the one that its name says: a copy that was made by hand may be damaged."""
    prefix = _digest_in(path)
    if prefix is None:
        return []
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # the message is that of who reads the weights
        return []
    if digest.startswith(prefix):
        return []
    return [f"{path} is not the published file: its sha256 begins with {digest[: len(prefix)]}; delete it if you did"
            " not make it yourself"]  # fmt: skip


def _digest_in(path: Path) -> str | None:
    """Return the beginning of the sha256 digest in the name NAME-DIGEST.SUFFIX, as torch.hub does; None without one."""
    match = torch.hub.HASH_REGEX.search(path.name)
    return match[1] if match else None
