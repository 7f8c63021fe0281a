"""The shell around the lease table: carries out its decisions, keeps its deadlines, records who held what.

A replica of several ranks is one lease: a grant or a revocation goes to every rank, wishes count from any rank, and the
lease is released when all ranks have released it.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from channels.lifecycle import LeaseGranted, LeaseRevoked
from channels.messages import Message
from flowd.leases import Action, Grant, Kill, LeaseTable, Revoke, StaleLease

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """What the shell asks of whoever runs the replica's processes."""

    def tell(self, message: Message) -> None:
        """Send to every rank."""
        ...

    def kill(self, reason: str) -> None:
        """Kill every rank; the shell hears of it through `remove`."""
        ...


@dataclass
class _Held:
    ranks: Ranks
    num_ranks: int
    spans: Path
    released: dict[int, int] = field(default_factory=dict)  # rank → bytes left
    needed: dict[int, int] = field(default_factory=dict)  # rank → bytes, of those who know
    granted_at: float = 0.0


class LeaseShell:
    """One per node. on_change: called after every change, with the table to be saved."""

    def __init__(self, table: LeaseTable, on_change: Callable[[], None] = lambda: None) -> None:
        self.table = table
        self.on_change = on_change
        self._held: dict[str, _Held] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(
        self,
        replica: str,
        devices: tuple[str, ...],
        *,
        ranks: Ranks,
        num_ranks: int,
        spans: Path,
        known: bool = False,
    ) -> None:
        """A replica starts. known: it is in the table already (flowd was restarted)."""
        self._held[replica] = _Held(ranks, num_ranks, spans, granted_at=time.time())
        if not known:
            self.table.add(replica, devices)
            self.on_change()
            for lease in self.table:
                # Whoever had these devices alone now has somebody to give way to.
                if (
                    lease.replica != replica
                    and lease.computing
                    and set(devices) & set(lease.devices)
                ):
                    again = LeaseGranted(lease_epoch=lease.epoch, shared=True)
                    self._held[lease.replica].ranks.tell(again)

    def remove(self, replica: str) -> None:
        """The replica's processes are gone."""
        held = self._held.pop(replica, None)
        lease = self.table.lease(replica)
        if held is not None and lease is not None and lease.computing:
            self._record(replica, held)
        self._carry_out(self.table.remove(replica, time.monotonic()))

    def want(
        self, replica: str, rank: int = 0, memory_bytes: int | None = None
    ) -> LeaseGranted | None:
        """A rank wants to compute, and needs so much memory on its device; None: it does not know yet.

        Returns the grant where it stands already: this rank missed it.
        """
        lease = self.table.lease(replica)
        if lease is None or lease.killed:
            return None  # its last words, perhaps
        standing = lease.state == "holding"
        held = self._held.get(replica)
        need = None
        if held is not None and memory_bytes is not None:
            held.needed[rank] = memory_bytes
            if len(held.needed) == held.num_ranks:
                need = max(held.needed.values())
        self._carry_out(self.table.want(replica, time.monotonic(), need))
        if not standing:
            return None
        return LeaseGranted(lease_epoch=lease.epoch, shared=self.is_shared(replica))

    def idle(self, replica: str, epoch: int) -> None:
        """The leader has nothing to compute."""
        if self.table.admits(replica, epoch):
            self._carry_out(self.table.idle(replica, time.monotonic()))

    def busy(self, replica: str, epoch: int) -> None:
        """The leader computes again."""
        if self.table.admits(replica, epoch):
            self._carry_out(self.table.busy(replica, time.monotonic()))

    def released(self, replica: str, rank: int, epoch: int, memory_bytes: int) -> None:
        """A rank gave up the lease."""
        held, lease = self._held.get(replica), self.table.lease(replica)
        if held is None or lease is None or lease.epoch != epoch:
            return
        if not (lease.computing or lease.offloading):
            return  # said again: it must not count as the answer to what is asked next
        held.released[rank] = memory_bytes
        if len(held.released) < held.num_ranks:
            return
        left = max(held.released.values())
        held.released = {}
        if lease.computing:
            self._record(replica, held)
        try:
            self._carry_out(self.table.released(replica, epoch, left, time.monotonic()))
        except StaleLease as error:
            log.warning("stale_release replica=%s epoch=%d %s", replica, epoch, error)

    def is_shared(self, replica: str) -> bool:
        """Whether others may ask for its devices."""
        lease = self.table.lease(replica)
        if lease is None:
            return False
        mine = set(lease.devices)
        return any(x.replica != replica and mine & set(x.devices) for x in self.table)

    def resend(self) -> None:
        """Say again what holds: actors were re-adopted. Repeats are harmless."""
        self._carry_out(self.table.outstanding(), again=True)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _carry_out(self, actions: Iterable[Action], *, again: bool = False) -> None:
        for action in actions:
            held = self._held.get(action.replica)
            if held is None:
                continue
            match action:
                case Grant():
                    if not again:
                        held.granted_at = time.time()
                    held.released = {}
                    held.ranks.tell(
                        LeaseGranted(
                            lease_epoch=action.epoch, shared=self.is_shared(action.replica)
                        )
                    )
                case Revoke():
                    held.ranks.tell(
                        LeaseRevoked(
                            lease_epoch=action.epoch,
                            offload=action.offload,
                            deadline_s=max(0.0, action.deadline - time.monotonic()),
                        )
                    )
                case Kill():
                    log.warning("lease_kill replica=%s reason=%s", action.replica, action.reason)
                    held.ranks.kill(action.reason)
        self.on_change()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.table.next_deadline()
        if deadline is not None:
            delay = max(0.0, deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._carry_out(self.table.expired(time.monotonic()))

    def _record(self, replica: str, held: _Held) -> None:
        """A line per device in the run's spans.jsonl, for `flowctl trace`."""
        lease = self.table.lease(replica)
        assert lease is not None
        now = time.time()
        lines = [
            json.dumps(
                {
                    "device": device,
                    "name": replica.rpartition("/")[2],
                    "start": round(held.granted_at, 6),
                    "seconds": round(now - held.granted_at, 6),
                }
            )
            for device in lease.devices
        ]
        try:
            with held.spans.open("a") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            log.warning("span not written path=%s error=%s", held.spans, error)
