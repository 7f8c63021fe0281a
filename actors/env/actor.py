"""The env actor: plays whole groups of episodes. It needs no torch and keeps nothing that cannot be made again.

For every ticket it resets one slot per sample with the group's seed, then plays turn by turn: the observations go to a
rollout actor together with the tokens of the history (opaque here), the actions come back, the environment steps. A
turn's request is an item on the channel "requests", a TurnRequest, or one of a tuple of them (see `asking`). It is
acknowledged with a tuple of Action, None where the context has no room for another turn. The finished group goes to the
trainer, through an inference actor where the job has some; when the trainer holds it the ticket is acknowledged.

Problems of an evaluation come on a channel of their own and are played in an environment of their own; they are
acknowledged with what came of them, and nobody trains on them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import actors.wire  # noqa: F401  registers the payload types
from actors.actor import Actor
from actors.conductor.config import evaluates, evaluation_env
from actors.env.arrays import as_run, check_fit
from actors.env.asking import Asking
from actors.env.evaluating import KEY_OF_EVALUATION, evaluation_seed, outcome
from actors.env.hosts import Hosts, open_hosts
from actors.env.video import check_encoder, encode
from actors.episodes import (
    Action,
    Group,
    Int32,
    SampleRequest,
    Sampling,
    Segment,
    Turn,
    TurnRequest,
)
from actors.randomness import fold
from channels.channel import Consumer, Item
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
    pictures: list[Any] = field(default_factory=list)  # of one that is filmed
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
EVALUATION_PRIORITY = 1  # before any step's groups: they wait for the evaluation in the end


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Episodes to play together from one seed.

    request: as of every turn, but for its turn and samples    key: those of one key prefer one rollout actor
    filmed: pictures are taken of the first of them
    """

    hosts: Hosts
    seed: int
    size: int
    request: TurnRequest
    key: str
    priority: int
    filmed: bool = False


class EnvActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Open the environments with a slot for every sample of every group played at a time."""
        config = self.config
        num_groups = config.env.groups_per_actor
        self.playing = 0
        self.opened: list[Hosts] = []
        if config.job.steps:
            self.hosts = await self._open(
                config.env.task, config.env.args, config.rollout.group_size
            )
        if evaluates(config.job, config.eval):
            if config.eval.videos:
                check_encoder()
            task, args = evaluation_env(config.env, config.eval)
            self.eval_hosts = await self._open(task, args, max(config.eval.k, 1))
        self.step_seen = -1
        self.tickets = self.router.consumer("tickets", capacity=num_groups)
        self.evaluations = self.router.consumer("evaluations", capacity=num_groups)
        self.requests = self.router.producer(
            "requests", bound=2 * num_groups, epoch=self.spec.epoch
        )
        self.asking = Asking(
            self.requests,
            together=config.policy is not None,
            max_samples=config.rollout.max_running,
            num_rollouts=lambda: len(self.peers_of("rollout")),
        )
        self.groups = self.router.producer("groups", bound=num_groups, epoch=self.spec.epoch)
        self._account()

    async def _open(self, task: str, args: dict[str, Any], group_size: int) -> Hosts:
        num_slots = group_size * self.config.env.groups_per_actor
        hosts = await open_hosts(
            task,
            args,
            num_slots=num_slots,
            workers=min(self.config.env.workers, num_slots),
            step_timeout_s=self.config.env.step_timeout_s,
            blocking=self.blocking,
            told=self._account,
        )
        check_fit(self.config.policy, hosts.env)
        self.opened.append(hosts)
        return hosts

    async def run(self) -> None:
        """Play every ticket that comes, several at a time."""
        async with asyncio.TaskGroup() as tasks:
            for hosts in self.opened:
                tasks.create_task(hosts.run())
            tasks.create_task(self._attend_all(tasks, self.tickets, self._play))
            tasks.create_task(self._attend_all(tasks, self.evaluations, self._evaluate))

    async def leave(self) -> None:
        """Give tickets back: another env actor plays them from the start."""
        self.tickets.close()
        self.evaluations.close()
        for hosts in self.opened:
            await self.blocking(hosts.close)

    def close(self) -> None:
        """Also after an error: worker processes end before the actor does."""
        if (asking := getattr(self, "asking", None)) is not None:
            asking.close()
        for hosts in getattr(self, "opened", ()):
            hosts.end_workers()
        super().close()

    def on_peer(self, peer: Introduce) -> None:
        """Learn who gives tickets, who acts, who trains."""
        match peer.kind:
            case "conductor":
                self.tickets.add_producer(peer.peer)
                self.evaluations.add_producer(peer.peer)
            case "rollout":
                self.requests.add_consumer(peer.peer)
            case kind if kind == self.config.target_of_groups and peer.rank == 0:
                self.groups.add_consumer(peer.peer)

    def on_peer_lost(self, peer: Introduce) -> None:
        """What a dead rollout or trainer held is offered to the next one."""
        match peer.kind:
            case "conductor":
                self.tickets.remove_producer(peer.peer)
                self.evaluations.remove_producer(peer.peer)
            case "rollout":
                self.requests.remove_consumer(peer.peer)
            case kind if kind == self.config.target_of_groups and peer.rank == 0:
                self.groups.remove_consumer(peer.peer)

    async def _attend_all(
        self, tasks: asyncio.TaskGroup, tickets: Consumer, play: Callable[[Item], Awaitable[None]]
    ) -> None:
        while True:
            item = await tickets.get()
            tasks.create_task(self._attend(item, play))

    async def _attend(self, item: Item, play: Callable[[Item], Awaitable[None]]) -> None:
        """Play what a ticket says unless it is cancelled meanwhile."""
        self.playing += 1
        self._account()
        playing = asyncio.ensure_future(play(item))
        cancelled = asyncio.create_task(item.wait_cancelled())
        try:
            await asyncio.wait({playing, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if playing.done():
                playing.result()
        finally:
            for task in (playing, cancelled):
                task.cancel()
            await asyncio.gather(playing, cancelled, return_exceptions=True)
            if item.cancelled and not item.finished:
                item.ack()  # frees its place; nobody waits for it
            self.playing -= 1
            self._account()

    async def _play(self, item: Item) -> None:
        """A group to train on."""
        ticket: dict[str, Any] = item.payload
        self._tell_times(ticket["step"])
        assignment = Assignment(
            hosts=self.hosts,
            seed=self._seed(ticket),
            size=ticket["group_size"],
            request=TurnRequest(
                group=ticket["group"],
                attempt=ticket["attempt"],
                run_attempt=ticket["run_attempt"],
                turn=0,
                version=ticket["version"],
                exact=ticket["exact"],
                samples=(),
            ),
            key=str(ticket["group"]),
            priority=-ticket["step"],
        )
        group = Group(
            group=ticket["group"],
            attempt=ticket["attempt"],
            run_attempt=ticket["run_attempt"],
            seed=ticket["seed"],
            segments=tuple(e.segment() for e in await self._episodes_again(assignment)),
        )
        await self.groups.call(group, priority=assignment.priority)
        self.delivered()
        item.ack()

    async def _evaluate(self, item: Item) -> None:
        """A problem of an evaluation: what came of it goes back with the acknowledgement."""
        ticket: dict[str, Any] = item.payload
        seed, hosts = self.config.eval.seed, self.eval_hosts
        assignment = Assignment(
            hosts=hosts,
            seed=evaluation_seed(seed, ticket["problem"], counted=_counts_seeds(hosts)),
            size=ticket["size"],
            request=TurnRequest(
                group=ticket["problem"],
                attempt=0,
                run_attempt=ticket["run_attempt"],
                turn=0,
                version=ticket["version"],
                exact=True,
                samples=(),
                sampling=Sampling(temperature=ticket["temperature"], top_k=ticket["top_k"]),
                key=fold(seed, KEY_OF_EVALUATION, ticket["problem"]),
            ),
            key=f"{ticket['mode']}-{ticket['problem']}",
            priority=EVALUATION_PRIORITY,
            filmed=ticket["filmed"],
        )
        episodes = await self._episodes_again(assignment)
        pictures = episodes[0].pictures
        video = await self.blocking(encode, pictures) if pictures else b""
        self.delivered()
        item.ack(outcome(ticket, [episode.segment() for episode in episodes], video))

    async def _episodes_again(self, assignment: Assignment) -> list[Episode]:
        """Play a group; from the start where a worker took an episode of it along."""
        slots = assignment.hosts.take(assignment.size)
        try:
            for losses in range(1, LOSSES + 1):
                try:
                    return await self._episodes(assignment, slots)
                except WorkerLost as error:
                    lost = error
                self.counters["groups_lost"] = self.counters.get("groups_lost", 0) + 1
                self.event(
                    "group_lost", group=assignment.request.group, losses=losses, reason=str(lost)
                )
            raise SimError(
                f"group {assignment.key} (seed {assignment.seed}) lost its worker {LOSSES} times: {lost}"
            ) from lost
        finally:
            assignment.hosts.give_back(slots)

    async def _episodes(self, assignment: Assignment, slots: Sequence[int]) -> list[Episode]:
        observations = await assignment.hosts.call("reset", slots, [assignment.seed] * len(slots))
        episodes = [
            Episode(sample, slot, observation)
            for sample, (slot, observation) in enumerate(zip(slots, observations, strict=True))
        ]
        for turn in range(self.config.max_turns):
            await self._film(assignment, episodes[0])
            await self._turn(assignment, turn, [e for e in episodes if not e.ended])
            if all(episode.ended for episode in episodes):
                break
        await self._film(assignment, episodes[0])
        for episode in episodes:
            episode.truncated = episode.truncated or not episode.terminated
        return [episode for episode in episodes if episode.turns]

    async def _film(self, assignment: Assignment, episode: Episode) -> None:
        """Take a picture of a filmed episode, unless its end is on the last one."""
        if assignment.filmed and len(episode.pictures) <= len(episode.turns):
            episode.pictures += await assignment.hosts.call("render", [episode.slot], [None])

    def _seed(self, ticket: dict[str, Any]) -> int:
        if _counts_seeds(self.hosts):
            return counted_seed(self.config.job.seed, ticket["group"])
        seed: int = ticket["seed"]
        return seed

    async def _turn(self, assignment: Assignment, turn: int, episodes: list[Episode]) -> None:
        """One turn of every episode that goes on."""
        request = replace(
            assignment.request,
            turn=turn,
            samples=tuple(
                SampleRequest(sample=e.sample, history=e.history, observation=e.observation)
                for e in episodes
            ),
        )
        actions = await self.asking.ask(request, key=assignment.key, priority=assignment.priority)
        acting: list[tuple[Episode, Action]] = []
        for episode, action in zip(episodes, actions, strict=True):
            if action is None:
                episode.truncated = True  # no room in the context for another turn
            else:
                acting.append((episode, action))
        if not acting:
            return
        results = await assignment.hosts.call(
            "step",
            [e.slot for e, _ in acting],
            [action.text if action.chunk is None else action.chunk for _, action in acting],
        )
        for (episode, action), result in zip(acting, results, strict=True):
            episode.act(action, result)

    def _account(self) -> None:
        busy = any(hosts.busy for hosts in self.opened)
        state = "work" if busy else "wait_rollout" if self.playing else "wait_tickets"
        self.time.enter(state)

    def _tell_times(self, step: int) -> None:
        """Once a step the conductor hears how time was spent."""
        if step > self.step_seen:
            self.step_seen = step
            for conductor in self.peers_of("conductor"):
                self.endpoint.send(conductor.peer, StageTimes(seconds=self.time.seconds()))


def _counts_seeds(hosts: Hosts) -> bool:
    return bool(getattr(hosts.env, "counted_seeds", False))
