"""OpenAI's protocol as pure functions: the JSON of a request to a `Job` for the engine, and answers to the JSON of a
response.

Beside OpenAI's fields, a request may have `top_k`, `min_p`, `repetition_penalty`, `constraint` (as in
`dist_lm.generation.constraint`) and `return_token_ids`. A field that would change nothing here is refused by its name.
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import Call, ChatError, Conversation, Message
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.template import stop_tokens
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError, shown_value
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.request import MOST_TOP_LOGPROBS, Answer, Request, SamplingParams, TopLogprobs
from dist_lm.server.conversations import Conversations
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tokenizer.tokenizer import Tokenizer

Json = Any
Endpoint = Literal["chat", "completions"]
SEEDS = 1 << 62  # a seed that the server draws lies below
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_PENALTY = 2  # OpenAI's bound
LONGEST_NAME = 128  # characters of a tool's name
MOST_PROMPTS = 64  # of one request to /v1/completions
ANY_OBJECT: Json = {"type": "object"}

SAMPLING = {
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("logit_bias", "stop", "seed", "n", "stream", "stream_options", "logprobs", "constraint", "return_token_ids"),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # say nothing to us
# Fields of OpenAI that may be given with the value that they have if they are left out.
DEFAULTS: dict[str, Sequence[Json]] = {
    "echo": (False, None),
    "best_of": (1, None),
}
FIELDS: dict[Endpoint, set[str]] = {
    "chat": {
        *("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "max_completion_tokens"),
        *("frequency_penalty", "presence_penalty", "top_logprobs"),
    },
    "completions": {"prompt", "suffix", "frequency_penalty", "presence_penalty", "echo", "best_of"},
}
FINISHES = {"eot": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


class ProtocolError(UserError):
    """A request that is refused: its HTTP status, the field, and OpenAI's code."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class ServeLimits:
    """What a request may ask for."""

    max_tokens: int = 4096  # new tokens of an answer
    default_tokens: int = 512  # new tokens of an answer that names no number
    n: int = 16  # answers to a prompt
    prompt_tokens: int = 1 << 20  # the model's context is a limit of its own
    schema_bytes: int = 64 << 10  # of a constraint or of all tools, as JSON
    body_bytes: int = 4 << 20


@dataclass(frozen=True)
class Job:
    """A request for the engine, and what its response needs."""

    id: str
    endpoint: Endpoint
    model: str
    requests: tuple[Request, ...]  # one for each prompt
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    reads_calls: bool = False  # whether answers are turns that may have calls
    conversation: Conversation | None = None  # of a chat
    n_remembered: int = 0  # tokens of the prompt that are those of the conversation's last answer and all before it

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


@dataclass
class Served:
    """The model that requests are for."""

    name: str
    tokenizer: Tokenizer
    context: int  # tokens of prompt and answer
    version: int = 0  # of the weights: the step of the checkpoint
    aliases: Sequence[str] = ()
    created: int = 0  # seconds since 1970
    limits: ServeLimits = field(default_factory=ServeLimits)
    conversations: Conversations = field(init=False)

    def __post_init__(self) -> None:
        self.conversations = Conversations(self.tokenizer)


@dataclass(frozen=True)
class _Chat:
    """What the body of a chat says beside its sampling."""

    conversation: Conversation
    prompt: list[int]
    n_remembered: int  # as in `Job`
    constraint: Constraint | None
    reads_calls: bool


