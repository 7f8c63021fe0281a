"""What differs where the policy acts on arrays: chunks of actions, and spaces that it has to fit. numpy only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.episodes import Action
from actors.models.config import PolicyConfig, bounds
from sim.contract import ArrayEnvironment, StepResult
from sim.errors import SimError
from sim.spaces import ArraySpace, TextSpace


def check_fit(policy: PolicyConfig | None, env: Any) -> None:
    """Raise SimError where policy and environment do not go together, with the lines of [policy] that would."""
    if not hasattr(env, "action_space"):
        if policy is not None:
            raise SimError(
                "[policy] acts on arrays, and the task is a text task: leave [policy] out, or name a simulator"
            )
        return
    simulator: ArrayEnvironment = env
    if policy is None:
        raise SimError(
            f"the task is a simulator and needs a [policy]. It shows\n{_lines(simulator)}"
        )
    complaint = _complaint(policy, simulator)
    if complaint:
        raise SimError(
            f"[policy] does not fit the simulator: {complaint}. It shows\n{_lines(simulator)}"
        )


def as_run(action: Action, result: StepResult) -> Action:
    """The action with the units masked whose steps the episode's end left out."""
    assert action.chunk is not None
    assert result.step_rewards is not None
    steps, run = len(action.chunk), len(result.step_rewards)
    if run == steps:
        return action
    mask = action.mask.copy()
    mask[run * (len(mask) // steps) :] = False
    return replace(action, mask=mask)


def _complaint(policy: PolicyConfig, env: ArrayEnvironment) -> str:
    for name, shape in policy.observation.items():
        space = env.observation_space.get(name)
        if space is None:
            return f"it shows no {name}"
        if isinstance(space, TextSpace):
            if name != policy.instruction:
                return f'{name} is a text; name it in instruction, as in instruction = "{name}"'
        elif name == policy.instruction:
            return f"{name} is no text"
        elif list(space.shape) != shape:
            return f"{name} has shape {list(space.shape)}, not {shape}"
    space = env.action_space
    if space.num_choices is not None:
        if not policy.discrete or policy.action != space.num_choices:
            return f"it takes one of {space.num_choices} actions"
        return ""
    if policy.discrete or space.shape != (policy.action,):
        return f"an action has shape {list(space.shape)}"
    low, high = bounds(policy)
    for number, (least, most) in enumerate(zip(low, high, strict=True)):
        lowest, highest = _bound(space.low, number), _bound(space.high, number)
        if least < lowest - 1e-6 or most > highest + 1e-6:
            return f"number {number} of an action lies between {lowest} and {highest}, not {least} and {most}"
    return ""


def _bound(bound: Any, number: int) -> float:
    return float(bound if not getattr(bound, "shape", ()) else bound[number])


def _lines(env: ArrayEnvironment) -> str:
    """What to write in the job."""
    arrays = {
        name: [64] if isinstance(space, TextSpace) else list(space.shape)
        for name, space in env.observation_space.items()
    }
    lines = [f"observation = {_table(arrays)}"]
    lines += [
        f'instruction = "{name}"'
        for name, space in env.observation_space.items()
        if isinstance(space, TextSpace)
    ]
    space = env.action_space
    if space.num_choices is not None:
        lines += [f"action = {space.num_choices}", "discrete = true"]
    else:
        lines += [f"action = {space.shape[0]}", *_bound_lines(space)]
    return "\n".join(lines)


def _bound_lines(space: ArraySpace) -> list[str]:
    numbers = range(space.shape[0])
    return [
        f"{key} = {[_bound(bound, number) for number in numbers]}"
        for key, bound in (("low", space.low), ("high", space.high))
    ]


def _table(arrays: Mapping[str, list[int]]) -> str:
    return "{ " + ", ".join(f"{name} = {shape}" for name, shape in arrays.items()) + " }"
