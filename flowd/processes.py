"""flowd's side of the zygote: start or adopt it, spawn actors through it, know when each ends.

Runs in one asyncio loop. Knows nothing of jobs, restarts or leases: the supervisor decides, this
obeys.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from flowd import linux
from flowd.errors import FlowdError, RequestError
from flowd.linux import alive, process_start_time
from flowd.paths import runtime_dir
from flowd.zygote_messages import (
    PROTOCOL_VERSION,
    TAG_VARIABLE,
    ActorProcess,
    Exited,
    FrameReader,
    Hello,
    List,
    Listing,
    Message,
    Refused,
    Reply,
    Signal,
    Spawn,
    Spawned,
    SpawnFailed,
    Stop,
    encode_frame,
    reply_decoder,
)

__all__ = [
    "DEFAULT_PRELOAD",
    "SOCKET_NAME",
    "ExitStatus",
    "ProcessHandle",
    "SpawnError",
    "ZygoteClient",
    "ZygoteLost",
    "alive",
    "process_start_time",
]

log = logging.getLogger("flowd.processes")

SOCKET_NAME = "zygote.sock"
DEFAULT_PRELOAD = (
    "uvloop",
    "zmq",
    "msgspec",
    "torch",
    "torch.profiler._cupti_monitor",  # what a first backward pass imports
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.tokenization_utils_tokenizers",
)
STATUS_WAIT_S = 1.0  # a process is gone, its status is on the way from the zygote
LEAVE_S = 15.0  # beyond a stop's own deadline: SIGKILL, drivers, the zygote's own exit


class ZygoteLost(FlowdError):
    """Raised when there is no fork server at the other end, or no longer, or none that takes us."""


class SpawnError(FlowdError):
    """Raised when the fork server could not start a process; nothing runs."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended; both None when it ended unseen, together with its zygote."""

    exit_code: int | None = None
    signum: int | None = None

    def __str__(self) -> str:
        if self.exit_code is not None:
            return f"exited with code {self.exit_code}"
        if self.signum is None:
            return "gone, exit status unknown"
        try:
            return f"killed by {signal.Signals(self.signum).name}"
        except ValueError:  # real-time signals have no names
            return f"killed by signal {self.signum}"


class ProcessHandle:
    """One actor process. `exited` is done once it is gone, and its process group with it."""

    def __init__(self, client: "ZygoteClient", actor: ActorProcess) -> None:
        self.pid = actor.pid
        self.start_time = actor.start_time
        self.name = actor.name
        self.spawn_id = actor.spawn_id
        self.exited: asyncio.Future[ExitStatus] = client.loop.create_future()
        self._client = client
        self._pidfd: int | None = None
        self._status_due: asyncio.TimerHandle | None = None
        self._watch()

    def signal(self, signum: int) -> None:
        """Send a signal to the actor's process group. Nothing happens once it is gone."""
        if not self.exited.done():
            self._client._send(Signal(pid=self.pid, signum=signum))

    def _watch(self) -> None:
        """Learn of the end from the kernel as well: also when the zygote is stuck."""
        try:
            self._pidfd = linux.open_pidfd(self.pid, self.start_time)
        except OSError as error:
            self._client._warn_once(f"no pidfds here ({error}): only the zygote tells of exits")
            return
        if self._pidfd is None:
            self._on_gone()
        else:
            self._client.loop.add_reader(self._pidfd, self._on_gone)

    def _on_gone(self) -> None:
        self._unwatch()
        self._status_due = self._client.loop.call_later(STATUS_WAIT_S, self._end, ExitStatus())

    def _unwatch(self) -> None:
        if self._pidfd is not None:
            self._client.loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _end(self, status: ExitStatus) -> None:
        self._unwatch()
        if self._status_due is not None:
            self._status_due.cancel()
        if not self.exited.done():
            self.exited.set_result(status)
        self._client.handles.pop(self.pid, None)


class _Link(asyncio.Protocol):
    """Bytes to messages; all meaning is in the client."""

    def __init__(self, client: "ZygoteClient") -> None:
        self._client = client
        self._frames = FrameReader()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._client._on_reply(reply_decoder.decode(body))

    def connection_lost(self, error: Exception | None) -> None:
        self._client._on_disconnect(self, error)


