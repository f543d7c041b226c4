"""Addresses of data sets: how they are recognised, and how secrets are removed from them before they are shown."""

from __future__ import annotations

import re
from pathlib import Path

_SECRET = re.compile("(token|secret|passw|credential|key$)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>]+")
"""An address in a text. A limited scheme: otherwise the search in a long word takes time that grows with its square."""
_HOST = re.compile(r"([^:\[\]]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?")


def scheme(text: str) -> str | None:
    """Return the scheme of an address (the part before `://`) in lower case; None if the text is a path."""
    match = _SCHEME.match(text)
    return match[0].lower() if match else None


def is_address(path: Path) -> bool:
    """Whether a path was an address: pathlib makes `https:/host` of `https://host`."""
    return re.match(r"\w+:/", str(path)) is not None


def without_secrets(text: str) -> str:
    """Return an address without user, password, query and fragment, fit for messages and files. Paths are unchanged."""
    prefix = scheme(text)
    if prefix in (None, "file"):
        return text
    rest = re.split(r"[?#]", text[len(prefix) + 3 :], maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    # An unescaped / ? or # in a password ends the authority early: then any part may be a secret.
    if not _HOST.fullmatch(host) or ("@" not in authority and ":" in authority and "@" in text):
        return f"{prefix}://…"
    return f"{prefix}://{host}{slash}{path}"


def is_secret(name: str) -> bool:
    """Whether the name of a value says that it is a secret (`api_key`, `token` …), so that it must not be recorded."""
    return _SECRET.search(name) is not None


def scrub(text: str) -> str:
    """Return a message with the secrets removed from all addresses in it."""
    return _IN_TEXT.sub(lambda match: without_secrets(match[0]), text)
