"""The body of a request to /v1/responses, read as that of a chat.

Items of `input` become turns: a call belongs to the turn of the assistant before it, its output is a turn of the tool.
Nothing is stored here, so a request has the whole conversation, and `previous_response_id` is refused.
"""

from collections.abc import Mapping, Sequence

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_fields, typed
from dist_lm.errors import shown_value
from dist_lm.server.job import Job
from dist_lm.server.requests import job_of
from dist_lm.server.served import Served

TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
# Fields that a chat reads under the same name.
SAME = (
    *("model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "seed", "stream"),
    *("parallel_tool_calls", "constraint", "return_token_ids"),
)
READ = {
    *("input", "instructions", "tools", "tool_choice", "max_output_tokens", "text", "include", "stream_options"),
    "top_logprobs",
}
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("reasoning", "max_tool_calls"),
}
# Fields that may be given with the value that they have if they are left out.
DEFAULTS: dict[str, Sequence[Json]] = {
    "previous_response_id": (None,),
    "conversation": (None,),
    "prompt": (None,),
    "context_management": (None,),
    "background": (False, None),
    "truncation": ("disabled", None),
}
ECHOED = (
    "instructions",
    "metadata",
    "max_output_tokens",
    "temperature",
    "top_p",
    "tools",
    "tool_choice",
    "text",
    "user",
)


def responses_job(body: Mapping[str, Json], served: Served, client: str) -> Job:
    """Returns the job that the body of a request describes.

    Raises:
        ProtocolError: a field is unknown, has another type or exceeds a limit; or the conversation is none.
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    check_fields(body, {*SAME, *READ, *IGNORED}, DEFAULTS)

    # The same request in the words of /v1/chat/completions, whose checks then hold here too.
    chat: dict[str, Json] = {key: body[key] for key in SAME if body.get(key) is not None}
    chat["messages"] = [*_system(body), *_messages(body)]
    chat["tools"] = [_tool(tool) for tool in typed(body, "tools", list, [])] or None
    chat["tool_choice"] = _tool_choice(body.get("tool_choice"))
    chat["response_format"] = _response_format(typed(body, "text", dict, {}))
    chat["top_logprobs"] = body.get("top_logprobs")
    chat["logprobs"] = LOGPROBS in _includes(body) or bool(chat["top_logprobs"])
    chat["max_completion_tokens"] = body.get("max_output_tokens")

    try:
        job = job_of("chat", chat, served, client)
    except ProtocolError as error:
        # The client knows the names of its own request.
        names = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
        raise ProtocolError(str(error), error.status, names.get(error.param or "", error.param), error.code) from error
    return job.with_asked({key: body.get(key) for key in ECHOED} | {"parallel": body.get("parallel_tool_calls")})


def _includes(body: Mapping[str, Json]) -> list[str]:
    includes = typed(body, "include", list, [])
    if unknown := [name for name in includes if name not in INCLUDES]:
        message = f"include={shown_value(unknown[0])}: expected {' or '.join(INCLUDES)}"
        raise ProtocolError(message, param="include")
    return includes


def _system(body: Mapping[str, Json]) -> list[dict[str, Json]]:
    instructions = typed(body, "instructions", str, "")
    return [{"role": "system", "content": instructions}] if instructions else []


def _messages(body: Mapping[str, Json]) -> list[dict[str, Json]]:
    """Returns the turns that the items of `input` are.

    Raises:
        ProtocolError: an item has another form.
    """
    items = body.get("input")
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise ProtocolError("input: expected a text, or a list of items", param="input")

    messages: list[dict[str, Json]] = []
    for number, item in enumerate(items):
        where = f"input.{number}"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"), where)})
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            content = _text(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind != "reasoning":  # the model has no thoughts beside its text
            accepted = "a message, function_call or function_call_output"
            raise ProtocolError(f"{where}: {shown_value(kind)}; expected {accepted}", param="input")
    return messages


def _add_call(messages: list[dict[str, Json]], item: Mapping[str, Json]) -> None:
    """Adds a call to the turn of the assistant that it follows, or to a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: Json, where: str) -> str:
    """Returns the text of a content: the text itself, or the texts of a list of parts, joined without a separator;
    empty for an empty list.

    Args:
        where: the field, for the message.

    Raises:
        ProtocolError: the content has another form.
    """
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None
        if not isinstance(text, str):
            raise ProtocolError(f"{where}: expected a text, or parts of type {', '.join(TEXT_PARTS)}", param="input")
        texts.append(text)
    return "".join(texts)


def _tool(tool: Json) -> dict[str, Json]:
    """Returns a tool in the form of a chat.

    Raises:
        ProtocolError: it is no function.
    """
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise ProtocolError("tools: expected tools of type function, which the client runs", param="tools")
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Json) -> Json:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: Mapping[str, Json]) -> Json:
    """Returns `text.format` in the form of a chat; the schema of a chat has one object more around it."""
    described = typed(text, "format", dict, None)
    if not described or described.get("type") != "json_schema":
        return described
    return {"type": "json_schema", "json_schema": {"schema": described.get("schema")}}
