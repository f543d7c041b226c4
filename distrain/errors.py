"""Exceptions, grouped by what the user can do about them, and the exit codes of every command."""

from typing import Literal

Kind = Literal["fault", "user", "again", "busy", "peer", "hang", "save", "gpu"]
"""Class of the cause for which a process ends; "fault" is an unexpected exception."""

EXIT_OK = 0
EXIT_FAULT = 1
"""A fault of the program: an unexpected exception, shown with its traceback."""
EXIT_AGAIN = 75
"""Run the command again: it was stopped on request, or a peer was lost (`EX_TEMPFAIL` of sysexits.h)."""
EXIT_NEVER_AGAIN = 78
"""The same command would fail again: wrong configuration, data or sources (`EX_CONFIG` of sysexits.h)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C ended a command that has nothing to save."""


class UserError(ValueError):
    """An error that the user can correct: the message names the problem and its cure.

    Commands print it without a traceback and exit with 78 (`UnreachableError`: 75).
    """

    kind: Kind = "user"
    exit_code = EXIT_NEVER_AGAIN


class ConfigError(UserError):
    """The configuration, a command line or the number of processes cannot be used."""


class DataError(UserError):
    """A source, data set or checkpoint is missing, damaged or not of the expected kind."""


class UnreadableImagesError(DataError):
    """More images than allowed turned out to be unreadable while they were used."""


class ShardError(DataError):
    """A shard cannot be used. Only the process that read it knows."""


class UnreachableError(ShardError):
    """A server did not answer after all retries. It may answer later, so commands exit with 75.

    While shards are read it is handled like any other reason why a shard cannot be used.
    """

    kind: Kind = "peer"
    exit_code = EXIT_AGAIN  # guard: unreachable


class CrashedError(UserError):
    """A worker process of `prepare` crashed; the message names the sample. Commands exit with 1."""

    kind: Kind = "fault"
    exit_code = EXIT_FAULT


class DivergedError(UserError):
    """The loss is NaN or infinite. The same run would diverge again, so commands exit with 78."""

    step = 0
    """The step that failed, counted from 0."""


class AgainError(RuntimeError):
    """The same command, run again, resumes where this one ended; commands exit with 75."""

    kind: Kind = "again"
    exit_code = EXIT_AGAIN


class Stopped(AgainError):  # noqa: N818 - requested, so not an error
    """A signal to one process, or to all, requested a stop."""


class PeerLostError(AgainError):
    """Another process of the run is gone or does not answer."""

    kind: Kind = "peer"


class GpuError(AgainError):
    """A GPU failed, or other processes use its memory. Only the process that uses it knows."""

    kind: Kind = "gpu"


class BusyError(AgainError):
    """Another process is writing to the folder."""

    kind: Kind = "busy"


class FolderLostError(UserError):
    """The run's folder was removed, moved or replaced while its job was writing there; commands exit with 78.

    The same command, run again, would silently begin another run, or meet another one in its folder.
    """

    kind: Kind = "busy"


class SaveError(RuntimeError):
    """The last checkpoint could not be saved, so the last steps are lost; commands exit with 1."""

    kind: Kind = "save"
    exit_code = EXIT_FAULT
