"""Errors that are the user's to mend, and the exit codes of every command."""

EXIT_OK = 0
EXIT_FAULT = 1
"""A fault of the program: an unexpected exception, shown with its traceback."""
EXIT_NEVER_AGAIN = 78
"""Run it again unchanged and it fails again: configuration, data or sources (`EX_CONFIG` of sysexits.h)."""


class UserError(ValueError):
    """The message names what is wrong and the cure; commands print it without a traceback and exit with 78."""


class ConfigError(UserError):
    """The configuration, a command line or the number of processes cannot be used."""


class DataError(UserError):
    """A source, a data set or a checkpoint is missing, damaged or of another kind than expected."""


class ShardError(DataError):
    """One shard is damaged: only the process that read it knows."""


class DivergedError(UserError):
    """The loss is NaN or infinite: the same run would diverge again, so it is not worth running unchanged."""
