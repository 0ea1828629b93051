"""Rollouts: the order of prompts, the requests for completions, and completions as arrays.

A rollout is a prompt with its completion, or a conversation with an environment, whose turns of the model have the
environment's between them (`environment_rollouts.py`). A conversation is one sample, or several if the chat template
writes earlier turns otherwise (`transcript.py`); its completion tokens are those that the model drew, of all samples.

Dimensions: B rollouts, N their tokens (prompts and completions) concatenated, M the tokens of completions concatenated,
S samples of conversations, X bytes of the sets of tokens that completion tokens were drawn from, G bytes that identify
a grammar. The completions of one prompt are numbered by `sample`, from 0, which has nothing to do with S.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import torch

from dist_lm.data.order import Shuffle, key, permutation
from dist_lm.errors import ArtefactError
from dist_lm.generation.constraint import Constraint, GrammarRecord
from dist_lm.generation.decoder import Weights, WeightStream
from dist_lm.generation.engine import Engine
from dist_lm.generation.request import (
    Answer,
    Finished,
    FinishReason,
    Refusal,
    Request,
    RequestError,
    SamplingParams,
    ignore_answer,
    in_order,
    reporting,
)
from dist_lm.model.keyed_random import hash_words, signed
from dist_lm.model.token_sets import TokenSets
from dist_lm.rlhf.request_feed import AbortedError

CUTS = ("", "turns", "tokens", "context")
"""Limits that end a conversation: `rlhf.environment_limits`, or the context of the model; the first is none."""
FINISHES: tuple[FinishReason, ...] = ("eot", "stop", "length", "context", "cancelled")
ENDED = ("eot", "stop")
"""The finish reasons of a completion that was not cut off."""

END = object()  # behind the last request of an iterator

_SEED = 0x726F6C6C  # salt of sampling seeds: keeps them apart from other hashes of seed and position

LIBRARY_BYTES, DIGEST_BYTES = 32, 32
"""Sizes of the parts of a packed `GrammarRecord`."""

Prompt = TypeVar("Prompt")
PromptOrder = Callable[[int, int], list[Sequence[int]]]
"""(first position, count) -> the token ids of the prompts there."""

ConstraintOrder = Callable[[int], Constraint]
"""position -> the constraint of the completions of the prompt there."""


@dataclass(frozen=True)
class ShuffledPrompts(Generic[Prompt]):
    """Prompts of all iterations, reshuffled every epoch: a pure function of seed and position. A `PromptOrder` if they
    are token ids."""

    # token ids as the model reads them: a prompt that begins a document begins with the id of `Tokenizer.first_token`;
    # or the tasks of an environment
    prompts: Sequence[Prompt]
    seed: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ArtefactError("there are no prompts to draw completions for")

    def __call__(self, position: int, count: int) -> list[Prompt]:
        """Returns `count` prompts from `position` on, over the border of an epoch if need be."""
        return [self.prompts[self.index(position + i)] for i in range(count)]

    def index(self, position: int) -> int:
        """Returns which of `prompts` stands at a position."""
        epoch, number_in_epoch = divmod(position, len(self.prompts))
        return int(_epoch_order(len(self.prompts), self.seed, epoch)[number_in_epoch])


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(count, key(Shuffle.PROMPTS, seed, epoch))


@dataclass
class SignsOfLife:
    """Calls a function regularly, from any thread, while the run waits for engines.

    A run counts as hanging when no rank gives a sign of life. Engines that work beside the learner would hide that the
    learner hangs, so their signs count only while it waits for them (`asynchronous.py`).
    """

    sign: Callable[[], None] = lambda: None
    passes: bool = True

    def __call__(self) -> None:
        if self.passes:
            self.sign()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Lets signs pass in a block, and none behind it."""
        self.passes = True
        try:
            yield
        finally:
            self.passes = False