class ZygoteClient:
    """The connection to one zygote, for one life of it: after a loss, make another client.

    on_lost: called once, with the reason, when the zygote dies unasked; by then none of its actors
    is left and every handle's `exited` is done. Nothing but handles and futures is touched from
    outside the loop's thread.
    """

    def __init__(self, on_lost: Callable[[str], None] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.handles: dict[int, ProcessHandle] = {}
        """Live actors by pid."""
        self.missed_exits: list[Exited] = []
        """After `adopt`: exits that the previous flowd may not have seen, oldest first."""
        self.warnings: list[str] = []
        """What the zygote cannot do here, in words for the log."""
        self.pid = 0
        self._on_lost = on_lost
        self._socket_path = Path()
        self._start_time = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._link: _Link | None = None
        self._greeting: asyncio.Future[Hello] | None = None
        self._spawning: dict[str, tuple[str, asyncio.Future[ProcessHandle]]] = {}
        self._listing: deque[asyncio.Future[list[ActorProcess]]] = deque()
        self._attached = False
        self._leaving = False
        self._losing: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    # --- connect

    async def start(
        self,
        state_dir: Path,
        preload: Sequence[str] = DEFAULT_PRELOAD,
        orphan_grace_s: float = 30.0,
        *,
        ready_timeout_s: float = 240.0,
    ) -> None:
        """Start a zygote on the state directory; returns when it has imported `preload`.

        Whatever an earlier zygote of this directory left running is killed first, a living zygote
        included: try `adopt` before. Raises ZygoteLost when it dies or is not ready in time.
        """
        self._socket_path = socket_path = _private(runtime_dir(state_dir)) / SOCKET_NAME
        await asyncio.to_thread(linux.kill_tagged, TAG_VARIABLE, str(socket_path))
        command = [sys.executable, "-m", "flowd.zygote", "--socket", str(socket_path)]
        command += ["--state-dir", str(state_dir)]
        command += ["--orphan-grace-s", str(orphan_grace_s), "--preload", ",".join(preload)]
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                await self._launch(command, theirs, state_dir / "zygote.log")
            await self._attach(ready_timeout_s, sock=ours)
        except BaseException:
            ours.close()
            if self._popen is not None:
                self._popen.kill()
                await asyncio.to_thread(self._popen.wait)
                socket_path.unlink(missing_ok=True)  # it listens before it imports
            raise

    async def _launch(self, command: list[str], theirs: socket.socket, log_path: Path) -> None:
        environment = os.environ | {
            TAG_VARIABLE: str(self._socket_path),
            # OpenBLAS would start its threads at import; threads and fork do not go together.
            "OPENBLAS_NUM_THREADS": "1",
            # torch.cuda.is_available() at some import must not initialise CUDA in the zygote.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }

        def launch() -> None:
            with open(log_path, "ab") as log_file:
                self._popen = subprocess.Popen(
                    [*command, "--connection-fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a terminal's Ctrl-C is flowd's business
                    env=environment,
                )

        launching = asyncio.ensure_future(asyncio.to_thread(launch))
        try:
            await asyncio.shield(launching)
        except asyncio.CancelledError:
            await launching  # the caller ends what it started
            raise

    async def adopt(self, socket_path: Path, timeout_s: float = 5.0) -> list[ProcessHandle]:
        """Take over a zygote whose flowd is gone; returns its live actors.

        Raises ZygoteLost when none listens there, another flowd has it, or it is leaving already.
        """
        self._socket_path = _private(socket_path.parent) / socket_path.name
        await self._attach(timeout_s, path=str(socket_path))
        return list(self.handles.values())

    async def _attach(self, timeout_s: float, **where: Any) -> None:
        self._greeting = self.loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self.loop.create_unix_connection(self._make_link, **where)
                hello = await self._greeting
        except (ConnectionError, FileNotFoundError) as error:
            raise ZygoteLost(f"no fork server listens on {self._socket_path}: {error}") from error
        except TimeoutError:
            raise ZygoteLost(
                f"the fork server on {self._socket_path} was not ready within {timeout_s:g} s; "
                f"see {self._socket_path.with_suffix('.log')} for the import it hangs in"
            ) from None
        finally:
            if (
                not self._greeting.done()
                or self._greeting.cancelled()
                or self._greeting.exception()
            ):
                self._leaving = True
                self._close_link()
        self.missed_exits, self.warnings = hello.exited, hello.warnings
        for warning in self.warnings:
            log.warning("zygote_pid=%d %s", self.pid, warning)

    def _make_link(self) -> _Link:
        self._link = _Link(self)
        return self._link

    # --- use

    async def spawn(
        self,
        entry: str,
        argument: bytes | Mapping[str, Any],
        *,
        name: str,
        log_path: Path,
        environment: Mapping[str, str | None] | None = None,
        python: str | None = None,
        cwd: Path | None = None,
        nice: int = 0,
        spawn_id: str | None = None,
        timeout_s: float = 10.0,
    ) -> ProcessHandle:
        """Start an actor: `entry` ("module:function") is called with `argument`.

        A mapping travels as JSON, bytes as they are. `environment` changes the fork server's own,
        None removes; FLOWD_TORCH_THREADS sets torch's threads. Preloaded modules have read theirs
        already. Calls may overlap. After a timeout the process may still come up: it is killed
        then, unless the call is repeated with the same `spawn_id`, which never starts a second one.
        Raises SpawnError when it cannot be started, ZygoteLost when the zygote dies or does not
        answer.
        """
        spawn_id = spawn_id or uuid.uuid4().hex
        if spawn_id in self._spawning:
            raise ValueError(
                f"spawn_id {spawn_id!r} is being spawned; await that call, or use another id"
            )
        as_json = not isinstance(argument, bytes)
        request = Spawn(
            spawn_id=spawn_id,
            name=name,
            entry=entry,
            argument=json.dumps(argument).encode() if not isinstance(argument, bytes) else argument,
            argument_is_json=as_json,
            environment=dict(environment or {}),
            log_path=str(log_path),
            python=python,
            cwd=None if cwd is None else str(cwd),
            nice=nice,
        )
        started: asyncio.Future[ProcessHandle] = self.loop.create_future()
        self._spawning[spawn_id] = name, started
        try:
            self._send(request)
            async with asyncio.timeout(timeout_s):
                return await started
        except TimeoutError:
            raise ZygoteLost(
                f"the fork server (pid {self.pid}) did not start {name!r} within {timeout_s:g} s; "
                f"see {self._socket_path.with_suffix('.log')}"
            ) from None
        finally:
            del self._spawning[spawn_id]

    async def live(self, timeout_s: float = 5.0) -> list[ActorProcess]:
        """The actors that the zygote knows; also shows that it answers. Raises ZygoteLost."""
        listing: asyncio.Future[list[ActorProcess]] = self.loop.create_future()
        self._send(List())
        self._listing.append(listing)
        try:
            async with asyncio.timeout(timeout_s):
                return await listing
        except TimeoutError:
            raise ZygoteLost(
                f"the fork server (pid {self.pid}) did not answer in {timeout_s:g} s"
            ) from None

    async def stop(self, deadline_s: float = 3.0) -> None:
        """End everything: SIGTERM to all actors, SIGKILL after `deadline_s`, then the zygote.

        On return nothing of it is left, and every handle's `exited` is done. Safe to call again,
        and after a loss or `detach`. Raises TimeoutError when a process outlives SIGKILL inside a
        driver.
        """
        self._leaving = True
        if self._losing is not None:
            await self._losing
            return
        if not self._attached:
            return
        if self._link is not None:
            self._send(Stop(deadline_s=deadline_s))
        await self._bury(deadline_s + LEAVE_S)

    def detach(self) -> None:
        """Let go of the zygote and its actors, for another flowd to adopt within the grace."""
        self._attached, self._leaving = False, True
        self._close_link()
        for handle in list(self.handles.values()):
            handle._unwatch()
            handle.exited.cancel()
        self.handles.clear()
        if self._popen is not None:
            self._popen.returncode = 0  # it lives on, and is not ours to wait for any more

    # --- what comes from the zygote

    def _send(self, message: Message) -> None:
        if self._link is None or self._link.transport is None:
            raise ZygoteLost(f"the fork server (pid {self.pid}) is gone; start another")
        self._link.transport.write(encode_frame(message))

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Hello():
                self._on_hello(reply)
            case Refused(reason=reason):
                self._fail_greeting(ZygoteLost(f"{self._socket_path}: {reason}"))
            case Spawned():
                self._on_spawned(reply)
            case SpawnFailed(spawn_id=spawn_id, reason=reason):
                name, started = self._spawning.get(spawn_id, ("", None))
                if started is not None and not started.done():
                    started.set_exception(SpawnError(f"cannot start {name!r}: {reason}"))
            case Listing(actors=actors):
                listing = self._listing.popleft()
                if not listing.done():
                    listing.set_result(actors)
            case Exited(pid=pid, start_time=start_time):
                handle = self.handles.get(pid)
                if handle is not None and handle.start_time == start_time:
                    handle._end(ExitStatus(reply.exit_code, reply.signum))

    def _on_hello(self, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            self._fail_greeting(
                ZygoteLost(
                    f"the fork server on {self._socket_path} speaks protocol "
                    f"{hello.protocol_version}, this flowd {PROTOCOL_VERSION}: "
                    "it is of another version; start a new one"
                )
            )
            return
        self.pid, self._start_time, self._attached = hello.pid, hello.start_time, True
        for actor in hello.actors:
            self.handles[actor.pid] = ProcessHandle(self, actor)
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_result(hello)

    def _fail_greeting(self, error: ZygoteLost) -> None:
        if self._greeting is not None and not self._greeting.done():
            self._greeting.set_exception(error)

    def _on_spawned(self, reply: Spawned) -> None:
        name, started = self._spawning.get(reply.spawn_id, ("", None))
        if started is None or started.done():  # whoever asked has given up
            self._send(Signal(pid=reply.pid, signum=signal.SIGKILL))
            return
        actor = ActorProcess(
            spawn_id=reply.spawn_id, name=name, pid=reply.pid, start_time=reply.start_time
        )
        handle = self.handles.get(reply.pid) or ProcessHandle(self, actor)
        self.handles[reply.pid] = handle
        started.set_result(handle)

    def _on_disconnect(self, link: _Link, error: Exception | None) -> None:
        if link is not self._link:
            return
        self._link = None
        reason = f"the fork server (pid {self.pid}) is gone" + (f": {error}" if error else "")
        reason += f"; its last words are in {self._socket_path.with_suffix('.log')}"
        self._fail_greeting(ZygoteLost(reason))
        for waiter in [started for _, started in self._spawning.values()] + list(self._listing):
            if not waiter.done():
                waiter.set_exception(ZygoteLost(reason))
        self._listing.clear()
        if self._attached and not self._leaving:
            self._losing = self.loop.create_task(self._lose(reason), name="zygote-lost")

    async def _lose(self, reason: str) -> None:
        """The zygote broke off by itself: see to it that it is dead, and so are its actors."""
        log.error("%s", reason)
        try:
            await self._bury(wait_s=0.5)
        except TimeoutError as error:
            log.error("%s", error)
        if self._on_lost is not None:
            self._on_lost(reason)

    async def _bury(self, wait_s: float) -> None:
        """Wait for the zygote's end, force it after `wait_s`, kill what is left, settle handles."""
        if not await _wait_gone(self.pid, self._start_time, wait_s):
            log.error("zygote_pid=%d still runs after %g s: killing it", self.pid, wait_s)
            _kill(self.pid, self._start_time)
        for handle in self.handles.values():
            _kill(handle.pid, handle.start_time)  # only needed without parent death signals
        self._close_link()
        try:
            await asyncio.to_thread(linux.kill_tagged, TAG_VARIABLE, str(self._socket_path))
        finally:
            if self._popen is not None:
                await asyncio.to_thread(self._popen.wait, LEAVE_S)
            for handle in list(self.handles.values()):
                handle._end(ExitStatus())

    def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None and link.transport is not None:
            link.transport.abort()

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)


def _private(folder: Path) -> Path:
    """Make `folder`, 0700. RequestError when others may enter: they could pose as our zygote."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise RequestError(
            f"{folder} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}: "
            f"sockets need a folder of your own with mode 0700; run `chmod 700 {folder}`"
        )
    return folder


def _kill(pid: int, start_time: int) -> None:
    if alive(pid, start_time):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _wait_gone(pid: int, start_time: int, timeout_s: float) -> bool:
    """Whether the process ended within `timeout_s`; a zombie has ended."""
    loop = asyncio.get_running_loop()
    try:
        pidfd = linux.open_pidfd(pid, start_time)
    except OSError:  # no pidfds: looking again is all there is
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while alive(pid, start_time):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        return not alive(pid, start_time)
    if pidfd is None:
        return True
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return True
