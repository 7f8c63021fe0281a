"""Environments in worker processes: same results, losses that stay small, and nothing that outlives its parent."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.checker import check
from sim.contract import TextObservation
from sim.errors import BadTaskData, SimError, SimulatorFailed, WorkerLost
from sim.point_reach import PointReach
from sim.workers import Workers

DEADLINE_S = 20.0


@contextlib.contextmanager
def open_workers(task: str, num_slots: int, num_workers: int, **options: Any) -> Iterator[Workers]:
    args = options.pop("args", {})
    workers = Workers(task, args, num_slots=num_slots, num_workers=num_workers, **options)
    try:
        yield workers
    finally:
        workers.close()


def obedient(num_slots: int = 2, num_workers: int = 2, **options: Any) -> Any:
    return open_workers("worker_tasks:Obedient", num_slots, num_workers, **options)


def content(observation: TextObservation) -> str:
    return observation.messages[0].content


def ended(pid: int) -> bool:
    """Whether the process ends within the deadline; a zombie has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], DEADLINE_S)[0])
    finally:
        os.close(descriptor)


def test_workers_keep_the_contract() -> None:
    """Slots over three processes, action chunks, pictures through shared memory."""
    draw = np.random.default_rng(0)

    def make(num_slots: int) -> Workers:
        args = {"max_steps": 7, "image_size": 96}
        return Workers("point_reach", args, num_slots=num_slots, num_workers=3)

    checked = check(make, actions=lambda _: draw.uniform(-1, 1, (3, 2)).astype(np.float32))
    assert checked.ended == checked.episodes


def test_they_are_described_as_the_environment_is() -> None:
    """Spaces, and whether it counts seeds."""
    with open_workers("point_reach", 3, 2) as workers:
        env = PointReach(3)
        assert workers.observation_space == env.observation_space  # type: ignore[attr-defined]
        assert workers.action_space == env.action_space  # type: ignore[attr-defined]
        assert workers.counted_seeds is False  # type: ignore[attr-defined]
        assert [list(part.slots) for part in workers.parts] == [[0], [1, 2]]


def test_large_arrays_are_copies_of_what_the_worker_saw() -> None:
    """Through shared memory that is written anew for every answer, whatever their strides."""
    with open_workers("worker_tasks:Pictures", 6, 2) as workers:
        (first,) = workers.reset([5], [7])
        slots = list(range(6))
        many = workers.reset(slots, slots)  # more than the area held before
        assert [int(each["picture"][0, 0, 0]) for each in many] == slots
        depth = np.arange(64 * 64, dtype=np.float32).reshape(64, 64).T[::-1]
        for value, observation in ((7, first), *enumerate(many)):
            np.testing.assert_array_equal(observation["depth"], depth + value)
            assert (observation["picture"] == value).all()
        (result,) = workers.step([2], [np.array([3, 4])])
        np.testing.assert_array_equal(result.observation["depth"], depth + 4)
        with pytest.raises(SimError, match="nothing to show"):
            workers.render([2])


def test_a_segfault_costs_the_episodes_of_its_worker() -> None:
    """The others go on; the slot takes no step until it is reset; the new process is another one."""
    with obedient(num_slots=3, num_workers=2) as workers:
        workers.reset([0, 1, 2], [10, 11, 12])
        (before,) = workers.step([2], ["walk"])
        with pytest.raises(
            WorkerLost, match=r"of slots 1 to 2 died \(SIGSEGV\) in step of slots \[2\]"
        ):
            workers.step([0, 2], ["walk", "segfault"])
        for slot in (1, 2):
            with pytest.raises(WorkerLost, match=f"the episode in slot {slot} was lost"):
                workers.step([0, slot], ["stand", "walk"])
        assert content(workers.step([0], ["walk"])[0].observation) == "did walk for seed 10"
        workers.reset([2], [13])
        (after,) = workers.step([2], ["walk"])
        assert content(after.observation) == "did walk for seed 13"
        assert after.info["pid"] == workers.parts[1].pid != before.info["pid"]
        with pytest.raises(WorkerLost, match="the episode in slot 1 was lost"):
            workers.step([1], ["walk"])


def test_a_hang_ends_at_its_deadline() -> None:
    """Though it ignores signals; killed, begun anew."""
    with obedient(step_timeout_s=0.3) as workers:
        workers.reset([0, 1], [10, 11])
        pid = workers.parts[1].pid
        with pytest.raises(WorkerLost, match="did not answer step in time"):
            workers.step([1], ["hang"])
        assert ended(pid)
        workers.reset([1], [14])
        assert content(workers.step([1], ["walk"])[0].observation) == "did walk for seed 14"


def test_what_died_between_two_calls_is_lost_too() -> None:
    """As when the kernel ran out of memory."""
    with obedient() as workers:
        workers.reset([0, 1], [10, 11])
        os.kill(workers.parts[0].pid, signal.SIGKILL)
        assert ended(workers.parts[0].pid)
        with pytest.raises(WorkerLost, match=r"died \(SIGKILL\) in step"):
            workers.step([0, 1], ["walk", "walk"])
        workers.reset([0], [12])
        assert content(workers.step([0], ["walk"])[0].observation) == "did walk for seed 12"


def test_errors_of_the_environment_arrive() -> None:
    """Ours as they are, others with the worker's traceback; the worker lives on."""
    with obedient() as workers:
        workers.reset([0, 1], [10, 11])
        with pytest.raises(BadTaskData, match="row 3 is bad"):
            workers.step([0], ["refuse"])
        with pytest.raises(SimulatorFailed, match=r"(?s)reward per second.*worker_tasks.py.*obey"):
            workers.step([0, 1], ["walk", "raise"])
        assert content(workers.step([0], ["walk"])[0].observation) == "did walk for seed 10"
        workers.step([1], ["stand"])
        with pytest.raises(SimError, match="slot 1 has no episode"):
            workers.step([1], ["walk"])


def test_an_environment_that_cannot_be_opened_is_told_at_once() -> None:
    """A wrong argument, an error, a death; nothing is left running."""
    for args, error, message in (
        ({"zzz": 1}, SimError, 'takes no argument "zzz"'),
        ({"open_with": "refuse"}, BadTaskData, "row 3 is bad"),
        ({"open_with": "exit"}, WorkerLost, r"died \(exit code 7\) in open"),
    ):
        with pytest.raises(error, match=message), obedient(args=args):
            pass
    with pytest.raises(ValueError, match="num_workers = 3: the rule is 1 to 2"), obedient(2, 3):
        pass


def test_each_worker_ends_with_its_own_socket() -> None:
    """No sibling holds it open; closing ends all of them."""
    with obedient() as workers:
        one, two = (part.pid for part in workers.parts)
        workers.parts[0].hang_up()
        assert ended(one)
        assert Path(f"/proc/{two}").exists()
    assert ended(two)


PARENT = """
import signal, sys
from sim.workers import Workers
workers = Workers("worker_tasks:Obedient", {}, num_slots=3, num_workers=3)
workers.reset([0, 1, 2], [0, 1, 2])
workers.parts[0].ask("step", [0], ["hang"])
workers.parts[1].ask("step", [1], ["wait " + sys.argv[1]])
print(*(part.pid for part in workers.parts), flush=True)
signal.pause()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(how: int, tmp_path: Path) -> None:
    """However it dies, and whatever the workers are in: a step that hangs, a system call, or nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pipe)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        parent.send_signal(how)
        assert all(ended(pid) for pid in pids)
