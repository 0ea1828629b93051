"""Answers of the engine as the JSON of a response, and the parts that chunks of a stream share with it."""

import math
import secrets
from collections.abc import Sequence

from dist_lm.chat.layouts.openai import call_value
from dist_lm.chat.openai_fields import Json
from dist_lm.generation.request import Answer, TopLogprobs
from dist_lm.server.job import Endpoint, Job
from dist_lm.server.turns import turn_of
from dist_lm.tokenizer.tokenizer import Tokenizer


def response_of(job: Job, answers: Sequence[Sequence[Answer]], created: int) -> dict[str, Json]:
    """Returns the JSON of a complete response.

    Args:
        answers: of each prompt, by their index.
        created: seconds since 1970.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    flat = [answer for of_prompt in answers for answer in of_prompt]
    version = flat[0].version
    response = head_of(job, created, version, is_chunk=False)
    response["choices"] = [_choice(answer, index, job) for index, answer in enumerate(flat)]
    # Answers to one prompt share its pages, so its cached tokens count once.
    n_reused = sum(of_prompt[0].reused_tokens for of_prompt in answers)
    response["usage"] = usage_value(job, sum(len(answer.tokens) for answer in flat), n_reused)
    if job.endpoint == "chat":
        response["remembered_tokens"] = job.n_remembered
    if job.return_token_ids:
        response |= prompt_ids_value(job, version)
    return response


def _choice(answer: Answer, index: int, job: Job) -> dict[str, Json]:
    """Returns one answer in OpenAI's form, with a message for the endpoint `chat`, else with a text.

    Args:
        index: place of the answer in the response.

    Raises:
        UserError: as `turn_of`.
    """
    turn = turn_of(answer, job)
    choice: dict[str, Json] = {"index": index, "finish_reason": turn.finish}
    if job.endpoint == "chat":
        message: dict[str, Json] = {"role": "assistant", "content": turn.content, "refusal": None}
        if turn.calls:
            message["content"] = turn.content or None
            message["tool_calls"] = [call_value(call, new_call_id()) for call in turn.calls]
        choice["message"] = message
    else:
        choice["text"] = turn.content

    choice["logprobs"] = None
    if job.logprobs:
        choice["logprobs"] = logprobs_value(
            job.endpoint, answer.tokens, answer.raw_logprobs, answer.top_logprobs, job.served.tokenizer
        )
    if job.return_token_ids:
        choice |= ids_value(answer.tokens, answer.raw_logprobs, answer.logprobs)
    return choice


def head_of(job: Job, created: int, version: int, is_chunk: bool) -> dict[str, Json]:
    """Returns the fields that all responses and chunks have.

    Args:
        version: of the weights.
    """
    kind = "text_completion"
    if job.endpoint == "chat":
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    return {
        "id": job.id,
        "object": kind,
        "created": created,
        "model": job.served.name,
        "system_fingerprint": f"version-{version}",
    }


def usage_value(job: Job, n_new: int, n_reused: int) -> dict[str, Json]:
    """Returns the counts of tokens.

    Args:
        n_new: tokens of all answers.
        n_reused: tokens of the prompts that the engine had cached.
    """
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": n_new,
        "total_tokens": job.prompt_tokens + n_new,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }


def prompt_ids_value(job: Job, version: int) -> dict[str, Json]:
    """Returns the ids of the prompts (of one prompt its ids alone), and the version of the weights."""
    ids = [list(request.prompt) for request in job.requests]
    return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids, "weights_version": version}


def ids_value(tokens: Sequence[int], raw: Sequence[float], drawn: Sequence[float]) -> dict[str, Json]:
    """Returns ids of an answer with log-probabilities (nats) of the model and of the distribution they were drawn from;
    None for minus infinity."""
    return {"token_ids": [*tokens], "raw_logprobs": [*map(_finite, raw)], "sampling_logprobs": [*map(_finite, drawn)]}


def _finite(number: float) -> float | None:
    # JSON has no infinity, which is the log-probability of a forbidden token.
    return number if math.isfinite(number) else None


def logprobs_value(
    endpoint: Endpoint, tokens: Sequence[int], raw: Sequence[float], top: Sequence[TopLogprobs], tokenizer: Tokenizer
) -> dict[str, Json]:
    """Returns log-probabilities of the model in OpenAI's form, in nats; None for minus infinity.

    Args:
        raw: one for each of `tokens`.
        top: the likeliest tokens in the place of each; empty if they were not asked for.
    """
    entries = _logprob_entries(tokens, raw, tokenizer)
    alternatives = [
        _logprob_entries([token for token, _ in pairs], [logprob for _, logprob in pairs], tokenizer) for pairs in top
    ]
    if endpoint == "chat":
        for entry, likeliest in zip(entries, alternatives or [[]] * len(entries), strict=True):
            entry["top_logprobs"] = likeliest
        return {"content": entries, "refusal": None}

    # Tokens with one text share a key, which tells of the likelier: it stands first.
    by_text: list[dict[str, Json]] = [{} for _ in alternatives]
    for values, likeliest in zip(by_text, alternatives, strict=True):
        for entry in likeliest:
            values.setdefault(entry["token"], entry["logprob"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": by_text or None,
        "text_offset": None,
    }


def _logprob_entries(tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Tokenizer) -> list[dict[str, Json]]:
    contents = [tokenizer.content([token]) for token in tokens]
    pieces = tokenizer.pieces(tokens)
    return [
        # Marks have no text: their piece names them.
        {"token": content.decode(errors="replace") or piece, "logprob": _finite(logprob), "bytes": [*content]}
        for content, piece, logprob in zip(contents, pieces, logprobs, strict=True)
    ]


def new_call_id() -> str:
    """Returns an id for a call, which no other call has."""
    return f"call_{secrets.token_hex(12)}"
