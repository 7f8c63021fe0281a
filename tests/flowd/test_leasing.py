"""The shell around the lease table: what ranks are told, deadlines on the clock, spans on disk."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from channels.lifecycle import LeaseGranted, LeaseRevoked
from channels.messages import Message
from flowd.leases import LeaseTable
from flowd.leasing import LeaseShell

Main = Callable[[], Coroutine[Any, Any, None]]


def run(main: Main) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(20.0):
            await main()

    asyncio.run(guarded())


class Ranks:
    """The processes of a replica, as far as the shell knows them."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.killed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def tell(self, message: Message) -> None:
        self.told.append(message)

    def kill(self, reason: str) -> None:
        self.killed.set_result(reason)

    def take(self) -> list[Message]:
        told, self.told = self.told, []
        return told


class Node:
    """A shell over two devices."""

    def __init__(self, spans: Path, *, deadline_s: float = 30.0) -> None:
        self.changes = 0
        table = LeaseTable({"cpu:0": 100, "cpu:1": 100}, revoke_deadline_s=deadline_s)
        self.shell = LeaseShell(table, self._changed)
        self.spans = spans

    def _changed(self) -> None:
        self.changes += 1

    def add(self, replica: str, *devices: str, num_ranks: int = 1) -> Ranks:
        ranks = Ranks()
        self.shell.add(replica, devices, ranks=ranks, num_ranks=num_ranks, spans=self.spans)
        return ranks


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Node]:
    return lambda **given: Node(tmp_path / "spans.jsonl", **given)


def test_two_stages_take_turns(node: Callable[..., Node]) -> None:
    """Wish, idle, revoke, release, grant: in this order, each told to the ones it concerns."""

    async def main() -> None:
        own = node()
        rollout = own.add("toy/rollout-0", "cpu:0")
        assert own.shell.want("toy/rollout-0") is None
        assert rollout.take() == [LeaseGranted(lease_epoch=1, shared=False)]
        trainer = own.add("toy/trainer-0", "cpu:0")
        assert rollout.take() == [LeaseGranted(lease_epoch=1, shared=True)], (
            "it has to give way now"
        )
        own.shell.want("toy/trainer-0")
        assert rollout.take() == trainer.take() == []
        own.shell.idle("toy/rollout-0", 1)
        (revoke,) = rollout.take()
        assert isinstance(revoke, LeaseRevoked)
        assert (revoke.lease_epoch, revoke.offload) == (1, True)
        assert 29.0 < revoke.deadline_s <= 30.0
        own.shell.released("toy/rollout-0", 0, 1, 0)
        assert trainer.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        assert own.changes >= 5
        own.shell.close()

    run(main)


@pytest.mark.parametrize(("trainer_needs", "offload"), [(60, False), (61, True)])
def test_stages_that_fit_together_stay_resident(
    node: Callable[..., Node], trainer_needs: int, offload: bool
) -> None:
    """Once both have said what they need; a replica needs what its neediest rank does."""

    async def main() -> None:
        own = node()
        trainer = own.add("toy/trainer-0", "cpu:0", "cpu:1", num_ranks=2)
        rollout = own.add("toy/rollout-0", "cpu:0")
        own.shell.want("toy/trainer-0", 0, trainer_needs)
        own.shell.want("toy/trainer-0", 1, 10)
        own.shell.idle("toy/trainer-0", 1)
        own.shell.want("toy/rollout-0", 0, 40)
        (_, revoke) = trainer.take()
        assert isinstance(revoke, LeaseRevoked)
        assert revoke.offload, "nobody knew of the second rank when it was granted the first lease"
        for rank in (0, 1):
            own.shell.released("toy/trainer-0", rank, 1, 0)
        assert rollout.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        for rank, needs in ((0, trainer_needs), (1, 10)):
            own.shell.want("toy/trainer-0", rank, needs)
        own.shell.idle("toy/rollout-0", 2)
        (revoke,) = rollout.take()
        assert isinstance(revoke, LeaseRevoked)
        assert revoke.offload is offload
        own.shell.close()

    run(main)


