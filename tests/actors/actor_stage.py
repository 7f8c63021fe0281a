"""A job's surroundings for one real actor: an inline hub, a flowd that records and grants, and hand-made peers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from actors.conductor.config import JobSection
from actors.env.config import EnvConfig
from actors.host import ActorHost
from actors.job_config import JobConfig
from actors.models.config import ModelConfig
from actors.rollout.config import RolloutConfig
from actors.trainer.config import TrainerConfig
from channels.channel import ChannelRouter
from channels.inline import InlineEndpoint, InlineHub
from channels.lifecycle import (
    FLOWD,
    ActorSpec,
    Failed,
    Forget,
    Introduce,
    LeaseGranted,
    LeaseIdle,
    LeaseReleased,
    LeaseRevoked,
    LeaseWanted,
    Ready,
    Stop,
)
from channels.messages import Message

JOB = "toy"
TINY = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
AnyMessage = TypeVar("AnyMessage", bound=Message)


def job_config(**sections: Any) -> JobConfig:
    """A job of a tiny model; sections are given as dicts of what differs."""
    made: dict[str, Any] = {
        "job": JobSection(
            name=JOB, **{"steps": 4, "groups_per_step": 2, **sections.pop("job", {})}
        ),
        "env": EnvConfig(
            **{"task": "arithmetic", "groups_per_actor": 2, **sections.pop("env", {})}
        ),
        "model": sections.pop("model", TINY),
        "rollout": RolloutConfig(
            **{
                "devices": 1,
                "group_size": 2,
                "max_new_tokens": 6,
                "max_context_tokens": 64,
                "max_running": 8,
                **sections.pop("rollout", {}),
            }
        ),
        "trainer": TrainerConfig(**{"learning_rate": 1e-3, **sections.pop("trainer", {})}),
    }
    for name, values in sections.items():
        made[name] = msgspec.convert(values, JobConfig.__annotations__[name])
    return JobConfig(**made)


class Peer:
    """Another actor, played by the test: an endpoint, its channels, and every message that came."""

    def __init__(self, stage: "Stage", name: str, kind: str, rank: int, epoch: int) -> None:
        self.endpoint: InlineEndpoint = stage.hub.endpoint(name)
        self.introduction = Introduce(
            peer=name, kind=kind, address=self.endpoint.address, epoch=epoch, rank=rank
        )
        self.router = ChannelRouter(self.endpoint)
        self.router.on_message = self._received
        self.messages: list[Message] = []
        self.payloads: list[Any] = []
        self.arrived = asyncio.Event()

    @property
    def name(self) -> str:
        return self.endpoint.name

    def _received(self, sender: str, message: Message, payload: Any) -> None:
        self.messages.append(message)
        self.payloads.append(payload)
        self.arrived.set()

    def of(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        """The messages of a type that came so far."""
        return [message for message in self.messages if isinstance(message, kind)]

    async def take(self, kind: type[AnyMessage], count: int = 1) -> AnyMessage:
        """Wait until `count` messages of a type came; returns the last of these."""
        while len(self.of(kind)) < count:
            self.arrived.clear()
            await self.arrived.wait()
        return self.of(kind)[count - 1]


class Stage:
    """One actor under test, by its host, with a flowd that grants every wish unless told not to."""

    def __init__(
        self,
        run_dir: Path,
        kind: str,
        config: JobConfig,
        *,
        hub: InlineHub | None = None,
        actor: str | None = None,
        devices: tuple[str, ...] = (),
        rank: int = 0,
        num_ranks: int = 1,
        epoch: int = 0,
        shared: bool = False,
        **spec: Any,
    ) -> None:
        self.run_dir = run_dir
        for name in ("checkpoints", "weights", "cache"):
            (run_dir / name).mkdir(parents=True, exist_ok=True)
        self.hub = hub or InlineHub()
        self.shared = shared
        self.granting = True
        self.lease_epoch = 0
        name = actor or f"{kind}-0"
        self.flowd: InlineEndpoint = self.hub.endpoint(FLOWD)
        self.flowd.on_message = self._received
        self.told: list[Message] = []
        self.arrived = asyncio.Event()
        self.spec = ActorSpec(
            **{
                "actor": name,
                "job": JOB,
                "kind": kind,
                "epoch": epoch,
                "replica": name.partition(".")[0],
                "rank": rank,
                "num_ranks": num_ranks,
                "devices": devices,
                "replica_devices": devices,
                "device_memory_bytes": None,
                "config": msgspec.msgpack.encode(config),
                "run_dir": str(run_dir),
                "address": "",
                "weights_dir": str(run_dir / "weights"),
                "cache_dir": str(run_dir / "cache"),
                "flowd_address": self.flowd.address,
                "orphan_grace_s": 30.0,
                "threads": 1,
                **spec,
            }
        )
        self.endpoint = self.hub.endpoint(self.spec.peer)
        self.host = ActorHost(self.spec, self.endpoint, inline=True)
        self.peers: dict[str, Peer] = {}
        self.life: asyncio.Task[int] | None = None

    @property
    def introduction(self) -> Introduce:
        """The actor itself, as flowd introduces it to others."""
        spec = self.spec
        return Introduce(
            peer=spec.peer,
            kind=spec.kind,
            address=self.endpoint.address,
            epoch=spec.epoch,
            rank=spec.rank,
        )

    @property
    def actor(self) -> Any:
        assert self.host.actor is not None
        return self.host.actor

    async def __aenter__(self) -> "Stage":
        self.flowd.connect(self.spec.peer, self.endpoint.address)
        self.life = asyncio.create_task(self.host.main())
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        assert self.life is not None
        if not self.life.done():
            self.host.stop("the test is over")
        await asyncio.gather(self.life, return_exceptions=True)
        failures = self.of(Failed)
        for peer in self.peers.values():
            peer.endpoint.close()
        self.endpoint.close()
        self.flowd.close()
        if error is not None and failures:
            error.add_note(failures[0].traceback)

    # flowd's part.

    def _received(self, sender: str, message: Message, payload: Any) -> None:
        self.told.append(message)
        if isinstance(message, LeaseWanted) and self.granting:
            self.grant()
        self.arrived.set()

    def of(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        """What flowd was told, of one type."""
        return [message for message in self.told if isinstance(message, kind)]

    async def heard(self, kind: type[AnyMessage], count: int = 1) -> AnyMessage:
        """Wait until flowd was told `count` messages of a type; returns the last of these.

        When the actor fails meanwhile, its traceback is raised.
        """
        while len(self.of(kind)) < count:
            failures = self.of(Failed)
            assert not failures, failures[0].traceback
            self.arrived.clear()
            await self.arrived.wait()
        return self.of(kind)[count - 1]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Let the loop run until something holds. The deadline is the test's."""
        while not holds():
            failures = self.of(Failed)
            assert not failures, failures[0].traceback
            await asyncio.sleep(0)

    def grant(self) -> None:
        self.lease_epoch += 1
        self.tell(LeaseGranted(lease_epoch=self.lease_epoch, shared=self.shared))

    async def revoke(self, *, offload: bool) -> LeaseReleased:
        """Take the lease away; returns once the actor has released it."""
        count = len(self.of(LeaseReleased)) + 1
        self.tell(LeaseRevoked(lease_epoch=self.lease_epoch, offload=offload, deadline_s=10.0))
        return await self.heard(LeaseReleased, count)

    async def idle(self) -> None:
        """Wait until the actor said that it has nothing to compute. Only a shared lease says so."""
        await self.heard(LeaseIdle, len(self.of(LeaseIdle)) + 1)

    def tell(self, message: Message) -> None:
        self.flowd.send(self.spec.peer, message)

    async def stop(self) -> int:
        """Ask the actor to leave; returns its exit code."""
        assert self.life is not None
        self.tell(Stop(reason="test", deadline_s=5.0))
        return await self.life

    # Peers.

    async def meet(self, name: str, kind: str, *, rank: int = 0, epoch: int = 0) -> Peer:
        """Once the actor is ready, introduce it and a new peer to each other."""
        await self.heard(Ready)
        peer = Peer(self, f"{JOB}/{name}", kind, rank, epoch)
        self.peers[name] = peer
        await self.introduce(peer)
        return peer

    async def introduce(self, peer: Peer) -> None:
        """Introduce the actor and a peer, perhaps of another stage on the same hub, to each other."""
        await self.heard(Ready)
        peer.endpoint.connect(self.spec.peer, self.endpoint.address)
        self.tell(peer.introduction)
        await self.until(lambda: peer.name in self.actor.peers)

    def lose(self, name: str) -> None:
        """The peer died."""
        peer = self.peers.pop(name)
        peer.endpoint.close()
        known = peer.introduction
        self.tell(Forget(peer=known.peer, kind=known.kind, epoch=known.epoch))