class RolloutSource(Protocol):
    """Draws completions for the controller: an engine in its process (`EngineRollouts`), or a pool of actors, each with
    such an engine (`cluster.pool.PoolRollouts`). Whoever opens a source closes it."""

    def load_weights(self, weights: Any, version: int) -> None:
        """Continues with other weights.

        Args:
            weights: a `WeightStream`, which is read to its end, or the return value of `hold`.

        Raises:
            UserError: the weights do not fit the model.
            ActorsLostError, PoolFailure: of a pool: see `cluster.pool.Pool.load_weights`.
        """
        ...

    def hold(self, weights: WeightStream) -> Any:
        """Reads a stream to its end for a later `load_weights`, also while `generate` runs in another thread."""
        ...

    def swap_weights(self, weights: Any, version: int) -> None:
        """Continues soon with the return value of `hold`, in the middle of answers too (`Engine.swap_weights`); from
        any thread, does not wait."""
        ...

    def generate(self, requests: Sequence[Request], finished: Finished = ignore_answer) -> list[Answer]:
        """Returns all answers, in the order of the requests, then of the answer's index.

        An answer is a function of its request and the weights that draw it: to the last bit on the CPU in fp32, else up
        to rounding, which may depend on other requests. So a pool returns what one engine would, whichever actor gets a
        request, and also if an actor dies and another one computes it.

        Args:
            finished: called with each answer as soon as it is there.

        Raises:
            RequestError: a request cannot be answered.
            ConfigError: with cache_tokens=0, free memory does not hold one context.
            ActorsLostError, PoolFailure: of a pool: see `cluster.pool.Pool.generate`.
        """
        ...

    def results(self, requests: Iterable[Request | None]) -> Iterator[Answer | Refusal]:
        """Yields every answer, or the refusal of a request, as soon as it is there.

        Args:
            requests: None among them means that there is none now: the iterator is asked again.

        Raises:
            ConfigError, ActorsLostError, PoolFailure: as `generate`.
        """
        ...


def read_to_end(weights: WeightStream) -> None:
    """Takes part in sending weights that this rank does not use."""
    for _ in weights:
        continue


