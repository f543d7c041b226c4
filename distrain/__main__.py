"""The command `distrain`, also as `python -m distrain` under torchrun and accelerate launch."""

import os
import sys


def main() -> int:
    """Run a command. Stop requests are noted before anything slow is imported."""
    command = "".join(sys.argv[1:2])  # no other word: `prepare folder train` trains nothing
    if command in ("train", "evaluate", "launch"):
        from distrain import signals

        signals.end_with_launcher()
        signals.install()
    from distrain import cli

    code = cli.main()
    if command in ("train", "evaluate"):
        # Not by way of the interpreter's end: libraries wait there for services, and for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
