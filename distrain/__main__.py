"""The command `distrain`, also run as `python -m distrain` by torchrun and accelerate launch."""

import os
import sys

if __name__ == "__main__":
    # Python has put the current folder first (`python -m`), or that of this file. A random.py there, or a clone of
    # distrain, would replace Python's or the installed one; the script `distrain` does not see them.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.modules.pop("distrain", None)
    import importlib.util

    if importlib.util.find_spec("distrain") is None:  # not installed: this file's folder has it
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import contextlib
import importlib
import signal

from distrain import console
from distrain.environment import IN_A_GROUP, Environment


def main() -> int:
    """Run a command and return its exit code. Stop requests are noted before any slow import."""
    console.set_up()  # guard: tolerant-output
    command = "".join(sys.argv[1:2])  # the first word alone: `prepare folder train` trains nothing
    if command in (*IN_A_GROUP, "launch"):
        from distrain import signals
        from distrain.errors import ConfigError

        if command in IN_A_GROUP:
            with contextlib.suppress(ConfigError):  # cli reports it
                signals.end_with_launcher(Environment.read(os.environ))
        signals.install()  # guard: early-handlers
        if command in IN_A_GROUP:
            from distrain.launcher import standby

            standby.wait_for_work()  # before the variables of its group are read
        # When a process is gone, torch's store prints pages of C++ frames; our own message is one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    else:
        # As a container's first process it would never receive a signal that it has no handler for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from distrain import cli

    code = cli.main()
    if command in (*IN_A_GROUP, "launch"):
        # Skip the interpreter's shutdown: libraries wait there for services, and for processes that are gone; and a
        # second stop request would end this process with another exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    # Not the function above: this file may be a clone's, while the imported modules are the installed ones.
    sys.exit(importlib.import_module("distrain.__main__").main())
