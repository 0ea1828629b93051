"""Compares recorded conversations with what happens again: drawn from the same weights, or executed in an environment.

    drawn       the model draws every turn again; the record takes the place of the environment
    executed    the environment answers every recorded turn again; the record takes the place of the model

Both end at the first difference of a conversation: what follows it belongs to another conversation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NoReturn, TypeVar

import numpy as np

from dist_lm.chat.messages import Json
from dist_lm.environments.protocol import Action, EnvironmentFailedError, Failure, Observation, Step, Task, Verdict
from dist_lm.environments.values import action_of, action_value, observation_of, observation_value, step_of
from dist_lm.errors import ArtefactError
from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.conversing import Conversing, EpisodeHost
from dist_lm.rlhf.episodes import Episode, Turn
from dist_lm.rlhf.request_feed import Ask
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks

OF_THE_MACHINE: tuple[Failure, ...] = ("timeout", "infrastructure", "differs")
"""Failures that need not happen again: how a conversation ended by one of them is not compared."""
OF_ROUNDING = ("token", "log-probability", "tokens allowed", "number of tokens")
"""Differences that sums in another order may make."""
CONTEXT, SHOWN = 20, 80  # characters shown before the first difference of two texts, and in all

Value = TypeVar("Value")


@dataclass(frozen=True)
class Difference:
    """The first difference between a recorded conversation and the same one now."""

    what: str  # token, log-probability, prompt, observation, verdict, ...
    recorded: Json
    now: Json
    turn: int | None = None  # of the model, from 1; None: before the first, or the conversation as a whole
    token: int | None = None  # of the turn or the prompt, from 1

    def __str__(self) -> str:
        place = "".join(f"{name} {at}, " for name, at in (("turn", self.turn), ("token", self.token)) if at is not None)
        recorded, now = shortened(_text_of(self.recorded), _text_of(self.now))
        return f"{place}{self.what}: recorded {recorded}, now {now}"


@dataclass(frozen=True)
class Outcome:
    """The result for one conversation."""

    difference: Difference | None
    largest_gap: float = 0.0  # nats; between log-probabilities of equal tokens
    n_equal: int = 0  # tokens of the model before the difference
    is_complete: bool = True  # False: the end was not compared (`OF_THE_MACHINE`)


class DifferenceError(Exception):
    """Ends a conversation at its first difference."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def differ(what: str, recorded: Json, now: Json, turn: int | None = None, token: int | None = None) -> NoReturn:
    raise DifferenceError(Difference(what, recorded, now, turn, token))


# --- drawn again ---


async def drawn_again(how: Conversing, recorded: Episode, task: Task, ask: Ask, is_exact: bool) -> Outcome:
    """Holds a conversation with the record in place of the environment, and compares it with the record.

    Args:
        how: the conversations of the run.
        ask: returns the answers of a model with the weights that drew the recorded ones.
        is_exact: whether log-probabilities must have the same bits.

    Raises:
        ArtefactError: the record does not hold what an environment returns.
        AbortedError: from `ask`.
    """
    conversation = _RecordedEnvironment(how, recorded, ask, is_exact)
    try:
        episode = await how.hold(conversation, task, recorded.position, recorded.sample, conversation.ask)
        compare_ends(recorded, episode)
    except DifferenceError as error:
        return Outcome(error.difference, conversation.largest_gap, conversation.n_equal)
    return Outcome(None, conversation.largest_gap, conversation.n_equal)


@dataclass(frozen=True)
class RecordedTurn:
    """What the model read and drew in a recorded turn."""

    prompt: list[int]
    tokens: list[int]
    logprobs: tuple[float, ...]  # nats, of each token
    sets: tuple[bytes, ...]  # with filters or a constraint: the tokens among which each was drawn


class RecordedTurns:
    """Finds the ids of the turns of a recorded conversation with a verdict, in their order."""

    def __init__(self, recorded: Episode) -> None:
        self._recorded = recorded
        self._sample, self._begin = 0, 0  # where in the samples the search for the next turn begins
        self._place = 0  # of its first token among all drawn ones

    def next(self, turn: Turn, number: int) -> RecordedTurn:
        """Returns the next turn.

        Raises:
            ArtefactError: its tokens are not one piece of its sample.
        """
        recorded, samples = self._recorded, self._recorded.samples
        while self._sample < len(samples) and True not in samples[self._sample].drawn[self._begin :]:
            self._sample, self._begin = self._sample + 1, 0
        if self._sample == len(samples):
            raise unreadable(recorded, f"turn {number} has no tokens")

        sample = samples[self._sample]
        begin = sample.drawn.index(True, self._begin)
        end = begin + turn.new_tokens
        if not all(sample.drawn[begin:end]) or end > len(sample.ids):
            raise unreadable(recorded, f"turn {number} is not one piece of its sample")

        first_drawn, self._place, self._begin = self._place, self._place + turn.new_tokens, end
        drawn = slice(first_drawn, self._place)
        return RecordedTurn(sample.ids[:begin], sample.ids[begin:end], recorded.logprobs[drawn], recorded.sets[drawn])


