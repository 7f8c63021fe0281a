"""`flowd up`: start the daemon."""

import argparse
import ipaddress
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowd.paths import StatePaths

NAME = "up"
HELP = "start flowd on this machine, in the foreground or with --detach in the background"
READY_DEADLINE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices",
        default="auto",
        metavar="SPEC",
        help="auto (all GPUs, else virtual devices, one per core), cpu:N, or GPU numbers as in 0,1",
    )
    parser.add_argument(
        "--listen",
        type=listening,
        metavar="tcp://IP:PORT",
        help="let members of the cluster reach flowd there, and its actors at other ports of IP: enciphered "
        "(CURVE), and nobody else",
    )
    parser.add_argument(
        "--token",
        metavar="T",
        help="be of the cluster whose `flowd token` printed T; - reads it from stdin, where no `ps` shows it",
    )
    parser.add_argument(
        "--bulk",
        choices=("encrypted", "plain"),
        default="encrypted",
        help="large arrays between nodes that all say plain are authenticated, and not enciphered, for private "
        "networks; NCCL between nodes needs it",
    )
    parser.add_argument(
        "--orphan-grace-s",
        type=grace,
        default=30.0,
        metavar="SECONDS",
        help="how long actors work on without flowd (default 30): started again by then, it takes them over",
    )
    parser.add_argument("--detach", action="store_true", help="return once it is ready")
    # The started half of --detach writes here, once: its pid when it is ready, or why it is not.
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def grace(text: str) -> float:
    """Seconds; enough for a few heartbeats, so that a busy flowd is not taken for a dead one."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is too short: give seconds, at least 1, as in 30")
    return seconds


def listening(text: str) -> str:
    """The address to listen at: one that others can be told, so not all of a machine's at once."""
    scheme, _, place = text.partition("://")
    host, _, port = place.rpartition(":")
    try:
        known = ipaddress.IPv4Address(host)
        valid = scheme == "tcp" and not known.is_unspecified and 0 < int(port) < 65536
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(
            f"{text} is not an address that other nodes can be told: give the scheme, this node's IPv4 "
            "address and a port, as in tcp://10.0.0.5:7780"
        )
    return text


def run(args: argparse.Namespace) -> int:
    from flowd.errors import FlowdError, RequestError
    from flowd.runs import paths_of

    paths = paths_of(args)
    if not args.listen and (args.token or args.bulk == "plain"):
        option = "--token" if args.token else "--bulk plain"
        raise RequestError(f"{option} is about other nodes: say --listen tcp://IP:PORT as well")
    if args.token:
        from flowd.auth import join

        join(paths.cluster_key, sys.stdin.readline() if args.token == "-" else args.token)
    if args.detach:
        return _detach(args, paths)
    try:
        return _serve(args, paths)
    except FlowdError as error:
        _tell(args, {"error": str(error), "exit_code": error.exit_code})
        raise


def _serve(args: argparse.Namespace, paths: "StatePaths") -> int:
    from flowd.console import hint, print_json
    from flowd.devices import inventory
    from flowd.errors import RequestError

    try:
        devices = inventory(args.devices)
    except ValueError as error:
        raise RequestError(str(error)) from error

    def ready() -> None:
        known = {
            "pid": os.getpid(),
            "state_dir": str(paths.root),
            "devices": [d.id for d in devices],
        }
        if args.ready_fd is not None:
            _tell(args, known)
        elif args.json:
            print_json(known)
        else:
            hint(f"flowd is up (pid {os.getpid()}): {len(devices)} devices, state in {paths.root}")

    from flowd.daemon import serve

    return serve(
        paths,
        devices,
        listen=args.listen or "",
        plain_bulk=args.bulk == "plain",
        ready=ready,
        orphan_grace_s=args.orphan_grace_s,
    )


def _detach(args: argparse.Namespace, paths: "StatePaths") -> int:
    """Start `flowd up` in a session of its own, and wait until it is ready or has failed."""
    import select
    import subprocess

    from flowd import lockfile
    from flowd.console import hint, print_json
    from flowd.errors import FlowdError, RequestError

    lockfile.acquire(paths.lock).release()  # the common refusal, before anything is started
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "flowd", "up", "--devices", args.devices]
    command += ["--state-dir", str(paths.root), "--ready-fd", str(writer)]
    command += ["--orphan-grace-s", str(args.orphan_grace_s)]
    command += ["--listen", args.listen, "--bulk", args.bulk] if args.listen else []
    try:
        with paths.log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        answered, _, _ = select.select([reader], [], [], READY_DEADLINE_S)
        line = os.read(reader, 65536) if answered else b""
    finally:
        os.close(reader)
    if not line:
        if answered:
            child.wait()
            raise FlowdError(f"flowd ended before it was ready: see the last lines of {paths.log}")
        child.kill()
        child.wait()
        raise FlowdError(
            f"flowd was not ready within {READY_DEADLINE_S:g} s and was stopped: see {paths.log}"
        )
    answer = json.loads(line)
    if "error" in answer:
        child.wait()
        raise (RequestError if answer["exit_code"] == 2 else FlowdError)(answer["error"])
    if args.json:
        print_json(answer)
    else:
        num_devices = len(answer["devices"])
        hint(f"flowd is up (pid {answer['pid']}): {num_devices} devices, state in {paths.root}")
    child.returncode = 0  # it is flowd now, not ours to wait for
    return 0


def _tell(args: argparse.Namespace, answer: dict[str, object]) -> None:
    """Answer the waiting `--detach`, if there is one; what happens later is for the log."""
    if args.ready_fd is not None:
        os.write(args.ready_fd, json.dumps(answer).encode())
        os.close(args.ready_fd)
        args.ready_fd = None
