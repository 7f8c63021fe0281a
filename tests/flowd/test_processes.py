"""Actor processes with real signals: whoever dies, nothing is left running."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml
import pytest
import uvloop

from flowd.errors import RequestError
from flowd.linux import open_pidfd, peer_hung_up
from flowd.processes import (
    SOCKET_NAME,
    ExitStatus,
    ProcessHandle,
    SpawnError,
    ZygoteClient,
    ZygoteLost,
    alive,
    process_start_time,
)

ENTRIES = Path(__file__).parent
DEADLINE_S = 20.0


@dataclass
class Introduction:
    """What an actor said, and the connection that ends with the last process that holds it."""

    facts: dict[str, Any]
    reader: asyncio.StreamReader

    @property
    def pid(self) -> int:
        return int(self.facts["pid"])

    async def next(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(await self.reader.readline())
        return facts

    async def all_holders_gone(self) -> None:
        assert await self.reader.read() == b""


@dataclass
class Stage:
    """A state directory, and a mailbox for the actors of one test."""

    state_dir: Path
    mailbox: str
    introductions: "asyncio.Queue[Introduction]"
    clients: list[ZygoteClient] = field(default_factory=list)

    def client(self, on_lost: Callable[[str], None] | None = None) -> ZygoteClient:
        self.clients.append(ZygoteClient(on_lost))
        return self.clients[-1]

    async def started(
        self, on_lost: Callable[[str], None] | None = None, grace_s: float = 30.0
    ) -> ZygoteClient:
        client = self.client(on_lost)
        await client.start(self.state_dir, preload=(), orphan_grace_s=grace_s)
        return client

    async def spawn(
        self,
        client: ZygoteClient,
        entry: str,
        argument: dict[str, Any] | None = None,
        **options: Any,
    ) -> ProcessHandle:
        options = {"name": "actor", "log_path": self.log_path} | options
        argument = {"mailbox": self.mailbox} | (argument or {})
        return await client.spawn(f"zygote_entries:{entry}", argument, **options)

    @property
    def log_path(self) -> Path:
        return self.state_dir / "actor.log"


@asynccontextmanager
async def stage_in(folder: Path) -> AsyncIterator[Stage]:
    introductions: asyncio.Queue[Introduction] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        introductions.put_nowait(Introduction(json.loads(await reader.readline()), reader))

    mailbox = str(folder / "mail.sock")
    server = await asyncio.start_unix_server(on_connection, mailbox, limit=1 << 20)
    stage = Stage(folder / "state", mailbox, introductions)
    try:
        yield stage
    finally:
        for client in stage.clients:
            await client.stop(deadline_s=0.0)
        for writer in writers:
            writer.close()
            await writer.wait_closed()
        server.close()
        await server.wait_closed()


Scenario = Callable[[Stage], Awaitable[None]]


def python_path(*folders: Path) -> str:
    """A PYTHONPATH with these folders in front of what is there: an installation may live on it."""
    present = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, folders), *([present] if present else [])])


@pytest.fixture(params=["asyncio", "uvloop"])
def play(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scenario], None]:
    """Run a scenario with a deadline, on either loop."""
    monkeypatch.setenv("PYTHONPATH", python_path(ENTRIES))
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    async def with_stage(scenario: Scenario) -> None:
        async with asyncio.timeout(DEADLINE_S), stage_in(tmp_path) as stage:
            await scenario(stage)

    def run(scenario: Scenario) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(with_stage(scenario))

    return run


async def gone(pid: int, start_time: int | None) -> None:
    """Wait until the process ended; the test's deadline bounds it."""
    pidfd = open_pidfd(pid, start_time) if start_time is not None else None
    if pidfd is None:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    await ended.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)


def flowd_process(stage: Stage, entry: str, grace_s: float) -> "subprocess.Popen[bytes]":
    """A process in flowd's place, for the test to kill; the actor and it write to the mailbox."""
    command = [sys.executable, str(ENTRIES / "zygote_entries.py"), str(stage.state_dir)]
    command += [stage.mailbox, str(grace_s), f"zygote_entries:{entry}"]
    return subprocess.Popen(command)


async def introduced_flowd_and_actor(stage: Stage) -> tuple[Introduction, Introduction]:
    both = [await stage.introductions.get(), await stage.introductions.get()]
    flowd, actor = sorted(both, key=lambda one: "zygote" not in one.facts)
    return flowd, actor