def job_of(endpoint: Endpoint, body: Json, served: Served, *, cache_key: str = "") -> Job:
    """Returns the job that the body of a request describes. Its constraint is not compiled.

    Args:
        cache_key: who asks; only requests with the same key share what the engine has cached of prompts.

    Raises:
        ProtocolError: a field is unknown, has another type or exceeds a limit; or the conversation is none.
    """
    if not isinstance(body, dict):
        raise ProtocolError("the body is no JSON object")
    _check_fields(endpoint, body)
    model = _typed(body, "model", str, served.name)
    if model not in (served.name, *served.aliases):
        raise ProtocolError(
            f"model={shown_value(model)}: expected {served.name}", status=404, param="model", code="model_not_found"
        )

    tokenizer = served.tokenizer
    constraint = _constraint(body, served)
    ends: tuple[int, ...] = ()
    chat: _Chat | None = None
    if endpoint == "chat":
        chat = _chat_of(body, served, constraint)
        prompts, constraint = [chat.prompt], chat.constraint
        ends = stop_tokens(tokenizer)
    else:
        prompts = _text_prompts(body, tokenizer)
    for ids in prompts:
        if len(ids) > served.limits.prompt_tokens or len(ids) >= served.context:
            most = min(served.limits.prompt_tokens, served.context - 1)
            raise ProtocolError(
                f"the prompt has {len(ids):,} tokens; expected at most {most:,}, which leave space for an answer",
                param="messages" if endpoint == "chat" else "prompt",
                code="context_length_exceeded",
            )

    n = _typed(body, "n", int, 1)
    if not 1 <= n <= served.limits.n:
        raise ProtocolError(f"n={n}: expected 1 to {served.limits.n}", param="n")
    seed = _typed(body, "seed", int, None)
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    if not -(1 << 63) <= seed < 1 << 63:
        raise ProtocolError("seed: expected an integer of 64 bits", param="seed")
    has_logprobs, n_top = _logprobs(endpoint, body)
    params = _params(body, ends, n_top, served)
    name = f"{'chatcmpl' if endpoint == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
    stream_options = _typed(body, "stream_options", dict, {})
    if unknown := stream_options.keys() - {"include_usage", "include_obfuscation"}:
        raise ProtocolError(f"stream_options.{min(unknown)}: unknown; expected include_usage", param="stream_options")
    return Job(
        id=name,
        endpoint=endpoint,
        model=served.name,
        requests=tuple(
            Request(f"{name}-{index}", ids, params, seed, n, constraint=constraint, cache_key=cache_key)
            for index, ids in enumerate(prompts)
        ),
        stream=_typed(body, "stream", bool, False),
        include_usage=bool(stream_options.get("include_usage")),
        logprobs=has_logprobs,
        return_token_ids=_typed(body, "return_token_ids", bool, False),
        reads_calls=bool(chat and chat.reads_calls),
        conversation=chat.conversation if chat else None,
        n_remembered=chat.n_remembered if chat else 0,
    )


def _check_fields(endpoint: Endpoint, body: Mapping[str, Json]) -> None:
    for key, value in body.items():
        if key not in {"model"} | SAMPLING | IGNORED | FIELDS[endpoint]:
            raise ProtocolError(
                f"{shown_value(key)}: this field is not supported here: leave it out", param=shown_value(key)
            )
        if key in DEFAULTS and value not in DEFAULTS[key]:
            raise ProtocolError(f"{key}={shown_value(value)}: not supported; expected {DEFAULTS[key][0]}", param=key)


def _typed(body: Mapping[str, Json], key: str, kind: type, default: Json) -> Json:
    """Returns a field, or `default` where it is missing or null.

    Raises:
        ProtocolError: it has another type; true and false are no numbers.
    """
    value = body.get(key)
    if value is None:
        return default
    is_number = kind is float and isinstance(value, int | float)
    if (isinstance(value, bool) and kind is not bool) or not (isinstance(value, kind) or is_number):
        raise ProtocolError(f"{key}: a {type(value).__name__}; expected {kind.__name__}", param=key)
    return value


def _params(body: Mapping[str, Json], ends: tuple[int, ...], n_top: int, served: Served) -> SamplingParams:
    """Returns how tokens are drawn.

    Raises:
        ProtocolError: names the field.
    """
    limits = served.limits
    key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    new_tokens = _typed(body, key, int, None)
    if new_tokens is None:
        new_tokens = min(limits.default_tokens, limits.max_tokens)
    if not 1 <= new_tokens <= limits.max_tokens:
        raise ProtocolError(f"{key}={new_tokens}: expected 1 to {limits.max_tokens}", param=key)

    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise ProtocolError(f"stop: expected a text, or up to {MOST_STOPS} texts that are not empty", param="stop")

    biases: dict[int, float] = {}
    given = _typed(body, "logit_bias", dict, {})
    for token, bias in given.items():
        is_bias = isinstance(bias, int | float) and not isinstance(bias, bool) and math.isfinite(bias)
        if not token.isascii() or not token.isdigit() or not is_bias or len(given) > MOST_BIASES:
            accepted = f"up to {MOST_BIASES} numbers by token id"
            raise ProtocolError(
                f"logit_bias.{token[:40]}: {shown_value(bias)}; expected {accepted}", param="logit_bias"
            )
        biases[int(token)] = float(bias)
    try:
        return SamplingParams(
            max_new_tokens=new_tokens,
            temperature=_typed(body, "temperature", float, 1.0),
            top_k=_typed(body, "top_k", int, 0),
            top_p=_typed(body, "top_p", float, 1.0),
            min_p=_typed(body, "min_p", float, 0.0),
            repetition_penalty=_typed(body, "repetition_penalty", float, 1.0),
            presence_penalty=_penalty(body, "presence_penalty"),
            frequency_penalty=_penalty(body, "frequency_penalty"),
            logit_bias=biases,
            top_logprobs=n_top,
            stop=tuple(stop),
            stop_tokens=ends,
        )
    except UserError as error:
        raise ProtocolError(str(error), param=str(error).partition("=")[0]) from error


