"""What flowd says to the actors of a job: welcome, whom to talk to, who is gone. Channels are theirs from there on."""

import logging

from channels.endpoint import Endpoint
from channels.errors import ChannelError
from channels.lifecycle import Forget, Introduce, Welcome, heartbeat_interval_s
from channels.messages import Message
from flowd.actor_record import ActorRecord, meet
from flowd.roster import Roster

log = logging.getLogger(__name__)


class Introductions:
    """One per job. incarnation: of this flowd; an actor that meets another one says hello again."""

    def __init__(
        self, roster: Roster, endpoint: Endpoint, *, incarnation: str, orphan_grace_s: float
    ) -> None:
        self._roster = roster
        self._endpoint = endpoint
        self._welcome = Welcome(
            incarnation=incarnation, heartbeat_s=heartbeat_interval_s(orphan_grace_s)
        )

    @property
    def flowd_address(self) -> str:
        """Where actors find this flowd."""
        return self._endpoint.address

    def send(self, record: ActorRecord, message: Message) -> None:
        """Tell an actor something; one that can not be told is about to be found dead."""
        try:
            self._endpoint.send(self._peer(record), message)
        except ChannelError as error:
            log.debug("actor=%s was not told: %s", record.name, error)

    def welcome(self, record: ActorRecord) -> None:
        """Connect to an actor whose address is known."""
        if record.address:
            self._endpoint.connect(self._peer(record), record.address)
            record.welcomed = True
            self.send(record, self._welcome)

    def introduce(self, record: ActorRecord) -> None:
        """An actor is ready: it and those that it works with get to know each other."""
        for other in self._roster.actors.values():
            if other is not record and other.state == "ready" and meet(record, other):
                self.send(record, self._introduction(other))
                self.send(other, self._introduction(record))

    def disconnect(self, record: ActorRecord) -> None:
        """The process of an actor is gone."""
        self._endpoint.disconnect(self._peer(record))

    def forget(self, record: ActorRecord, how: str) -> None:
        """Tell those who knew an actor that it is gone."""
        notice = Forget(peer=self._peer(record), kind=record.kind, epoch=record.epoch, reason=how)
        for other in self._roster.actors.values():
            if other.state == "ready" and meet(record, other):
                self.send(other, notice)

    def _peer(self, record: ActorRecord) -> str:
        return f"{self._roster.job}/{record.name}"

    def _introduction(self, record: ActorRecord) -> Introduce:
        return Introduce(
            peer=self._peer(record),
            kind=record.kind,
            address=record.address,
            epoch=record.epoch,
            rank=record.rank,
        )