class _RecordedEnvironment:
    """Answers the turns of one conversation from its record, and compares each with the recorded one."""

    def __init__(self, how: Conversing, recorded: Episode, ask: Ask, is_exact: bool) -> None:
        self._how, self._recorded, self._ask, self._is_exact = how, recorded, ask, is_exact
        self._turn = 0  # index of the turn that is drawn next
        self._recorded_turns = RecordedTurns(recorded)
        self.largest_gap, self.n_equal = 0.0, 0  # as in `Outcome`

    def episode(self, task: Task) -> "_RecordedEnvironment":
        return self

    async def reset(self) -> Step:
        recorded = self._recorded
        if recorded.opening is None:
            return Step(Observation(), True, recorded.verdict)
        return Step(read_recorded(observation_of, recorded.opening, recorded), False)

    async def step(self, action: Action) -> Step:
        number, turn = self._turn + 1, self._recorded_turn()
        if (value := action_value(action)) != turn.action:
            differ("action", turn.action, value, number)

        self._turn += 1
        if turn.step is None:
            return Step(Observation(), True, self._recorded.verdict)
        return read_recorded(step_of, turn.step, self._recorded)

    async def close(self) -> None:
        """There is nothing to end."""

    async def ask(self, request: Request) -> Answer:
        """Returns the model's answer, which is that of the record.

        Raises:
            DifferenceError: it is another one, or another prompt.
            AbortedError: the engines have failed.
        """
        number, turn = self._turn + 1, self._recorded_turn()
        if turn.new_tokens == 0:
            differ("turn", "none is drawn", "one is drawn", number)
        request = replace(request, versions=turn.versions)
        # The ids of a conversation without a verdict are not recorded, only their number.
        if not self._recorded.samples:
            answer = await self._ask(request)
            if len(answer.tokens) != turn.new_tokens:
                differ("number of tokens", turn.new_tokens, len(answer.tokens), number)
            return answer

        drawn = self._recorded_turns.next(turn, number)
        compare_ids("prompt", drawn.prompt, request.prompt, number, self._how.tokenizer)
        answer = await self._ask(request)
        self._compare(drawn, answer, number)
        return answer

    def _recorded_turn(self) -> Turn:
        if self._turn >= len(self._recorded.turns):
            differ("turn", "the conversation has ended", "another turn", self._turn + 1)
        return self._recorded.turns[self._turn]

    def _compare(self, recorded: RecordedTurn, answer: Answer, number: int) -> None:
        """Compares the tokens of a turn with the record, and what they were drawn with: log-probabilities, and the sets
        of allowed tokens.

        Log-probabilities must be equal only if the replay is exact; `largest_gap` (nats) and `n_equal` are updated.

        Args:
            number: number of the turn, from 1.

        Raises:
            DifferenceError: at the first token that differs, or if one of the two has more tokens or sets.
        """
        tokenizer, sets = self._how.tokenizer, recorded.sets
        pairs = zip(recorded.tokens, recorded.logprobs, answer.tokens, answer.logprobs, strict=False)
        for index, (token, logprob, token_now, logprob_now) in enumerate(pairs):
            logprob_now = float(np.float32(logprob_now))
            gap = abs(logprob - logprob_now)
            if token != token_now or (self._is_exact and gap > 0):
                what = "token" if token != token_now else "log-probability"
                before, now = named(token, tokenizer, logprob), named(token_now, tokenizer, logprob_now)
                differ(what, before, now, number, index + 1)

            self.largest_gap = max(self.largest_gap, gap)
            if sets and index < len(answer.sets) and sets[index] != answer.sets[index]:
                differ("tokens allowed", sets[index].hex(), answer.sets[index].hex(), number, index + 1)
            self.n_equal += 1

        compare_ids("token", recorded.tokens, answer.tokens, number, tokenizer)
        if len(sets) != len(answer.sets):
            differ("sets of tokens", len(sets), len(answer.sets), number)


def compare_ids(what: str, recorded: Sequence[int], now: Sequence[int], turn: int, tokenizer: Tokenizer) -> None:
    """Raises DifferenceError: the ids differ; it names the first one that does."""
    for index, (token, token_now) in enumerate(zip_longest(recorded, now), 1):
        if token != token_now:
            before, after = ("the end" if t is None else named(t, tokenizer) for t in (token, token_now))
            differ(what, before, after, turn, index)


def named(token: int, tokenizer: Tokenizer, logprob: float | None = None) -> str:
    """Returns a token for people: its id, its text, and its log-probability."""
    text = f" {text_with_marks([token], tokenizer)!r}" if token < tokenizer.vocab_size else ""
    return f"{token}{text}" + (f" ({np.float32(logprob)})" if logprob is not None else "")