def _penalty(body: Mapping[str, Json], key: str) -> float:
    """Returns a penalty, within OpenAI's bounds.

    Raises:
        ProtocolError: it is no number from -2 to 2.
    """
    penalty = _typed(body, key, float, 0.0)
    if not -MOST_PENALTY <= penalty <= MOST_PENALTY:
        raise ProtocolError(f"{key}={penalty}: expected -{MOST_PENALTY} to {MOST_PENALTY}", param=key)
    return penalty


def _logprobs(endpoint: Endpoint, body: Mapping[str, Json]) -> tuple[bool, int]:
    """Returns whether log-probabilities are asked for, and how many alternatives of each token: in chats the field
    `top_logprobs`, in /v1/completions the value of `logprobs`.

    Raises:
        ProtocolError: the number is out of bounds, or there is one without `logprobs`.
    """
    key = "top_logprobs" if endpoint == "chat" else "logprobs"
    if endpoint == "chat":
        is_asked = _typed(body, "logprobs", bool, False)
        n_top = _typed(body, key, int, 0)
    else:
        is_asked = body.get(key) is not None
        n_top = 0 if body.get(key) is True else _typed(body, key, int, 0)
    if not 0 <= n_top <= MOST_TOP_LOGPROBS:
        raise ProtocolError(f"{key}={n_top}: expected 0 to {MOST_TOP_LOGPROBS}", param=key)
    if n_top and not is_asked:
        raise ProtocolError("top_logprobs: expected logprobs=true beside it", param=key)
    return is_asked, n_top


def _constraint(body: Mapping[str, Json], served: Served) -> Constraint | None:
    """Returns the constraint of `response_format` or `constraint`; None without one.

    Raises:
        ProtocolError: it has another form, or is too long.
    """
    response_format = _typed(body, "response_format", dict, None)
    described = _typed(body, "constraint", dict, None)
    if response_format and described:
        raise ProtocolError("constraint: expected no response_format beside it", param="constraint")

    key = "constraint" if described else "response_format"
    if response_format:
        kind = response_format.get("type")
        if kind == "json_object":
            described = {"json_schema": ANY_OBJECT}
        elif kind == "json_schema":
            json_schema = response_format.get("json_schema")
            schema = json_schema.get("schema") if isinstance(json_schema, dict) else None
            if not isinstance(schema, dict):
                raise ProtocolError("response_format.json_schema.schema: expected an object", param=key)
            described = {"json_schema": schema}
        elif kind != "text":
            raise ProtocolError(
                f"response_format.type={shown_value(kind)}: expected text, json_object or json_schema", param=key
            )
    if not described:
        return None
    _check_size(described, key, served)
    try:
        return Constraint.from_json(described)
    except UserError as error:
        raise ProtocolError(str(error), param=key) from error


def _check_size(value: Json, key: str, served: Served) -> None:
    n_bytes = len(json.dumps(value))
    if n_bytes > served.limits.schema_bytes:
        raise ProtocolError(f"{key}: {n_bytes:,} bytes; expected at most {served.limits.schema_bytes:,}", param=key)


