"""Prompts from data files: which field of a row is what, which rows belong to a split, what the policy is shown.

The split is a hash of the prompt, so rows that are appended, moved or doubled change no other row's side.
"""

import json
import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.contract import ChatMessage, TextObservation
from sim.errors import BadTaskData
from sim.text.ordering import Epochs, digest
from sim.text.rows import Row, Rows
from sim.text.tables import from_table

SPLITS = ("train", "eval", "all")
ROLES = ("system", "user", "assistant", "tool")
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """One data file.

    path: JSON lines or Parquet, by its ending
    name: in logs; the file's name without ending when empty
    weight: how often it is drawn from, against the other sources
    fields: what the task and its rewards call a value = the field of the row; a dot goes into a table
        ("extra.answer"). "question" (a text for the template) or "messages" (a conversation, shown as it is) is the
        prompt; "solution" serves a supervised warm-up; "pass_rate" the curriculum; the rest is for template and rewards
    template: this source's own, instead of the task's
    """

    path: str
    name: str = ""
    weight: float = 1.0
    fields: dict[str, str] = field(
        default_factory=lambda: {"question": "question", "answer": "answer"}
    )
    template: str = ""

    @classmethod
    def of(cls, table: Any, where: str) -> "SourceSettings":
        """From the job's table. ValueError: a key breaks a rule."""
        settings = from_table(cls, table, where)
        if ("question" in settings.fields) == ("messages" in settings.fields):
            raise ValueError(
                f'{where}.fields has {sorted(settings.fields)}: give the field of either "question" '
                'or "messages", as in fields = {question = "problem", answer = "solution"}'
            )
        if not (settings.weight > 0 and math.isfinite(settings.weight)):
            raise ValueError(f"{where}.weight = {settings.weight:g}: it must be more than 0")
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows of every source are played, and in which order.

    split: "train", "eval" or "all" rows; eval_share: the share of rows, from 0 to 1, that is for eval
    split_seed: another one gives another split
    shuffle: a new order in every epoch; False keeps the file's
    pass_rates: [lowest, highest] of the rows that are kept, by the field "pass_rate"; empty keeps all
    levels: parts of an epoch from easy to hard, by the same field
    """

    split: str = "train"
    eval_share: float = 0.0
    split_seed: int = 0
    shuffle: bool = True
    pass_rates: list[float] = field(default_factory=list)
    levels: int = 1

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f'split = "{self.split}": it must be one of {", ".join(SPLITS)}')
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share = {self.eval_share}: the rule is 0 <= eval_share < 1")
        if self.split == "eval" and not self.eval_share:
            raise ValueError('split = "eval" has no rows with eval_share = 0: give it a share')
        if self.pass_rates and not (
            len(self.pass_rates) == 2 and 0 <= self.pass_rates[0] <= self.pass_rates[1] <= 1
        ):
            raise ValueError(
                f"pass_rates = {self.pass_rates}: give the lowest and the highest, from 0 to 1"
            )
        if self.levels < 1:
            raise ValueError(f"levels = {self.levels}: the rule is levels >= 1")

    @property
    def needs_pass_rate(self) -> bool:
        return bool(self.pass_rates) or self.levels > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What one row gives: the conversation's begin, the values by name, and where it stands."""

    observation: TextObservation
    values: Mapping[str, Any]
    where: str


