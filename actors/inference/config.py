"""The [inference] section of a job: reference log-probs by actors of their own."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class InferenceConfig(Section, frozen=True, kw_only=True):
    """Inference actors: one replica a device. Groups pass through them on their way to the trainer, which then keeps
    no reference policy. Precision and micro-batches are those of [trainer], and so are the numbers."""

    devices: Annotated[int, Meta(ge=0)] = 0
    """Devices of the stage, which is the number of inference actors; 0: the trainer computes what it needs itself."""
    python: str | None = None
    """Another interpreter for this stage; None is flowd's own."""
