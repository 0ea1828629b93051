"""Answers to /v1/responses: the response whole, and as the events of a stream."""

import json
import secrets
from collections.abc import Iterator, Sequence

from dist_lm.chat.messages import Call
from dist_lm.chat.openai_fields import Json
from dist_lm.generation.request import Answer, TopLogprobs
from dist_lm.server.answers import ids_value, logprobs_value, prompt_ids_value
from dist_lm.server.api import Api
from dist_lm.server.engine_thread import Done, Event, Grown
from dist_lm.server.job import Job
from dist_lm.server.response_fields import responses_job
from dist_lm.server.turns import Turn, VisibleText, turn_of


def responses_response(job: Job, answers: Sequence[Sequence[Answer]], created: int) -> Json:
    """Returns the JSON of a complete response.

    Args:
        answers: one, of the only prompt.
        created: seconds since 1970.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    ((answer,),) = answers
    turn = turn_of(answer, job)
    status = _status(turn)
    output: list[Json] = []
    if turn.content or not turn.calls:
        logprobs = _logprobs(job, answer.tokens, answer.raw_logprobs, answer.top_logprobs)
        output.append(_message(_new_id("msg"), turn.content, status, logprobs))
    output += [_call(call) for call in turn.calls]
    return _response(job, created, status, output, answer)


def _status(turn: Turn) -> str:
    return "incomplete" if turn.finish == "length" else "completed"


def _response(
    job: Job, created: int, status: str, output: Sequence[Json], answer: Answer | None = None
) -> dict[str, Json]:
    """Returns a response; `answer` is None while it is computed."""
    settings = job.asked

    response: dict[str, Json] = {
        "id": f"resp_{job.id.partition('-')[2]}",
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": settings["instructions"],
        "max_output_tokens": settings["max_output_tokens"],
        "metadata": settings["metadata"] or {},
        "model": job.served.name,
        "output": [*output],
        "parallel_tool_calls": settings["parallel"] is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": settings["temperature"],
        "text": settings["text"] or {"format": {"type": "text"}},
        "tool_choice": settings["tool_choice"] or "auto",
        "tools": settings["tools"] or [],
        "top_p": settings["top_p"],
        "truncation": "disabled",
        "usage": None,
        "user": settings["user"],
        "remembered_tokens": job.n_remembered,
    }
    if answer is None:
        return response

    response["usage"] = _usage(job, answer)
    if job.return_token_ids:
        response |= prompt_ids_value(job, answer.version)
        response |= ids_value(answer.tokens, answer.raw_logprobs, answer.logprobs)
    return response


def _usage(job: Job, answer: Answer) -> dict[str, Json]:
    n_new = len(answer.tokens)
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.reused_tokens},
        "output_tokens": n_new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + n_new,
    }


def _message(name: str, text: str, status: str, logprobs: Sequence[Json] = ()) -> dict[str, Json]:
    content = [_part(text, logprobs)]
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str, logprobs: Sequence[Json] = ()) -> dict[str, Json]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def _call(call: Call) -> dict[str, Json]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "status": "completed",
        "call_id": _new_id("call"),
        "name": call.name,
        "arguments": arguments,
    }


def _logprobs(job: Job, tokens: Sequence[int], raw: Sequence[float], top: Sequence[TopLogprobs]) -> list[Json]:
    if not job.logprobs:
        return []
    return logprobs_value("chat", tokens, raw, top, job.served.tokenizer)["content"]


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


class ResponseEvents:
    """Turns events of the engine into those of a response. Text comes as it grows, calls when they are complete."""

    def __init__(self, job: Job, created: int) -> None:
        """
        Args:
            created: seconds since 1970.
        """
        self._job = job
        self._created = created
        self._number = 0  # number of the next event
        self._visible = VisibleText(job.served.tokenizer) if job.reads_calls else None
        self._message_id = _new_id("msg")
        self._text = ""
        self._logprobs: list[Json] = []
        self._has_begun = False
        self._has_message = False
        self._is_first_token = True

    def of(self, event: Event) -> Iterator[str]:
        """Yields the events of new tokens or of the complete answer.

        Raises:
            UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
        """
        if not self._has_begun:
            self._has_begun = True
            # Clients expect these two events before all others.
            response = _response(self._job, self._created, "in_progress", [])
            yield self._event("response.created", response=response)
            yield self._event("response.in_progress", response=response)
        if isinstance(event, Grown):
            yield from self._grown(event)
        elif isinstance(event, Done):
            yield from self._done(event.answer)

    def end(self) -> Iterator[str]:
        """Yields nothing: the last event was `response.completed` or `response.incomplete`."""
        yield from ()

    def error(self, message: str, status: int) -> str:
        """Returns the event of a response that fails."""
        response = _response(self._job, self._created, "failed", [])
        response["error"] = {"code": "server_error", "message": message}
        return self._event("response.failed", response=response)

    def _grown(self, event: Grown) -> Iterator[str]:
        new = ""
        for token, piece in event.pieces:
            text = piece.removeprefix(" ") if self._is_first_token and self._job.served.tokenizer.adds_space else piece
            self._is_first_token = False
            new += self._visible.add(token, text) if self._visible else text
        tokens = [token for token, _ in event.pieces]
        logprobs = _logprobs(self._job, tokens, event.raw_logprobs, event.top_logprobs)
        self._logprobs += logprobs
        if new:
            yield from self._said(new, logprobs)

    def _said(self, text: str, logprobs: Sequence[Json] = ()) -> Iterator[str]:
        """Yields new text, and before the first one the message that it belongs to."""
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        if not self._has_message:
            self._has_message = True
            item = _message(self._message_id, "", "in_progress") | {"content": []}
            yield self._event("response.output_item.added", output_index=0, item=item)
            yield self._event("response.content_part.added", **place, part=_part(""))
        self._text += text
        yield self._event("response.output_text.delta", **place, delta=text, logprobs=[*logprobs])

    def _done(self, answer: Answer) -> Iterator[str]:
        turn = turn_of(answer, self._job)
        status = _status(turn)
        output: list[Json] = []

        # A line break before a call is no text; without a call it is.
        rest = self._visible.end() if self._visible else ""
        if not turn.calls and (rest or not self._has_message):
            yield from self._said(rest)
        if self._has_message:
            place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
            message = _message(self._message_id, self._text, status, self._logprobs)
            output.append(message)
            yield self._event("response.output_text.done", **place, text=self._text, logprobs=self._logprobs)
            yield self._event("response.content_part.done", **place, part=message["content"][0])
            yield self._event("response.output_item.done", output_index=0, item=message)

        for call in turn.calls:
            item = _call(call)
            yield from self._called(item, len(output))
            output.append(item)
        response = _response(self._job, self._created, status, output, answer)
        yield self._event(f"response.{status}", response=response)

    def _called(self, item: dict[str, Json], index: int) -> Iterator[str]:
        """Yields the events of a complete call."""
        place = {"item_id": item["id"], "output_index": index}
        # Clients build a call from its deltas: first an empty item, then one delta with all arguments.
        started_item = item | {"arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=started_item)
        yield self._event("response.function_call_arguments.delta", **place, delta=item["arguments"])
        yield self._event(
            "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
        )
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _event(self, kind: str, **fields: Json) -> str:
        value = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"


RESPONSES = Api(responses_job, responses_response, ResponseEvents)
