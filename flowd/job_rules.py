"""What must hold in a job beyond type and range of single keys. Reads the disk, starts nothing."""

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec

from actors.algorithms.config import CHOICES as ALGORITHM_CHOICES
from actors.algorithms.config import PAPERS, broken_rule, reads_proximal
from actors.conductor.config import evaluates, evaluation_env
from actors.inference.config import COMPUTES, InferenceConfig
from actors.job_config import JobConfig
from actors.models.config import broken_rule as broken_policy_rule
from flowd.errors import JobFileError
from flowd.toml_text import value_text
from sim.errors import SimError
from sim.registry import TASKS, check_arguments

CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("job", "mode"): ("disaggregated", "collocated"),
    ("rollout", "adopt"): ("group", "turn", "token"),
    ("rollout", "dtype"): ("float32", "bfloat16"),
    ("trainer", "dtype"): ("float32", "bfloat16"),
    ("trainer", "lr_schedule"): ("constant", "cosine"),
    ("trainer", "weights"): ("full", "delta"),
    ("algorithm", "name"): tuple(PAPERS),
    **{("algorithm", key): known for key, known in ALGORITHM_CHOICES.items()},
    ("model", "tokenizer"): ("characters",),
}
STAGES_WITH_PYTHON = ("env", "rollout", "inference", "trainer")
LARGEST_WHOLE_NUMBER = 2**63 - 1  # of TOML and of the wire
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass
class Origin:
    """Where the values of a job come from: the file, and the keys that --set gave."""

    name: str
    overridden: set[tuple[str, str]] = field(default_factory=set)

    def where(self, section: str, key: str | None = None) -> str:
        """How a sentence about a key begins."""
        given = [
            f"--set {s}.{k}"
            for s, k in sorted(self.overridden)
            if s == section and key in (None, k)
        ]
        return f"{self.name} with {given[0]}" if given else self.name


def resolve_paths(config: JobConfig) -> JobConfig:
    """Make paths absolute: actors do not share the user's working directory.

    Links stay as they are: the python of a virtual environment is one, and means another
    interpreter when followed.
    """
    sections: dict[str, Any] = {}
    if any(_paths(config.eval.args)):
        args = _with_absolute_paths(config.eval.args)
        sections["eval"] = msgspec.structs.replace(config.eval, args=args)
    if config.model.path is not None:
        sections["model"] = msgspec.structs.replace(config.model, path=_absolute(config.model.path))
    if config.policy is not None and config.policy.path is not None:
        path = _absolute(config.policy.path)
        sections["policy"] = msgspec.structs.replace(config.policy, path=path)
    if any(_paths(config.env.args)):
        args = _with_absolute_paths(config.env.args)
        sections["env"] = msgspec.structs.replace(config.env, args=args)
    for stage in STAGES_WITH_PYTHON:
        section = sections.get(stage, getattr(config, stage))
        if section.python is not None:
            python = section.python
            found = _absolute(python) if os.sep in python else shutil.which(python) or python
            sections[stage] = msgspec.structs.replace(section, python=found)
    return msgspec.structs.replace(config, **sections) if sections else config


def check_rules(config: JobConfig, origin: Origin) -> None:
    """Raise JobFileError for the first rule that the job breaks."""

    def require(holds: bool, section: str, key: str, sentence: str) -> None:
        if not holds:
            value = value_text(msgspec.to_builtins(getattr(getattr(config, section), key)))
            raise JobFileError(
                f"{origin.where(section, key)}: [{section}] {key} = {value} {sentence}"
            )

    _check_values(config, origin)
    for (section, key), known in CHOICES.items():
        value = getattr(getattr(config, section), key)
        # What is left out of [algorithm] is as the algorithm's paper has it.
        if value is not None:
            require(value in known, section, key, f"is not known; {_near(value, known)}")
    if config.job.steps:
        _check_task("env", config.env.task, config.env.args, require)
    if evaluates(config.job, config.eval):
        _check_evaluation(config, require)
    _check_model(config, require)
    _check_sizes(config, require)
    for stage in STAGES_WITH_PYTHON:
        python = getattr(config, stage).python
        require(
            python is None or (os.path.isfile(python) and os.access(python, os.X_OK)),
            stage,
            "python",
            "is not a program that can be run; "
            "give the python of a virtual environment, as in /path/to/.venv/bin/python; "
            "make install-robots makes .venv-robots",
        )


