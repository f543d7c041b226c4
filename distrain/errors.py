"""Errors, by what is to be done about them, and the exit codes of every command.

Which error ends with which code: `distrain.failures`.
"""

EXIT_OK = 0
EXIT_FAULT = 1
"""A fault of the program: an unexpected exception, shown with its traceback."""
EXIT_AGAIN = 75
"""Run it again: stopped on request, or a peer was lost (`EX_TEMPFAIL` of sysexits.h)."""
EXIT_NEVER_AGAIN = 78
"""Run it again unchanged and it fails again: configuration, data or sources (`EX_CONFIG` of sysexits.h)."""


class UserError(ValueError):
    """The message names what is wrong and the cure; commands print it without a traceback and exit with 78
    (`UnreachableError`: 75).
    """


class ConfigError(UserError):
    """The configuration, a command line or the number of processes cannot be used."""


class DataError(UserError):
    """A source, a data set or a checkpoint is missing, damaged or of another kind than expected."""


class ShardError(DataError):
    """One shard is damaged: only the process that read it knows."""


class UnreachableError(ShardError):
    """A server did not answer, however often it was asked: another time it may, so commands exit with 75. Where shards
    are read it is told as any other reason why one cannot be had.
    """


class DivergedError(UserError):
    """The loss is NaN or infinite: the same run would diverge again, so it is not worth running unchanged."""


class AgainError(RuntimeError):
    """The same command, run again, goes on where this one ended; commands exit with 75."""


class Stopped(AgainError):  # noqa: N818 - what was asked for, not an error
    """A stop was requested: by a signal, to one process or to all."""


class PeerLostError(AgainError):
    """Another process of the run is gone, or does not answer."""


class BusyError(AgainError):
    """Another job is writing in the run's folder."""


class SaveError(RuntimeError):
    """The last checkpoint could not be saved: the run's last steps are lost."""
