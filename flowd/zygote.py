"""The fork server: imports once, then forks actors, watches them, and never leaves one behind.

It is the parent of every actor, so that actors outlive flowd but not the zygote. It decides
nothing: flowd says what to start and when to stop. One thread, no asyncio, never touches a device.

    flowd dies     no more forks; after the grace without a new flowd: SIGTERM, SIGKILL, then it
                   removes what flowd left (weights in shared memory, sockets), exit
    zygote dies    the kernel kills every actor (parent death signal); flowd sweeps up what they
                   started
    an actor ends  its process group is killed, and whatever it orphaned
"""

import argparse
import contextlib
import gc
import importlib
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict, deque
from pathlib import Path

from flowd import leftovers, linux
from flowd.paths import StatePaths
from flowd.zygote_child import become_actor, link_our_packages
from flowd.zygote_messages import (
    PROTOCOL_VERSION,
    ActorProcess,
    Exited,
    FrameReader,
    Hello,
    List,
    Listing,
    Message,
    Refused,
    Signal,
    Spawn,
    Spawned,
    SpawnFailed,
    Stop,
    encode_frame,
    request_decoder,
)

log = logging.getLogger("flowd.zygote")

TERMINATE_S = 3.0  # from SIGTERM to SIGKILL when nobody says otherwise
KILLED_S = 10.0  # SIGKILL waits for a driver at most this long; the zygote then leaves without it
PRELOAD_S = 300  # an import that hangs ends the zygote, also when its flowd is gone
REMEMBERED = 4096  # spawn ids and exits kept for a flowd that missed the reply
MAX_UNSENT_BYTES = 16 * 1024 * 1024  # a flowd that reads this little is taken for dead


class Connection:
    """One flowd at the other end of a socket: frames in, frames out, never blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.frames = FrameReader()
        self.unsent = bytearray()

    def send(self, message: Message) -> None:
        """Queue a message and send what fits. Raises OSError or BufferError for a dead end."""
        self.unsent += encode_frame(message)
        if len(self.unsent) > MAX_UNSENT_BYTES:
            raise BufferError(f"flowd left {len(self.unsent)} bytes unread")
        self.flush()

    def flush(self) -> None:
        """Send queued bytes as far as the socket takes them. Raises OSError when it is gone."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]