def _check_evaluation(config: JobConfig, require: Any) -> None:
    evaluation, max_running = config.eval, config.rollout.max_running
    require(
        evaluation.k > 0 or evaluation.greedy,
        "eval",
        "k",
        "with greedy = false leaves nothing to evaluate; give k = 1 or more, or greedy = true",
    )
    require(
        evaluation.k <= max_running,
        "eval",
        "k",
        f"does not fit [rollout] max_running = {max_running}: one engine samples a problem's k side by side; "
        f"use at most {max_running}, or raise max_running",
    )
    require(
        not evaluation.videos or config.policy is not None,
        "eval",
        "videos",
        "are of simulators, and the job has no [policy]: use 0",
    )
    require(
        config.job.steps > 0 or config.warmup.steps == 0,
        "warmup",
        "steps",
        "needs a trainer, and job.steps = 0 has none: the model is evaluated as it is; set warmup.steps = 0",
    )
    section = "eval" if evaluation.task or evaluation.args else "env"
    task = evaluation.task or config.env.task
    if task in TASKS:
        _check_task(section, *evaluation_env(config.env, evaluation), require)
    else:
        _check_task(section, task, evaluation.args, require)


def _check_task(section: str, task: str, args: Mapping[str, Any], require: Any) -> None:
    require(
        task in TASKS or IMPORT_PATH.fullmatch(task) is not None,
        section,
        "task",
        f"is not a task; {_near(task, TASKS)}; or write an import path, module:Class",
    )
    for path in _paths(args):
        require(
            os.path.exists(path),
            section,
            "args",
            f"names a file that does not exist: {path}; "
            "relative paths are taken from the working directory",
        )
    if task in TASKS:  # ours load no simulator for this; a user's own are checked by their actors
        try:
            check_arguments(task, args)
        except SimError as error:
            require(False, section, "args" if args else "task", f"does not fit: {error}")


def _check_model(config: JobConfig, require: Any) -> None:
    if config.policy is not None:
        broken = broken_policy_rule(config.policy)
        if broken is not None:
            require(False, "policy", *broken)
        path = config.policy.path
        require(
            path is None or os.path.isdir(path),
            "policy",
            "path",
            "is not a folder; give one that flowctl export wrote",
        )
        for section, heat in (
            ("rollout", config.rollout.temperature),
            ("eval", config.eval.temperature),
        ):
            require(
                heat in (None, 0, 1),
                section,
                "temperature",
                "does not go with a [policy], which samples from its own distribution: use 1, or 0 for the "
                "likeliest actions",
            )
        return
    model = config.model
    if model.path is not None:
        folder = Path(model.path)
        downloads = "give a Hugging Face model folder; flowd downloads none"
        require(folder.exists(), "model", "path", f"does not exist; {downloads}")
        require(folder.is_dir(), "model", "path", f"is not a folder; {downloads}")
        require(
            (folder / "config.json").is_file(),
            "model",
            "path",
            f"has no config.json in it; {downloads}",
        )
        return
    unit = 2 * model.num_heads
    require(
        model.hidden_size % unit == 0,
        "model",
        "hidden_size",
        f"must be a multiple of {unit}, twice num_heads (heads of even width); "
        f"use {-(-model.hidden_size // unit) * unit}",
    )


def _check_sizes(config: JobConfig, require: Any) -> None:
    rollout = config.rollout
    slots = rollout.group_size * config.env.groups_per_actor
    require(
        config.env.workers <= slots,
        "env",
        "workers",
        f"are more than an env actor has slots: group_size = {rollout.group_size} times groups_per_actor = "
        f"{config.env.groups_per_actor} makes {slots}",
    )
    require(
        not (
            config.job.steps and PAPERS[config.algorithm.name].compares and rollout.group_size == 1
        ),
        "rollout",
        "group_size",
        f"gives zero advantage everywhere, so nothing is learned: {config.algorithm.name} compares the "
        "samples of one prompt; use 2 or more",
    )
    require(
        not (config.algorithm.dynamic_sampling and rollout.group_size == 1),
        "algorithm",
        "dynamic_sampling",
        "leaves every group of one sample out, so nothing would be trained: set rollout.group_size to 2 or more",
    )
    require(
        not (config.trainer.compile and config.policy is not None),
        "trainer",
        "compile",
        "is for language models: leave it out",
    )
    require(
        not (config.model.lora is not None and config.policy is not None),
        "model",
        "lora",
        "is for language models: leave [model.lora] out",
    )
    broken = broken_rule(config.algorithm)
    if broken is not None:
        require(False, "algorithm", *broken)
    _check_inference(config, require)
    require(
        rollout.group_size <= rollout.max_running,
        "rollout",
        "group_size",
        f"does not fit max_running = {rollout.max_running}: one engine samples a group side by "
        f"side; use at most {rollout.max_running}, or raise max_running",
    )
    require(
        rollout.max_new_tokens < rollout.max_context_tokens,
        "rollout",
        "max_new_tokens",
        f"leaves no room for a prompt in max_context_tokens = {rollout.max_context_tokens}; "
        f"use less, or raise max_context_tokens",
    )
    checkpoint = config.checkpoint
    require(
        checkpoint.keep_every_steps % checkpoint.every_steps == 0,
        "checkpoint",
        "keep_every_steps",
        f"names steps without a commit: commits come every {checkpoint.every_steps} steps; "
        "use a multiple of every_steps",
    )
    require(
        not checkpoint.keep_best
        or (config.eval.every_steps > 0 and config.eval.every_steps % checkpoint.every_steps == 0),
        "checkpoint",
        "keep_best",
        f"needs evaluations at commits: [eval] every_steps = {config.eval.every_steps} must be a multiple of "
        f"[checkpoint] every_steps = {checkpoint.every_steps}",
    )
    require(
        all(0 <= beta < 1 for beta in config.trainer.betas),
        "trainer",
        "betas",
        "is out of range: both decay rates must be at least 0 and less than 1; "
        "the default is [0.9, 0.95]",
    )


