"""What a job consists of at this moment: its plan, its devices and its actors. Data that the job's parts share."""

from dataclasses import dataclass, field

from actors.job_config import JobConfig
from flowd.actor_record import ActorRecord
from flowd.devices import Device
from flowd.errors import FlowdError
from flowd.paths import JobPlaces
from flowd.planner import Plan


@dataclass(kw_only=True)
class Roster:
    """One per job.

    ending: why the job ends, once that is decided    finished: the conductor said so itself
    committed_step: the last one that this flowd heard of, -1 before the first
    """

    job: str
    config: JobConfig
    plan: Plan
    devices: dict[str, Device]
    places: JobPlaces
    node: str
    actors: dict[str, ActorRecord] = field(default_factory=dict)
    ending: str | None = None
    finished: bool = False
    committed_step: int = -1

    def lease_name(self, replica: str) -> str:
        """The name of a replica among those of all jobs."""
        return f"{self.job}/{replica}"

    def ranks(self, replica: str) -> list[ActorRecord]:
        """The actors of one replica."""
        return [record for record in self.actors.values() if record.replica == replica]

    def alive(self) -> list[ActorRecord]:
        """The actors whose processes are not known to have ended."""
        return [record for record in self.actors.values() if record.state != "gone"]

    def refuse_when_ending(self, what: str) -> None:
        """Raise FlowdError when the job ended while it was being `what` ("started")."""
        if self.ending is not None:
            raise FlowdError(f'job "{self.job}" ended while it was being {what}: {self.ending}')