def _chat_of(body: Mapping[str, Json], served: Served, constraint: Constraint | None) -> _Chat:
    """Returns the conversation with its prompt, and the constraint of the answer.

    Raises:
        ProtocolError: the conversation or the tools are not well formed, or a schema cannot be held to.
    """
    tools_given = _typed(body, "tools", list, [])
    if not all(isinstance(tool, dict) for tool in tools_given):
        raise ProtocolError("tools: expected objects with type and function", param="tools")
    if tools_given:
        _check_size(tools_given, "tools", served)
    messages = _typed(body, "messages", list, None)
    if not messages:
        raise ProtocolError("messages: expected at least one", param="messages")
    try:
        conversation = conversation_of(messages, tools_given or None, style="openai")
        ids, n_remembered = served.conversations.prompt(conversation)
    except UserError as error:
        param = "tools" if str(error).startswith("tool ") else "messages"
        raise ProtocolError(str(error), param=param) from error

    choice = _tool_choice(body, bool(conversation.tools))
    if not conversation.tools:
        return _Chat(conversation, ids, n_remembered, constraint, reads_calls=False)
    if constraint:
        if choice.mode != "none":
            raise ProtocolError(
                "response_format: expected no tools beside it, or tool_choice=none", param="response_format"
            )
        return _Chat(conversation, ids, n_remembered, constraint, reads_calls=False)

    # OpenAI's `strict` asks that the schema is held to exactly; otherwise a call may break what no grammar can say.
    is_strict = any((tool.get("function") or tool).get("strict") is True for tool in tools_given)
    try:
        constraint = call_constraint(conversation.tools, served.tokenizer, choice, strict=is_strict)
    except ChatError as error:
        param = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise ProtocolError(str(error), param=param) from error
    return _Chat(conversation, ids, n_remembered, constraint, reads_calls=True)


def _tool_choice(body: Mapping[str, Json], has_tools: bool) -> ToolChoice:
    """Returns which calls the answer may have.

    Raises:
        ProtocolError: it has another form, or asks for calls without tools.
    """
    parallel = _typed(body, "parallel_tool_calls", bool, True)
    value = body.get("tool_choice")
    mode = "auto" if value is None else value
    if isinstance(value, dict):
        function = value.get("function")
        mode = function.get("name") if isinstance(function, dict) else None
    elif mode not in ("auto", "none", "required"):
        mode = None
    if not isinstance(mode, str) or len(mode) > LONGEST_NAME:
        raise ProtocolError(
            "tool_choice: expected auto, none, required or {type: function, function: {name: ...}}",
            param="tool_choice",
        )
    if not has_tools and mode not in ("auto", "none"):
        raise ProtocolError("tool_choice: expected tools beside it", param="tool_choice")
    return ToolChoice(mode, parallel)


