"""Text tasks from files: prompts from JSON lines or Parquet, rewards by import path. One turn."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from sim.contract import StepResult, TextObservation, split_counted_seed
from sim.errors import BadTaskData, SimError
from sim.text.ordering import Mixture
from sim.text.rewards import Reply, Rewards, RewardSettings, Score
from sim.text.sources import Prompt, Selection, Source, SourceSettings, check_template
from sim.text.tables import from_table


class Prompts:
    """One turn: a prompt from a file, then a reply that earns the weighted sum of the rewards.

    num_slots: episodes hosted at the same time
    sources: tables of `sim.text.sources.SourceSettings`, at least one
    rewards: tables of `sim.text.rewards.RewardSettings`, at least one
    template: the user message; "{question}" and other names of a source's fields in braces are replaced, other braces
        stay. Conversations ("messages") are shown as they are
    system: a system message in front, where a conversation brings none; none when empty
    split, eval_share, split_seed, shuffle, pass_rates, levels: see `sim.text.sources.Selection`
    workers: rewards computed at a time; 0 is one per core

    Seeds are counted (see `sim.contract`): the index in a seed leads to a source by the weights, and to a row of it so
    that each is played once per epoch. `info` has each reward's value under its name, what it says for the logs,
    the `source`, and the `row` as file and line.

    ValueError: an argument breaks a rule. BadTaskData: a file does. Rewards may raise what their classes say.
    """

    counted_seeds = True

    def __init__(
        self,
        num_slots: int,
        sources: Sequence[Mapping[str, Any]],
        rewards: Sequence[Mapping[str, Any]],
        *,
        template: str = "{question}",
        system: str = "",
        split: str = "train",
        eval_share: float = 0.0,
        split_seed: int = 0,
        shuffle: bool = True,
        pass_rates: Sequence[float] = (),
        levels: int = 1,
        workers: int = 0,
    ) -> None:
        source_settings, reward_settings = _settings(sources, rewards, template)
        selection = _selection(
            {
                "split": split,
                "eval_share": eval_share,
                "split_seed": split_seed,
                "shuffle": shuffle,
                "pass_rates": list(pass_rates),
                "levels": levels,
            }
        )
        if workers < 0:
            raise ValueError(f"workers = {workers}: give 0 for one per core, or more")
        self._mixture = Mixture([each.weight for each in source_settings])
        self._rewards = Rewards(reward_settings, workers=workers or len(os.sched_getaffinity(0)))
        self._reward_settings = reward_settings
        self._sources: list[Source] = []
        try:
            for each in source_settings:
                self._sources.append(Source(each, selection, template=template, system=system))
        except BaseException:
            self.close()
            raise
        self._playing: list[tuple[Prompt, str] | None] = [None] * num_slots

    @staticmethod
    def check_arguments(args: Mapping[str, Any]) -> None:
        """Raise ValueError for what can be known without the files and the user's own modules."""
        sources, _ = _settings(args["sources"], args["rewards"], args.get("template", "{question}"))
        Mixture([each.weight for each in sources])
        _selection({name: args[name] for name in get_type_hints(Selection) if name in args})

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        """Show the prompt of each seed. BadTaskData: a file was changed since it was opened."""
        observations = []
        for slot, seed in zip(slots, seeds, strict=True):
            self._playing[slot] = prompt, _ = self._draw(seed)
            observations.append(prompt.observation)
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        """Score each reply. Every episode ends here. SimError: a slot has no episode, or a reward failed."""
        playing = [self._playing_in(slot) for slot in slots]
        scores = self._rewards.score(
            [
                Reply(text=text, row=prompt.values, where=prompt.where)
                for (prompt, _), text in zip(playing, actions, strict=True)
            ]
        )
        for slot in slots:
            self._playing[slot] = None
        return [
            self._result(prompt, source, of_reply)
            for (prompt, source), of_reply in zip(playing, scores, strict=True)
        ]

    def close(self) -> None:
        """Close the files and the rewards."""
        for source in self._sources:
            source.close()
        self._rewards.close()

    def examples(self, seeds: Sequence[int]) -> list[tuple[TextObservation, str]]:
        """Worked examples for a supervised warm-up: the prompt of each seed, and the field "solution" of its row."""
        examples = []
        for seed in seeds:
            prompt, source = self._draw(seed)
            solution = prompt.values.get("solution")
            if not isinstance(solution, str):
                raise BadTaskData(
                    f'{prompt.where}: a warm-up needs a text as "solution", and the row has {solution!r:.60}: '
                    f'name the field that holds it in the fields of source "{source}", or set warmup.steps = 0'
                )
            examples.append((prompt.observation, solution))
        return examples

    def _draw(self, seed: int) -> tuple[Prompt, str]:
        key, index = split_counted_seed(seed)
        number, position = self._mixture.locate(index)
        source = self._sources[number]
        return source.prompt(key, position), source.name

    def _playing_in(self, slot: int) -> tuple[Prompt, str]:
        playing = self._playing[slot]
        if playing is None:
            raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")
        return playing

    def _result(self, prompt: Prompt, source: str, scores: Sequence[Score]) -> StepResult:
        info: dict[str, float | str] = {"source": source, "row": prompt.where}
        reward = 0.0
        for settings, score in zip(self._reward_settings, scores, strict=True):
            name = settings.log_name
            reward += settings.weight * score.value
            info[name] = score.value
            info.update({f"{name}_{key}": value for key, value in score.info.items()})
        return StepResult(
            observation=TextObservation(messages=()),
            reward=reward,
            terminated=True,
            truncated=False,
            info=info,
        )


def _selection(args: Mapping[str, Any]) -> Selection:
    return from_table(Selection, args, "[env.args]")


def _settings(
    sources: Any, rewards: Any, template: str
) -> tuple[list[SourceSettings], list[RewardSettings]]:
    for name, tables in (("sources", sources), ("rewards", rewards)):
        if not isinstance(tables, Sequence) or isinstance(tables, str) or not tables:
            raise ValueError(
                f"{name} = {tables!r:.80}: give one table or more, each below [[env.args.{name}]]"
            )
    read = [SourceSettings.of(table, f"sources[{i}]") for i, table in enumerate(sources)]
    for each in read:
        if "question" in each.fields:
            check_template(each.template or template)
    scored = [RewardSettings.of(table, f"rewards[{i}]") for i, table in enumerate(rewards)]
    names = [each.log_name for each in scored]
    for name in names:
        if names.count(name) > 1 or name in ("source", "row"):
            raise ValueError(
                f'rewards has the name "{name}" twice or where the task has one: give each a name of its own'
            )
    return read, scored