class EngineRollouts:
    """A `RolloutSource` over one engine in this process."""

    def __init__(self, engine: Engine, sleeps: bool = False) -> None:
        """`sleeps`: free the cache between two calls of `generate`."""
        self.engine, self._sleeps = engine, sleeps
        # Weights of the last `swap_weights`, which another thread calls: each of its methods is atomic.
        self._next_weights: deque[tuple[Weights, int]] = deque(maxlen=1)

    def load_weights(self, weights: Weights, version: int) -> None:
        self._next_weights.clear()
        self.engine.load_weights(weights, version)

    def hold(self, weights: WeightStream) -> Weights:
        return dict(weights)

    def swap_weights(self, weights: Weights, version: int) -> None:
        self._next_weights.append((weights, version))

    def generate(self, requests: Sequence[Request], finished: Finished = ignore_answer) -> list[Answer]:
        return in_order(requests, reporting(requests, self.results(requests), finished))

    def results(self, requests: Iterable[Request | None]) -> Iterator[Answer | Refusal]:
        """Yields every answer, or the refusal of a request, when the engine has finished it. A request that the engine
        does not accept gives its refusal at once.

        With `sleeps`, the cache is freed after the last one, which takes a caller that reads to the end. A caller that
        leaves early and closes the iterator cancels the rest, as do requests that raise AbortedError.

        Args:
            requests: read up to the next None before each step of the engine.

        Raises:
            ConfigError: with cache_tokens=0, free memory does not hold one context.
            RuntimeError: the engine has no weights; with tp > 1, another process of the model has ended
                (RankLostError).
        """
        unread, is_all_read = iter(requests), False
        try:
            while self.engine.busy or not is_all_read:
                while not is_all_read:
                    request = next(unread, END)
                    is_all_read = request is END
                    if request is None or is_all_read:
                        break
                    try:
                        self.engine.submit(cast(Request, request))
                    except RequestError as error:
                        yield Refusal(error.request, error.reason)
                self._renew()
                if self.engine.busy:
                    yield from self.engine.step()
        except (GeneratorExit, AbortedError):
            self.engine.cancel_all()
            raise

        # The rank that trains next uses the memory of the cache.
        if self._sleeps:
            self.engine.sleep()

    def _renew(self) -> None:
        """Gives the engine the weights of the last `swap_weights`, between two steps."""
        if self._next_weights:
            self.engine.swap_weights(*self._next_weights.pop())


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt."""

    prompt: np.ndarray  # int64 tokens
    completion: np.ndarray  # int64 tokens, the stop token included; of a conversation all behind its first prompt
    logprobs: np.ndarray  # fp32, nats; of each token that the model drew, under the distribution it was drawn from
    finish: FinishReason
    version: int  # version of the weights that drew it
    position: int  # position of its prompt in the order of prompts
    sample: int  # number among the completions of its prompt

    @property
    def ended(self) -> bool:
        """Whether it ended by a stop token and was not cut off."""
        return self.finish in ENDED


def _none() -> np.ndarray:
    """Returns the column of rollouts that are no conversations."""
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Rollouts:
    """Many rollouts as a few arrays: the form in which they are sent, checkpointed and computed with."""

    tokens_N: np.ndarray  # int64; a prompt, its completion, the next prompt, ...
    logprobs_M: np.ndarray  # fp32, nats; of each completion token, by the engine that drew it
    prompt_tokens_B: np.ndarray  # int64; tokens of each prompt; of a conversation, tokens that the model did not draw
    new_tokens_B: np.ndarray  # int64; tokens of each completion, at least 1 (0 in a conversation without a verdict)
    finish_B: np.ndarray  # int64; index in FINISHES
    version_B: np.ndarray  # int64; version of the weights that drew it
    position_B: np.ndarray  # int64; position of its prompt in the order of prompts
    sample_B: np.ndarray  # int64; number among the completions of its prompt
    # the tokens among which each completion token was drawn (`model.token_sets`); both empty if every token was drawn
    # from the whole vocabulary
    set_size_M: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32; bytes of each set
    sets_X: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # uint8; the packed sets
    # uint8; the grammar that each completion followed (`packed_record`); no rows without constraints
    grammar_BG: np.ndarray = field(default_factory=lambda: np.zeros((0, LIBRARY_BYTES + DIGEST_BYTES), np.uint8))
    # Of conversations; all are empty without an environment.
    # uint8; 1 where the model drew the token
    drawn_N: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    # int64; tokens of each sample, in the order of `tokens_N`
    sample_tokens_S: np.ndarray = field(default_factory=_none)
    samples_B: np.ndarray = field(default_factory=_none)  # int64; samples of each conversation
    turns_B: np.ndarray = field(default_factory=_none)  # int64; turns of the model
    unreadable_B: np.ndarray = field(default_factory=_none)  # int64; turns that could not be read
    tool_errors_B: np.ndarray = field(default_factory=_none)  # int64; results of calls that are errors
    cut_B: np.ndarray = field(default_factory=_none)  # int64; index in CUTS of the limit that ended it
    failure_B: np.ndarray = field(default_factory=_none)  # int64; index in FAILURES of why it has no reward, or -1
    # fp64; rewards of turns and verdict; NaN: it has none
    reward_B: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.new_tokens_B)

    @property
    def are_conversations(self) -> bool:
        """Whether an environment took part."""
        return len(self.samples_B) > 0

    def __iter__(self) -> Iterator[Rollout]:
        # Rollouts stand one behind the other, so the sums of their lengths are their ends.
        end_N = np.cumsum(self.prompt_tokens_B + self.new_tokens_B)
        end_M = np.cumsum(self.new_tokens_B)
        for b, new_tokens in enumerate(self.new_tokens_B):
            end, new_end = end_N[b], end_M[b]
            middle = end - new_tokens  # end of the prompt and beginning of the completion
            if self.are_conversations:
                # What follows the first prompt, the environment's turns included, is read as one text.
                middle = end - self.prompt_tokens_B[b] - new_tokens
                middle += int(np.argmax(self.drawn_N[middle:end])) if new_tokens else 0

            yield Rollout(
                prompt=self.tokens_N[end - self.prompt_tokens_B[b] - new_tokens : middle],
                completion=self.tokens_N[middle:end],
                logprobs=self.logprobs_M[new_end - new_tokens : new_end],
                finish=FINISHES[self.finish_B[b]],
                version=int(self.version_B[b]),
                position=int(self.position_B[b]),
                sample=int(self.sample_B[b]),
            )

    @property
    def ended(self) -> np.ndarray:
        """Which rollouts ended by a stop token, (B,) bool."""
        return np.isin(self.finish_B, [FINISHES.index(reason) for reason in ENDED])

    def chosen(self, chosen_B: np.ndarray) -> "Rollouts":
        """Returns the rollouts where `chosen_B` (bool) is true."""
        chosen_N = np.repeat(chosen_B, self.prompt_tokens_B + self.new_tokens_B)
        chosen_M = np.repeat(chosen_B, self.new_tokens_B)
        columns = {
            name: column_B[chosen_B] for name, column_B in vars(self).items() if name.endswith("_B") and len(column_B)
        }
        if len(self.set_size_M):
            columns["set_size_M"] = self.set_size_M[chosen_M]
            columns["sets_X"] = self.sets_X[np.repeat(chosen_M, self.set_size_M)]
        if len(self.grammar_BG):
            columns["grammar_BG"] = self.grammar_BG[chosen_B]
        if self.are_conversations:
            columns["drawn_N"] = self.drawn_N[chosen_N]
            columns["sample_tokens_S"] = self.sample_tokens_S[np.repeat(chosen_B, self.samples_B)]
        return Rollouts(tokens_N=self.tokens_N[chosen_N], logprobs_M=self.logprobs_M[chosen_M], **columns)

    def sets_of(self, place_K: np.ndarray) -> TokenSets | None:
        """Returns the sets of K completion tokens, in host memory; None: all were drawn from the whole vocabulary.

        Args:
            place_K: indices of the tokens in M, int64.
        """
        if not len(self.set_size_M):
            return None
        size_K = self.set_size_M[place_K].astype(np.int64)
        end_M = np.cumsum(self.set_size_M, dtype=np.int64)

        # Consecutive places, such as those of a completion, are one slice: few copies instead of one a token.
        spans = np.split(place_K, np.flatnonzero(np.diff(place_K) != 1) + 1) if len(place_K) else []
        slices = [self.sets_X[end_M[span[0]] - self.set_size_M[span[0]] : end_M[span[-1]]] for span in spans]
        bytes_X = np.concatenate([self.sets_X[:0], *slices])

        begin_K = np.cumsum(size_K) - size_K
        return TokenSets(torch.from_numpy(bytes_X), torch.from_numpy(begin_K), torch.from_numpy(size_K))


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts and their scores under the rules of the reward."""

    rollouts: Rollouts
    scores: Mapping[str, np.ndarray]  # by part, fp64 (B,); NaN: the rule failed on this rollout
    replaced: int = 0  # prompts that were drawn, had no signal and were replaced by others (`schedule.SamplingAgain`)
    # Whether answers look forged or looked up, bool (B,), by name; empty without a reward of kind `tests`.
    marks: Mapping[str, np.ndarray] = field(default_factory=dict)
    # Where a rule does not apply, bool (B,), by part; its score is 0 there. Parts that apply to all are left out.
    skipped: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def applicable(self) -> np.ndarray:
        """Whether some rule applies, bool (B,); true without rules."""
        applicable_B = np.ones(len(self.rollouts), bool)
        if self.scores and len(self.skipped) == len(self.scores):
            applicable_B = ~np.all([*self.skipped.values()], axis=0)
        return applicable_B

    @property
    def prompts(self) -> int:
        """Number of prompts drawn."""
        return len(np.unique(self.rollouts.position_B)) + self.replaced

    def of_prompts(self, position_P: np.ndarray, replaced: int) -> "ScoredRollouts":
        """Returns the rollouts of the prompts at these positions, in their present order, with `replaced` as given."""
        chosen_B = np.isin(self.rollouts.position_B, position_P)
        scores = {name: score_B[chosen_B] for name, score_B in self.scores.items()}
        marks = {name: mark_B[chosen_B] for name, mark_B in self.marks.items()}
        skipped = {name: skipped_B[chosen_B] for name, skipped_B in self.skipped.items()}
        return ScoredRollouts(self.rollouts.chosen(chosen_B), scores, replaced, marks, skipped)