def _text_prompts(body: Mapping[str, Json], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of the prompts of /v1/completions: a text, ids, or a list of either.

    Raises:
        ProtocolError: they have another form, or the tokenizer lacks the marks of a middle.
    """
    value = body.get("prompt")
    is_ids = isinstance(value, list) and bool(value) and all(_is_id(token) for token in value)
    prompts = value if isinstance(value, list) and value and not is_ids else [value]
    if len(prompts) > MOST_PROMPTS:
        raise ProtocolError(f"prompt: {len(prompts)} prompts; expected at most {MOST_PROMPTS}", param="prompt")
    suffix = _typed(body, "suffix", str, None)

    ids_of_prompts: list[list[int]] = []
    for text in prompts:
        if isinstance(text, list) and text and all(_is_id(token) for token in text):
            if suffix is not None:
                raise ProtocolError("suffix: expected a text as the prompt", param="suffix")
            ids_of_prompts.append(text)
            continue
        if not isinstance(text, str):
            raise ProtocolError("prompt: expected a text, token ids, or a list of either", param="prompt")
        try:
            ids = tokenizer.encode_prompt(text)
            if suffix is not None:
                ids = InfillMarks.of(tokenizer).prompt(ids, tokenizer.encode(suffix))
        except UserError as error:
            raise ProtocolError(str(error), param="prompt") from error
        ids_of_prompts.append(ids)
    return ids_of_prompts


def _is_id(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Answers to responses.


@dataclass
class Turn:
    """One answer for a client: its text, or its calls."""

    content: str
    calls: tuple[Call, ...] = ()
    finish: str = "stop"


def turn_of(answer: Answer, job: Job, tokenizer: Tokenizer) -> Turn:
    """Returns the text and the calls of an answer; of a turn that was cut off inside a call, the text before calls."""
    finish = FINISHES[answer.finish]
    if not job.reads_calls:
        return Turn(answer.text, finish=finish)

    tokens = list(answer.tokens)
    if answer.finish in ("eot", "stop") and tokens[-1] in (tokenizer.eot_id, *stop_tokens(tokenizer)):
        tokens.pop()
    try:
        message = parse_turn(tokens, tokenizer)
    except ChatError:  # cut off inside a call, or by a stop text
        return Turn(_text_before_calls(answer, tokenizer), finish=finish)
    if message.calls and finish == "stop":
        finish = "tool_calls"
    return Turn(message.content, message.calls, finish)


def remember(answer: Answer, job: Job, served: Served) -> None:
    """Remembers the ids of an answer to a chat, so that the conversation can go on with them.

    Not those of an answer whose text is not all that the model wrote: one that a stop text cut, or a broken call.
    """
    tokenizer, tokens = served.tokenizer, list(answer.tokens)
    ends = (tokenizer.eot_id, *stop_tokens(tokenizer)) if job.conversation else ()
    if not job.conversation or (answer.finish not in ("length", "context") and tokens[-1] not in ends):
        return
    turn = turn_of(answer, job, tokenizer)
    message = Message("assistant", turn.content, turn.calls)
    written = tokens[:-1] if tokens[-1] in ends else tokens
    try:
        is_whole = parse_turn(written, tokenizer) == message
    except ChatError:
        return
    if is_whole:
        (request,) = job.requests
        served.conversations.remember(job.conversation, message, [*request.prompt, *tokens])


def _text_before_calls(answer: Answer, tokenizer: Tokenizer) -> str:
    """Returns the text of a turn up to its first call, without the line break before that."""
    call_id = tokenizer.special_ids.get(CALL)
    if call_id is None:
        before, mark, _ = answer.text.partition(CALL)
        return before.removesuffix("\n") if mark else before
    if call_id not in answer.tokens:
        return answer.text
    content = tokenizer.content(answer.tokens[: answer.tokens.index(call_id)])
    return content.decode(errors="replace").removesuffix("\n")


class VisibleText:
    """The text of a turn that a client sees while it grows: nothing from the first call on, nor the line break before
    that."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._call_id = tokenizer.special_ids.get(CALL)
        self._held = ""
        self._has_called = False

    def add(self, token: int, text: str) -> str:
        """Returns what can be shown after one more token, with which `text` became final."""
        if self._has_called:
            return ""
        self._held += text
        if self._call_id is None:
            self._has_called = CALL in self._held
            before = self._held.partition(CALL)[0]
        else:
            # The mark has no text, so what became final with it stands before it.
            self._has_called = token == self._call_id
            before = self._held
        if self._has_called:
            self._held = ""
            return before.removesuffix("\n")
        end = len(self._held) - self._n_kept()
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def end(self) -> str:
        """Returns the rest of the text; the turn is complete."""
        rest, self._held = self._held, ""
        return rest

    def _n_kept(self) -> int:
        """Returns the number of characters at the end that may belong to a call."""
        mark = "\n" if self._call_id is not None else f"\n{CALL}"
        beginnings = [mark[begin:end] for begin in (0, 1) for end in range(begin + 1, len(mark) + 1)]
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)


def response_of(job: Job, answers: Sequence[Sequence[Answer]], served: Served, created: int) -> dict[str, Json]:
    """Returns the JSON of a complete response.

    Args:
        answers: of each prompt, by their index.
        created: seconds since 1970.
    """
    choices = []
    for answer in (answer for of_prompt in answers for answer in of_prompt):
        turn = turn_of(answer, job, served.tokenizer)
        choice: dict[str, Json] = {"index": len(choices), "finish_reason": turn.finish}
        if job.endpoint == "chat":
            message: dict[str, Json] = {"role": "assistant", "content": turn.content, "refusal": None}
            if turn.calls:
                message["content"] = turn.content or None
                message["tool_calls"] = [call_value(call) for call in turn.calls]
            choice |= {"message": message}
        else:
            choice |= {"text": turn.content}
        choice["logprobs"] = None
        if job.logprobs:
            choice["logprobs"] = logprobs_value(
                job.endpoint, answer.tokens, answer.raw_logprobs, answer.top_logprobs, served.tokenizer
            )
        if job.return_token_ids:
            choice |= ids_value(answer.tokens, answer.raw_logprobs, answer.logprobs)
        choices.append(choice)

    n_new = sum(len(answer.tokens) for of_prompt in answers for answer in of_prompt)
    n_reused = sum(of_prompt[0].reused_tokens for of_prompt in answers)
    response = head_of(job, served, created, is_chunk=False)
    response |= {"choices": choices, "usage": usage_value(job, n_new, n_reused)}
    if job.endpoint == "chat":
        response["remembered_tokens"] = job.n_remembered
    if job.return_token_ids:
        response |= prompt_ids_value(job, served)
    return response


def head_of(job: Job, served: Served, created: int, is_chunk: bool) -> dict[str, Json]:
    """Returns the fields that all responses and chunks have."""
    kind = "text_completion"
    if job.endpoint == "chat":
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    fingerprint = f"version-{served.version}"
    return {"id": job.id, "object": kind, "created": created, "model": job.model, "system_fingerprint": fingerprint}


