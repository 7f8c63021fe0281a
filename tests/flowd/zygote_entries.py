"""Entries that the tests of the fork server run as actors. Standard library only: one interpreter
that runs them has nothing else.

Each connects to the test's mailbox and says who it is. It keeps the connection open, and so does
what it forks: the test reads an end-of-file when the last holder is gone.
"""

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path


def _introduce(argument, **facts):
    mailbox = socket.socket(socket.AF_UNIX)
    mailbox.connect(argument["mailbox"])
    _say(mailbox, **facts)
    return mailbox


def _say(mailbox, **facts):
    mailbox.sendall(json.dumps({"pid": os.getpid(), **facts}).encode() + b"\n")


def describe(argument):
    """Tell what the process looks like from the inside, then end with the code asked for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    facts = {
        "ppid": os.getppid(),
        "sid": os.getsid(0),
        "pgid": os.getpgid(0),
        "cwd": os.getcwd(),
        "nice": os.nice(0),
        "environment": dict(os.environ),
        "executable": sys.executable,
        "path": sys.path,
        "random": random.random(),
        "numpy_random": _numpy_random(),
        "name": Path("/proc/self/comm").read_text().strip(),
        "blocked": int(status["SigBlk"], 16),
        "ignored": int(status["SigIgn"], 16),
        "descriptors": [fd for fd in descriptors if os.path.exists(f"/proc/self/fd/{fd}")],
        "size": len(argument.get("payload", "")),
    }
    _introduce(argument, **facts)
    print("said on stdout")
    print("said on stderr", file=sys.stderr)
    return argument.get("code")


def _numpy_random():
    numpy = sys.modules.get("numpy")  # there when the fork server imported it
    return numpy.random.random() if numpy else None


def compute_with_torch(argument):
    """Forward and backward passes large enough for torch's thread pools."""
    import torch

    weights = torch.ones(256, 256, requires_grad=True)
    for _ in range(3):
        (weights @ weights).sum().backward()
    _introduce(argument, threads=torch.get_num_threads(), gradient=weights.grad[0, 0].item())


def compute_on_gpu(argument):
    """Use the one device that the environment of this actor shows."""
    import torch

    total = torch.ones(8, device="cuda").sum().item()
    _introduce(argument, total=total, devices=torch.cuda.device_count())


def count_bytes(argument):
    """The argument is bytes here; the exit code is their number."""
    assert isinstance(argument, bytes)
    return len(argument)


def fail(argument):
    """Raise."""
    raise RuntimeError("the entry's own words")


def leave_with_words(argument):
    """Exit as scripts do."""
    sys.exit("words instead of a code")


def wait(argument):
    """Introduce itself, then wait for a signal."""
    _held_open = _introduce(argument)
    while True:
        signal.pause()


def wait_stubbornly(argument):
    """As `wait`, but SIGTERM is ignored, as by code stuck in C."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait(argument)


def wait_with_family(argument):
    """Have a child, a child in a session of its own, and a daemon (orphaned twice), then wait."""
    mailbox = _introduce(argument)
    for kind in ("child", "own session", "daemon"):
        if os.fork():
            continue
        if kind != "child":
            os.setsid()
        if kind == "daemon" and os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _say(mailbox, kind=kind)
        while True:
            signal.pause()
    while True:
        signal.pause()


def leave_on_term(argument):
    """End with code 7 when told to."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(7))
    wait(argument)


async def play_flowd(state_dir, mailbox, grace_s, entry):
    """What a test kills in flowd's place: it starts a zygote and one actor, then waits."""
    from flowd.processes import ZygoteClient

    client = ZygoteClient()
    await client.start(Path(state_dir), preload=(), orphan_grace_s=float(grace_s))
    argument = {"mailbox": mailbox}
    log_path = Path(state_dir, "actor.log")
    await client.spawn(entry, argument, name="actor", log_path=log_path, spawn_id="the-actor")
    with_facts = {"zygote": client.pid, "at": time.time()}
    _connection = _introduce(argument, **with_facts)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(play_flowd(*sys.argv[1:]))