def test_forked_actor_is_a_clean_process_of_its_own(play, tmp_path):
    """Own session, default signals, nothing of the zygote's but stdio; the log gets both streams."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        handle = await stage.spawn(
            client,
            "describe",
            {"code": 3},
            name="env-0-with-a-long-name",
            environment={"ADDED": "1", "PYTHONPATH": None},
            cwd=tmp_path,
            nice=1,
        )
        actor = await stage.introductions.get()
        assert await handle.exited == ExitStatus(exit_code=3)
        facts = actor.facts
        assert facts["pid"] == facts["sid"] == facts["pgid"] == handle.pid
        assert facts["ppid"] == client.pid
        assert facts["name"] == "env-0-with-a-lo"  # what the kernel keeps
        assert facts["cwd"] == str(tmp_path)
        assert facts["nice"] == os.nice(0) + 1
        assert facts["environment"]["ADDED"] == "1"
        assert "PYTHONPATH" not in facts["environment"]
        assert facts["blocked"] == 0
        ignored = {s for s in signal.Signals if facts["ignored"] & (1 << (s - 1))}
        assert not ignored & {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP}
        assert facts["descriptors"] == [0, 1, 2]
        log = stage.log_path.read_text()
        assert "said on stdout" in log
        assert "said on stderr" in log
        assert client.handles == {}

    play(scenario)


def test_exit_code_is_what_the_entry_returns_or_raises(play):
    """None is 0, bytes arrive as bytes, an exception is a traceback in the log and code 1."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        logs = {name: stage.state_dir / "logs" / f"{name}.log" for name in ("fail", "exit", "none")}
        failed = await stage.spawn(client, "fail", log_path=logs["fail"])
        left = await stage.spawn(client, "leave_with_words", log_path=logs["exit"])
        ended = await stage.spawn(client, "describe", log_path=logs["none"])
        counted = await client.spawn(
            "zygote_entries:count_bytes", b"12345", name="n", log_path=logs["none"]
        )
        missing = await stage.spawn(client, "no_such_function", log_path=logs["none"])
        assert await failed.exited == await left.exited == ExitStatus(exit_code=1)
        assert await ended.exited == ExitStatus(exit_code=0)
        assert await counted.exited == ExitStatus(exit_code=5)
        assert await missing.exited == ExitStatus(exit_code=1)
        assert "RuntimeError: the entry's own words" in logs["fail"].read_text()
        assert "words instead of a code" in logs["exit"].read_text()
        assert "no_such_function" in logs["none"].read_text()

    play(scenario)


def test_actors_draw_different_random_numbers(play):
    """Forked twins share no random state."""

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        await client.start(stage.state_dir, preload=("numpy", "numpy.random"))
        await asyncio.gather(*(stage.spawn(client, "describe") for _ in range(4)))
        facts = [(await stage.introductions.get()).facts for _ in range(4)]
        assert len({one["random"] for one in facts}) == 4
        assert len({one["numpy_random"] for one in facts}) == 4

    play(scenario)


def test_repeated_spawn_id_runs_once(play):
    """A spawn whose reply was lost is asked again: the same process answers, also when it ended."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        first = await stage.spawn(client, "leave_on_term", spawn_id="one")
        await stage.introductions.get()
        assert await stage.spawn(client, "leave_on_term", spawn_id="one") is first
        assert [actor.pid for actor in await client.live()] == [first.pid]
        first.signal(signal.SIGTERM)
        assert await first.exited == ExitStatus(exit_code=7)
        again = await stage.spawn(client, "leave_on_term", spawn_id="one")
        assert again.pid == first.pid
        assert await again.exited == ExitStatus(exit_code=7)
        assert await client.live() == []
        assert stage.introductions.empty()

    play(scenario)


def test_killed_actor_takes_all_it_started_along(play):
    """kill -9 of an actor: children, those in a session of their own, and daemons go with it."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        handle = await stage.spawn(client, "wait_with_family")
        bystander = await stage.spawn(client, "wait_with_family")
        families = [await stage.introductions.get() for _ in range(2)]
        family, other = sorted(families, key=lambda one: one.pid != handle.pid)
        others = [(await other.next())["pid"] for _ in range(3)]
        for _ in range(3):
            await family.next()
        os.kill(handle.pid, signal.SIGKILL)
        assert await handle.exited == ExitStatus(signum=signal.SIGKILL)
        await family.all_holders_gone()
        assert all(process_start_time(pid) is not None for pid in [*others, bystander.pid])
        assert not bystander.exited.done()

    play(scenario)


