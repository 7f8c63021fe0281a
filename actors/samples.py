"""Lines of samples.jsonl and eval_samples.jsonl: what the policy saw and did, turn by turn. Torch-free."""

from typing import Any

from actors.episodes import Segment


def sample_lines(segment: Segment, **where: Any) -> list[dict[str, Any]]:
    """A line for each turn of a segment. where: what they begin with, such as step and group."""
    return [
        {
            **where,
            "sample": segment.sample,
            "turn": segment.first_turn + position,
            "prompt": "\n".join(
                message.content for message in getattr(turn.observation, "messages", ())
            ),
            "text": turn.action.text,
            "reward": turn.reward,
            "versions": turn.action.versions.tolist(),
            "logprobs": [round(float(x), 5) for x in turn.action.logprobs],
            "tokens": turn.action.tokens.tolist(),
            "prompt_tokens": turn.action.prompt.tolist(),
            "finish": turn.action.finish,
            "info": segment.info,
        }
        for position, turn in enumerate(segment.turns)
    ]