def concatenated(parts: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """Returns all rollouts, in the order of the parts, of which there is at least one; `replaced` is their sum. Each
    part has scores under the same rules and the same marks."""
    names = vars(parts[0].rollouts)
    arrays = {name: np.concatenate([getattr(part.rollouts, name) for part in parts]) for name in names}
    scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
    marks = {name: np.concatenate([part.marks[name] for part in parts]) for name in parts[0].marks}

    # A part that applies to all rollouts of a draw has no array there.
    skipped = {}
    for name in dict.fromkeys(name for part in parts for name in part.skipped):
        skipped[name] = np.concatenate([part.skipped.get(name, np.zeros(len(part.rollouts), bool)) for part in parts])
    return ScoredRollouts(Rollouts(**arrays), scores, sum(part.replaced for part in parts), marks, skipped)


def requests_of(
    prompts: Sequence[Sequence[int]],
    first_position: int,
    samples: int,
    params: SamplingParams,
    seed: int,
    constraint_at: ConstraintOrder | None = None,
) -> list[Request]:
    """Returns requests whose answers depend only on the weights and on (seed, position of the prompt, sample).

    Args:
        first_position: position of `prompts[0]` in the order of prompts.
        samples: completions of each prompt.
        params: with filters, the answers have the sets of tokens that they were drawn from. They may not adjust logits
            (penalties, bias).
        constraint_at: what the completions of each prompt must be; None: anything.
    """
    assert not params.adjusts_logits, params
    # Filters renormalise probabilities over the tokens that they allow; training must use the same sets.
    filters = (params.top_k, params.top_p, params.min_p) != (0, 1, 0)
    requests = []
    for position, prompt in enumerate(prompts, first_position):
        answer_seed = signed(hash_words(seed, _SEED, position))
        constraint = constraint_at(position) if constraint_at else None
        requests.append(
            Request(str(position), prompt, params, answer_seed, samples, keep_sets=filters, constraint=constraint)
        )
    return requests


def rollouts_of(requests: Sequence[Request], answers: Sequence[Answer]) -> Rollouts:
    """Returns the answers to `requests_of` as arrays, in their order: by request, then by index. None may be missing.
    Either all requests have a constraint, or none has."""
    prompts = {request.id: np.array(request.prompt, np.int64) for request in requests}
    assert [answer.request for answer in answers] == [r.id for r in requests for _ in range(r.n)], "order of answers"

    # Sets have different sizes, so they are one array of bytes with the size of each.
    token_sets = [packed for answer in answers for packed in answer.sets]
    records = [packed_record(answer.grammar) for answer in answers if answer.grammar]
    assert len(records) in (0, len(answers)), "constraints of some requests alone"

    def column(values: list[int]) -> np.ndarray:
        return np.array(values, np.int64)

    # An array an answer: one list of all tokens takes nearly twice the time.
    tokens = [np.zeros(0, np.int64)]
    logprobs = [np.zeros(0, np.float32)]
    for answer in answers:
        tokens += [prompts[answer.request], np.array(answer.tokens, np.int64)]
        logprobs.append(np.array(answer.logprobs, np.float32))

    return Rollouts(
        tokens_N=np.concatenate(tokens),
        logprobs_M=np.concatenate(logprobs),
        prompt_tokens_B=column([len(prompts[answer.request]) for answer in answers]),
        new_tokens_B=column([len(answer.tokens) for answer in answers]),
        finish_B=column([FINISHES.index(answer.finish) for answer in answers]),
        version_B=column([answer.version for answer in answers]),
        position_B=column([int(answer.request) for answer in answers]),
        sample_B=column([answer.index for answer in answers]),
        set_size_M=np.array([len(packed) for packed in token_sets], np.int32),
        sets_X=np.array(bytearray().join(token_sets), np.uint8),
        grammar_BG=np.array(bytearray().join(records), np.uint8).reshape(-1, LIBRARY_BYTES + DIGEST_BYTES),
    )


def packed_record(record: GrammarRecord) -> bytes:
    """Returns a record as LIBRARY_BYTES + DIGEST_BYTES bytes: the version of the library, filled up with zeros or cut
    off, then the digest."""
    library = record.library.encode()[:LIBRARY_BYTES].ljust(LIBRARY_BYTES, b"\0")
    return library + bytes.fromhex(record.sha256)


def library_of(record_G: np.ndarray) -> str:
    """Returns the version of the library in a packed record."""
    return record_G[:LIBRARY_BYTES].tobytes().rstrip(b"\0").decode(errors="replace")
