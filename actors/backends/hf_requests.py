"""What makes a generation request one that can run, and when it has ended. No torch."""

from actors.backends.contract import Generation, GenerationRequest


def check_request(
    request: GenerationRequest, vocabulary_size: int, max_context_tokens: int
) -> None:
    """Raise ValueError (value, rule, way out) for a request that could never run."""
    problem = (
        _length_problem(request, max_context_tokens)
        or _token_problem(request, vocabulary_size)
        or _sampling_problem(request, vocabulary_size)
    )
    if problem is not None:
        raise ValueError(f"request {request.request_id}: {problem}")


def _length_problem(request: GenerationRequest, max_context_tokens: int) -> str | None:
    num_sampled = len(request.sampled)
    num_tokens = len(request.context) + num_sampled
    num_logprobs, num_versions = len(request.sampled_logprobs), len(request.sampled_versions)
    if len(request.context) == 0:
        return (
            "its context is empty, and a model continues at least one token; begin with a "
            "beginning-of-sequence token or the chat template's first tokens"
        )
    if num_tokens > max_context_tokens:
        return (
            f"its {num_tokens} tokens are more than max_context_tokens = {max_context_tokens}; "
            "shorten the prompt, end the episode earlier, or raise rollout.max_context_tokens"
        )
    if not num_sampled == num_logprobs == num_versions:
        return (
            f"{num_sampled} sampled tokens come with {num_logprobs} log-probs and {num_versions} "
            "versions; give one of each per token, as an aborted Generation does"
        )
    if request.max_new_tokens < 1:
        return f"max_new_tokens = {request.max_new_tokens}; ask for at least 1"
    return None


def _token_problem(request: GenerationRequest, vocabulary_size: int) -> str | None:
    for name, tokens in (("context", request.context), ("sampled", request.sampled)):
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocabulary_size):
            outside = int(tokens[(tokens < 0) | (tokens >= vocabulary_size)][0])
            return (
                f"{name} has token {outside}, outside the vocabulary [0, {vocabulary_size}); "
                "use the tokenizer that belongs to this model"
            )
    return None


def _sampling_problem(request: GenerationRequest, vocabulary_size: int) -> str | None:
    sampling, window = request.sampling, request.sampling.vocabulary
    # Written so that NaN is refused too.
    if not sampling.temperature >= 0 or sampling.top_k < 0:
        return (
            f"temperature = {sampling.temperature}, top_k = {sampling.top_k}: neither may be "
            "negative; 0 is greedy and 0 keeps all"
        )
    if window is not None and not 0 <= window[0] < window[1] <= vocabulary_size:
        return (
            f"its vocabulary window [{window[0]}, {window[1]}) is no part of [0, {vocabulary_size}); "
            "give one that lies within the vocabulary and is not empty, or None"
        )
    return None


def end_length(request: GenerationRequest, max_context_tokens: int) -> int:
    """Tokens, context included, at which a request ends with "length"."""
    return min(len(request.context) + request.max_new_tokens, max_context_tokens)


def finish_on_arrival(request: GenerationRequest, max_context_tokens: int) -> str | None:
    """How a request had ended before it came; None where there is something left to sample.

    One may be resumed after its last token, or come with a context that is full.
    """
    if len(request.sampled) and int(request.sampled[-1]) in request.stop_tokens:
        return "stop"
    num_tokens = len(request.context) + len(request.sampled)
    return "length" if num_tokens >= end_length(request, max_context_tokens) else None


def as_it_came(request: GenerationRequest, finish: str) -> Generation:
    """The result of a request that was given no step."""
    return Generation(
        request_id=request.request_id,
        tokens=request.sampled,
        logprobs=request.sampled_logprobs,
        versions=request.sampled_versions,
        finish=finish,
    )
