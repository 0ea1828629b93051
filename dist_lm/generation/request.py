"""Requests and answers, and the sequence of tokens that grows from a request into an answer.

`SamplingParams` says how tokens are drawn and `Request` adds a prompt. `AnswerSequence` collects tokens and text while
the engine runs. It ends as an `Answer`, or the request ends as a `Refusal`.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dist_lm.errors import ArtefactError, UserError, require
from dist_lm.generation.constraint import Constraint, GrammarRecord
from dist_lm.model.keyed_random import hash_words, signed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dist_lm.generation.grammar import Matcher

OnText = Callable[[str, int, int, str], None]
"""A function (request id, index of the answer, token, text that is now final) -> None."""

Versions = tuple[tuple[int, int], ...]
"""(tokens of the answer that the model had read, version of the weights from there on), in their order. The first pair
has 0 tokens: its version read the prompt and drew token 0. For example ((0, 7), (2, 8)): version 7 drew tokens 0 to 2
and read tokens 0 and 1. Then came version 8: it read token 2, and drew token 3 and all later ones."""

MOST_TOP_LOGPROBS = 20  # OpenAI's bound

TopLogprobs = tuple[tuple[int, float], ...]
"""(token, its log-probability under the model in nats), most likely first."""

FinishReason = Literal["eot", "stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """Says how tokens are drawn, and how many.

    Applied in this order: repetition, presence and frequency penalty, logit bias, the request's constraint,
    temperature, then top-k, top-p and min-p. A token must pass all three filters.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0: greedy, the largest logit; filters are ignored
    top_k: int = 0  # keep the k most likely tokens (and ties with the last one); 0: off
    top_p: float = 1.0  # keep the smallest set with this much probability (Holtzman et al. 2020); 1: off
    min_p: float = 0.0  # keep tokens with this share of the top token's probability (Nguyen et al. 2024); 0: off
    repetition_penalty: float = 1.0  # > 1: tokens of prompt and answer become less likely (Keskar et al. 2019); 1: off
    # subtracted from the logit of a token: once if the answer has it, and for each time that it does (OpenAI)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf forbids it
    top_logprobs: int = 0  # answers say this many of the most likely tokens at each place, by the model; 0: none
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    stop_tokens: tuple[int, ...] = ()  # end the answer, as end-of-text does
    ignore_eot: bool = False  # end-of-text does not end the answer

    def __post_init__(self) -> None:
        for key, holds, accepted in (
            ("max_new_tokens", self.max_new_tokens > 0, "a positive integer"),
            ("temperature", 0 <= self.temperature < math.inf, "a number >= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0 (1 is off)"),
            ("top_logprobs", 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS, f"0 to {MOST_TOP_LOGPROBS}"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number (0 is off)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number (0 is off)"),
        ):
            require(holds, key, getattr(self, key), accepted)
        require(all(self.stop), "stop", list(self.stop), "texts that are not empty")
        for token, bias in self.logit_bias.items():
            require(not math.isnan(bias) and bias < math.inf, f"logit_bias[{token}]", bias, "a number, or -inf")

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits of some tokens change before the temperature applies."""
        return self.repetition_penalty != 1 or self.counts_tokens or bool(self.logit_bias)

    @property
    def counts_tokens(self) -> bool:
        """Whether a logit depends on how often the answer has its token."""
        return bool(self.presence_penalty or self.frequency_penalty)


class RequestError(UserError):
    """A request cannot be answered; the remaining requests are not affected."""

    def __init__(self, request: str, message: str) -> None:
        super().__init__(f"request {request}: {message}")
        self.request = request  # id
        self.reason = message


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    id: str
    # token ids; the first is `Tokenizer.first_token.id` (usually end-of-text) if the prompt begins a document
    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0  # answers are a function of prompt, params, constraint, seed and the weights (with the adapter)
    n: int = 1  # number of answers; they share the prompt's pages in the cache
    truncate: Literal["refuse", "left"] = "refuse"  # if a prompt fills the context: refuse it, or drop its beginning
    keep_sets: bool = False  # answers say from which tokens each token was drawn
    constraint: Constraint | None = None  # the form of an answer; one that ends by itself has it
    cache_key: str = ""  # only requests with the same key share what the prefix cache holds
    # the weights that the answer waits for, as `Answer.versions`; empty: those that the engine has. Only with n=1
    versions: Versions = ()
    adapter: str = ""  # name of an adapter that the engine holds; empty: the engine's own weights

    @property
    def prefix_key(self) -> str:
        """Key of the prefix cache: adapters compute other keys and values. No name holds a NUL, so none forges it."""
        return f"{self.adapter}\0{self.cache_key}"


@dataclass(frozen=True)
class Room:
    """Limits of an engine for a request."""

    context: int  # tokens of prompt and answer, model.max_seq_len
    vocab_size: int
    capacity: int  # most tokens, of all sequences together, that fit into the cache
    cache_tokens: int  # the engine's option, for messages; `capacity` is this rounded down to whole pages


def fitted(request: Request, room: Room, texts: bool) -> Request:
    """Returns the request after checks, with its prompt as a list.

    With `truncate=left`, of a prompt that fills the context the last `context - max_new_tokens` tokens stay, at least
    one.

    Args:
        texts: whether the engine matches texts that end an answer.

    Raises:
        RequestError: the prompt is empty, fills the context or names an unknown token, `n` is below 1, a stop text has
            no vocabulary, or the cache is too small; the message names the field.
    """

    def refuse(message: str) -> None:
        raise RequestError(request.id, message)

    prompt, params = list(request.prompt), request.params
    if not prompt:
        refuse("prompt is empty; give at least one token (end-of-text begins a document)")
    invalid = next((token for token in prompt if not 0 <= token < room.vocab_size), None)
    if invalid is not None:
        refuse(f"prompt has token {invalid}; expected 0 to {room.vocab_size - 1}")
    if request.n < 1:
        refuse(f"n={request.n}: expected a positive integer")

    # A prompt that fills the context leaves no position for an answer.
    if len(prompt) >= room.context:
        if request.truncate == "refuse":
            refuse(
                f"prompt has {len(prompt)} tokens and model.max_seq_len is {room.context}, which leaves no space for "
                "an answer: shorten it, or set truncate=left"
            )
        # The end of a prompt is kept, because the answer continues it.
        prompt = prompt[-max(1, room.context - params.max_new_tokens) :]

    if request.versions and request.n > 1:
        refuse(f"n={request.n}: expected 1 with versions, because each answer follows its own")
    if request.constraint and params.ignore_eot:
        refuse("ignore_eot: an answer with a constraint ends where that is fulfilled: leave it out")
    if params.stop and not texts:
        refuse(f"stop={list(params.stop)}: this engine has no vocabulary and cannot match texts: use stop_tokens")
    unknown = [token for token in (*params.stop_tokens, *params.logit_bias) if not 0 <= token < room.vocab_size]
    if unknown:
        refuse(f"stop_tokens or logit_bias name token {unknown[0]}; expected 0 to {room.vocab_size - 1}")

    # Otherwise the sequence would be preempted for ever: even alone it would not fit.
    n_tokens = min(len(prompt) + params.max_new_tokens, room.context)
    if n_tokens > room.capacity:
        refuse(
            f"prompt and max_new_tokens={params.max_new_tokens} take {n_tokens} tokens of a cache of "
            f"cache_tokens={room.cache_tokens}: lower max_new_tokens or raise cache_tokens"
        )
    return replace(request, prompt=prompt)


@dataclass(frozen=True)
class Answer:
    """One answer to a request."""

    request: str
    index: int  # 0 to n - 1
    prompt_tokens: int
    tokens: tuple[int, ...]  # all drawn tokens, including the one that ended the answer
    text: str  # without the stop text; empty if the engine has no vocabulary
    logprobs: tuple[float, ...]  # nats, of each token under the distribution it was drawn from
    raw_logprobs: tuple[float, ...]  # nats, of each token under the model's distribution; nan: cancelled before
    finish: FinishReason
    seed: int
    version: int  # version of the weights that drew the first token
    sets: tuple[bytes, ...] = ()  # with keep_sets: the tokens among which each was drawn (`model.token_sets`)
    # with params.top_logprobs, for each token; empty for one that a constraint left no choice about
    top_logprobs: tuple[TopLogprobs, ...] = ()
    reused_tokens: int = field(default=0, compare=False)  # tokens of the prompt that the prefix cache held
    grammar: GrammarRecord | None = None  # the grammar that the answer followed, with a constraint
    versions: Versions = ()  # if the weights have changed while it was drawn, or the request asked for versions


@dataclass(frozen=True)
class Refusal:
    """A request that failed while it ran."""

    request: str
    error: str


Finished = Callable[[Request, Answer], None]


def ignore_answer(request: Request, answer: Answer) -> None:
    """Does nothing: for a caller that needs no call for each answer."""


def reporting(
    requests: Sequence[Request], results: Iterable[Answer | Refusal], finished: Finished
) -> Iterator[Answer | Refusal]:
    """Yields `results` unchanged; before each answer is yielded, `finished` is called with its request and the
    answer."""
    request_of = {request.id: request for request in requests}
    for result in results:
        if isinstance(result, Answer):
            finished(request_of[result.request], result)
        yield result


def only_answers(results: Iterable[Answer | Refusal], asked: str) -> Iterator[Answer]:
    """Yields `results` again, which must be answers.

    Args:
        asked: the model or its requests, for the message.

    Raises:
        ArtefactError: the next one is a refusal: the model's logits are not numbers.
    """
    for result in results:
        if isinstance(result, Refusal):
            raise ArtefactError(f"{asked}: request {result.request}: {result.error}")
        yield result


def in_order(requests: Sequence[Request], results: Iterable[Answer | Refusal]) -> list[Answer]:
    """Returns all answers, in the order of the requests, then of their index.

    Raises:
        RequestError: a request was refused.
    """
    answers: dict[tuple[str, int], Answer] = {}
    for result in results:
        if isinstance(result, Refusal):
            raise RequestError(result.request, result.error)
        answers[result.request, result.index] = result
    return [answers[request.id, index] for request in requests for index in range(request.n)]


class AnswerSets:
    """Collects the answers to each request until all of them have arrived."""

    def __init__(self) -> None:
        self._answers: dict[str, list[Answer]] = {}

    def add(self, result: Answer | Refusal, n: int) -> list[Answer] | Refusal | None:
        """Adds an answer or the refusal of a request for `n` answers.

        Returns:
            All `n` answers, by index, when the last one arrives, which are then forgotten; None before. A refusal is
            returned at once, and the request's answers so far are dropped.
        """
        if isinstance(result, Refusal):
            self._answers.pop(result.request, None)
            return result
        answers = self._answers.setdefault(result.request, [])
        answers.append(result)
        if len(answers) < n:
            return None
        # They arrive in the order in which they end.
        return sorted(self._answers.pop(result.request), key=lambda answer: answer.index)


@dataclass(eq=False)
class AnswerSequence:
    """One answer in progress: the tokens of prompt and answer, and the cache pages that hold their keys and values."""

    request: Request
    index: int  # index of the answer
    on_text: OnText | None
    stream: "TextStream"
    tokens: list[int] = field(init=False)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the pages
    digests: Sequence[bytes] = ()  # digests of the prompt's blocks, with a prefix cache
    n_reused: int = 0  # tokens of the prompt that the prefix cache held
    has_nan: "torch.Tensor | None" = None  # bool: the last piece of the prompt has logits of nan, from keys of nan
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    sets: list[bytes] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    saved: Any = None  # content of the pages while the sequence is preempted
    matcher: "Matcher | None" = None  # follows the constraint and says which tokens it allows next; None: no constraint
    allowed: "np.ndarray | None" = None  # the answer of `matcher.allowed`; None: it was not asked
    finish: FinishReason | None = None
    versions: list[tuple[int, int]] = field(default_factory=list)  # as `Answer.versions`; empty before it is admitted

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.n_prompt = len(self.tokens)

    @cached_property
    def seed(self) -> int:
        """The seed of this answer, int64."""
        return signed(hash_words(self.request.seed, self.index))

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def version(self) -> int | None:
        """The weights that have read its last tokens; None before it is admitted."""
        return self.versions[-1][1] if self.versions else None

    @property
    def next_version(self) -> int | None:
        """The version of the weights that must read its next token; None if the request does not say, so any may."""
        required_versions = self.request.versions
        n_reached = len(self.versions)
        if not required_versions:
            return None
        if n_reached < len(required_versions) and (
            not n_reached or required_versions[n_reached][0] == self.cached - self.n_prompt
        ):
            return required_versions[n_reached][1]
        return self.version

    def read_by(self, version: int) -> None:
        """Notes the weights that read its next token, if they are others than before."""
        if not self.versions or self.versions[-1][1] != version:
            self.versions.append((max(0, self.cached - self.n_prompt), version))

    @property
    def n_to_compute(self) -> int:
        """Tokens that the model has not read yet but must. The last token of a finished answer is never read."""
        return len(self.tokens) - bool(self.finish) - self.cached

    @property
    def n_unscored(self) -> int:
        """New tokens without a log-probability of the model."""
        return self.n_new - len(self.raw_logprobs)

    def add(
        self,
        token: int,
        logprob: float,
        raw_logprob: float | None,
        eot_id: int,
        context: int,
        token_set: bytes | None = None,
        top_logprobs: TopLogprobs = (),
    ) -> str:
        """Appends a token with its log-probabilities, and sets `finish` if it is the last one; `cached` stays.

        The first reason that holds becomes `finish`: end-of-text, a stop token or text, max_new_tokens, a full context.

        Args:
            logprob: nats, under the distribution the token was drawn from.
            raw_logprob: nats, under the model's distribution; None: the engine appends it to `raw_logprobs` later.
            context: most tokens of prompt and answer.
            token_set: the packed set of tokens among which it was drawn; kept if the request asks for sets.
            top_logprobs: the most likely tokens; kept if the request asks for some.

        Returns:
            The text that became final; with the last token also the text held back; always empty without a vocabulary.

        Raises:
            GrammarError: the constraint does not allow the token.
        """
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if raw_logprob is not None:
            self.raw_logprobs.append(raw_logprob)
        if self.request.keep_sets and token_set is not None:
            self.sets.append(token_set)
        if self.request.params.top_logprobs:
            self.top_logprobs.append(top_logprobs)
        text = self.stream.add(token)

        # The first reason that holds counts: end-of-text and stop texts before the limits.
        params = self.request.params
        if token == eot_id and not params.ignore_eot:
            self.finish = "eot"
        elif token in params.stop_tokens or self.stream.stopped:
            self.finish = "stop"
        elif self.n_new == params.max_new_tokens:
            self.finish = "length"
        elif len(self.tokens) == context:
            self.finish = "context"
        if self.finish:
            text += self.stream.finish()
        elif self.matcher:
            self.matcher.take(token)
            self.allowed = None
        return text

    def answer(self, version: int) -> Answer:
        """Returns the answer, which must be finished.

        Args:
            version: of the engine's weights, for an answer that was cancelled before it was admitted.
        """
        assert self.finish
        assert not self.n_unscored or self.finish == "cancelled"
        has_swapped = len(self.versions) > 1

        return Answer(
            request=self.request.id,
            index=self.index,
            prompt_tokens=self.n_prompt,
            tokens=tuple(self.tokens[self.n_prompt :]),
            text=self.stream.text,
            logprobs=tuple(self.logprobs),
            raw_logprobs=(*self.raw_logprobs, *[math.nan] * self.n_unscored),
            finish=self.finish,
            seed=self.seed,
            version=self.versions[0][1] if self.versions else version,
            sets=tuple(self.sets),
            top_logprobs=tuple(self.top_logprobs),
            reused_tokens=self.n_reused,
            grammar=self.matcher.record if self.matcher else None,
            versions=tuple(self.versions) if has_swapped or self.request.versions else (),
        )


class TextStream:
    """Decodes tokens to text one by one. Incomplete characters and possible stop texts are held back."""

    def __init__(self, vocabulary: Sequence[bytes] | None, stops: Sequence[str]) -> None:
        """
        Args:
            vocabulary: the bytes of every token; None: the text stays empty.
            stops: texts that end the answer.
        """
        self._vocabulary = vocabulary
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._longest_stop = max((len(stop) for stop in stops), default=0)
        self._n_returned = 0  # characters returned so far
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Appends a token. Returns the text that became final: no later stop text can remove it. It is empty without a
        vocabulary.

        If a stop text is complete, `stopped` is set, and `text` ends before it; later tokens are ignored.
        """
        if self.stopped or self._vocabulary is None:
            return ""
        # A token may hold a part of a character; the decoder keeps it until the rest arrives.
        n_before = len(self.text)
        self.text += self._decoder.decode(self._vocabulary[token])

        # A stop text may begin before the new text.
        begin = max(0, n_before - self._longest_stop + 1)
        stop_positions = [at for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        if stop_positions:
            self.stopped = True
            self.text = self.text[: min(stop_positions)]
            return self._return_up_to(len(self.text))
        return self._return_up_to(len(self.text) - self._n_held_back())

    def finish(self) -> str:
        """Returns the text held back so far; no more tokens follow."""
        # A character that never became complete turns into U+FFFD.
        if not self.stopped:
            self.text += self._decoder.decode(b"", final=True)
        return self._return_up_to(len(self.text))

    def _return_up_to(self, end: int) -> str:
        text = self.text[self._n_returned : end]
        self._n_returned = max(self._n_returned, end)
        return text

    def _n_held_back(self) -> int:
        """Returns the number of characters at the end that may begin a stop text."""
        return max(
            (length for stop in self._stops for length in range(1, len(stop)) if self.text.endswith(stop[:length])),
            default=0,
        )