def test_a_grant_follows_the_release_of_every_rank(node: Callable[..., Node]) -> None:
    """One rank's release is not the replica's; what stays is the most that any rank keeps."""

    async def main() -> None:
        own = node()
        trainer = own.add("toy/trainer-0", "cpu:0", "cpu:1", num_ranks=2)
        rollout = own.add("toy/rollout-0", "cpu:1")
        own.shell.want("toy/trainer-0")
        assert trainer.take() == [LeaseGranted(lease_epoch=1, shared=True)]
        own.shell.idle("toy/trainer-0", 1)
        own.shell.want("toy/rollout-0")
        (revoke,) = trainer.take()
        assert isinstance(revoke, LeaseRevoked)
        own.shell.released("toy/trainer-0", 1, 1, 7)
        own.shell.released("toy/trainer-0", 1, 1, 7)  # the same rank again
        assert rollout.take() == []
        own.shell.released("toy/trainer-0", 0, 1, 3)
        assert rollout.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        lease = own.shell.table.lease("toy/trainer-0")
        assert lease is not None
        assert lease.resident_bytes == 7
        own.shell.close()

    run(main)


def test_a_release_that_was_said_again_is_no_answer_to_the_next_question(
    node: Callable[..., Node],
) -> None:
    """Parked and asked to offload, a replica has done so when all its ranks said it anew."""

    async def main() -> None:
        own = node()
        trainer = own.add("toy/trainer-0", "cpu:0", "cpu:1", num_ranks=2)
        own.shell.want("toy/trainer-0")
        own.shell.table.preempt("toy/trainer-0", 0.0)
        own.shell.released("toy/trainer-0", 0, 1, 50)
        own.shell.released("toy/trainer-0", 1, 1, 50)
        own.shell.released("toy/trainer-0", 0, 1, 50)  # crossed a grant that was repeated
        rollout = own.add("toy/rollout-0", "cpu:1")
        trainer.take()
        own.shell.want("toy/rollout-0")
        (revoke,) = trainer.take()
        assert isinstance(revoke, LeaseRevoked)
        assert revoke.offload
        own.shell.released("toy/trainer-0", 1, 1, 0)
        assert rollout.take() == []
        own.shell.released("toy/trainer-0", 0, 1, 0)
        assert rollout.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        own.shell.close()

    run(main)


def test_a_rank_that_comes_late_is_told_what_the_others_know(node: Callable[..., Node]) -> None:
    """The grant went out before this rank could hear it; asking again gives it, and changes nothing."""

    async def main() -> None:
        own = node()
        trainer = own.add("toy/trainer-0", "cpu:0", "cpu:1", num_ranks=2)
        assert own.shell.want("toy/trainer-0") is None
        assert trainer.take() == [LeaseGranted(lease_epoch=1, shared=False)]
        assert own.shell.want("toy/trainer-0") == LeaseGranted(lease_epoch=1, shared=False)
        assert trainer.take() == []
        own.add("toy/rollout-0", "cpu:0")
        assert own.shell.want("toy/trainer-0") == LeaseGranted(lease_epoch=1, shared=True)
        own.shell.close()

    run(main)


def test_whoever_misses_the_deadline_is_killed_and_its_successor_served(
    node: Callable[..., Node],
) -> None:
    """After the kill nothing it says counts; once it is gone the waiter gets the device."""

    async def main() -> None:
        own = node(deadline_s=0.02)
        rollout = own.add("toy/rollout-0", "cpu:0")
        trainer = own.add("toy/trainer-0", "cpu:0")
        own.shell.want("toy/rollout-0")
        own.shell.want("toy/trainer-0")
        own.shell.idle("toy/rollout-0", 1)
        assert "did not answer a revoke within 0.02 s" in await rollout.killed
        own.shell.released("toy/rollout-0", 0, 1, 0)
        assert own.shell.want("toy/rollout-0") is None
        own.shell.idle("toy/rollout-0", 1)
        assert trainer.take() == []
        own.shell.remove("toy/rollout-0")
        assert trainer.take() == [LeaseGranted(lease_epoch=2, shared=False)]
        own.shell.close()

    run(main)


def test_an_answer_in_time_stops_the_clock(node: Callable[..., Node]) -> None:
    """A released replica is not killed by the deadline that it met."""

    async def main() -> None:
        own = node(deadline_s=0.02)
        rollout = own.add("toy/rollout-0", "cpu:0")
        trainer = own.add("toy/trainer-0", "cpu:0")
        own.shell.want("toy/rollout-0")
        own.shell.want("toy/trainer-0")
        own.shell.idle("toy/rollout-0", 1)
        own.shell.released("toy/rollout-0", 0, 1, 0)
        done, _ = await asyncio.wait({rollout.killed}, timeout=0.06)
        assert not done
        assert trainer.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        own.shell.close()

    run(main)


