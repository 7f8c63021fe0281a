"""The device lease: who may compute where. The only scheduling mechanism. Decides, does nothing.

Each input is something that happened (a replica wants its devices, has nothing to compute, gave
them back, died, a deadline passed) and returns the actions that the shell carries out. Rules:

- A device computes for one replica at a time. A replica's whole set is granted at once, to waiters
  in the order they came. A waiter blocks later ones whose set overlaps its own, also while it waits
  itself, so a large set is not starved by small ones, and two stages can not deadlock.
- A holder is asked to give way only when the first waiter for one of its devices could have it: at
  once if it is idle, else when it becomes idle. `preempt` asks a busy one too. Whoever was asked
  has a deadline; past it the shell kills it and then tells `remove`.
- A grant follows only when the memory that others still hold, with what the replica needs, fits
  each device. Who would be in the way is asked to offload, the less urgent first; who keeps too
  much even so is killed. Offloading is asked only when it does not fit otherwise.
- Epochs count grants. What comes under another epoch than the current one is refused.

Times are seconds of one monotonic clock, passed in. Memory is bytes on each device of the set.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from flowd.devices import device_order

SNAPSHOT_VERSION = 1
State = Literal["parked", "waiting", "holding", "revoking"]


class LeaseError(ValueError):
    """Raised when a replica or a request can not be leased for as it is described."""


class StaleLease(LeaseError):
    """Raised when something comes from a replica, or under an epoch, whose lease is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The replica may compute on its devices; everything it delivers carries this epoch."""

    replica: str
    devices: tuple[str, ...]
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoke:
    """The replica finishes its micro-batch, offloads if asked, and answers `released`.

    Also sent to one that does not compute (and then has nothing to finish) but is to offload.
    """

    replica: str
    epoch: int
    offload: bool
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """The shell kills the replica's processes and calls `remove` when they are gone."""

    replica: str
    reason: str


Action = Grant | Revoke | Kill


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """What the table knows of a replica. Read it, never write it.

    memory_bytes: what it needs to compute; None is unknown: all that the others can not offload
    next_bytes: what it said that it needs from its next grant on
    resident_bytes: what it holds while it does not compute
    kept_bytes: what it is expected to hold after a release without offload; None: memory_bytes
    ticket: its place in the queue, if it wants its devices
    offloading: asked to offload, not answered yet    offloaded: holds no more than it must
    draining: is granted nothing any more
    """

    replica: str
    devices: tuple[str, ...]
    memory_bytes: int | None = None
    next_bytes: int | None = None
    kept_bytes: int | None = None
    resident_bytes: int = 0
    state: State = "parked"
    epoch: int = 0
    idle: bool = False
    ticket: int | None = None
    offloading: bool = False
    offloaded: bool = True
    draining: bool = False
    killed: bool = False
    deadline: float | None = None

    @property
    def computing(self) -> bool:
        """Whether it may use its devices now."""
        return self.state in ("holding", "revoking")


