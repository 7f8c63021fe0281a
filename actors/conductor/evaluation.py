"""What an evaluation asks for and what its answers say. Plain data: no clock, no sockets.

An evaluation plays every problem in one or two modes: "sampled", k samples at a temperature, and "greedy", one of the
likeliest tokens. An answer is what `actors.env.evaluating.outcome` tells of a problem in a mode.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from actors.conductor.config import EvalConfig
from actors.conductor.estimators import pass_at_k, powers_of_two, score_interval
from actors.rollout.config import RolloutConfig

Answer = Mapping[str, Any]
SUCCESSES = ("success_once", "success_at_end")  # what simulators say of an episode, 0 or 1


def tickets(
    config: EvalConfig, rollout: RolloutConfig, *, version: int, run_attempt: int
) -> list[dict[str, Any]]:
    """The tickets of one evaluation, problem by problem."""
    temperature = rollout.temperature if config.temperature is None else config.temperature
    modes: list[tuple[str, int, float, int]] = []
    if config.k:
        modes.append(("sampled", config.k, temperature, rollout.top_k))
    if config.greedy:
        modes.append(("greedy", 1, 0.0, 0))
    return [
        {
            "problem": problem,
            "mode": mode,
            "size": size,
            "temperature": heat,
            "top_k": top_k,
            "step": version,
            "version": version,
            "attempt": run_attempt,
            "run_attempt": run_attempt,
            "record": problem < config.record,
            "filmed": problem < config.videos,
        }
        for problem in range(config.problems)
        for mode, size, heat, top_k in modes
    ]


def summary(config: EvalConfig, answers: Iterable[Answer]) -> dict[str, Any]:
    """What all problems say together, and for each value of [eval] `by`."""
    ordered = sorted(answers, key=lambda answer: (answer["mode"], answer["problem"]))
    result = _summary(config, ordered)
    if config.by:
        parts: dict[str, list[Answer]] = defaultdict(list)
        for answer in ordered:
            parts[str(answer["infos"][0].get(config.by, ""))].append(answer)
        result["by"] = {value: _summary(config, parts[value]) for value in sorted(parts)}
    result["rewards"] = {
        mode: [list(answer["rewards"]) for answer in _of(ordered, mode)]
        for mode in ("sampled", "greedy")
        if _of(ordered, mode)
    }
    return result


def metrics_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a summary under the keys of metrics.jsonl."""
    line: dict[str, Any] = {"eval_problems": result["problems"]}
    line.update(_metrics(result, "eval_"))
    for value, part in result.get("by", {}).items():
        line.update(_metrics(part, f"eval_{value}_"))
    return line


def score_of(line: Mapping[str, Any]) -> float:
    """How good a policy is, from its metrics: the mean reward of its samples, or of greedy answers without others."""
    score: float = line["eval_reward_mean" if "eval_reward_mean" in line else "eval_greedy"]
    return score


def _metrics(result: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for mode, name, low_high in (
        ("sampled", "reward_mean", "reward"),
        ("greedy", "greedy", "greedy"),
    ):
        if mode in result:
            line[f"{prefix}{name}"] = result[mode]["reward_mean"]
            line[f"{prefix}{low_high}_low"] = result[mode]["reward_low"]
            line[f"{prefix}{low_high}_high"] = result[mode]["reward_high"]
    first = result.get("sampled") or result["greedy"]
    line |= {f"{prefix}pass_at_{k}": rate for k, rate in first["pass_at"].items()}
    line[f"{prefix}tokens_mean"] = first["tokens_mean"]
    line |= {f"{prefix}info_{key}": value for key, value in first["info"].items()}
    for key, success in first["success"].items():
        line |= {f"{prefix}info_{key}_{end}": success[end] for end in ("low", "high")}
    return line


def _summary(config: EvalConfig, answers: Sequence[Answer]) -> dict[str, Any]:
    result: dict[str, Any] = {"problems": len({answer["problem"] for answer in answers})}
    for mode in ("sampled", "greedy"):
        if of_mode := _of(answers, mode):
            result[mode] = _of_mode(config, of_mode)
    return result


def _of(answers: Sequence[Answer], mode: str) -> list[Answer]:
    return [answer for answer in answers if answer["mode"] == mode]


def _of_mode(config: EvalConfig, answers: Sequence[Answer]) -> dict[str, Any]:
    rewards = [answer["rewards"] for answer in answers]
    solved = [sum(_solved(config, answer)) for answer in answers]
    num_samples = len(rewards[0])
    interval = score_interval(rewards)
    tokens = [count for answer in answers for count in answer["tokens"]]
    return {
        "samples": len(tokens),
        "reward_mean": round(_mean([_mean(of_problem) for of_problem in rewards]), 6),
        "reward_low": None if interval is None else round(interval[0], 6),
        "reward_high": None if interval is None else round(interval[1], 6),
        "pass_at": {
            str(k): round(_mean([pass_at_k(num_samples, c, k) for c in solved]), 6)
            for k in powers_of_two(num_samples)
        },
        "tokens_mean": round(_mean(tokens), 2),
        "info": _mean_infos([info for answer in answers for info in answer["infos"]]),
        "success": {key: found for key in SUCCESSES if (found := _success(key, answers))},
    }


def _success(key: str, answers: Sequence[Answer]) -> dict[str, float]:
    """A success rate with its interval; nothing where an episode does not say."""
    said = [[info.get(key) for info in answer["infos"]] for answer in answers]
    if any(each is None for of_problem in said for each in of_problem):
        return {}
    interval = score_interval(said)
    assert interval is not None, "0 and 1 have one"
    rate = _mean([_mean(of_problem) for of_problem in said])
    return {"rate": round(rate, 6), "low": round(interval[0], 6), "high": round(interval[1], 6)}


def _solved(config: EvalConfig, answer: Answer) -> list[bool]:
    if config.success == "reward":
        return [reward >= config.success_at for reward in answer["rewards"]]
    return [_number(config, info) >= config.success_at for info in answer["infos"]]


def _number(config: EvalConfig, info: Mapping[str, Any]) -> float:
    value = info.get(config.success)
    if not isinstance(value, int | float):
        raise ValueError(
            f'[eval] success = "{config.success}" is no number in what the task says about an episode: it says '
            f'{", ".join(sorted(info)) or "nothing"}; give one of these, or "reward"'
        )
    return float(value)


def _mean_infos(infos: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the episodes of every number in their info."""
    values: dict[str, list[float]] = defaultdict(list)
    for info in infos:
        for key, value in info.items():
            if isinstance(value, int | float):
                values[key].append(float(value))
    return {key: round(_mean(values[key]), 6) for key in sorted(values)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
