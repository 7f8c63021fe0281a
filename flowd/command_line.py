"""Turns a command line into one call of a command module: shared options, errors, exit codes.

A command is one file in flowd/commands/ with NAME, HELP, `add_arguments(parser)` and
`run(args) -> int` (the console half), and where flowd is asked, `async handle(daemon, arguments) ->
dict` or `async stream(daemon, arguments)`, an iterator of dicts, for what follows (the daemon half;
see `flowd.control`). Command modules import light at the top, so that help costs nothing.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from flowd.errors import FlowdError, JobFailed, RequestError

DAEMON_COMMANDS = ("up", "down", "token")
CTL_COMMANDS = (
    "submit",
    "run",
    "plan",
    "jobs",
    "status",
    "channels",
    "logs",
    "events",
    "samples",
    "eval",
    "audit",
    "trace",
    "cancel",
    "resume",
    "export",
    "scale",
    "nodes",
    "devices",
    "doctor",
)
EXIT_CODES = "exit codes: 0 done, 1 it failed, 2 the request was wrong (nothing was changed)"


def command_module(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"flowd.commands.{name}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are RequestErrors that suggest the near name."""

    def __init__(self, **keywords: Any) -> None:
        self.option_names: list[str] = []
        super().__init__(allow_abbrev=False, **keywords)

    def add_argument(self, *names: Any, **keywords: Any) -> argparse.Action:
        self.option_names += [n for n in names if isinstance(n, str) and n.startswith("-")]
        return super().add_argument(*names, **keywords)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see `{self.prog} --help`")


def run_command_line(
    program: str, about: str, commands: Sequence[str], argv: Sequence[str] | None = None
) -> int:
    """Parse, run the command, and return the exit code. Errors become one sentence on stderr."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(program, about, commands, argv)
    except JobFailed as error:
        if error.traceback:
            print(error.traceback.rstrip("\n"), file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except FlowdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) left. Whatever the interpreter still flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(program: str, about: str, commands: Sequence[str], argv: Sequence[str]) -> int:
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in commands:
        raise RequestError(_unknown_command(program, name, commands))
    parser = Parser(prog=program, description=about, epilog=EXIT_CODES)
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers: dict[str, Parser] = {}
    # One command named: only its module is loaded.
    for known in commands if name is None else (name,):
        module = command_module(known)
        parsers[known] = chosen.add_parser(
            known, help=module.HELP, description=module.HELP, epilog=EXIT_CODES
        )
        module.add_arguments(parsers[known])
        _add_shared(parsers[known])
    args, rest = parser.parse_known_args(argv)
    if rest:
        _refuse(rest, parsers.get(args.command, parser))
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    return int(command_module(args.command).run(args))


def _add_shared(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print data as JSON")
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help="flowd's state directory (default: $FLOWD_HOME, else ~/.flowd)",
    )


def _refuse(rest: Iterable[str], parser: Parser) -> NoReturn:
    word = next(iter(rest))
    option = word.partition("=")[0]
    near = difflib.get_close_matches(option, parser.option_names, n=1)
    if near:
        way = f"did you mean {near[0]}?"
    elif word.startswith("-"):
        way = f"options are {', '.join(parser.option_names)}"
    else:
        way = f"see `{parser.prog} --help` for what it takes"
    raise RequestError(f"{word} is not an argument of `{parser.prog}`; {way}")


def _unknown_command(program: str, name: str, commands: Sequence[str]) -> str:
    if name in DAEMON_COMMANDS:
        return f"{name} is not a command of {program}; it is `flowd {name}`"
    if name in CTL_COMMANDS:
        return f"{name} is not a command of {program}; it is `flowctl {name}`"
    near = difflib.get_close_matches(name, commands, n=1)
    if near:
        return f"{name} is not a command of {program}; did you mean `{program} {near[0]}`?"
    if re.search(r"\.toml$", name):
        return f"{name} is not a command of {program}; to start a job: `flowctl submit {name}`"
    return f"{name} is not a command of {program}; commands are {', '.join(commands)}"