def usage_value(job: Job, n_new: int, n_reused: int) -> dict[str, Json]:
    """Returns the counts of tokens.

    Args:
        n_new: of all answers.
        n_reused: of the prompts, those that the engine had cached.
    """
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": n_new,
        "total_tokens": job.prompt_tokens + n_new,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }


def prompt_ids_value(job: Job, served: Served) -> dict[str, Json]:
    """Returns the ids of the prompts (of one prompt its ids alone), and the version of the weights."""
    ids = [list(request.prompt) for request in job.requests]
    return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids, "weights_version": served.version}


def ids_value(tokens: Sequence[int], raw: Sequence[float], drawn: Sequence[float]) -> dict[str, Json]:
    """Returns ids of an answer with log-probabilities of the model and of the distribution they were drawn from."""
    return {"token_ids": [*tokens], "raw_logprobs": [*map(_finite, raw)], "sampling_logprobs": [*map(_finite, drawn)]}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def logprobs_value(
    endpoint: Endpoint, tokens: Sequence[int], raw: Sequence[float], top: Sequence[TopLogprobs], tokenizer: Tokenizer
) -> dict[str, Json]:
    """Returns log-probabilities of the model in OpenAI's form.

    Args:
        top: the most likely tokens in the place of each; empty if they were not asked for.
    """
    entries = _logprob_entries(tokens, raw, tokenizer)
    alternatives = [
        _logprob_entries([token for token, _ in pairs], [logprob for _, logprob in pairs], tokenizer) for pairs in top
    ]
    if endpoint == "chat":
        for entry, top_entries in zip(entries, alternatives or [[]] * len(entries), strict=True):
            entry["top_logprobs"] = top_entries
        return {"content": entries, "refusal": None}

    by_text = [{entry["token"]: entry["logprob"] for entry in top_entries} for top_entries in alternatives]
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
        {"token": content.decode(errors="replace") or piece, "logprob": _finite(logprob), "bytes": [*content]}
        for content, piece, logprob in zip(contents, pieces, logprobs, strict=True)
    ]


def call_value(call: Call, index: int | None = None) -> dict[str, Json]:
    """Returns a call in OpenAI's form; `index`: its place in a streamed turn."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    value = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
    return value if index is None else {"index": index} | value


def error_value(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Json]:
    """Returns an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def tokenized(body: Mapping[str, Json], served: Served) -> Json:
    """Returns the ids of `prompt`, with the token that opens a document unless `add_special_tokens` is false, or of the
    conversation in `messages` and `tools`, up to where the model goes on.

    Raises:
        ProtocolError: there is neither, or it is not well formed.
    """
    if body.get("messages") is not None:
        tokens = _chat_of({"tool_choice": "none"} | {**body}, served, None).prompt
    else:
        text = _typed(body, "prompt", str, None)
        if text is None:
            raise ProtocolError("prompt: expected a text, or messages", param="prompt")
        try:
            tokens = served.tokenizer.encode(text)
            if _typed(body, "add_special_tokens", bool, True):
                tokens = served.tokenizer.encode_prompt(text)
        except UserError as error:
            raise ProtocolError(str(error), param="prompt") from error
    return {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}


def detokenized(body: Mapping[str, Json], served: Served) -> Json:
    """Returns the text of `tokens`; special tokens have none.

    Raises:
        ProtocolError: they are no ids of the vocabulary.
    """
    tokens = _typed(body, "tokens", list, None)
    size = served.tokenizer.vocab_size
    if tokens is None or not all(_is_id(token) and 0 <= token < size for token in tokens):
        raise ProtocolError(f"tokens: expected ids from 0 to {size - 1}", param="tokens")
    return {"prompt": served.tokenizer.content(tokens).decode(errors="replace")}


def models_value(served: Served) -> dict[str, Json]:
    """Returns the list of models."""
    names = (served.name, *served.aliases)
    return {"object": "list", "data": [model_value(name, served) for name in names]}


def model_value(name: str, served: Served) -> dict[str, Json]:
    """Returns one model.

    Raises:
        ProtocolError: there is none of this name.
    """
    if name not in (served.name, *served.aliases):
        raise ProtocolError(f"model={shown_value(name)}: expected {served.name}", 404, "model", "model_not_found")
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "dist_lm",
        "max_model_len": served.context,
    }
