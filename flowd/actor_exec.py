"""Runs an actor's entry in a process of its own, to its exit. Standard library alone.

The zygote calls `run_entry` in a child it forked; for a stage with its own interpreter it executes
this module there, so nothing here may need a package that the other interpreter lacks.
"""

import argparse
import atexit
import faulthandler
import importlib
import io
import json
import logging
import os
import sys
import traceback
from typing import Any, NoReturn

from flowd import linux


def run_entry(entry: str, argument: bytes, argument_is_json: bool) -> NoReturn:
    """Call `module:function` with the argument and end the process with what it returns.

    An integer is the exit code, None is 0; an exception leaves its traceback on stderr and exits 1.
    """
    code = 1
    try:
        # The log shows each line when it is written, and a crash in C code says where.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        faulthandler.enable()
        linux.keep_freed_memory()
        code = _exit_code(_resolve(entry)(_decode(argument, argument_is_json)))
    except SystemExit as stop:
        code = _exit_code(stop.code)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        # The interpreter is not finalised: a forked child would run what belongs to the zygote's
        # frames, and a stuck worker thread must not keep a finished actor. What the entry
        # registered does run.
        try:
            atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(code)


def forget_exit_handlers() -> None:
    """Drop exit handlers inherited from the process that forked this one, except logging's.

    Handlers of preloaded modules clean up what is the parent's, temporary folders above all.
    """
    atexit._clear()
    atexit.register(logging.shutdown)


def _resolve(entry: str) -> Any:
    module, separator, function = entry.partition(":")
    if not (module and separator and function):
        raise ValueError(f"entry {entry!r} is not of the form module:function")
    return getattr(importlib.import_module(module), function)


def _decode(argument: bytes, argument_is_json: bool) -> Any:
    return json.loads(argument) if argument_is_json else argument


def _exit_code(result: object) -> int:
    if result is None or isinstance(result, int):
        return (result or 0) & 0xFF
    print(result, file=sys.stderr)  # as the interpreter does with sys.exit("text")
    return 1


def main() -> NoReturn:
    """Entry of `python -m flowd.actor_exec`; the argument waits in an inherited descriptor."""
    parser = argparse.ArgumentParser(description="run an actor's entry; started by flowd")
    parser.add_argument("--entry", required=True)
    parser.add_argument("--argument-fd", type=int, required=True)
    parser.add_argument("--argument-is-json", action="store_true")
    options = parser.parse_args()
    with open(options.argument_fd, "rb") as file:
        argument = file.read()
    run_entry(options.entry, argument, options.argument_is_json)


if __name__ == "__main__":
    main()
