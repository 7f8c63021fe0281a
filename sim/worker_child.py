"""The process of one worker: hosts an environment and answers the calls of its parent, one after the other.

Run as `python -m sim.worker_child SOCKET AREA PARENT` with two inherited descriptors and the parent's pid. It ends when
the parent closes the socket, and the kernel kills it when the parent's thread that started it is gone, even in the
middle of a step.
"""

import ctypes
import os
import signal
import socket
import sys
import traceback
from typing import Any

from sim import errors
from sim.chunks import Chunked
from sim.registry import make
from sim.worker_wire import SharedArea, Wire

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Open the environment that the first message names, then serve."""
    connection, area, parent = (int(argument) for argument in sys.argv[1:4])
    die_with_parent(parent)
    os.dup2(2, 1)  # simulators print; the actor's log is where that belongs
    wire = Wire(socket.socket(fileno=connection), SharedArea(area), writes_area=True)
    env: Any = None
    while True:
        try:
            call, values = wire.receive()
        except (EOFError, OSError):
            break  # the parent is gone, or wants no more
        reply: list[Any]
        try:
            if call == "open":
                env = _open(**values)
                answer = _description(env)
            else:
                answer = getattr(env, call)(*values)
            reply = [None, answer]
        except Exception as error:
            reply = [[type(error).__name__, str(error), traceback.format_exc()], None]
        try:
            wire.send(reply)
        except OSError:
            break  # nobody waits for it any more
    if env is not None:
        env.close()


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; leave at once if it is dead already."""
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)
    if os.getppid() != parent:
        os._exit(1)


def _open(task: str, args: dict[str, Any], num_slots: int) -> Any:
    env = make(task, num_slots=num_slots, args=args)
    return Chunked(env) if hasattr(env, "action_space") else env  # type: ignore[arg-type]


def _description(env: Any) -> dict[str, Any]:
    names = ("observation_space", "action_space", "counted_seeds")
    return {name: getattr(env, name) for name in names if hasattr(env, name)}


def raise_remote(name: str, message: str, trace: str) -> None:
    """Raise in the parent what was raised here: SimErrors and ValueErrors as such, all else with its traceback."""
    kind = getattr(errors, name, ValueError if name == "ValueError" else None)
    if kind is None:
        raise errors.SimulatorFailed(f"{name}: {message}\n\nin the worker:\n{trace}")
    raise kind(message)


if __name__ == "__main__":
    main()
