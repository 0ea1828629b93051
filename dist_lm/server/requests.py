"""The body of a request to /v1/chat/completions or /v1/completions, read into a `Job` for the engine.

Beside OpenAI's fields, a request may have `top_k`, `min_p`, `repetition_penalty`, `constraint` (as in
`dist_lm.generation.constraint`) and `return_token_ids`. A field that would change nothing here is refused by its name.
"""

import secrets
from collections.abc import Mapping, Sequence

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_fields, integer, typed
from dist_lm.chat.template import stop_tokens
from dist_lm.errors import shown_value
from dist_lm.generation.request import Request
from dist_lm.server.chat_fields import Chat, chat_of
from dist_lm.server.constraint_fields import answer_constraint
from dist_lm.server.job import Endpoint, Job
from dist_lm.server.prompt_fields import text_prompts
from dist_lm.server.sampling_fields import logprobs_asked, sampling_params
from dist_lm.server.served import Served

SEEDS = 1 << 62  # a seed that the server draws lies below
LARGEST_SEED = (1 << 63) - 1

SAMPLING = {
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("logit_bias", "stop", "seed", "n", "stream", "stream_options", "logprobs", "constraint", "return_token_ids"),
}
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    # Fields of llama.cpp: its way of working, and details of what `DEFAULTS` has switched off.
    *("samplers", "cache_prompt", "timings_per_token", "repeat_last_n", "dynatemp_exponent", "xtc_threshold"),
    *("dry_base", "dry_allowed_length", "dry_penalty_last_n"),
}
# llama.cpp's clients send these with every request.
LLAMA_DEFAULTS: dict[str, Sequence[Json]] = {
    "repeat_penalty": (1, None),
    "typical_p": (1, None),
    "dynatemp_range": (0, None),
    "xtc_probability": (0, None),
    "dry_multiplier": (0, None),
}
# Fields that may be given with the value that they have if they are left out.
DEFAULTS: dict[Endpoint, dict[str, Sequence[Json]]] = {
    "chat": LLAMA_DEFAULTS,
    "completions": {"echo": (False, None), "best_of": (1, None)} | LLAMA_DEFAULTS,
}
FIELDS: dict[Endpoint, set[str]] = {
    "chat": {
        *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "max_completion_tokens"),
        *("frequency_penalty", "presence_penalty", "top_logprobs"),
    },
    "completions": {"prompt", "suffix", "frequency_penalty", "presence_penalty"},
}


def job_of(endpoint: Endpoint, body: Mapping[str, Json], served: Served, client: str = "") -> Job:
    """Returns the job that the body of a request describes. Its constraint is not compiled.

    Args:
        served: the model that `model` names.
        client: the key that the client has sent.

    Raises:
        ProtocolError: a field is unknown, has another type or exceeds a limit; or the conversation is none.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    check_fields(body, {"model"} | SAMPLING | IGNORED | FIELDS[endpoint], DEFAULTS[endpoint])
    limits = served.limits
    n = integer(body, "n", 1, 1, limits.n)
    seed = integer(body, "seed", secrets.randbelow(SEEDS), -LARGEST_SEED, LARGEST_SEED)
    stream_options = typed(body, "stream_options", dict, {})
    if unknown := stream_options.keys() - {"include_usage", "include_obfuscation"}:
        message = f"stream_options.{shown_value(min(unknown))}: unknown; expected include_usage"
        raise ProtocolError(message, param="stream_options")

    constraint = answer_constraint(body, limits)
    ends: tuple[int, ...] = ()
    chat: Chat | None = None
    if endpoint == "chat":
        chat = chat_of(body, served, constraint, client)
        prompts, constraint = [chat.prompt], chat.constraint
        ends = stop_tokens(served.tokenizer)
    else:
        prompts = text_prompts(body, served.tokenizer)
    for ids in prompts:
        check_length(ids, served, "messages" if endpoint == "chat" else "prompt")

    has_logprobs, n_alternatives = logprobs_asked(endpoint, body)
    params = sampling_params(body, ends, limits, n_alternatives)
    name = f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
    return Job(
        id=name,
        endpoint=endpoint,
        served=served,
        requests=tuple(
            # A shared cache would show one client, by its times, which prompts another has sent.
            Request(
                f"{name}-{index}", ids, params, seed, n, constraint=constraint, cache_key=client, adapter=served.adapter
            )
            for index, ids in enumerate(prompts)
        ),
        stream=typed(body, "stream", bool, False),
        include_usage=bool(stream_options.get("include_usage")),
        logprobs=has_logprobs,
        return_token_ids=typed(body, "return_token_ids", bool, False),
        reads_calls=bool(chat and chat.reads_calls),
        conversation=chat.conversation if chat else None,
        n_remembered=chat.n_remembered if chat else 0,
        client=client,
    )


def check_length(ids: Sequence[int], served: Served, param: str) -> None:
    """Refuses a prompt that leaves no space for an answer.

    Raises:
        ProtocolError: it does; of the field `param`.
    """
    most = min(served.limits.prompt_tokens, served.context - 1)
    if len(ids) > most:
        raise ProtocolError(
            f"the prompt has {len(ids):,} tokens; expected at most {most:,}, which leave space for an answer",
            param=param,
            code="context_length_exceeded",
        )
