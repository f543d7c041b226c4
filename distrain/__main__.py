"""The command `distrain`, also run as `python -m distrain` by torchrun and accelerate launch."""

import contextlib
import os
import signal
import sys

from distrain import console


def main() -> int:
    """Run a command and return its exit code. Stop requests are noted before any slow import."""
    console.set_up()  # guard: tolerant-output
    command = "".join(sys.argv[1:2])  # the first word alone: `prepare folder train` trains nothing
    if command in ("train", "evaluate", "doctor", "launch"):
        from distrain import signals
        from distrain.environment import Environment
        from distrain.errors import ConfigError

        with contextlib.suppress(ConfigError):  # cli reports it
            signals.end_with_launcher(Environment.read(os.environ))
        signals.install()  # guard: early-handlers
        # When a process is gone, torch's store prints pages of C++ frames; our own message is one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    else:
        # As a container's first process it would never receive a signal that it has no handler for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from distrain import cli

    code = cli.main()
    if command in ("train", "evaluate", "doctor"):
        # Skip the interpreter's shutdown: libraries wait there for services, and for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