def test_killed_zygote_takes_all_actors_along(play):
    """kill -9 of the zygote: no actor and nothing they started outlives it; flowd is told once."""

    async def scenario(stage: Stage) -> None:
        losses: list[str] = []
        lost = asyncio.Event()
        client = await stage.started(on_lost=lambda reason: (losses.append(reason), lost.set()))
        handle = await stage.spawn(client, "wait_with_family")
        family = await stage.introductions.get()
        for _ in range(3):
            await family.next()
        os.kill(client.pid, signal.SIGKILL)
        await family.all_holders_gone()
        await lost.wait()
        assert len(losses) == 1
        assert str(client.pid) in losses[0]
        assert handle.exited.done()
        with pytest.raises(ZygoteLost, match="start another"):
            await stage.spawn(client, "wait")
        successor = await stage.started()
        assert await (await stage.spawn(successor, "describe")).exited == ExitStatus(exit_code=0)

    play(scenario)


def test_killed_zygote_takes_actors_along_with_no_flowd_to_sweep(play):
    """The kernel alone does it: no flowd is connected when the zygote dies."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        await stage.spawn(client, "wait_stubbornly")
        actor = await stage.introductions.get()
        client.detach()
        os.kill(client.pid, signal.SIGKILL)
        await actor.all_holders_gone()

    play(scenario)


def test_stop_kills_an_actor_that_ignores_sigterm(play):
    """SIGTERM first; what is left after the deadline is killed, and the zygote is gone too."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        polite = await stage.spawn(client, "leave_on_term")
        stubborn = await stage.spawn(client, "wait_stubbornly")
        stopped = await stage.spawn(client, "leave_on_term")
        introductions = [await stage.introductions.get() for _ in range(3)]
        os.kill(stopped.pid, signal.SIGSTOP)
        await client.stop(deadline_s=0.5)
        assert polite.exited.result() == stopped.exited.result() == ExitStatus(exit_code=7)
        assert stubborn.exited.result() == ExitStatus(signum=signal.SIGKILL)
        assert process_start_time(client.pid) is None
        assert not (stage.state_dir / SOCKET_NAME).exists()
        for introduction in introductions:
            await introduction.all_holders_gone()
        await client.stop()

    play(scenario)


def test_killed_flowd_is_followed_by_another(play):
    """kill -9 of flowd: actors work on, a new flowd adopts them and learns of exits it missed."""

    async def scenario(stage: Stage) -> None:
        flowd_popen = flowd_process(stage, "leave_on_term", grace_s=30)
        flowd, actor = await introduced_flowd_and_actor(stage)
        zygote_start_time = process_start_time(flowd.facts["zygote"])
        with pytest.raises(ZygoteLost, match="another flowd is connected"):
            await stage.client().adopt(stage.state_dir / SOCKET_NAME)
        flowd_popen.kill()
        flowd_popen.wait()

        second = stage.client()
        handles = await second.adopt(stage.state_dir / SOCKET_NAME)
        assert [(one.pid, one.name, one.spawn_id) for one in handles] == [
            (actor.pid, "actor", "the-actor")
        ]
        assert second.pid == flowd.facts["zygote"]
        assert alive(actor.pid, handles[0].start_time)
        second.detach()

        os.kill(actor.pid, signal.SIGTERM)
        await actor.all_holders_gone()
        await gone(actor.pid, handles[0].start_time)
        third = stage.client()
        assert await third.adopt(stage.state_dir / SOCKET_NAME) == []
        assert [(one.pid, one.exit_code) for one in third.missed_exits] == [(actor.pid, 7)]
        assert await (await stage.spawn(third, "describe")).exited == ExitStatus(exit_code=0)
        await third.stop()
        await gone(second.pid, zygote_start_time)

    play(scenario)


