"""Lines of samples.jsonl and eval_samples.jsonl: what the policy saw and did, turn by turn. Torch-free."""

from typing import Any

import numpy as np

from actors.episodes import Segment, Turn


def sample_lines(segment: Segment, **where: Any) -> list[dict[str, Any]]:
    """A line for each turn of a segment. where: what they begin with, such as step and group."""
    return [
        {
            **where,
            "sample": segment.sample,
            "turn": segment.first_turn + position,
            **(_text(turn) if turn.action.chunk is None else _arrays(turn)),
            "reward": turn.reward,
            "versions": turn.action.versions.tolist(),
            "logprobs": _rounded(turn.action.logprobs),
            "tokens": turn.action.tokens.tolist(),
            "info": segment.info,
        }
        for position, turn in enumerate(segment.turns)
    ]


def _text(turn: Turn) -> dict[str, Any]:
    messages = getattr(turn.observation, "messages", ())
    return {
        "prompt": "\n".join(message.content for message in messages),
        "text": turn.action.text,
        "prompt_tokens": turn.action.prompt.tolist(),
        "finish": turn.action.finish,
    }


def _arrays(turn: Turn) -> dict[str, Any]:
    """What the policy saw, but for images, and the chunk of actions, as many of them as were run."""
    action = turn.action
    assert action.chunk is not None
    run = int(action.mask.sum()) * len(action.chunk) // len(action.mask)
    return {
        "observation": {
            name: value if isinstance(value, str) else _rounded(value)
            for name, value in turn.observation.items()
            if isinstance(value, str) or value.ndim < 3
        },
        "chunk": [_rounded(step) for step in action.chunk[:run]],
        "value": action.value,
    }


def _rounded(numbers: Any) -> Any:
    if np.ndim(numbers) == 0:
        return round(float(numbers), 5)
    return [_rounded(number) for number in numbers]
