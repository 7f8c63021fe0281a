"""An actor's side of its lease, on a real loop: who may compute when, and what flowd hears."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from actors.errors import DeviceMemoryExceeded, LeaseViolation
from actors.lease import Lease

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
MIB = 2**20


class Flowd:
    """Hears what a lease says, and parks when told to, holding until `may_park` is set."""

    def __init__(self, *, follows: bool = False, devices: tuple[str, ...] = ("cpu:0",)) -> None:
        self.heard: list[Any] = []
        self.parked: list[bool] = []
        self.failures: list[BaseException] = []
        self.error: Exception | None = None
        self.may_park = asyncio.Event()
        self.may_park.set()
        self.lease = Lease(
            devices=devices,
            memory_limit=100 * MIB,
            send_wanted=self._wanted,
            send_idle=lambda epoch: self.heard.append(("idle", epoch)),
            send_busy=lambda epoch: self.heard.append(("busy", epoch)),
            send_released=lambda epoch, left: self.heard.append(("released", epoch, left)),
            park=self._park,
            failed=self.failures.append,
            follows=follows,
        )

    def _wanted(self, most_bytes: int | None) -> None:
        self.heard.append("wanted" if most_bytes is None else ("wanted", most_bytes))

    async def _park(self, offload: bool) -> int:
        await self.may_park.wait()
        if self.error is not None:
            raise self.error
        self.parked.append(offload)
        return 0 if offload else 7

    def take_heard(self) -> list[Any]:
        heard, self.heard = self.heard, []
        return heard


async def turns(number: int = 5) -> None:
    """Let everything that can go on go on."""
    for _ in range(number):
        await asyncio.sleep(0)


async def enter(lease: Lease) -> None:
    async with lease:
        pass


def test_waits_until_granted(run: Run) -> None:
    """The wish is said once, the section begins with the grant."""

    async def main() -> None:
        flowd = Flowd()
        assert not flowd.lease.held
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        assert flowd.take_heard() == ["wanted"]
        assert not entering.done()
        flowd.lease.granted(1, shared=False)
        await entering
        assert flowd.lease.held
        await enter(flowd.lease)  # held already: no wish, no wait
        assert flowd.take_heard() == []

    run(main)


def test_no_devices_no_waiting(run: Run) -> None:
    """An env or conductor computes on no device and never asks."""

    async def main() -> None:
        flowd = Flowd(devices=())
        await enter(flowd.lease)
        flowd.lease.check()
        flowd.lease.idle()
        assert flowd.take_heard() == []

    run(main)


def test_computing_without_the_lease_is_a_violation(run: Run) -> None:
    """Before the grant and after the release; the message names device, epoch, way out."""

    async def main() -> None:
        flowd = Flowd()
        with pytest.raises(LeaseViolation, match=r"cpu:0 without holding its lease \(epoch 0\)"):
            flowd.lease.check()
        flowd.lease.granted(4, shared=False)
        flowd.lease.check()
        flowd.lease.revoked(4, offload=False)
        await turns()
        with pytest.raises(LeaseViolation, match=r"\(epoch 4\): enter `async with lease` first"):
            flowd.lease.check()

    run(main)


def test_a_wish_tells_the_most_that_was_needed(run: Run) -> None:
    """So that whoever fits beside it may stay on the device; nothing is told before anything was checked."""

    async def main() -> None:
        flowd = Flowd()
        asked = asyncio.create_task(enter(flowd.lease))
        await turns()
        assert flowd.take_heard() == ["wanted"]
        flowd.lease.granted(1, shared=True)
        await asked
        for used in (30, 50, 40):
            flowd.lease.check_memory(used)
        flowd.lease.revoked(1, offload=False)
        await turns()
        asked = asyncio.create_task(enter(flowd.lease))
        await turns()
        assert flowd.take_heard() == [("released", 1, 7), ("wanted", 50)]
        flowd.lease.granted(2, shared=True)
        await asked

    run(main)


def test_memory_beyond_the_lease_is_an_error(run: Run) -> None:
    """The limit itself is allowed; the message says both numbers."""

    async def main() -> None:
        lease = Flowd().lease
        lease.check_memory(100 * MIB)
        with pytest.raises(DeviceMemoryExceeded, match=r"150\.0 MiB on cpu:0.*100\.0 MiB"):
            lease.check_memory(150 * MIB)

    run(main)


def test_revocation_takes_effect_when_the_section_ends(run: Run) -> None:
    """Inside, the micro-batch is finished first; it can see that somebody waits."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        async with flowd.lease:
            assert not flowd.lease.revoking
            flowd.lease.revoked(1, offload=True)
            assert flowd.lease.revoking
            await turns()
            assert flowd.parked == []
            flowd.lease.check()
        await turns()
        assert flowd.parked == [True]
        assert flowd.take_heard() == [("released", 1, 0)]
        assert not flowd.lease.held

    run(main)


