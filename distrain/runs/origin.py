"""The origin of an attempt: its command, without secrets, and the git commit of the code in the current folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain import address
from distrain.environment import COMMAND
from distrain.text import printable

_GIT_SECONDS = 2.0
"""Longest time for git: in a large working tree on a slow disk it is ended, and no commit is recorded."""
_MAX_LENGTH = 4000


def describe() -> dict[str, Any]:
    """Return `command`, `git_commit` and `git_changes` for the record of an attempt; None where they are not known."""
    commit, changes = git_commit(Path()) or (None, None)
    return {"command": os.environ.get(COMMAND) or command(sys.argv), "git_commit": commit, "git_changes": changes}


def command(arguments: Sequence[str]) -> str:
    """Return a command as it can be typed in a shell; secrets are removed from addresses and replaced by `hidden`.

    Args:
        arguments: as in `sys.argv`, the program first.
    """
    program, *rest = arguments or [""]
    path = Path(program)
    ours = path.name == "distrain" or path.parts[-2:] == ("distrain", "__main__.py")
    shown = ["distrain"] if ours else ["python", program]
    is_value = False
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if is_value:
            shown.append("hidden")
        else:
            shown.append(_public(argument))
        is_value = address.is_secret(name) and not equals and argument.startswith("-")
    return printable(shlex.join(shown), _MAX_LENGTH)


def _public(argument: str) -> str:
    """Return an argument without secrets; an address is all of it, or all of its value: it may have spaces."""
    if address.scheme(argument) is not None:
        return address.without_secrets(argument)
    name, equals, value = argument.partition("=")
    if equals and address.is_secret(name):
        return f"{name}=hidden"
    return address.scrub(f"{name}={address.without_secrets(value)}" if equals else argument)


def git_commit(folder: Path) -> tuple[str, bool] | None:
    """Return the commit that is checked out in a folder, and whether files that git tracks were changed since.

    Returns:
        None without git, outside a working tree, before the first commit, or if git does not answer in time.
    """
    git = shutil.which("git")
    if git is None:
        return None
    # As `rev-parse HEAD` and `status` in one process. No tag is a name here: the commit's digest is returned.
    arguments = ["--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=64", "--dirty"]
    try:
        done = subprocess.run(
            [git, *arguments],
            cwd=folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.fullmatch(r"([0-9a-f]{40,64})(-dirty)?", done.stdout.strip())
    return (match[1], match[2] is not None) if match else None