class Source:
    """The rows of one file that belong to the selection; they stay on disk.

    template: the user message, "{question}" and other fields' names in braces replaced, other braces kept
    system: a system message in front, unless "messages" bring their own; none when empty

    BadTaskData: a row breaks a rule, or none is left; it says file, line and what is wrong.
    """

    def __init__(
        self, settings: SourceSettings, selection: Selection, *, template: str, system: str
    ) -> None:
        self._fields = settings.fields
        self._template = settings.template or template
        self._system = system
        self._selection = selection
        if "question" in self._fields:
            check_template(self._template)
        if selection.needs_pass_rate and "pass_rate" not in self._fields:
            raise ValueError(
                f"{settings.path}: pass_rates and levels need the share of right answers that was "
                'measured for each row: name its field, as in fields = {pass_rate = "pass_rate", …}'
            )
        self.name = settings.name or Path(settings.path).stem
        rates = array("d")

        def keep(row: Row, where: str) -> bool:
            return self._keeps(row, where, rates)

        columns = dict.fromkeys(path.partition(".")[0] for path in self._fields.values())
        self._rows = Rows(settings.path, keep, columns=columns)
        if not self._rows:
            self._rows.close()
            raise BadTaskData(
                f'{settings.path}: no rows are left for split = "{selection.split}", eval_share = '
                f"{selection.eval_share:g}, pass_rates = {selection.pass_rates}; "
                "at least one is needed"
            )
        self._epochs = Epochs(
            len(self._rows),
            name=self.name,
            shuffle=selection.shuffle,
            pass_rates=rates,
            levels=selection.levels,
        )

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, key: int, position: int) -> Prompt:
        """The prompt at a position, which counts on from epoch to epoch, in the order of a key."""
        index = self._epochs.row(key, position)
        where = self._rows.where(index)
        values = self._values(self._rows[index], where)
        return Prompt(observation=self._observation(values, where), values=values, where=where)

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def _keeps(self, row: Row, where: str, rates: "array[float]") -> bool:
        """Check a row, and say whether it belongs to the selection."""
        values = self._values(row, where)
        self._observation(values, where)
        selection = self._selection
        if selection.split != "all":
            shown = values.get("question", values.get("messages"))
            text = json.dumps(shown, sort_keys=True)
            draw = digest("split", selection.split_seed, text) / 2**64
            if (draw < selection.eval_share) != (selection.split == "eval"):
                return False
        if selection.needs_pass_rate:
            rate = values["pass_rate"]
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise BadTaskData(f'{where}: "pass_rate" must be from 0 to 1; it is {rate!r:.60}')
            low, high = selection.pass_rates or (0.0, 1.0)
            if not low <= rate <= high:
                return False
            rates.append(rate)
        return True

    def _values(self, row: Row, where: str) -> dict[str, Any]:
        return {name: _lookup(row, path, where) for name, path in self._fields.items()}

    def _observation(self, values: Mapping[str, Any], where: str) -> TextObservation:
        if "question" in values:
            question = values["question"]
            if not isinstance(question, str) or not question.strip():
                raise BadTaskData(
                    f'{where}: "{self._fields["question"]}" must be a text that is not empty; '
                    f"it is {question!r:.60}"
                )
            text = PLACE.sub(
                lambda m: _text(values[m[1]]) if m[1] in values else m[0], self._template
            )
            messages = [ChatMessage(role="user", content=text)]
        else:
            messages = _conversation(values["messages"], f'{where}: "{self._fields["messages"]}"')
        if self._system and messages[0].role != "system":
            messages.insert(0, ChatMessage(role="system", content=self._system))
        return TextObservation(messages=tuple(messages))


def check_template(template: str) -> None:
    """ValueError: the template does not show the question."""
    if "{question}" not in template:
        raise ValueError(f'template = {template!r:.200} has no "{{question}}": say where it goes')


def _lookup(row: Row, path: str, where: str) -> Any:
    """The value of a field; a name with a dot is tried as it is first, then as the way into tables."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise BadTaskData(f'{where}: there is no field "{path}"; the row has {sorted(row)}')
        value = value[part]
    return value


def _conversation(value: Any, what: str) -> list[ChatMessage]:
    if not isinstance(value, list) or not value:
        raise BadTaskData(f"{what} must be a list of messages; it is {value!r:.60}")
    messages = []
    for message in value:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        )
        if role not in ROLES or not isinstance(content, str):
            raise BadTaskData(
                f'{what}: a message is {{"role": one of {", ".join(ROLES)}, "content": text}}; '
                f"one is {message!r:.80}"
            )
        messages.append(ChatMessage(role=role, content=content))
    if messages[-1].role not in ("user", "tool"):
        raise BadTaskData(
            f'{what} must end with a message of "user" or "tool", for the policy to answer; '
            f'it ends with "{messages[-1].role}"'
        )
    return messages


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