def _check_inference(config: JobConfig, require: Any) -> None:
    """What inference actors compute is known, needed, and of the very weights that the trainer computes with."""
    inference, algorithm = config.inference, config.algorithm
    for what in inference.computes:
        require(
            what in COMPUTES, "inference", "computes", f'holds "{what}"; {_near(what, COMPUTES)}'
        )
    require(
        inference.devices > 0 or inference.computes == InferenceConfig().computes,
        "inference",
        "computes",
        "is for actors that the job does not have: set inference.devices to 1 or more, or leave it out",
    )
    if not inference.devices:
        return
    require(
        config.policy is None,
        "inference",
        "devices",
        "reads language models only, and the job has a [policy]: use 0, and the trainer computes all itself",
    )
    if inference.computes == InferenceConfig().computes:
        require(
            algorithm.kl_coefficient > 0,
            "inference",
            "devices",
            "has nothing to compute: the reference's log-probs are, unless inference.computes says otherwise, and "
            "algorithm.kl_coefficient = 0 asks for none; use 0, give the KL a weight, or set computes",
        )
    require(
        len(inference.computes) > 0,
        "inference",
        "computes",
        f"leaves inference actors nothing to do: name some of {', '.join(COMPUTES)}, or set inference.devices = 0",
    )
    require(
        not inference.gives("reference") or algorithm.kl_coefficient > 0,
        "inference",
        "computes",
        'has "reference", and algorithm.kl_coefficient = 0 asks for none: leave it out, or give the KL a weight',
    )
    require(
        not inference.gives("proximal") or reads_proximal(algorithm),
        "inference",
        "computes",
        'has "proximal", which nobody reads: it is the policy before the step\'s first update, for '
        'algorithm.proximal = "recomputed" and more than one update in a step (epochs, mini_batches); leave it out',
    )
    with_critic = [name for name, paper in PAPERS.items() if paper.critic]
    require(
        not inference.gives("values") or algorithm.name in with_critic,
        "inference",
        "computes",
        f'has "values", and {algorithm.name} has no critic ({" and ".join(with_critic)} have): leave it out',
    )
    if not inference.reads_policy:
        return
    require(
        config.rollout.dtype == "float32" or config.trainer.dtype == "bfloat16",
        "rollout",
        "dtype",
        "is what weights are published in, and inference.computes needs those of the trainer, which computes in "
        '"float32": use "float32", set trainer.dtype = "bfloat16" too, or let the trainer compute proximal log-probs '
        "and values",
    )


def _check_values(config: JobConfig, origin: Origin) -> None:
    """Numbers are finite, and values are of the types that the wire carries."""
    for section in config.__struct_fields__:
        if getattr(config, section) is None:
            continue
        for key, value in msgspec.structs.asdict(getattr(config, section)).items():
            for leaf in _leaves(value):
                shown = f"{origin.where(section, key)}: [{section}] {key} holds {leaf}"
                if isinstance(leaf, float) and not math.isfinite(leaf):
                    raise JobFileError(f"{shown}: numbers must be finite; give a number")
                if (
                    isinstance(leaf, int)
                    and not -LARGEST_WHOLE_NUMBER <= leaf <= LARGEST_WHOLE_NUMBER
                ):
                    raise JobFileError(
                        f"{shown}: whole numbers go from -2**63 + 1 to 2**63 - 1; give a smaller one"
                    )
                if not isinstance(leaf, str | int | float | None):
                    raise JobFileError(
                        f"{shown}: dates and times are not values of a job; put it in quotes"
                    )


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _paths(args: Any) -> Iterable[str]:
    """Every `path` of a task's arguments, in tables and lists of them too."""
    if isinstance(args, dict):
        if isinstance(path := args.get("path"), str):
            yield path
        args = list(args.values())
    if isinstance(args, list):
        for value in args:
            yield from _paths(value)


def _with_absolute_paths(args: Any) -> Any:
    if isinstance(args, list):
        return [_with_absolute_paths(value) for value in args]
    if isinstance(args, dict):
        return {
            key: _absolute(value)
            if key == "path" and isinstance(value, str)
            else _with_absolute_paths(value)
            for key, value in args.items()
        }
    return args


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
