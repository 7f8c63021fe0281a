"""`flowd`, or `python -m flowd`: starts and stops the daemon of this machine."""

import sys

from flowd.command_line import DAEMON_COMMANDS, run_command_line

ABOUT = (
    "The daemon that owns this machine's devices and runs the actors of jobs; ask it with flowctl."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_command_line("flowd", ABOUT, DAEMON_COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