def test_old_epochs_and_strangers_change_nothing(node: Callable[..., Node]) -> None:
    """What an earlier life of a replica says late is not taken for the present one's."""

    async def main() -> None:
        own = node()
        rollout = own.add("toy/rollout-0", "cpu:0")
        own.shell.want("toy/rollout-0")
        trainer = own.add("toy/trainer-0", "cpu:0")
        own.shell.want("toy/trainer-0")
        rollout.take()
        own.shell.idle("toy/rollout-0", 0)
        own.shell.busy("toy/rollout-0", 7)
        own.shell.released("toy/rollout-0", 0, 7, 0)
        own.shell.released("toy/nobody-0", 0, 1, 0)
        own.shell.remove("toy/nobody-0")
        assert own.shell.want("toy/nobody-0") is None
        assert rollout.take() == trainer.take() == []
        own.shell.close()

    run(main)


def test_a_restarted_flowd_says_again_what_holds(tmp_path: Path, node: Callable[..., Node]) -> None:
    """From the saved table: the grant, and the revoke that was under way with a new deadline."""

    async def main() -> None:
        own = node()
        own.add("toy/rollout-0", "cpu:0")
        own.add("toy/trainer-0", "cpu:0")
        own.shell.want("toy/rollout-0")
        own.shell.want("toy/trainer-0")
        own.shell.idle("toy/rollout-0", 1)
        own.shell.close()
        saved = json.loads(json.dumps(own.shell.table.snapshot()))
        shell = LeaseShell(LeaseTable.restore(saved, asyncio.get_running_loop().time()))
        rollout, trainer = Ranks(), Ranks()
        for name, ranks in (("toy/rollout-0", rollout), ("toy/trainer-0", trainer)):
            shell.add(
                name,
                ("cpu:0",),
                ranks=ranks,
                num_ranks=1,
                spans=tmp_path / "spans.jsonl",
                known=True,
            )
        assert rollout.take() == []
        shell.resend()
        grant, revoke = rollout.take()
        assert grant == LeaseGranted(lease_epoch=1, shared=True)
        assert isinstance(revoke, LeaseRevoked)
        assert revoke.lease_epoch == 1
        shell.released("toy/rollout-0", 0, 1, 0)
        assert trainer.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        shell.close()

    run(main)


def test_who_held_a_device_is_written_down(node: Callable[..., Node]) -> None:
    """A line per device and stay, from grant to release, also for one that died holding."""

    async def main() -> None:
        own = node()
        own.add("toy/trainer-0", "cpu:0", "cpu:1")
        own.shell.want("toy/trainer-0")
        own.add("toy/rollout-0", "cpu:1")
        own.shell.idle("toy/trainer-0", 1)
        own.shell.want("toy/rollout-0")
        own.shell.released("toy/trainer-0", 0, 1, 0)
        own.shell.remove("toy/rollout-0")
        lines = [json.loads(line) for line in own.spans.read_text().splitlines()]
        assert [(line["device"], line["name"]) for line in lines] == [
            ("cpu:0", "trainer-0"),
            ("cpu:1", "trainer-0"),
            ("cpu:1", "rollout-0"),
        ]
        assert all(0 <= line["seconds"] < 20 for line in lines)
        assert lines[2]["start"] >= lines[1]["start"]
        own.shell.close()

    run(main)


def test_a_span_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The lease goes on without its line: a full disk must not hold devices."""

    async def main() -> None:
        own = Node(tmp_path / "gone" / "spans.jsonl")
        own.add("toy/rollout-0", "cpu:0")
        trainer = own.add("toy/trainer-0", "cpu:0")
        own.shell.want("toy/rollout-0")
        own.shell.want("toy/trainer-0")
        own.shell.idle("toy/rollout-0", 1)
        own.shell.released("toy/rollout-0", 0, 1, 0)
        assert trainer.take() == [LeaseGranted(lease_epoch=2, shared=True)]
        own.shell.close()

    run(main)
