"""The task of any environment registered with Gymnasium. Loads Gymnasium when it is opened, not to check a job.

Ids that other packages register are given as "module:id", such as "panda_gym:PandaReachDense-v3"; Gymnasium imports
the module then.
"""

from collections.abc import Mapping
from typing import Any

from sim.errors import MissingDependency
from sim.slots import SimulatorSlots


class Gymnasium(SimulatorSlots):
    """Episodes of a registered environment.

    num_slots: episodes hosted at the same time, each in an environment of its own
    id: of the environment; "module:id" imports the module first
    kwargs: of gymnasium.make
    max_steps: episodes are truncated after so many, instead of after the registered number
    ignore_terminations: episodes go on until they are truncated
    render: whether videos can be made (render_mode "rgb_array"); slower in some simulators

    Observations: parts of dicts and tuples by name, joined by "/" ("achieved_goal"); any other is "state". Actions:
    Box, Discrete, MultiDiscrete and MultiBinary. Success is what info says as "success" or "is_success"; the other
    numbers of info are handed on.

    SimError: there is no such environment, or its spaces are of another kind. ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        num_slots: int,
        id: str,
        *,
        kwargs: Mapping[str, Any] | None = None,
        max_steps: int | None = None,
        ignore_terminations: bool = False,
        render: bool = False,
    ) -> None:
        options = dict(kwargs or {})
        if max_steps is not None:
            options["max_episode_steps"] = max_steps
        if render:
            options["render_mode"] = "rgb_array"
        try:
            from sim.gymnasium_simulator import GymnasiumSimulator, open_environment
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "Gymnasium is not installed: pip install 'flowd[gymnasium]' where env actors run"
            ) from error
        super().__init__(
            lambda: GymnasiumSimulator(open_environment(id, options)),
            num_slots,
            max_steps=max_steps,
            ignore_terminations=ignore_terminations,
        )
