"""The env actor: plays whole groups of episodes. It needs no torch and keeps nothing that cannot be made again.

For every ticket it resets one slot per sample with the group's seed, then plays turn by turn: the observations go to a
rollout actor together with the tokens of the history (opaque here), the actions come back, the environment steps. A
turn's request is one item on the channel "requests", a TurnRequest, and is acknowledged with a tuple of Action, None
where the context has no room for another turn. The finished group goes to the trainer; when the trainer holds it the
ticket is acknowledged.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import actors.wire  # noqa: F401  registers the payload types
from actors.actor import Actor
from actors.env.arrays import as_run, check_fit
from actors.env.hosts import open_hosts
from actors.episodes import Action, Group, Int32, SampleRequest, Segment, Turn, TurnRequest
from channels.channel import Item
from channels.lifecycle import Introduce
from channels.work import StageTimes
from sim.contract import StepResult, counted_seed
from sim.errors import SimError, WorkerLost


@dataclass
class Episode:
    """One sample of a group while it is played."""

    sample: int
    slot: int
    observation: Any
    history: Int32 = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    turns: list[Turn] = field(default_factory=list)
    info: dict[str, float | str] = field(default_factory=dict)
    terminated: bool = False
    truncated: bool = False

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    def act(self, action: Action, result: StepResult) -> None:
        """A turn is over. The tokens of a text join the history: exactly those the policy saw and sampled."""
        if action.chunk is None:
            self.history = np.concatenate([self.history, action.prompt, action.tokens])
        else:
            action = as_run(action, result)
        self.turns.append(Turn(observation=self.observation, action=action, reward=result.reward))
        self.observation = result.observation
        self.info.update(result.info)
        self.terminated, self.truncated = result.terminated, result.truncated

    def segment(self) -> Segment:
        return Segment(
            sample=self.sample,
            turns=tuple(self.turns),
            terminated=self.terminated,
            truncated=self.truncated,
            bootstrap=self.observation if self.truncated else None,
            info=self.info,
        )


LOSSES = 3  # of one group's episodes with their worker, before the env actor gives up


class EnvActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Open the environment with a slot for every sample of every group played at a time."""
        group_size = self.config.rollout.group_size
        num_groups = self.config.env.groups_per_actor
        num_slots = group_size * num_groups
        self.playing = 0
        self.hosts = await open_hosts(
            self.config.env.task,
            self.config.env.args,
            num_slots=num_slots,
            workers=self.config.env.workers,
            step_timeout_s=self.config.env.step_timeout_s,
            blocking=self.blocking,
            told=self._account,
        )
        self.env = self.hosts.env
        check_fit(self.config.policy, self.env)
        self.step_seen = -1
        self.tickets = self.router.consumer("tickets", capacity=num_groups)
        self.requests = self.router.producer("requests", bound=num_groups, epoch=self.spec.epoch)
        self.groups = self.router.producer("groups", bound=num_groups, epoch=self.spec.epoch)
        self._account()

    async def run(self) -> None:
        """Play every ticket that comes, several at a time."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.hosts.run())
            while True:
                item = await self.tickets.get()
                tasks.create_task(self._attend(item), name=f"group-{item.payload['group']}")

    async def leave(self) -> None:
        """Give tickets back: another env actor plays them from the start."""
        self.tickets.close()
        await self.blocking(self.hosts.close)

    def close(self) -> None:
        """Also after an error: worker processes end before the actor does."""
        if hasattr(self, "hosts"):
            self.hosts.end_workers()
        super().close()

    def on_peer(self, peer: Introduce) -> None:
        """Learn who gives tickets, who acts, who trains."""
        match peer.kind:
            case "conductor":
                self.tickets.add_producer(peer.peer)
            case "rollout":
                self.requests.add_consumer(peer.peer)
            case "trainer" if peer.rank == 0:
                self.groups.add_consumer(peer.peer)

    def on_peer_lost(self, peer: Introduce) -> None:
        """What a dead rollout or trainer held is offered to the next one."""
        match peer.kind:
            case "conductor":
                self.tickets.remove_producer(peer.peer)
            case "rollout":
                self.requests.remove_consumer(peer.peer)
            case "trainer" if peer.rank == 0:
                self.groups.remove_consumer(peer.peer)

    async def _attend(self, item: Item) -> None:
        """Play the group of a ticket unless it is cancelled meanwhile."""
        self.playing += 1
        self._account()
        play = asyncio.create_task(self._play(item))
        cancelled = asyncio.create_task(item.wait_cancelled())
        try:
            await asyncio.wait({play, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if play.done():
                play.result()
        finally:
            for task in (play, cancelled):
                task.cancel()
            await asyncio.gather(play, cancelled, return_exceptions=True)
            if item.cancelled and not item.finished:
                item.ack()  # frees its place; nobody waits for it
            self.playing -= 1
            self._account()

    async def _play(self, item: Item) -> None:
        ticket: dict[str, Any] = item.payload
        self._tell_times(ticket["step"])
        slots = self.hosts.take(ticket["group_size"])
        try:
            group = await self._episodes_again(ticket, slots)
            await self.groups.call(group, priority=-ticket["step"])
            self.delivered()
            item.ack()
        finally:
            self.hosts.give_back(slots)

    async def _episodes_again(self, ticket: dict[str, Any], slots: Sequence[int]) -> Group:
        """Play a group; from the start where a worker took an episode of it along."""
        for losses in range(1, LOSSES + 1):
            try:
                return await self._episodes(ticket, slots)
            except WorkerLost as error:
                lost = error
            self.counters["groups_lost"] = self.counters.get("groups_lost", 0) + 1
            self.event("group_lost", group=ticket["group"], losses=losses, reason=str(lost))
        raise SimError(
            f"group {ticket['group']} (seed {ticket['seed']}) lost its worker {LOSSES} times: {lost}"
        ) from lost

    async def _episodes(self, ticket: dict[str, Any], slots: Sequence[int]) -> Group:
        observations = await self.hosts.call("reset", slots, [self._seed(ticket)] * len(slots))
        episodes = [
            Episode(sample, slot, observation)
            for sample, (slot, observation) in enumerate(zip(slots, observations, strict=True))
        ]
        for turn in range(self.config.max_turns):
            await self._turn(ticket, turn, [e for e in episodes if not e.ended])
            if all(episode.ended for episode in episodes):
                break
        for episode in episodes:
            episode.truncated = episode.truncated or not episode.terminated
        return Group(
            group=ticket["group"],
            attempt=ticket["attempt"],
            run_attempt=ticket["run_attempt"],
            seed=ticket["seed"],
            segments=tuple(episode.segment() for episode in episodes if episode.turns),
        )

    def _seed(self, ticket: dict[str, Any]) -> int:
        if getattr(self.env, "counted_seeds", False):
            return counted_seed(self.config.job.seed, ticket["group"])
        seed: int = ticket["seed"]
        return seed

    async def _turn(self, ticket: dict[str, Any], turn: int, episodes: list[Episode]) -> None:
        """One turn of every episode that goes on."""
        request = TurnRequest(
            group=ticket["group"],
            attempt=ticket["attempt"],
            run_attempt=ticket["run_attempt"],
            turn=turn,
            version=ticket["version"],
            exact=ticket["exact"],
            samples=tuple(
                SampleRequest(sample=e.sample, history=e.history, observation=e.observation)
                for e in episodes
            ),
        )
        actions: tuple[Action | None, ...] = await self.requests.call(
            request, key=str(ticket["group"]), priority=-ticket["step"]
        )
        acting: list[tuple[Episode, Action]] = []
        for episode, action in zip(episodes, actions, strict=True):
            if action is None:
                episode.truncated = True  # no room in the context for another turn
            else:
                acting.append((episode, action))
        if not acting:
            return
        results = await self.hosts.call(
            "step",
            [e.slot for e, _ in acting],
            [action.text if action.chunk is None else action.chunk for _, action in acting],
        )
        for (episode, action), result in zip(acting, results, strict=True):
            episode.act(action, result)

    def _account(self) -> None:
        state = "work" if self.hosts.busy else "wait_rollout" if self.playing else "wait_tickets"
        self.time.enter(state)

    def _tell_times(self, step: int) -> None:
        """Once a step the conductor hears how time was spent."""
        if step > self.step_seen:
            self.step_seen = step
            for conductor in self.peers_of("conductor"):
                self.endpoint.send(conductor.peer, StageTimes(seconds=self.time.seconds()))