class LeaseTable:
    """The leases of the devices of one plan.

    budgets: device id to bytes    revoke_deadline_s: what a revoked replica has to answer
    """

    def __init__(self, budgets: Mapping[str, int], *, revoke_deadline_s: float = 30.0) -> None:
        self._budgets = dict(budgets)
        self._revoke_deadline_s = revoke_deadline_s
        self._leases: dict[str, Lease] = {}
        self._epoch = 0  # of the table: a replica that was removed and added again goes on counting
        self._ticket = 0

    # What happened.

    def add(
        self,
        replica: str,
        devices: Sequence[str],
        *,
        memory_bytes: int | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        """A replica lives and holds nothing. Raises LeaseError for a set that can never be had."""
        if replica in self._leases:
            raise LeaseError(f"replica {replica} has a lease already: remove it first")
        unknown = [device for device in devices if device not in self._budgets]
        if unknown or not devices or len(set(devices)) < len(devices):
            raise LeaseError(
                f"replica {replica} on {list(devices)}: a set names each of its devices once, "
                f"and of {', '.join(self._budgets)}"
            )
        lease = Lease(
            replica=replica,
            devices=tuple(sorted(devices, key=device_order)),
            memory_bytes=memory_bytes,
            kept_bytes=kept_bytes,
        )
        self._check_memory(lease, memory_bytes)
        self._leases[replica] = lease

    def remove(self, replica: str, now: float) -> list[Action]:
        """Its processes are gone: devices and memory are free. Unknown ones are no error."""
        self._leases.pop(replica, None)
        return self._dispatch(now)

    def want(self, replica: str, now: float, memory_bytes: int | None = None) -> list[Action]:
        """It has something to compute. memory_bytes: what it needs from now on, if it knows.

        From a holder that was asked to give way, it counts as its next place in the queue.
        """
        lease = self._lease(replica)
        if memory_bytes is not None:
            self._check_memory(lease, memory_bytes)
            lease.next_bytes = memory_bytes
            if not lease.computing:
                lease.memory_bytes = memory_bytes
        if lease.state == "holding":
            lease.idle = False
        elif lease.ticket is None and not lease.draining:
            self._ticket += 1
            lease.ticket = self._ticket
            if lease.state == "parked":
                lease.state = "waiting"
        return self._dispatch(now)

    def idle(self, replica: str, now: float) -> list[Action]:
        """It has nothing to compute: a holder can be revoked at once, a waiter leaves the queue."""
        lease = self._lease(replica)
        lease.idle = lease.state == "holding"
        lease.ticket = None
        if lease.state == "waiting":
            lease.state = "parked"
        return self._dispatch(now)

    def busy(self, replica: str, now: float) -> list[Action]:
        """An idle holder computes again. Raises StaleLease without a lease."""
        lease = self._lease(replica)
        if not lease.computing:
            raise StaleLease(f"replica {replica} computes while {lease.state}: it must want first")
        return self.want(replica, now)

    def preempt(self, replica: str, now: float, *, drain: bool = False) -> list[Action]:
        """Revoke it now, busy or not. drain: and grant it nothing more (it will be removed)."""
        lease = self._leases.get(replica)
        if lease is None or lease.killed:
            return []  # it is leaving already
        if drain:
            lease.draining = True
            lease.ticket = None
            if lease.state == "waiting":
                lease.state = "parked"
        actions: list[Action] = []
        if lease.state == "holding":
            shared = (w for w in self._waiting() if not set(w.devices).isdisjoint(lease.devices))
            first = next(shared, None)
            offload = first is not None and lease in self._in_the_way(first)
            actions.append(self._revoke(lease, offload, now))
        return actions + self._dispatch(now)

    def released(
        self, replica: str, epoch: int, memory_bytes_left: int, now: float
    ) -> list[Action]:
        """It stopped computing (or offloaded), and still holds so much on each of its devices.

        Raises StaleLease for another epoch than its current one, and for a second answer.
        """
        lease = self._lease(replica)
        if epoch != lease.epoch or not (lease.computing or lease.offloading):
            raise StaleLease(
                f"replica {replica} released epoch {epoch}, but is {lease.state} in epoch "
                f"{lease.epoch}: its lease ended before"
            )
        if memory_bytes_left < 0:
            raise LeaseError(f"replica {replica} says {memory_bytes_left} bytes left: 0 or more")
        lease.resident_bytes = memory_bytes_left
        lease.offloaded = lease.offloading or not memory_bytes_left
        if not lease.offloaded:
            lease.kept_bytes = memory_bytes_left
        if lease.computing and lease.next_bytes is not None:
            lease.memory_bytes = lease.next_bytes
        lease.offloading = False
        lease.deadline = None
        lease.state = "parked" if lease.ticket is None else "waiting"
        return self._dispatch(now)

    def expired(self, now: float) -> list[Action]:
        """Kill whoever missed its deadline. Call it at `next_deadline`."""
        late = [x for x in self._leases.values() if x.deadline is not None and x.deadline <= now]
        return [
            self._kill(x, f"did not answer a revoke within {self._revoke_deadline_s:g} s")
            for x in late
        ]

    # What one may ask.

    def admits(self, replica: str, epoch: int) -> bool:
        """Whether work of this replica under this epoch is taken."""
        lease = self._leases.get(replica)
        if lease is None or lease.killed:
            return False
        return lease.computing and lease.epoch == epoch

    def lease(self, replica: str) -> Lease | None:
        """What is known of a replica."""
        return self._leases.get(replica)

    def holder(self, device: str) -> str | None:
        """Who may compute on a device now."""
        return next((x.replica for x in self._on([device]) if x.computing), None)

    def queue(self) -> list[str]:
        """Who waits, first come first."""
        return [lease.replica for lease in self._waiting()]

    def next_deadline(self) -> float | None:
        """When `expired` has something to do, on the clock of the inputs."""
        return min(
            (x.deadline for x in self._leases.values() if x.deadline is not None), default=None
        )

    def memory_bytes(self, device: str) -> int:
        """What replicas hold on a device; a holder of unknown size has all that others leave."""
        here = list(self._on([device]))
        if any(lease.computing and lease.memory_bytes is None for lease in here):
            return self._budgets[device]
        return sum(self._held(lease) for lease in here)

    def outstanding(self) -> list[Action]:
        """What holds and was asked, as actions: to be sent again to actors that were re-adopted.

        Repeats are harmless: replica and epoch say what was acted upon already.
        """
        actions: list[Action] = []
        for lease in self._leases.values():
            if lease.computing:
                actions.append(
                    Grant(replica=lease.replica, devices=lease.devices, epoch=lease.epoch)
                )
            if lease.deadline is not None:
                actions.append(
                    Revoke(
                        replica=lease.replica,
                        epoch=lease.epoch,
                        offload=lease.offloading,
                        deadline=lease.deadline,
                    )
                )
        return actions

    def snapshot(self) -> dict[str, Any]:
        """The table as plain data, for the head's state on disk."""
        return {
            "version": SNAPSHOT_VERSION,
            "revoke_deadline_s": self._revoke_deadline_s,
            "budgets": dict(self._budgets),
            "epoch": self._epoch,
            "ticket": self._ticket,
            "leases": [{**asdict(lease), "devices": list(lease.devices)} for lease in self],
        }

    @classmethod
    def restore(cls, data: Mapping[str, Any], now: float) -> Self:
        """The table of a snapshot. Deadlines start anew: the clock may be another one."""
        if data.get("version") != SNAPSHOT_VERSION:
            raise LeaseError(
                f"lease snapshot of version {data.get('version')}, and this flowd reads version "
                f"{SNAPSHOT_VERSION}: stop the jobs with the flowd that wrote it"
            )
        table = cls(data["budgets"], revoke_deadline_s=data["revoke_deadline_s"])
        table._epoch, table._ticket = data["epoch"], data["ticket"]
        for row in data["leases"]:
            lease = Lease(**{**row, "devices": tuple(row["devices"])})
            if lease.deadline is not None:
                lease.deadline = now + table._revoke_deadline_s
            table._leases[lease.replica] = lease
        return table

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    # Deciding.

    def _dispatch(self, now: float) -> list[Action]:
        """Grant what can be granted, and ask for what the first waiters need."""
        actions: list[Action] = []
        reserved: set[str] = set()
        for waiter in self._waiting():
            first = reserved.isdisjoint(waiter.devices)
            reserved.update(waiter.devices)
            if first:
                actions += self._serve(waiter, now)
        return actions

    def _serve(self, waiter: Lease, now: float) -> list[Action]:
        """One step towards the grant of a waiter that nobody is before; the last one is it."""
        others = [other for other in self._on(waiter.devices) if other is not waiter]
        actions: list[Action] = []
        in_the_way = self._in_the_way(waiter)
        for other in others:
            if other.state == "holding" and other.idle and not other.killed:
                actions.append(self._revoke(other, other in in_the_way, now))
        if any(other.state == "holding" for other in others):
            return actions  # a busy one: the rest may keep its memory until that is over
        for other in in_the_way:
            if not other.computing:
                actions.append(self._revoke(other, True, now))
        if any(other.computing or other.offloading for other in [waiter, *others]):
            return actions
        leaving = [other for other in others if other.killed or other.draining]
        if not self._fits(waiter, others):
            if not any(other.resident_bytes for other in leaving):
                actions += self._make_room(waiter, others)
            return actions
        actions.append(self._grant(waiter))
        return actions

    def _in_the_way(self, waiter: Lease) -> list[Lease]:
        """Whom to ask to offload so that the waiter fits, the less urgent first."""
        others = [other for other in self._on(waiter.devices) if other is not waiter]
        able = [
            other
            for other in others
            if not (other.offloaded or other.offloading or other.killed or other.draining)
        ]
        if waiter.memory_bytes is None:
            return able
        able.sort(key=lambda x: (x.ticket is not None, -(x.ticket or 0), -x.resident_bytes))
        chosen: list[Lease] = []
        for device in waiter.devices:
            here = [other for other in others if device in other.devices and other not in chosen]
            total = waiter.memory_bytes + sum(self._expected(other, device) for other in here)
            for other in able:
                if total <= self._budgets[device]:
                    break
                if other in here:
                    total -= self._expected(other, device)
                    chosen.append(other)
        return chosen

    def _expected(self, lease: Lease, device: str) -> int:
        """What a replica will hold on a device once it has answered what it was asked."""
        if lease.offloading or lease.killed:
            return 0
        if not lease.computing:
            return lease.resident_bytes
        kept = lease.memory_bytes if lease.kept_bytes is None else lease.kept_bytes
        return self._budgets[device] if kept is None else kept

    def _fits(self, waiter: Lease, others: Sequence[Lease]) -> bool:
        if waiter.memory_bytes is None:  # what others could not offload, it must do without
            return not any(x.resident_bytes for x in others if x.killed or x.draining)
        return all(
            waiter.memory_bytes + sum(x.resident_bytes for x in others if device in x.devices)
            <= self._budgets[device]
            for device in waiter.devices
        )

    def _make_room(self, waiter: Lease, others: Sequence[Lease]) -> list[Action]:
        """Kill those that keep most although they offloaded, until the waiter would fit."""
        actions: list[Action] = []
        left = sorted(others, key=lambda x: x.resident_bytes)
        while left and not self._fits(waiter, left):
            most = left.pop()
            reason = (
                f"keeps {most.resident_bytes} bytes a device after offloading, and "
                f"{waiter.replica} needs {waiter.memory_bytes} of "
                f"{min(self._budgets[device] for device in waiter.devices)}"
            )
            actions.append(self._kill(most, reason))
        return actions

    def _grant(self, lease: Lease) -> Grant:
        self._epoch += 1
        lease.epoch = self._epoch
        lease.state = "holding"
        lease.ticket = None
        lease.idle = lease.offloaded = False
        return Grant(replica=lease.replica, devices=lease.devices, epoch=lease.epoch)

    def _revoke(self, lease: Lease, offload: bool, now: float) -> Revoke:
        if lease.computing:
            lease.state = "revoking"
        lease.offloading = offload
        lease.deadline = now + self._revoke_deadline_s
        return Revoke(
            replica=lease.replica, epoch=lease.epoch, offload=offload, deadline=lease.deadline
        )

    def _kill(self, lease: Lease, reason: str) -> Kill:
        lease.killed = True
        lease.deadline = None
        lease.ticket = None
        if lease.state == "waiting":
            lease.state = "parked"
        return Kill(replica=lease.replica, reason=reason)

    # Looking up.

    def _lease(self, replica: str) -> Lease:
        lease = self._leases.get(replica)
        if lease is None or lease.killed:
            raise StaleLease(
                f"replica {replica} is {'being killed' if lease else 'not known'}: "
                "it has no lease and gets none"
            )
        return lease

    def _waiting(self) -> list[Lease]:
        waiting = [lease for lease in self._leases.values() if lease.state == "waiting"]
        return sorted(waiting, key=lambda lease: lease.ticket or 0)

    def _on(self, devices: Iterable[str]) -> list[Lease]:
        wanted = set(devices)
        return [lease for lease in self._leases.values() if not wanted.isdisjoint(lease.devices)]

    def _held(self, lease: Lease) -> int:
        return (lease.memory_bytes or 0) if lease.computing else lease.resident_bytes

    def _check_memory(self, lease: Lease, memory_bytes: int | None) -> None:
        for device in lease.devices:
            if memory_bytes is not None and memory_bytes > self._budgets[device]:
                raise LeaseError(
                    f"replica {lease.replica} needs {memory_bytes} bytes on {device}, which has "
                    f"{self._budgets[device]}: use a smaller model or batch, or larger devices"
                )
