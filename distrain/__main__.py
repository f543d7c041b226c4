"""The command `distrain`, also as `python -m distrain` under torchrun and accelerate launch."""

import sys


def main() -> int:
    """Run a command. Stop requests are noted before anything slow is imported."""
    if any(command in sys.argv[1:] for command in ("train", "evaluate", "launch")):
        from distrain import signals

        signals.end_with_launcher()
        signals.install()
    from distrain import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
