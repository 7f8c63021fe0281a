"""The [inference] section of a job: what frozen models and the step's own say of groups, by actors of their own."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section

COMPUTES = ("reference", "proximal", "values")


class InferenceConfig(Section, frozen=True, kw_only=True):
    """Inference actors: one replica a device. Precision and micro-batches are those of [trainer], and so are the
    numbers."""

    devices: Annotated[int, Meta(ge=0)] = 0
    """Devices of the stage, which is the number of inference actors; 0: the trainer computes what it needs itself."""
    computes: tuple[str, ...] = ("reference",)
    """What the actors compute, and the trainer then does not. "reference": log-probs under the reference policy, as
    groups pass on their way to the trainer, which keeps no such policy. "proximal": log-probs under the policy that a
    step begins with, for proximal = "recomputed"; "values": of the critic that it begins with. The trainer asks for
    these two once that version is out, group by group."""
    python: str | None = None
    """Another interpreter for this stage; None is flowd's own."""

    def gives(self, what: str) -> bool:
        """Whether inference actors compute something of `computes`."""
        return self.devices > 0 and what in self.computes

    @property
    def reads_policy(self) -> bool:
        """Whether they read groups with the weights that a step begins with."""
        return self.gives("proximal") or self.gives("values")