def test_unadopted_actors_leave_after_the_grace(play):
    """kill -9 of flowd and no other: the zygote and a stuck actor are gone after the grace."""

    async def scenario(stage: Stage) -> None:
        flowd_popen = flowd_process(stage, "wait_stubbornly", grace_s=0.2)
        flowd, actor = await introduced_flowd_and_actor(stage)
        zygote_pid = flowd.facts["zygote"]
        start_time = process_start_time(zygote_pid)
        flowd_popen.kill()
        flowd_popen.wait()
        await actor.all_holders_gone()
        await gone(zygote_pid, start_time)
        with pytest.raises(ZygoteLost, match="no fork server listens"):
            await stage.client().adopt(stage.state_dir / SOCKET_NAME)

    play(scenario)


def test_start_kills_what_an_earlier_zygote_left(play):
    """A zygote left alone on the state directory makes room for a new one, actors included."""

    async def scenario(stage: Stage) -> None:
        flowd_popen = flowd_process(stage, "wait_with_family", grace_s=30)
        _, actor = await introduced_flowd_and_actor(stage)
        for _ in range(3):
            await actor.next()
        flowd_popen.kill()
        flowd_popen.wait()
        await stage.started()
        await actor.all_holders_gone()

    play(scenario)


def test_other_interpreter_runs_the_entry(play):
    """`python = path`: our packages are found there, and nothing else of our environment is."""
    other = getattr(sys, "_base_executable", sys.executable)
    if os.path.realpath(other) == sys.executable:
        pytest.skip("the tests do not run in a virtual environment: no second interpreter")

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        payload = "x" * 300_000  # more than a pipe or a command line would take
        handle = await stage.spawn(
            client, "describe", {"code": 4, "payload": payload}, python=other
        )
        actor = await stage.introductions.get()
        assert await handle.exited == ExitStatus(exit_code=4)
        assert actor.pid == handle.pid == actor.facts["pgid"]
        assert actor.facts["executable"] == other
        assert actor.facts["size"] == len(payload)
        packages = stage.state_dir / "packages"
        assert str(packages) in actor.facts["path"]
        assert {"flowd", "channels", "actors", "sim"} <= {path.name for path in packages.iterdir()}

        survivor = await stage.spawn(client, "wait", python=other)
        waiting = await stage.introductions.get()
        os.kill(client.pid, signal.SIGKILL)
        await waiting.all_holders_gone()  # the parent death signal outlives exec
        await survivor.exited

    play(scenario)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"python": "/nonexistent/python"}, "python = '/nonexistent/python' cannot be executed"),
        ({"cwd": Path("/nonexistent/folder")}, "cwd = '/nonexistent/folder' is not a folder"),
        ({"log_path": Path("/dev/null/actor.log")}, "/dev/null"),
    ],
)
def test_spawn_that_cannot_work_says_why(play, options, words):
    """The reason comes back to the caller, nothing runs, and the fork server goes on."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        with pytest.raises(SpawnError, match=words):
            await stage.spawn(client, "wait", **options)
        assert await client.live() == []

    play(scenario)


def test_stuck_zygote_hides_no_exit_and_starts_nothing_unwanted(play):
    """Exits come from the kernel, calls time out, and a spawn nobody awaits any more is killed."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        handle = await stage.spawn(client, "wait")
        await stage.introductions.get()
        os.kill(client.pid, signal.SIGSTOP)
        os.kill(handle.pid, signal.SIGKILL)
        assert await handle.exited == ExitStatus()
        with pytest.raises(ZygoteLost, match="did not answer"):
            await client.live(timeout_s=0.05)
        with pytest.raises(ZygoteLost, match="did not start 'late'"):
            await stage.spawn(client, "wait", name="late", timeout_s=0.05)
        os.kill(client.pid, signal.SIGCONT)
        await client.live()  # by its answer the late process is up and its SIGKILL on the way
        for actor in await client.live():  # by this one the signal was sent
            await gone(actor.pid, actor.start_time)
        assert client.handles == {}

    play(scenario)


def test_spawns_may_overlap(play):
    """Twenty spawns at once all come up, each with its own process, and all leave at the stop."""

    async def scenario(stage: Stage) -> None:
        client = await stage.started()
        handles = await asyncio.gather(*(stage.spawn(client, "wait") for _ in range(20)))
        introductions = [await stage.introductions.get() for _ in range(20)]
        assert {one.pid for one in introductions} == {handle.pid for handle in handles}
        assert set(client.handles) == {handle.pid for handle in handles}
        await client.stop()
        assert all(handle.exited.result().signum == signal.SIGTERM for handle in handles)

    play(scenario)


