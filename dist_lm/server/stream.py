"""The chunks of a streamed response, made from events of the engine: a value that remembers what was sent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_lm.chat.layouts.openai import call_value
from dist_lm.chat.openai_fields import Json
from dist_lm.generation.request import Answer
from dist_lm.server.answers import head_of, ids_value, logprobs_value, new_call_id, prompt_ids_value, usage_value
from dist_lm.server.engine_thread import Done, Event, Grown
from dist_lm.server.job import Job
from dist_lm.server.turns import VisibleText, turn_of


@dataclass
class _Choice:
    """What is known of one answer."""

    visible: VisibleText | None  # None: all text is shown
    n_tokens: int = 0
    has_begun: bool = False


class Chunks:
    """Turns events into chunks, each the JSON of one server-sent event."""

    def __init__(self, job: Job, created: int) -> None:
        """
        Args:
            created: seconds since 1970.
        """
        self._job = job
        self._tokenizer = job.served.tokenizer
        self._created = created
        self._version = 0  # the weights' version in the newest event
        self._place = {request.id: number for number, request in enumerate(job.requests)}
        self._choices: dict[int, _Choice] = {}
        self._has_ids = job.return_token_ids  # whether the ids of the prompt are still to be sent
        self._n_new = 0
        self._reused_tokens: dict[str, int] = {}  # request -> tokens of its prompt that the prefix cache held

    def of(self, event: Event) -> Iterator[dict[str, Json]]:
        """Yields the chunks of new tokens or of a complete answer.

        Raises:
            UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
        """
        if isinstance(event, Grown):
            self._version = event.version
            yield from self._grown(event)
        elif isinstance(event, Done):
            self._version = event.answer.version
            yield from self._done(event.answer)

    def end(self) -> Iterator[dict[str, Json]]:
        """Yields what stands behind all answers: the counts of tokens, if they were asked for."""
        if self._job.include_usage:
            usage = usage_value(self._job, self._n_new, sum(self._reused_tokens.values()))
            yield self._head() | {"choices": [], "usage": usage}

    def _grown(self, event: Grown) -> Iterator[dict[str, Json]]:
        """Yields the chunks of new tokens of an answer: first the opening chunk, unless it was yielded before, then a
        chunk with the new text.

        The second chunk is left out while there is nothing to send: no visible text, and neither log-probabilities nor
        token ids were asked for. Calls of tools are not text; `_done` sends them.
        """
        index, choice = self._choice(event.request, event.index)
        yield from self._opening(index, choice)
        texts = []
        for token, text in event.pieces:
            # Such a tokenizer puts a space before every text, and it is no part of the turn.
            if not choice.n_tokens and self._job.endpoint == "chat" and self._tokenizer.adds_space:
                text = text.removeprefix(" ")
            choice.n_tokens += 1
            texts.append(choice.visible.add(token, text) if choice.visible else text)

        extras: dict[str, Json] = {}
        tokens = [token for token, _ in event.pieces]
        if self._job.logprobs:
            extras["logprobs"] = logprobs_value(
                self._job.endpoint, tokens, event.raw_logprobs, event.top_logprobs, self._tokenizer
            )
        if self._job.return_token_ids:
            extras |= ids_value(tokens, event.raw_logprobs, event.logprobs)
        text = "".join(texts)
        if text or extras:
            yield self._chunk(index, self._said(text), extras)

    def _done(self, answer: Answer) -> Iterator[dict[str, Json]]:
        index, choice = self._choice(answer.request, answer.index)
        yield from self._opening(index, choice)
        turn = turn_of(answer, self._job)
        self._n_new += len(answer.tokens)
        self._reused_tokens[answer.request] = answer.reused_tokens

        # A line break before a call is no text; without a call it is.
        rest = choice.visible.end() if choice.visible else ""
        if rest and not turn.calls:
            yield self._chunk(index, self._said(rest))
        for number, call in enumerate(turn.calls):
            yield self._chunk(index, {"delta": {"tool_calls": [call_value(call, new_call_id(), number)]}})
        # The reason of the end comes in a chunk of its own, as in OpenAI's streams.
        last = {"delta": {}} if self._job.endpoint == "chat" else {"text": ""}
        yield self._chunk(index, last, {"finish_reason": turn.finish})

    def _choice(self, request: str, answer: int) -> tuple[int, _Choice]:
        """Returns the index of an answer in the response, and what is known of it."""
        number = self._place[request]
        index = number * self._job.requests[number].n + answer
        if index not in self._choices:
            visible = VisibleText(self._tokenizer) if self._job.reads_calls else None
            self._choices[index] = _Choice(visible)
        return index, self._choices[index]

    def _opening(self, index: int, choice: _Choice) -> Iterator[dict[str, Json]]:
        """Yields the first chunk of an answer, which has its role; of the response, the ids of the prompt too."""
        if choice.has_begun:
            return
        choice.has_begun = True
        chunk = self._chunk(index, {"text": ""})
        if self._job.endpoint == "chat":
            chunk = self._chunk(index, {"delta": {"role": "assistant", "content": ""}})
            chunk["remembered_tokens"] = self._job.n_remembered
        # All answers share their prompts, so one chunk of the response has the ids.
        if self._has_ids:
            self._has_ids = False
            chunk |= prompt_ids_value(self._job, self._version)
        yield chunk

    def _head(self) -> dict[str, Json]:
        return head_of(self._job, self._created, self._version, is_chunk=True)

    def _said(self, text: str) -> dict[str, Json]:
        return {"delta": {"content": text}} if self._job.endpoint == "chat" else {"text": text}

    def _chunk(self, index: int, said: Mapping[str, Json], extras: Mapping[str, Json] | None = None) -> dict[str, Json]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": None, **(extras or {})}
        return self._head() | {"choices": [choice]}
