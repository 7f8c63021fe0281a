"""`flowctl`: asks flowd, and reads what jobs wrote. Loads nothing that a command does not need."""

import sys

from flowd.command_line import CTL_COMMANDS, run_command_line

ABOUT = (
    "Run reinforcement-learning jobs on a running flowd, watch them, and change them as they run."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_command_line("flowctl", ABOUT, CTL_COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