def compare_ends(recorded: Episode, now: Episode) -> None:
    """Compares what a record says of its conversation as a whole, and of each turn beside its tokens.

    Raises:
        DifferenceError: a value differs.
    """
    for number, (turn, turn_now) in enumerate(zip(recorded.turns, now.turns, strict=False), 1):
        for name, value in vars(turn).items():
            # An environment that failed has no step in older records.
            if name != "step" or value is not None:
                compare(name, value, getattr(turn_now, name), number)
    compare("number of turns", len(recorded.turns), len(now.turns))
    compare("limit", recorded.cut, now.cut)
    compare("verdict", judged(recorded.verdict), judged(now.verdict))

    # Log-probabilities and drawn ids are compared by turn.
    ids, ids_now = ([[s.ids, s.drawn] for s in episode.samples] for episode in (recorded, now))
    if ids != ids_now:
        differ("samples", f"{len(ids)} samples", f"{len(ids_now)} samples with other ids")


# --- executed again ---


async def executed_again(host: EpisodeHost, recorded: Episode, task: Task) -> Outcome:
    """Executes the recorded turns in an environment, and compares its answers with the record.

    The outcome has the first difference, or None; it is not complete if the record ends with a failure of the machine,
    which nothing can repeat. The episode is closed in any case.

    Raises:
        ArtefactError: the record does not hold turns of a model.
    """
    hosted = host.episode(task)
    try:
        opening = await hosted.reset()
        if recorded.opening is None:
            if recorded.verdict.failure_reason in OF_THE_MACHINE:
                return Outcome(None, is_complete=False)
            now: Json = judged(opening.verdict) if opening.verdict else observation_value(opening.observation)
            compare("reset", judged(recorded.verdict), now)
            return Outcome(None)
        if opening.verdict is not None:
            differ("reset", recorded.opening, judged(opening.verdict))
        compare("reset", recorded.opening, observation_value(opening.observation))

        last: Verdict | None = None
        for number, turn in enumerate(recorded.turns, 1):
            step = await hosted.step(read_recorded(action_of, turn.action, recorded))
            recorded_step = read_recorded(step_of, turn.step, recorded)
            if recorded_step.verdict and recorded_step.verdict.failure_reason in OF_THE_MACHINE:
                return Outcome(None, is_complete=False)
            compare_steps(recorded_step, step, number)
            last = step.verdict
        if recorded.verdict.valid:
            compare("verdict", judged(recorded.verdict), judged(last) if last else None, len(recorded.turns))
    except DifferenceError as error:
        return Outcome(error.difference)
    finally:
        await hosted.close()
    return Outcome(None)


def compare_steps(recorded: Step, now: Step, turn: int) -> None:
    """Compares two steps, the text that explains a failure excepted.

    Raises:
        DifferenceError: they differ.
    """
    recorded_verdict, verdict = (judged(step.verdict) if step.verdict else None for step in (recorded, now))
    recorded_turns, turns = (observation_value(step.observation) for step in (recorded, now))

    # A verdict in place of the turns says more than that they lack.
    if recorded_verdict is None and verdict is not None:
        differ("step", recorded_turns, verdict, turn)
    if recorded_verdict is not None and verdict is None:
        differ("step", recorded_verdict, turns, turn)

    compare("observation", recorded_turns, turns, turn)
    compare("verdict", recorded_verdict, verdict, turn)
    compare("reward", recorded.turn_reward, now.turn_reward, turn)


# --- values ---


def compare(what: str, recorded: Json, now: Json, turn: int | None = None) -> None:
    """Raises DifferenceError: the values differ as JSON."""
    # What was written to a file has lists in place of tuples, and versions are tuples again.
    recorded, now = (json.loads(json.dumps(value)) for value in (recorded, now))
    if recorded != now:
        differ(what, recorded, now, turn)


def judged(verdict: Verdict) -> list[Json]:
    """Returns what is compared of a verdict: all but the text for people."""
    return [verdict.reward, verdict.valid, verdict.failure_reason]


def read_recorded(read: Callable[[Any], Value], value: Json, recorded: Episode) -> Value:
    """Returns the value of the protocol that a record holds.

    Raises:
        ArtefactError: it holds none.
    """
    try:
        return read(value)
    except (EnvironmentFailedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(recorded, str(error)) from error


def unreadable(recorded: Episode, why: str) -> ArtefactError:
    place = f"task {recorded.position}, sample {recorded.sample}"
    return ArtefactError(f"the record of {place} cannot be replayed ({why}): restore its file from a copy")


def _text_of(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shortened(recorded: str, now: str) -> tuple[str, str]:
    """Returns the parts of two texts around their first difference, for people."""
    n_equal = next((i for i, pair in enumerate(zip(recorded, now, strict=False)) if pair[0] != pair[1]), None)
    if n_equal is None:
        n_equal = min(len(recorded), len(now))
    begin = max(0, n_equal - CONTEXT)

    def part(text: str) -> str:
        rest = text[begin:]
        return ("..." if begin else "") + (rest if len(rest) <= SHOWN else f"{rest[:SHOWN]}...")

    return part(recorded), part(now)