def test_revocation_outside_a_section_takes_effect_at_once(run: Run) -> None:
    """Without offload the bytes that stay are told."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        flowd.lease.revoked(1, offload=False)
        await turns()
        assert flowd.parked == [False]
        assert flowd.take_heard() == [("released", 1, 7)]

    run(main)


def test_a_section_that_comes_while_parking_waits_for_the_next_grant(run: Run) -> None:
    """It wants the lease only after the release was said: flowd's queue keeps its order."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        flowd.may_park.clear()
        flowd.lease.revoked(1, offload=False)
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        assert flowd.take_heard() == []
        flowd.may_park.set()
        await turns()
        assert flowd.take_heard() == [("released", 1, 7), "wanted"]
        flowd.lease.granted(2, shared=True)
        await entering

    run(main)


def test_a_second_section_waits_without_stopping_the_loop(run: Run) -> None:
    """Revoked while one section runs, another waits until that one ended and the next grant came."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        end_first = asyncio.Event()

        async def first() -> None:
            async with flowd.lease:
                await end_first.wait()

        running = asyncio.create_task(first())
        await turns()
        flowd.lease.revoked(1, offload=False)
        second = asyncio.create_task(enter(flowd.lease))
        await turns()
        assert not second.done()
        end_first.set()
        await running
        await turns()
        assert flowd.take_heard() == [("released", 1, 7), "wanted"]
        flowd.lease.granted(2, shared=True)
        await second

    run(main)


def test_a_parked_one_is_asked_to_offload(run: Run) -> None:
    """It answers again, now with nothing left; without offload there is nothing to answer."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        flowd.lease.revoked(1, offload=False)
        await turns()
        flowd.lease.revoked(1, offload=False)
        await turns()
        assert flowd.take_heard() == [("released", 1, 7)]
        flowd.lease.revoked(1, offload=True)
        await turns()
        assert flowd.parked == [False, True]
        assert flowd.take_heard() == [("released", 1, 0)]

    run(main)


def test_revocations_of_the_past_and_repeated_ones_do_nothing(run: Run) -> None:
    """An old epoch is ignored, a second revocation while parking is the same one."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(2, shared=True)
        flowd.lease.revoked(1, offload=True)
        await turns()
        assert flowd.lease.held
        flowd.may_park.clear()
        flowd.lease.revoked(2, offload=False)
        await turns()
        flowd.lease.revoked(2, offload=False)
        flowd.may_park.set()
        await turns()
        assert flowd.take_heard() == [("released", 2, 7)]

    run(main)


def test_a_repeated_grant_changes_nothing(run: Run) -> None:
    """Said again by a restarted flowd; an older epoch is ignored."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(3, shared=False)
        flowd.lease.granted(3, shared=False)
        flowd.lease.granted(2, shared=True)
        assert (flowd.lease.epoch, flowd.lease.shared) == (3, False)
        assert flowd.lease.held
        assert flowd.take_heard() == []

    run(main)


def test_a_grant_of_a_released_epoch_is_answered_by_the_release(run: Run) -> None:
    """It crossed the release, or a new flowd never heard it: computing now would be without a lease."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=False)
        flowd.lease.revoked(1, offload=False)
        await turns()
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        flowd.take_heard()
        flowd.lease.granted(1, shared=True)
        await turns()
        assert not flowd.lease.held
        assert flowd.take_heard() == [("released", 1, 7), "wanted"], "the wish is said after it"
        flowd.lease.granted(2, shared=True)
        await entering

    run(main)


def test_wishes_are_said_again_to_a_new_flowd(run: Run) -> None:
    """What was said to a flowd that died is not lost: waiting would be for ever."""

    async def main() -> None:
        waiting = Flowd()
        entering = asyncio.create_task(enter(waiting.lease))
        await turns()
        waiting.lease.say_again()
        assert waiting.take_heard() == ["wanted", "wanted"]
        waiting.lease.granted(1, shared=True)
        await entering
        waiting.lease.say_again()
        assert waiting.take_heard() == []
        waiting.lease.idle()
        waiting.lease.say_again()
        assert waiting.take_heard() == [("idle", 1), ("idle", 1)]

    run(main)


def test_idle_and_busy_are_said_only_when_shared(run: Run) -> None:
    """Each once per change; a lease that nobody else wants needs no messages."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.idle()  # not held: nothing to say
        flowd.lease.granted(1, shared=False)
        flowd.lease.idle()
        await enter(flowd.lease)
        assert flowd.take_heard() == []
        flowd.lease.granted(2, shared=True)
        flowd.lease.idle()
        flowd.lease.idle()
        await enter(flowd.lease)
        await enter(flowd.lease)
        assert flowd.take_heard() == [("idle", 2), ("busy", 2)]

    run(main)


