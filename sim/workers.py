"""An environment in processes of its own: each worker hosts some of the slots and answers when it is ready.

    workers = Workers("metaworld", {"env_name": "drawer-close-v3"}, num_slots=16, num_workers=4)
    results = workers.step(slots, chunks)           # as any environment; waits for all
    workers.parts[2].ask("step", slots, chunks)     # or each part by itself: ask, wait until readable, take

A worker that dies, or does not answer in time, is killed and begun anew; its episodes are lost (`WorkerLost`), those of
the others are not. Workers end with their parent, however it dies. Environments of arrays take action chunks
here, so that a chunk costs one message.
"""

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sim.contract import StepResult
from sim.errors import SimError, WorkerLost
from sim.worker_child import raise_remote
from sim.worker_wire import SharedArea, Wire

END_S = 3.0  # for workers that are told to end
SEND_S = 5.0  # for a message that has begun


class Worker:
    """One process and the slots it hosts. One call at a time: `ask`, then `take` once `fileno()` is readable.

    slots: the numbers that its slots have among all; callers use these
    timeouts: in seconds: "open", "reset" (of one slot), "step" (of all slots that are asked, and of one step of a
        chunk), "render"
    """

    def __init__(
        self, task: str, args: Mapping[str, Any], slots: range, timeouts: Mapping[str, float]
    ) -> None:
        self.slots = slots
        self.description: dict[str, Any] = {}
        self._opening = {"task": task, "args": dict(args), "num_slots": len(slots)}
        self._timeouts = timeouts
        self._call = ""
        self._asked: Sequence[int] = ()
        self._due = 0.0
        self._running: set[int] = set()  # slots with an episode
        self._lost: set[int] = set()  # slots whose episode went with an earlier process
        self.begin()

    def begin(self) -> None:
        """Start a process and ask it to open the environment: to be followed by `take`."""
        ours, theirs = socket.socketpair()
        area = os.memfd_create("flowd-worker")
        try:
            ours.settimeout(SEND_S)
            # Nothing else is inherited: a worker that holds a sibling's socket would keep it alive.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sim.worker_child"),
                    *(str(number) for number in (theirs.fileno(), area, os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), area),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except BaseException:
            ours.close()
            os.close(area)
            raise
        finally:
            theirs.close()
        self._connection, self._area = ours, area
        self._wire = Wire(ours, SharedArea(area), writes_area=False)
        self._send("open", self._opening, slots=self.slots)

    @property
    def pid(self) -> int:
        """Of the process that hosts the slots now."""
        return self._process.pid

    def fileno(self) -> int:
        """Readable once there is an answer, or the worker is dead."""
        return self._connection.fileno()

    @property
    def seconds_left(self) -> float:
        """Until the call that was asked is overdue; 0 or more."""
        return max(0.0, self._due - time.monotonic())

    def check_running(self, slots: Sequence[int]) -> None:
        """WorkerLost: the episode of a slot was lost. SimError: a slot has none. Until they are reset."""
        for slot in slots:
            if slot in self._lost:
                raise WorkerLost(f"the episode in slot {slot} was lost with its worker: reset it")
            if slot not in self._running:
                raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")

    def ask(self, call: str, slots: Sequence[int], values: Sequence[Any] = ()) -> None:
        """Ask for "reset" (values: seeds), "step" (actions) or "render" (none) of some of the slots.

        SimError: a slot to be stepped has no episode; nothing was asked. WorkerLost: the episode was lost, or the
        worker died since the last call.
        """
        if call == "step":
            self.check_running(slots)
        local = [slot - self.slots.start for slot in slots]
        times = 1
        if call == "step":
            times = max((len(action) for action in values if hasattr(action, "ndim")), default=1)
        elif call == "reset":
            times = len(slots)  # a slot's first one makes its simulator
        self._send(call, [local] if call == "render" else [local, list(values)], slots, times)

    def take(self) -> list[Any]:
        """The answer to what was asked, once readable or overdue: one per slot.

        WorkerLost: it died, or is overdue; it was killed, and `begin` starts another. Errors of the environment are
        raised here as SimError (or ValueError, where it was one).
        """
        readable, _, _ = select.select([self._connection], [], [], 0)
        if not readable:
            raise self._lose(f"did not answer {self._call} in time")
        try:
            error, answer = self._wire.receive()
        except (EOFError, OSError):
            raise self._lose("") from None
        if error is not None:
            raise_remote(*error)
        if self._call == "open":
            self.description = answer
            return []
        if self._call == "reset":
            self._running.update(self._asked)
            self._lost.difference_update(self._asked)
        elif self._call == "step":
            ended = (r.terminated or r.truncated for r in answer)
            self._running.difference_update(itertools.compress(self._asked, ended))
        return list(answer)

    def hang_up(self) -> None:
        """Tell it to end, without waiting for it."""
        self._connection.close()

    def end(self, within_s: float = END_S) -> None:
        """Let the environment close; kill what does not end in time."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        self._kill()

    def _send(self, call: str, content: Any, slots: Sequence[int], times: int = 1) -> None:
        self._call, self._asked = call, slots
        self._due = time.monotonic() + self._timeouts[call] * times
        try:
            self._wire.send([call, content])
        except OSError:
            raise self._lose("") from None

    def _lose(self, how: str) -> WorkerLost:
        if not how:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)  # what closed its socket is about to end
        code = self._process.poll()
        self.hang_up()
        self._kill()
        self._lost |= self._running
        self._running.clear()
        how = how or f"died ({_how_it_ended(code)}) in {self._call}"
        asked = (
            f"slots {list(self._asked)}" if len(self._asked) <= 4 else f"{len(self._asked)} slots"
        )
        return WorkerLost(
            f"the worker {self.pid} of slots {self.slots.start} to {self.slots.stop - 1} {how} of {asked}; "
            "its episodes are lost"
        )

    def _kill(self) -> None:
        with contextlib.suppress(OSError):  # closed by an earlier call
            os.close(self._area)
        self._area = -1
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Workers:
    """All slots of an environment over several workers; an Environment itself.

    timeouts in seconds: of opening the environment, of a reset of one slot, of one step of all slots of a worker

    MissingDependency, SimError, ValueError: as the task says when it is opened. WorkerLost: a worker died opening it.
    """

    def __init__(
        self,
        task: str,
        args: Mapping[str, Any],
        *,
        num_slots: int,
        num_workers: int,
        open_timeout_s: float = 300.0,
        reset_timeout_s: float = 120.0,
        step_timeout_s: float = 60.0,
    ) -> None:
        if not 1 <= num_workers <= num_slots:
            raise ValueError(
                f"num_workers = {num_workers}: the rule is 1 to {num_slots}, one slot each at least"
            )
        timeouts = {
            "open": open_timeout_s,
            "reset": reset_timeout_s,
            "step": step_timeout_s,
            "render": step_timeout_s,
        }
        bounds = [num_slots * i // num_workers for i in range(num_workers + 1)]
        self.parts: list[Worker] = []
        try:
            for first, last in itertools.pairwise(bounds):
                self.parts.append(Worker(task, args, range(first, last), timeouts))
            for part in self.parts:
                _wait(part)
                part.take()
        except BaseException:
            self.close()
            raise
        for name, value in self.parts[0].description.items():
            setattr(self, name, value)  # as the environment has them: spaces, counted_seeds

    def part_of(self, slot: int) -> Worker:
        """The worker of a slot."""
        return next(part for part in self.parts if slot in part.slots)

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        """Start an episode in each slot. WorkerLost: a worker was lost, and begun anew."""
        return self._all("reset", slots, seeds)

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        """Step each slot. WorkerLost: a worker was lost, and begun anew; the other slots have been stepped."""
        return self._all("step", slots, actions)

    def render(self, slots: Sequence[int]) -> list[Any]:
        """A picture of each slot."""
        return self._all("render", slots, slots)

    def close(self) -> None:
        """End every worker."""
        until = time.monotonic() + END_S
        for part in self.parts:
            part.hang_up()
        for part in self.parts:
            part.end(max(0.0, until - time.monotonic()))

    def _all(self, call: str, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        places: dict[Worker, list[int]] = {}  # positions in `slots`
        for place, slot in enumerate(slots):
            places.setdefault(self.part_of(slot), []).append(place)
        if call == "step":
            for part, mine in places.items():
                part.check_running([slots[i] for i in mine])
        answers: dict[int, Any] = {}
        errors: list[SimError | ValueError] = []
        asked = []
        for part, mine in places.items():
            try:
                part.ask(call, [slots[i] for i in mine], [values[i] for i in mine])
                asked.append(part)
            except WorkerLost as error:
                errors.append(error)
                self._begin_anew(part)
        for part in asked:
            _wait(part)
            try:
                answers.update(zip(places[part], part.take(), strict=True))
            except WorkerLost as error:
                errors.append(error)
                self._begin_anew(part)
            except (SimError, ValueError) as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return [answers[place] for place in range(len(slots))]

    def _begin_anew(self, part: Worker) -> None:
        part.begin()
        _wait(part)
        part.take()


def _wait(part: Worker) -> None:
    """Until there is an answer, or it is overdue."""
    select.select([part], [], [], part.seconds_left)


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "its socket closed"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
