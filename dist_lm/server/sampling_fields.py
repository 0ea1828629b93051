"""Fields of a request that say how tokens are drawn, how many, and where an answer stops."""

from collections.abc import Mapping

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, integer, is_number, number, typed
from dist_lm.errors import UserError, shown_value
from dist_lm.generation.request import MOST_TOP_LOGPROBS, SamplingParams
from dist_lm.server.job import Endpoint
from dist_lm.server.served import ServeLimits

MOST_STOPS = 64  # editors send lists of them
LONGEST_STOPS = 1024  # characters of all stop texts together: each token is compared with every beginning of them
MOST_BIASES = 1024
LONGEST_ID = 10  # digits of a token id
# Beyond these bounds, numbers of fp32 overflow.
MOST_TEMPERATURE = 100
MOST_TOP_K = 1 << 31
LEAST_PENALTY, MOST_PENALTY = 0.01, 100
MOST_BIAS = 1000
MOST_COUNT_PENALTY = 2  # OpenAI's bound of presence_penalty and frequency_penalty


def sampling_params(
    body: Mapping[str, Json], ends: tuple[int, ...], limits: ServeLimits, n_alternatives: int = 0
) -> SamplingParams:
    """Returns how tokens are drawn.

    Args:
        ends: tokens that end an answer beside end-of-text.
        n_alternatives: number of the likeliest tokens that are told in the place of each token.

    Raises:
        ProtocolError: a field has another type or is out of bounds; the message names it.
    """
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    # llama.cpp's clients send -1 where they name no number.
    if body.get(key) == -1:
        body = {**body, key: None}

    new_tokens = integer(body, key, limits.unnamed_tokens, 1, limits.max_tokens)
    try:
        return SamplingParams(
            max_new_tokens=new_tokens,
            temperature=number(body, "temperature", 1.0, 0, MOST_TEMPERATURE),
            top_k=integer(body, "top_k", 0, 0, MOST_TOP_K),
            top_p=number(body, "top_p", 1.0, 0, 1),
            min_p=number(body, "min_p", 0.0, 0, 1),
            repetition_penalty=number(body, "repetition_penalty", 1.0, LEAST_PENALTY, MOST_PENALTY),
            presence_penalty=_count_penalty(body, "presence_penalty"),
            frequency_penalty=_count_penalty(body, "frequency_penalty"),
            logit_bias=_biases(body),
            top_logprobs=n_alternatives,
            stop=_stops(body),
            stop_tokens=ends,
        )
    # A refused field has its name already; bounds that `SamplingParams` checks begin with theirs.
    except ProtocolError:
        raise
    except UserError as error:
        raise ProtocolError(str(error), param=str(error).partition("=")[0]) from error


def _stops(body: Mapping[str, Json]) -> tuple[str, ...]:
    """Returns the texts that end an answer.

    Raises:
        ProtocolError: they are none, too many, or too long.
    """
    stop = body.get("stop") or []
    texts = [stop] if isinstance(stop, str) else stop
    is_list = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not is_list or len(texts) > MOST_STOPS or sum(map(len, texts)) > LONGEST_STOPS:
        accepted = f"a text, or up to {MOST_STOPS} texts that are not empty, of {LONGEST_STOPS:,} characters together"
        raise ProtocolError(f"stop: expected {accepted}", param="stop")
    return tuple(texts)


def _biases(body: Mapping[str, Json]) -> dict[int, float]:
    """Returns what is added to logits, by token id.

    Raises:
        ProtocolError: they are too many, or one is no number or out of range.
    """
    biases: dict[int, float] = {}
    by_name = typed(body, "logit_bias", dict, {})
    accepted = f"up to {MOST_BIASES} numbers from -{MOST_BIAS} to {MOST_BIAS} by token id"
    if len(by_name) > MOST_BIASES:
        raise ProtocolError(f"logit_bias: {len(by_name):,} of them; expected {accepted}", param="logit_bias")

    for name, bias in by_name.items():
        # `isdigit` and `int` also take the digits of other scripts.
        is_token = name.isascii() and name.isdigit() and len(name) <= LONGEST_ID
        if not is_token or not is_number(bias) or not -MOST_BIAS <= bias <= MOST_BIAS:
            message = f"logit_bias.{shown_value(name[:40])}: {shown_value(bias)}; expected {accepted}"
            raise ProtocolError(message, param="logit_bias")
        biases[int(name)] = float(bias)
    return biases


def logprobs_asked(endpoint: Endpoint, body: Mapping[str, Json]) -> tuple[bool, int]:
    """Returns whether log-probabilities are asked for, and how many alternatives of each token: in chats the field
    `top_logprobs`, in /v1/completions the value of `logprobs`.

    Raises:
        ProtocolError: the number is out of bounds, or there is one without `logprobs`.
    """
    if endpoint == "chat":
        is_asked = typed(body, "logprobs", bool, False)
        n_alternatives = integer(body, "top_logprobs", 0, 0, MOST_TOP_LOGPROBS)
        if n_alternatives and not is_asked:
            raise ProtocolError("top_logprobs: expected logprobs=true beside it", param="top_logprobs")
        return is_asked, n_alternatives

    if body.get("logprobs") is True:
        return True, 0
    return body.get("logprobs") is not None, integer(body, "logprobs", 0, 0, MOST_TOP_LOGPROBS)


def _count_penalty(body: Mapping[str, Json], key: str) -> float:
    return number(body, key, 0.0, -MOST_COUNT_PENALTY, MOST_COUNT_PENALTY)
