"""The command `distrain`, also as `python -m distrain` under torchrun and accelerate launch."""

import os
import signal
import sys


def main() -> int:
    """Run a command. Stop requests are noted before anything slow is imported."""
    command = "".join(sys.argv[1:2])  # no other word: `prepare folder train` trains nothing
    if command in ("train", "evaluate", "doctor", "launch"):
        from distrain import console, signals
        from distrain.environment import Environment

        signals.end_with_launcher(Environment.read(os.environ))
        signals.install()  # guard: early-handlers
        console.keep_going()  # guard: tolerant-output
        # When a process is gone, torch's store prints pages of C++ frames; we say it in a line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    else:
        # As a container's first process it would never see a signal that it has no handler for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from distrain import cli

    code = cli.main()
    if command in ("train", "evaluate", "doctor"):
        # Not by way of the interpreter's end: libraries wait there for services, and for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