class Zygote:
    """The server's state and loop; `run` returns when it was told to stop or nobody adopted it."""

    def __init__(
        self,
        socket_path: Path,
        listener: socket.socket,
        connection: socket.socket | None,
        orphan_grace_s: float,
        warnings: list[str],
    ) -> None:
        self._pid = os.getpid()
        self._start_time = linux.process_start_time(self._pid) or 0
        self._packages = socket_path.parent / "packages"
        self._orphan_grace_s = orphan_grace_s
        self._warnings = warnings
        self._actors: dict[int, ActorProcess] = {}
        self._spawned: OrderedDict[str, Spawned] = OrderedDict()
        self._exited: deque[Exited] = deque(maxlen=REMEMBERED)
        self._connection: Connection | None = None
        self._orphaned_until: float | None = time.monotonic() + orphan_grace_s
        self._kill_at: float | None = None  # set once: stopping
        self._leave_at: float | None = None  # set once: everything was sent SIGKILL
        self._terminated = False

        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._woken, self._wakeup = socket.socketpair()
        self._woken.setblocking(False)
        self._wakeup.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain_wakeups)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)  # the wakeup is the message
        signal.signal(signal.SIGTERM, self._on_terminate)
        if connection is not None:
            self._adopt(connection)

    def run(self) -> None:
        """Serve until stopped; on return no child is left, but for those stuck inside a driver."""
        while not self._finished():
            for key, _ in self._selector.select(self._timeout_s()):
                key.data()
            self._reap()
            self._act_on_time(time.monotonic())

    @property
    def orphaned(self) -> bool:
        """Whether no flowd is there."""
        return self._connection is None

    # --- time

    def _timeout_s(self) -> float | None:
        deadlines = (self._leave_at or self._kill_at, self._orphaned_until)
        pending = [at for at in deadlines if at is not None]
        return max(0.0, min(pending) - time.monotonic()) if pending else None

    def _act_on_time(self, now: float) -> None:
        if self._terminated:
            self._begin_stop(TERMINATE_S)
        if self._orphaned_until is not None and now >= self._orphaned_until:
            self._orphaned_until = None
            log.warning("orphan_grace_s=%g passed without a flowd: leaving", self._orphan_grace_s)
            self._begin_stop(TERMINATE_S)
        if self._kill_at is not None and self._leave_at is None and now >= self._kill_at:
            self._leave_at = now + KILLED_S
            for pid in self._actors:
                self._signal(pid, signal.SIGKILL)

    def _begin_stop(self, deadline_s: float) -> None:
        kill_at = time.monotonic() + deadline_s
        if self._kill_at is None:
            for pid in self._actors:
                self._signal(pid, signal.SIGTERM)
                self._signal(pid, signal.SIGCONT)  # a stopped process would sleep through SIGTERM
            self._kill_at = kill_at
        self._kill_at = min(self._kill_at, kill_at)  # a second stop may only hasten the first

    def _finished(self) -> bool:
        if self._kill_at is None:
            return False
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            log.error("pids %s outlived SIGKILL, probably inside a driver", sorted(self._actors))
            return True
        return not self._actors and not linux.child_pids()

    # --- flowd

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            if self._connection is not None and linux.peer_hung_up(
                self._connection.socket.fileno()
            ):
                self._disconnect("its end is closed")
            uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            reason = None
            if uid != os.getuid():
                reason = f"user {uid} asks, but the fork server belongs to user {os.getuid()}"
            elif self._kill_at is not None:
                reason = "the fork server is stopping; wait for its end, then start another"
            elif self._connection is not None:
                reason = "another flowd is connected; stop it first"
            if reason is None:
                self._adopt(sock)
                return
            with sock:
                sock.sendall(encode_frame(Refused(reason=reason)))

    def _adopt(self, sock: socket.socket) -> None:
        self._reap()  # so that none of the dead is listed as live
        self._connection = Connection(sock)
        self._orphaned_until = None
        self._selector.register(sock, selectors.EVENT_READ, self._receive)
        self._send(
            Hello(
                protocol_version=PROTOCOL_VERSION,
                pid=self._pid,
                start_time=self._start_time,
                actors=list(self._actors.values()),
                exited=list(self._exited),
                warnings=self._warnings,
            )
        )

    def _disconnect(self, reason: str) -> None:
        assert self._connection is not None
        log.warning("flowd is gone (%s): waiting %g s for another", reason, self._orphan_grace_s)
        self._selector.unregister(self._connection.socket)
        self._connection.socket.close()
        self._connection = None
        if self._kill_at is None:
            self._orphaned_until = time.monotonic() + self._orphan_grace_s

    def _send(self, message: Message) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            connection.send(message)
        except (OSError, BufferError) as error:
            self._disconnect(str(error))
            return
        self._watch_writable(connection)

    def _watch_writable(self, connection: Connection) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.modify(connection.socket, events, self._receive)

    def _receive(self) -> None:
        connection = self._connection
        if connection is None:  # closed by an earlier event of the same round
            return
        try:
            connection.flush()
            self._watch_writable(connection)
            received = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._disconnect(str(error))
            return
        if not received:
            self._disconnect("connection closed")
            return
        try:
            for body in connection.frames.feed(received):
                # A dead flowd's remaining requests are not carried out: nobody would use the
                # actors.
                if self._connection is not connection or linux.peer_hung_up(
                    connection.socket.fileno()
                ):
                    return
                self._handle(request_decoder.decode(body))
        except ValueError as error:  # msgspec's errors are ValueErrors too
            log.error("bad request: %s", error)
            if self._connection is connection:
                self._disconnect("it does not speak our protocol")

    def _handle(self, request: Spawn | Signal | List | Stop) -> None:
        match request:
            case Spawn():
                self._spawn(request)
            case Signal(pid=pid, signum=signum):
                self._signal(pid, signum)
            case List():
                self._send(Listing(actors=list(self._actors.values())))
            case Stop(deadline_s=deadline_s):
                self._begin_stop(deadline_s)

    # --- actors

    def _spawn(self, spawn: Spawn) -> None:
        if (known := self._spawned.get(spawn.spawn_id)) is not None:  # its reply was lost
            self._send(known)
            for exited in self._exited:
                if exited.spawn_id == spawn.spawn_id:
                    self._send(exited)
            return
        try:
            pid = self._fork(spawn)
        except (OSError, ValueError, RuntimeError) as error:
            self._send(SpawnFailed(spawn_id=spawn.spawn_id, reason=str(error)))
            return
        # Not reaped before `_reap`, so the pid is certain to be the child's.
        start_time = linux.process_start_time(pid) or 0
        self._actors[pid] = ActorProcess(
            spawn_id=spawn.spawn_id, name=spawn.name, pid=pid, start_time=start_time
        )
        reply = Spawned(spawn_id=spawn.spawn_id, pid=pid, start_time=start_time)
        self._spawned[spawn.spawn_id] = reply
        if len(self._spawned) > REMEMBERED + len(self._actors):
            self._spawned.popitem(last=False)
        self._send(reply)

    def _fork(self, spawn: Spawn) -> int:
        """Returns the pid. Raises OSError, ValueError or RuntimeError, which say why not."""
        if self._kill_at is not None:
            raise RuntimeError("the fork server is stopping")
        if spawn.cwd is not None and not os.path.isdir(spawn.cwd):
            raise ValueError(f"cwd = {spawn.cwd!r} is not a folder; create it, or leave cwd out")
        packages = None
        if spawn.python is not None:
            if not (os.path.isfile(spawn.python) and os.access(spawn.python, os.X_OK)):
                raise ValueError(
                    f"python = {spawn.python!r} cannot be executed; "
                    "give the path of an interpreter, as in /path/to/venv/bin/python"
                )
            link_our_packages(self._packages)
            packages = self._packages
        elif linux.cuda_initialised():
            raise RuntimeError(
                "CUDA is initialised in the fork server, so its children could not use a device: "
                "a preloaded module did it; take that module out of the preload list"
            )
        os.makedirs(os.path.dirname(spawn.log_path) or ".", exist_ok=True)
        log_fd = os.open(
            spawn.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        # A signal between fork and the child's own handlers would be swallowed by ours.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                become_actor(spawn, log_fd, self._pid, packages, self._close_inherited)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(log_fd)
        return pid

    def _close_inherited(self) -> None:
        """In the child: close what is the zygote's, through the objects that own the descriptors.

        By number alone, an object collected later would close a descriptor of the actor.
        Descriptors of preloaded modules stay open: the modules still use them.
        """
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for sock in (self._listener, self._woken, self._wakeup):
            sock.close()
        if self._connection is not None:
            self._connection.socket.close()

    def _signal(self, pid: int, signum: int) -> None:
        if pid not in self._actors:  # reaped: the pid may be anybody's
            return
        try:
            os.killpg(pid, signum)
        except ProcessLookupError:  # forked, not yet leader of its group
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        except PermissionError as error:
            log.error("pid=%d signal=%d: %s", pid, signum, error)

    def _reap(self) -> None:
        reaped = False
        with contextlib.suppress(ChildProcessError):  # no children at all
            while True:
                # Looked at, not yet reaped: while the leader is a zombie, its group id is not
                # re-used.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None:
                    break
                self._signal(ended.si_pid, signal.SIGKILL)
                _, status = os.waitpid(ended.si_pid, 0)
                self._report(ended.si_pid, status)
                reaped = True
        for pid in linux.child_pids() if reaped else ():
            if pid not in self._actors:  # orphaned by an actor that is dead
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _report(self, pid: int, status: int) -> None:
        actor = self._actors.pop(pid, None)
        if actor is None:
            return
        by_signal = os.WIFSIGNALED(status)
        exited = Exited(
            spawn_id=actor.spawn_id,
            name=actor.name,
            pid=pid,
            start_time=actor.start_time,
            exit_code=None if by_signal else os.WEXITSTATUS(status),
            signum=os.WTERMSIG(status) if by_signal else None,
        )
        self._exited.append(exited)
        self._send(exited)

    # --- signals: they only set state, the loop acts

    def _on_terminate(self, signum: int, frame: object) -> None:
        self._terminated = True

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass


def preload(modules: list[str]) -> list[str]:
    """Import modules for all actors to come; returns what went wrong, in words.

    A failed import is no error here: the actor that needs the module will raise it where it counts.
    """
    warnings = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            warnings.append(f"preload of {module} failed: {type(error).__name__}: {error}")
    with contextlib.suppress(ImportError):
        importlib.import_module("setproctitle")
    if linux.cuda_initialised():
        warnings.append(
            "a preloaded module initialised CUDA: actors cannot be forked, shorten preload"
        )
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        warnings.append(
            f"preloaded modules started {threads - 1} threads: "
            "what they held locked stays locked in actors"
        )
    if not linux.set_parent_death_signal(0):
        warnings.append(
            "this kernel has no parent death signal: after kill -9 of the fork server, "
            "only flowd ends its actors"
        )
    if not linux.set_child_subreaper():
        warnings.append(
            "this kernel has no child subreapers: what an actor detaches is ended only at the stop"
        )
    return warnings


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for this user only; an old one there is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(8)
    return listener


def main() -> int:
    """Entry of `python -m flowd.zygote`."""
    parser = argparse.ArgumentParser(description="flowd's fork server; started by flowd")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--orphan-grace-s", type=float, required=True)
    parser.add_argument("--preload", default="", help="module,module,...")
    parser.add_argument(
        "--connection-fd", type=int, help="the first flowd's end, already connected"
    )
    options = parser.parse_args()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
        level=logging.INFO,
    )
    # A flowd that dies takes the terminal's signals with it; the zygote has its own way to leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listener = listen(options.socket)
    connection = None
    if options.connection_fd is not None:
        connection = socket.socket(fileno=options.connection_fd)
        connection.set_inheritable(False)

    # Objects made by imports live as long as the process: never scanned, so their pages stay
    # shared.
    gc.disable()
    signal.alarm(PRELOAD_S)
    warnings = preload([module for module in options.preload.split(",") if module])
    signal.alarm(0)
    for warning in warnings:
        log.warning("%s", warning)
    gc.collect()
    gc.freeze()
    zygote = Zygote(options.socket, listener, connection, options.orphan_grace_s, warnings)
    try:
        zygote.run()
    finally:
        options.socket.unlink(missing_ok=True)
    if zygote.orphaned:
        leftovers.clear(StatePaths(options.state_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