def test_a_grant_that_nobody_waits_for_is_idle(run: Run) -> None:
    """Its "busy" crossed a revocation, which flowd takes for a wish. Were the grant kept, all others would starve."""

    async def main() -> None:
        flowd = Flowd()
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        flowd.lease.granted(1, shared=True)
        await entering
        flowd.lease.idle()
        flowd.take_heard()
        async with flowd.lease:
            flowd.lease.revoked(1, offload=False)  # it left flowd before "busy" came there
        await turns()
        assert flowd.take_heard() == [("busy", 1), ("released", 1, 7)]
        flowd.lease.idle()
        flowd.lease.granted(2, shared=True)
        assert flowd.take_heard() == [("idle", 2)]
        await enter(flowd.lease)
        assert flowd.take_heard() == [("busy", 2)]

    run(main)


def test_an_idle_holder_says_so_when_it_becomes_shared(run: Run) -> None:
    """It had been idle without saying it; the newcomer would wait for ever."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=False)
        flowd.lease.idle()
        flowd.lease.granted(1, shared=True)
        assert flowd.take_heard() == [("idle", 1)]
        flowd.lease.granted(1, shared=True)
        assert flowd.take_heard() == []

    run(main)


def test_cancelled_while_waiting_leaves_it_usable(run: Run) -> None:
    """The wish stands, and the next section uses its grant."""

    async def main() -> None:
        flowd = Flowd()
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        assert entering.cancelled()
        flowd.lease.granted(1, shared=False)
        await enter(flowd.lease)
        flowd.lease.revoked(1, offload=False)
        await turns()
        assert flowd.take_heard() == ["wanted", ("released", 1, 7)]

    run(main)


def test_cancelled_inside_a_section_ends_the_section(run: Run) -> None:
    """A revocation that waited for the section then takes effect."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)

        async def hold() -> None:
            async with flowd.lease:
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await turns()
        flowd.lease.revoked(1, offload=False)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await turns()
        assert flowd.take_heard() == [("released", 1, 7)]

    run(main)


def test_cancelled_while_waiting_for_parking_does_not_stop_the_parking(run: Run) -> None:
    """The release is owed to flowd, whoever waited for it."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        flowd.may_park.clear()
        flowd.lease.revoked(1, offload=True)
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        flowd.may_park.set()
        await turns()
        assert flowd.take_heard() == [("released", 1, 0)]
        flowd.lease.granted(2, shared=False)
        await enter(flowd.lease)

    run(main)


def test_parking_that_raises_is_reported_and_ends_every_section(run: Run) -> None:
    """The device was not given up: nothing is released, and who enters gets the error."""

    async def main() -> None:
        flowd = Flowd()
        flowd.lease.granted(1, shared=True)
        flowd.error = RuntimeError("no host memory for the weights")
        flowd.may_park.clear()
        flowd.lease.revoked(1, offload=True)
        entering = asyncio.create_task(enter(flowd.lease))
        await turns()
        flowd.may_park.set()
        with pytest.raises(RuntimeError, match="no host memory"):
            await entering
        with pytest.raises(RuntimeError, match="no host memory"):
            await enter(flowd.lease)
        assert flowd.failures == [flowd.error]
        assert flowd.take_heard() == []

    run(main)


def test_a_rank_that_follows_parks_with_its_leader(run: Run) -> None:
    """Revoked, it goes on taking part until the leader lets go, in whichever order the two come."""

    async def main() -> None:
        flowd = Flowd(follows=True)
        flowd.lease.granted(1, shared=True)
        flowd.lease.revoked(1, offload=False)
        await turns()
        await enter(flowd.lease)
        assert flowd.lease.held
        flowd.lease.let_go()
        await turns()
        assert flowd.take_heard() == [("released", 1, 7)]
        flowd.lease.granted(2, shared=True)
        flowd.lease.let_go()
        await turns()
        assert flowd.lease.held
        flowd.lease.revoked(2, offload=False)
        await turns()
        assert flowd.take_heard() == [("released", 2, 7)]

    run(main)
