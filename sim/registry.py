"""Names of tasks, and how an environment is made from a name or an import path. Imports nothing heavy by itself."""

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sim.contract import Environment
from sim.errors import SimError

TASKS = {
    "arithmetic": "sim.text.arithmetic:Arithmetic",
    "gsm8k": "sim.text.gsm8k:Gsm8k",
    "guess_number": "sim.text.guess_number:GuessNumber",
    "gymnasium": "sim.gymnasium:Gymnasium",
    "libero": "sim.libero:Libero",
    "maniskill": "sim.maniskill:ManiSkill",
    "metaworld": "sim.metaworld:MetaWorld",
    "point_reach": "sim.point_reach:PointReach",
    "text": "sim.text.prompts:Prompts",
}


def find(task: str) -> Any:
    """The class behind a task name or an import path "module:Class". Raises SimError naming the way out."""
    path = TASKS.get(task, task)
    module, colon, name = path.partition(":")
    if not colon:
        near = difflib.get_close_matches(task, TASKS, n=1)
        known = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(TASKS)}"
        raise SimError(f'no task "{task}": {known}; one of your own is "module:Class"')
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise SimError(
            f'task "{task}": there is no module {module}: its folder must be on PYTHONPATH where the '
            "env actors run"
        ) from error
    except AttributeError as error:
        raise SimError(f'task "{task}": module {module} has no {name}') from error


def make(task: str, *, num_slots: int, args: Mapping[str, Any]) -> Environment:
    """Open an environment. args: the task's keyword arguments; a wrong one is a SimError naming the right ones."""
    check_arguments(task, args)
    environment: Environment = find(task)(num_slots=num_slots, **args)
    return environment


def check_arguments(task: str, args: Mapping[str, Any]) -> None:
    """Raise SimError for an argument that the task does not take, or needs and did not get. Loads the task's module.

    A task may know more about its arguments without opening anything: a static `check_arguments(args)` of its class is
    asked last, and its ValueError told.
    """
    found = find(task)
    keywords = dict(inspect.signature(found).parameters)
    keywords.pop("num_slots", None)  # the env actor chooses it
    open_ended = any(p.kind is p.VAR_KEYWORD for p in keywords.values())
    for name in args:
        if name == "num_slots" or (name not in keywords and not open_ended):
            near = difflib.get_close_matches(name, keywords, n=1)
            known = f"it takes {', '.join(keywords) or 'none'}"
            hint = f'did you mean "{near[0]}"?' if near else known
            raise SimError(f'task "{task}" takes no argument "{name}": {hint}')
    for name, parameter in keywords.items():
        fixed = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if fixed and parameter.default is parameter.empty and name not in args:
            raise SimError(
                f'task "{task}" needs the argument "{name}", which has no default: give it'
            )
    if hasattr(found, "check_arguments"):
        try:
            found.check_arguments(args)
        except ValueError as error:
            raise SimError(f'task "{task}": {error}') from error
