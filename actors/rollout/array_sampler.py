"""Finds actions with one forward pass of a policy that acts on arrays: the sampler of simulators.

All requests that may run go through the policy as one batch, up to [rollout] max_running samples; none outlives
the call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.episodes import Action, Sampling, TurnRequest
from actors.job_config import JobConfig
from actors.models.config import PolicyConfig
from actors.randomness import uniform_table
from actors.rollout.work import Advanced, Work, sample_key

if TYPE_CHECKING:
    import torch

    from actors.models.action_policy import Acted
    from channels.weights.delta import WeightsDelta

NO_TOKENS = np.zeros(0, dtype=np.int32)


class ArraySampler:
    """`actors.rollout.work.Sampler`. Builds the policy on the host at once; blocking."""

    def __init__(self, config: JobConfig, *, device: str, counters: dict[str, float]) -> None:
        import torch

        from actors.backends.hf_weights import ModelWeights
        from actors.models.policies import build_policy

        assert config.policy is not None
        self._policy_config: PolicyConfig = config.policy
        self._seed = config.job.seed
        self._max_samples = config.rollout.max_running
        self._device = device
        self._counters = counters
        self._sampling = Sampling(temperature=config.rollout.temperature)
        self.policy = build_policy(config.policy, seed=config.job.seed)
        self._weights = ModelWeights(self.policy, torch.device(device), buffers=True)
        self._version = -1 if config.job.steps else 0  # without a trainer the policy is what it is
        self.running: list[Work] = []  # always empty: what is begun is finished
        # A forward pass is as short as a wait; what comes meanwhile is the next batch.
        self.gather_s = 0.0
        self.at_a_time = max(1, config.rollout.max_running // config.rollout.group_size)
        self.has_device = False

    def take_device(self) -> None:
        self._weights.onload()
        self.has_device = True

    def offload(self) -> None:
        self._weights.offload()

    def memory_bytes(self) -> int:
        return self._weights.memory_bytes()

    def load_weights(
        self, version: int, weights: "Mapping[str, torch.Tensor] | WeightsDelta"
    ) -> None:
        if isinstance(weights, Mapping):
            self._weights.load(weights)
        else:
            self._weights.apply(weights)
        self._version = version

    def load_adapter(self, version: int, adapter: "Mapping[str, torch.Tensor]") -> None:
        raise AssertionError("adapters are for language models: a job with both is refused")

    def weights_in_place(self) -> "Mapping[str, torch.Tensor]":
        return self._weights.in_place()

    def weights_replaced(self, version: int) -> None:
        self._weights.replaced()
        self._version = version

    def advance(self, admissible: Sequence[Work], interrupted: Callable[[], bool]) -> Advanced:
        batch: list[Work] = []
        size = 0
        for work in admissible:
            if batch and self._is_greedy(work) != self._is_greedy(batch[0]):
                continue  # of an evaluation: its turn comes with the next call
            size += _num_samples(work)
            if batch and size > self._max_samples:
                break
            batch.append(work)
        if not batch:
            return Advanced([], [])
        greedy = self._is_greedy(batch[0])
        acted = self._act([request for work in batch for request in work.requests], greedy)
        actions = self._actions(acted, batch[0].request.sampling or self._sampling)
        finished: list[tuple[Work, list[Action | None]]] = []
        start = 0
        for work in batch:
            end = start + _num_samples(work)
            finished.append((work, list(actions[start:end])))
            start = end
        return Advanced(batch, finished)

    def suspend(self) -> list[Work]:
        return []

    def drop(self, work: Work) -> None:
        raise AssertionError("nothing runs between two calls")

    def with_progress(self, work: Work) -> TurnRequest | tuple[TurnRequest, ...]:
        return work.requests

    def _is_greedy(self, work: Work) -> bool:
        return (work.request.sampling or self._sampling).temperature == 0

    def _act(self, requests: Sequence[TurnRequest], greedy: bool) -> "Acted":
        import torch

        from actors.models.arrays import stack

        samples = [(request, sample) for request in requests for sample in request.samples]
        keys = [sample_key(self._seed, request, sample.sample) for request, sample in samples]
        uniforms = np.zeros((len(keys), self.policy.draws))
        if not greedy:
            uniforms = uniform_table(keys, self.policy.draws)
        return self.policy.act(
            stack([sample.observation for _, sample in samples], self._policy_config, self._device),
            torch.from_numpy(uniforms).to(self._device),
            greedy=greedy,
        )

    def _actions(self, acted: "Acted", sampling: Sampling) -> list[Action]:
        values = acted.values.tolist()
        arrays = acted.actions.cpu().numpy()  # [batch, chunk, ...]
        logprobs = acted.logprobs.cpu().numpy()  # [batch, units]
        tokens = None if acted.tokens is None else acted.tokens.to("cpu").numpy().astype(np.int32)
        recompute = {name: tensor.cpu().numpy() for name, tensor in acted.recompute.items()}
        units = logprobs.shape[1]
        mask = np.ones(units, dtype=np.bool_)
        versions = np.full(units, self._version, dtype=np.int32)
        self._counters["actions"] = self._counters.get("actions", 0) + len(values)

        def taken(place: int) -> dict[str, Any]:
            return {name: array[place] for name, array in recompute.items()}

        return [
            Action(
                prompt=NO_TOKENS,
                tokens=NO_TOKENS if tokens is None else tokens[place],
                logprobs=logprobs[place],
                versions=versions,
                mask=mask,
                sampling=sampling,
                value=values[place],
                chunk=arrays[place],
                recompute=taken(place),
            )
            for place in range(len(values))
        ]


def _num_samples(work: Work) -> int:
    return sum(len(request.samples) for request in work.requests)
