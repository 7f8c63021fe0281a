"""Messages between flowd and the actors it runs: hello, heartbeats, introductions, leases, farewell.

They travel over the endpoints of both sides; flowd's endpoint is the peer named "flowd".
"""

from typing import Any

import msgspec

from channels.messages import Message
from channels.security import Security

FLOWD = "flowd"


def heartbeat_interval_s(orphan_grace_s: float) -> float:
    """Seconds between heartbeats: several within the grace, so that one late reply orphans nobody."""
    return min(1.0, orphan_grace_s / 4)


class ActorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an actor process is told at its start."""

    actor: str  # unique in the job, such as "rollout-0"; "trainer-0.1" is rank 1 of the replica "trainer-0"
    job: str
    kind: str
    epoch: int  # rises with every restart of this actor
    replica: str
    rank: int
    num_ranks: int
    devices: tuple[str, ...]  # of this rank
    replica_devices: tuple[str, ...]  # of all ranks
    device_memory_bytes: int | None
    config: bytes  # the job config, MessagePack of JobConfig
    run_dir: str
    address: str  # of its mailbox
    weights_dir: str
    cache_dir: str
    flowd_address: str
    orphan_grace_s: float
    threads: int
    listen: str = ""  # a TCP address for a second mailbox, which other nodes reach
    security: Security | None = None  # for all TCP

    @property
    def peer(self) -> str:
        """The name of the actor's endpoint: two jobs may both have a "rollout-0"."""
        return f"{self.job}/{self.actor}"


class Hello(Message, frozen=True, tag="hello"):
    """Actor to flowd: I run. Sent once at the start and again to every new flowd."""

    actor: str
    job: str
    epoch: int
    pid: int
    address: str
    ready: bool
    holding: bool  # the lease is held
    lease_epoch: int
    remote_address: str = ""  # where peers on other nodes find it


class Welcome(Message, frozen=True, tag="welcome"):
    """flowd to actor: I am the flowd of this node. A new `incarnation` asks for a new Hello."""

    incarnation: str
    heartbeat_s: float


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """Actor to flowd, sent by the actor's loop: it shows progress of the loop, not only that the process is there."""

    actor: str
    job: str
    epoch: int
    report: dict[str, Any]


class HeartbeatReply(Message, frozen=True, tag="heartbeat_reply"):
    """flowd to actor; its absence is how an actor knows that it is an orphan."""

    incarnation: str


class Ready(Message, frozen=True, tag="ready"):
    """Actor to flowd: set-up is done (model built, environment opened); introductions may come."""

    actor: str
    job: str
    epoch: int


class FirstOutput(Message, frozen=True, tag="first_output"):
    """Actor to flowd: the first piece of work was delivered."""

    actor: str
    job: str
    epoch: int


class Introduce(Message, frozen=True, tag="introduce"):
    """flowd to actor: this peer is there and may be connected."""

    peer: str
    kind: str
    address: str
    epoch: int
    rank: int = 0


class Forget(Message, frozen=True, tag="forget"):
    """flowd to actor: this peer is gone (died, stopped); what it held comes back to its producers."""

    peer: str
    kind: str
    epoch: int
    reason: str = ""


class LeaseGranted(Message, frozen=True, tag="lease_granted"):
    """flowd to every rank of a replica: compute on your devices. shared: others may ask for them."""

    lease_epoch: int
    shared: bool


class LeaseRevoked(Message, frozen=True, tag="lease_revoked"):
    """flowd to every rank: finish the micro-batch, give up memory if `offload`, then say LeaseReleased."""

    lease_epoch: int
    offload: bool
    deadline_s: float


class LeaseWanted(Message, frozen=True, tag="lease_wanted"):
    """Actor to flowd: there is work and no lease. memory_bytes: the most that it has needed, when it knows."""

    actor: str
    job: str
    memory_bytes: int | None = None


class LeaseIdle(Message, frozen=True, tag="lease_idle"):
    """Actor to flowd: the lease is held and there is nothing to compute; it may be revoked at once."""

    actor: str
    job: str
    lease_epoch: int


class LeaseBusy(Message, frozen=True, tag="lease_busy"):
    """Actor to flowd: computing again under the lease that was idle."""

    actor: str
    job: str
    lease_epoch: int


class LeaseReleased(Message, frozen=True, tag="lease_released"):
    """Actor to flowd: nothing computes under this epoch any more."""

    actor: str
    job: str
    lease_epoch: int
    memory_bytes: int


class Stop(Message, frozen=True, tag="stop"):
    """flowd to actor: hand back what is in flight and leave. After the deadline the process is killed."""

    reason: str
    deadline_s: float


class Failed(Message, frozen=True, tag="failed"):
    """Actor to flowd, just before it exits: what it raised."""

    actor: str
    job: str
    epoch: int
    error: str  # one line: type and message
    traceback: str
    during_setup: bool


class JobEvent(Message, frozen=True, tag="job_event"):
    """Conductor (or trainer) to flowd: something users see. kind: "step", "warmup", "commit", "rollback", …"""

    job: str
    kind: str
    data: dict[str, Any]


class JobFinished(Message, frozen=True, tag="job_finished"):
    """Conductor to flowd: the job is over. state: "done" or "failed"; reason says why."""

    job: str
    state: str
    reason: str


class HandOver(Message, frozen=True, tag="hand_over"):
    """flowd to conductor: let the trainer commit at the next step boundary and leave; another one will come."""

    replica: str


class HandedOver(Message, frozen=True, tag="handed_over"):
    """Conductor to flowd: the trainer has committed and may be replaced."""

    job: str
    replica: str
