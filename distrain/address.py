"""Addresses of data sets: which text is one, and how one is shown without the secrets that people put into it; and by
which names secrets go.
"""

from __future__ import annotations

import re

_SECRET = re.compile("(token|secret|passw|credential|key$)", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_HOST = re.compile(r"([^:\[\]]*|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?")


def scheme(text: str) -> str | None:
    """What stands before `://`, in small letters; None: a path, not an address."""
    found = _SCHEME.match(text)
    return found[0].lower() if found else None


def shown(text: str) -> str:
    """An address without user, password, query and fragment: what messages and files may hold. A path as it is."""
    kind = scheme(text)
    if kind in (None, "file"):
        return text
    rest = re.split(r"[?#]", text[len(kind) + 3 :], maxsplit=1)[0]
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    # A raw / ? or # in a password ends the authority early: then no part is known to be harmless.
    if not _HOST.fullmatch(host) or ("@" not in authority and ":" in authority and "@" in text):
        return f"{kind}://…"
    return f"{kind}://{host}{slash}{path}"


def is_secret(name: str) -> bool:
    """Whether what goes by this name is not to be written down, whatever it is."""
    return _SECRET.search(name) is not None


def scrub(text: str) -> str:
    """A message whose addresses are all as `shown`."""
    return _IN_TEXT.sub(lambda found: shown(found[0]), text)
