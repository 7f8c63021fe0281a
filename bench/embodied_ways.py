"""Ways that bench.embodied compares with, each in a process of its own: a plain loop, and stable-baselines3.

python -m bench.embodied_ways loop JOB.json STEPS WARM_IN      prints JSON
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.job_config import JobConfig
from sim.contract import StepResult
from sim.registry import make

LAST_STEPS = 5  # whose episodes tell the final success


def loop(config: JobConfig, steps: int, warm_in: int) -> dict[str, float]:
    """Play a step's episodes side by side, train on them, hand the weights over, again and again."""
    import torch

    from actors.algorithms import registry
    from actors.backends.action_reader import ActionReader
    from actors.backends.hf_trainer import HFTrainingEngine
    from actors.env.actor import Episode
    from actors.episodes import Group, SampleRequest, TurnRequest
    from actors.models.policies import build_policy
    from actors.randomness import fold
    from actors.rollout.array_sampler import ArraySampler
    from sim.chunks import Chunked

    torch.set_num_threads(1)
    assert config.policy is not None
    num = config.job.groups_per_step
    env = Chunked(make(config.env.task, num_slots=num, args=config.env.args))  # type: ignore[arg-type]
    trainer = HFTrainingEngine(
        build_policy(config.policy, seed=config.job.seed),
        algorithm=registry.find(config.algorithm.name),
        algorithm_config=config.algorithm,
        config=config.trainer,
        reader=partial(ActionReader, config=config.policy),
        total_steps=steps,
    )
    sampler = ArraySampler(config, device="cpu", counters={})
    sampler.take_device()

    def play(step: int) -> list[Group]:
        seeds = [fold(config.job.seed, 1, step * num + slot) >> 1 for slot in range(num)]
        observations = env.reset(range(num), seeds)
        episodes = [Episode(0, slot, seen) for slot, seen in enumerate(observations)]
        turn = 0
        while going := [episode for episode in episodes if not episode.ended]:
            requests = tuple(
                TurnRequest(
                    group=step * num + episode.slot,
                    attempt=0,
                    run_attempt=0,
                    turn=turn,
                    version=step,
                    exact=False,
                    samples=(
                        SampleRequest(
                            sample=0, history=episode.history, observation=episode.observation
                        ),
                    ),
                )
                for episode in going
            )
            works: list[Any] = [SimpleNamespace(requests=requests, request=requests[0])]
            ((_, actions),) = sampler.advance(works, lambda: False).finished
            slots = [episode.slot for episode in going]
            results = env.step(slots, [action.chunk for action in actions])
            for episode, action, result in zip(going, actions, results, strict=True):
                episode.act(action, result)
            turn += 1
        return [
            Group(
                group=step * num + slot,
                attempt=0,
                run_attempt=0,
                seed=seeds[slot],
                segments=(episodes[slot].segment(),),
            )
            for slot in range(num)
        ]

    def one(step: int) -> tuple[int, float]:
        sampler.load_weights(step, dict(trainer.weights()))
        groups = play(step)
        trainer.begin_step()
        trainer.accumulate(groups)
        trainer.finish_step()
        succeeded = [float(g.segments[0].info["success_at_end"]) for g in groups]
        return sum(len(g.segments[0].turns) for g in groups), sum(succeeded) / num

    return _timed(one, steps, warm_in)


def _timed(one: Callable[[int], tuple[int, float]], steps: int, warm_in: int) -> dict[str, float]:
    """one(step): environment steps, and the share of episodes that were a success at the end."""
    successes, env_steps = [], 0
    for step in range(steps):
        if step == warm_in:
            began, env_steps = time.perf_counter(), 0
        taken, success = one(step)
        env_steps += taken
        successes.append(success)
    last = successes[-LAST_STEPS:]
    return {
        "steps_per_s": env_steps / (time.perf_counter() - began),
        "success_at_end": sum(last) / len(last),
    }


def sb3(config: JobConfig, steps: int, warm_in: int) -> dict[str, float]:
    """stable-baselines3's PPO with the same numbers, an environment a process, observations and returns normalised."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

    torch.set_num_threads(1)
    policy, algorithm, num = config.policy, config.algorithm, config.job.groups_per_step
    assert policy is not None
    length = int(config.env.args["max_steps"])

    class Timer(BaseCallback):
        """Notes when rollouts begin, and which episodes were a success."""

        def __init__(self) -> None:
            super().__init__()
            self.began: list[float] = []
            self.ended: list[float] = []

        def _on_rollout_start(self) -> None:
            self.began.append(time.perf_counter())

        def _on_step(self) -> bool:
            dones, infos = self.locals["dones"], self.locals["infos"]
            self.ended += [i["success_at_end"] for d, i in zip(dones, infos, strict=True) if d]
            return True

    envs = SubprocVecEnv([partial(_gym, config, slot) for slot in range(num)], "forkserver")
    try:
        learner = PPO(
            "MlpPolicy",
            VecNormalize(envs, gamma=algorithm.gamma),
            learning_rate=config.trainer.learning_rate,
            n_steps=length,
            batch_size=num * length // algorithm.mini_batches,
            n_epochs=algorithm.epochs,
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            clip_range=0.2,
            clip_range_vf=0.2,
            max_grad_norm=config.trainer.max_grad_norm,
            policy_kwargs={"net_arch": list(policy.hidden), "log_std_init": policy.initial_log_std},
            seed=config.job.seed,
            device="cpu",
        )
        timer = Timer()
        learner.learn(num * length * steps, callback=timer)
        ended = time.perf_counter()
    finally:
        envs.close()
    last = timer.ended[-LAST_STEPS * num :]
    return {
        "steps_per_s": num * length * (steps - warm_in) / (ended - timer.began[warm_in]),
        "success_at_end": sum(last) / len(last),
    }


def _gym(config: JobConfig, number: int) -> Any:
    """One slot of the same environment, as Gymnasium has it."""
    import gymnasium

    from actors.randomness import fold

    class Slot(gymnasium.Env):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self._env: Any = make(config.env.task, num_slots=1, args=config.env.args)
            seen, does = self._env.observation_space["state"], self._env.action_space
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, seen.shape, np.float32)
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, does.shape, np.float32)
            self._episodes = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
            key = fold(config.job.seed, 1, number, self._episodes) >> 1
            self._episodes += 1
            return self._env.reset([0], [key])[0]["state"], {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            results: Sequence[StepResult] = self._env.step([0], [action])
            (r,) = results
            return r.observation["state"], r.reward, r.terminated, r.truncated, dict(r.info)

    return Slot()


WAYS: dict[str, Callable[[JobConfig, int, int], dict[str, float]]] = {"loop": loop, "sb3": sb3}


def run_way(way: str, config: JobConfig, steps: int, warm_in: int) -> dict[str, Any]:
    """The numbers of a way; {"skipped": reason} where what it compares with is not installed."""
    try:
        return dict(WAYS[way](config, steps, warm_in))
    except ModuleNotFoundError as error:
        if error.name != "stable_baselines3":
            raise
        return {"skipped": f"stable-baselines3 is not installed in {sys.executable}: flowd[bench]"}