def test_state_directory_of_others_is_refused(play):
    """Who may enter the folder could pose as the fork server."""

    async def scenario(stage: Stage) -> None:
        stage.state_dir.mkdir()
        stage.state_dir.chmod(0o755)
        with pytest.raises(RequestError, match=r"mode 0755.*chmod 700"):
            await stage.started()

    play(scenario)


def test_failing_preload_is_a_warning(play):
    """A module that cannot be imported does not keep the daemon from starting."""

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        await client.start(stage.state_dir, preload=("no_such_module_anywhere",))
        assert any("no_such_module_anywhere" in warning for warning in client.warnings)

    play(scenario)


def test_forked_actors_compute_with_preloaded_torch(play):
    """torch's thread pools start in the actor, with the size asked for; none exists in the zygote."""

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        await client.start(stage.state_dir, preload=("torch",))
        assert client.warnings == []
        for threads in ("1", "2"):
            environment = {"FLOWD_TORCH_THREADS": threads}
            handle = await stage.spawn(client, "compute_with_torch", environment=environment)
            facts = (await stage.introductions.get()).facts
            assert await handle.exited == ExitStatus(exit_code=0)
            assert facts["threads"] == int(threads)
            assert facts["gradient"] == 3 * 2 * 256  # d/dw of sum(w @ w) at ones, three times

    play(scenario)


def has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


needs_gpu = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")


@pytest.mark.gpu
@needs_gpu
def test_forked_actor_computes_on_the_device_it_is_shown(play):
    """A zygote with torch imported leaves CUDA alone, so each child may choose its device."""

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        await client.start(stage.state_dir, preload=("torch",))
        environment = {"CUDA_VISIBLE_DEVICES": "0"}
        for _ in range(2):
            handle = await stage.spawn(client, "compute_on_gpu", environment=environment)
            facts = (await stage.introductions.get()).facts
            assert await handle.exited == ExitStatus(exit_code=0)
            assert (facts["total"], facts["devices"]) == (8.0, 1)

    play(scenario)


@pytest.mark.gpu
@needs_gpu
def test_zygote_that_initialised_cuda_refuses_to_fork(play, tmp_path, monkeypatch):
    """A child could not use any device; the reason names the preload list."""
    (tmp_path / "initialises_cuda.py").write_text("import torch\ntorch.cuda.init()\n")
    monkeypatch.setenv("PYTHONPATH", python_path(ENTRIES, tmp_path))

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        await client.start(stage.state_dir, preload=("initialises_cuda",))
        with pytest.raises(SpawnError, match="preload list"):
            await stage.spawn(client, "describe")

    play(scenario)


def test_start_that_fails_leaves_nothing(play, tmp_path, monkeypatch):
    """A fork server that is not ready in time is killed, not left to finish its imports."""
    module = tmp_path / "imports_forever.py"
    module.write_text("import signal\nwhile True:\n    signal.pause()\n")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))

    async def scenario(stage: Stage) -> None:
        client = stage.client()
        with pytest.raises(ZygoteLost, match=r"not ready within 0\.3 s"):
            await client.start(stage.state_dir, preload=("imports_forever",), ready_timeout_s=0.3)
        assert client._popen is not None
        assert client._popen.returncode == -signal.SIGKILL

    play(scenario)


def test_a_reused_pid_is_not_the_process_it_was():
    """(pid, start time) names a process: neither a later owner of the pid nor a zombie is alive."""
    start_time = process_start_time(os.getpid())
    assert start_time is not None
    assert alive(os.getpid(), start_time)
    assert not alive(os.getpid(), start_time - 1)
    assert open_pidfd(os.getpid(), start_time - 1) is None

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child_start_time = process_start_time(child.pid)
    assert child_start_time is not None
    assert alive(child.pid, child_start_time)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_time(child.pid) == child_start_time
    assert not alive(child.pid, child_start_time)
    child.communicate()
    assert process_start_time(child.pid) is None


def test_hang_up_is_seen_behind_unread_bytes():
    """What a dead flowd sent before its end does not hide that it is dead."""
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"unread")
        assert not peer_hung_up(ours.fileno())
        theirs.close()
        assert peer_hung_up(ours.fileno())
