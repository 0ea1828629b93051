"""Compares recorded conversations with what happens again: drawn from the same weights, or executed in an environment.

    drawn       the model draws every turn again; the record takes the place of the environment
    executed    the environment answers every recorded turn again; the record takes the place of the model

Both end at the first difference of a conversation: what follows it belongs to another conversation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from dist_lm.tokenizer.tokenizer import text_with_marks

OF_THE_MACHINE: tuple[Failure, ...] = ("timeout", "infrastructure")
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


class _DifferenceError(Exception):
    """Ends a conversation at its first difference."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def _differ(what: str, recorded: Json, now: Json, turn: int | None = None, token: int | None = None) -> NoReturn:
    raise _DifferenceError(Difference(what, recorded, now, turn, token))


# --- drawn again ---


async def drawn_again(how: Conversing, recorded: Episode, task: Task, ask: Ask, is_exact: bool) -> Outcome:
    """Holds a conversation with the record in place of the environment, and compares it with the record.

    Args:
        how: the conversations of the run.
        ask: returns the answers of a model with the weights that drew the recorded ones.
        is_exact: whether log-probabilities must have the same bits.

    Raises:
        ArtefactError: the record does not hold what an environment returns.
        AbortedError: of `ask`.
    """
    conversation = _RecordedEnvironment(how, recorded, ask, is_exact)
    try:
        episode = await how.hold(conversation, task, recorded.position, recorded.sample, conversation.ask)
        _compare_ends(recorded, episode)
    except _DifferenceError as error:
        return Outcome(error.difference, conversation.largest_gap, conversation.n_equal)
    return Outcome(None, conversation.largest_gap, conversation.n_equal)


class _RecordedEnvironment:
    """Answers the turns of one conversation from its record, and compares each with the recorded one."""

    def __init__(self, how: Conversing, recorded: Episode, ask: Ask, is_exact: bool) -> None:
        self._how, self._recorded, self._ask, self._is_exact = how, recorded, ask, is_exact
        self._turn = 0  # index of the turn that is drawn next
        self._sample, self._begin = 0, 0  # where in the samples the search for that turn begins
        self._place = 0  # of its first token among all drawn ones
        self.largest_gap, self.n_equal = 0.0, 0  # as of `Outcome`

    def episode(self, task: Task) -> "_RecordedEnvironment":
        return self

    async def reset(self) -> Step:
        recorded = self._recorded
        if recorded.opening is None:
            return Step(Observation(), True, recorded.verdict)
        return Step(_read(observation_of, recorded.opening, recorded), False)

    async def step(self, action: Action) -> Step:
        number, turn = self._turn + 1, self._recorded_turn()
        if (value := action_value(action)) != turn.action:
            _differ("action", turn.action, value, number)

        self._turn += 1
        if turn.step is None:
            return Step(Observation(), True, self._recorded.verdict)
        return _read(step_of, turn.step, self._recorded)

    async def close(self) -> None:
        """There is nothing to end."""

    async def ask(self, request: Request) -> Answer:
        """Returns the model's answer, which is that of the record.

        Raises:
            _DifferenceError: it is another one, or another prompt.
            AbortedError: the engines have failed.
        """
        number, turn = self._turn + 1, self._recorded_turn()
        if turn.new_tokens == 0:
            _differ("turn", "none is drawn", "one is drawn", number)
        # The ids of a conversation without a verdict are not recorded, only their number.
        if not self._recorded.samples:
            answer = await self._ask(request)
            if len(answer.tokens) != turn.new_tokens:
                _differ("number of tokens", turn.new_tokens, len(answer.tokens), number)
            return answer

        prompt, tokens = self._ids_of(turn, number)
        if token := _first_difference(prompt, request.prompt):
            self._differ_in_ids("prompt", prompt, request.prompt, number, token)
        answer = await self._ask(request)
        self._compare(tokens, answer, number)
        return answer

    def _recorded_turn(self) -> Turn:
        if self._turn >= len(self._recorded.turns):
            _differ("turn", "the conversation has ended", "another turn", self._turn + 1)
        return self._recorded.turns[self._turn]

    def _ids_of(self, turn: Turn, number: int) -> tuple[list[int], list[int]]:
        """Returns the prompt of a turn, and its tokens; the next call goes on behind them."""
        samples = self._recorded.samples
        while True not in samples[self._sample].drawn[self._begin :]:
            self._sample, self._begin = self._sample + 1, 0
        sample = samples[self._sample]
        begin = sample.drawn.index(True, self._begin)
        self._begin = begin + turn.new_tokens
        if not all(sample.drawn[begin : self._begin]) or self._begin > len(sample.ids):
            raise _unreadable(self._recorded, f"turn {number} is not one piece of its sample")
        return sample.ids[:begin], sample.ids[begin : self._begin]

    def _compare(self, tokens: list[int], answer: Answer, number: int) -> None:
        """Compares the tokens of a turn with the record, and what they were drawn with."""
        recorded, place = self._recorded, self._place
        self._place += len(tokens)
        logprobs = recorded.logprobs[place : self._place]
        sets = recorded.sets[place : self._place]

        pairs = zip(tokens, logprobs, answer.tokens, answer.logprobs, strict=False)
        for index, (token, logprob, token_now, logprob_now) in enumerate(pairs):
            logprob_now = float(np.float32(logprob_now))
            gap = abs(logprob - logprob_now)
            if token != token_now or (self._is_exact and gap > 0):
                what = "token" if token != token_now else "log-probability"
                before, now = self._named(token, logprob), self._named(token_now, logprob_now)
                _differ(what, before, now, number, index + 1)

            self.largest_gap = max(self.largest_gap, gap)
            if sets and index < len(answer.sets) and sets[index] != answer.sets[index]:
                _differ("tokens allowed", sets[index].hex(), answer.sets[index].hex(), number, index + 1)
            self.n_equal += 1

        if len(tokens) != len(answer.tokens):
            self._differ_in_ids("token", tokens, answer.tokens, number, _first_difference(tokens, answer.tokens))
        if len(sets) != len(answer.sets):
            _differ("sets of tokens", len(sets), len(answer.sets), number)

    def _differ_in_ids(self, what: str, recorded: Sequence[int], now: Sequence[int], turn: int, token: int) -> NoReturn:
        before, after = (self._named(ids[token - 1]) if token <= len(ids) else "the end" for ids in (recorded, now))
        _differ(what, before, after, turn, token)

    def _named(self, token: int, logprob: float | None = None) -> str:
        """Returns a token for people: its id, its text, and its log-probability."""
        has_text = token < self._how.tokenizer.vocab_size
        text = f" {text_with_marks([token], self._how.tokenizer)!r}" if has_text else ""
        return f"{token}{text}" + (f" ({np.float32(logprob)})" if logprob is not None else "")


def _compare_ends(recorded: Episode, now: Episode) -> None:
    """Compares what a record says of its conversation as a whole, and of each turn beside its tokens."""
    for number, (turn, turn_now) in enumerate(zip(recorded.turns, now.turns, strict=False), 1):
        for name, value in vars(turn).items():
            # An environment that failed has no step in older records.
            if name != "step" or value is not None:
                _compare(name, value, getattr(turn_now, name), number)
    _compare("number of turns", len(recorded.turns), len(now.turns))
    _compare("limit", recorded.cut, now.cut)
    _compare("verdict", _judged(recorded.verdict), _judged(now.verdict))

    # Log-probabilities and drawn ids are compared by turn.
    ids, ids_now = ([[s.ids, s.drawn] for s in episode.samples] for episode in (recorded, now))
    if ids != ids_now:
        _differ("samples", f"{len(ids)} samples", f"{len(ids_now)} samples with other ids")


def _first_difference(recorded: Sequence[int], now: Sequence[int]) -> int:
    """Returns the number of the first id that differs, from 1; 0 if none does."""
    for index, (token, token_now) in enumerate(zip(recorded, now, strict=False), 1):
        if token != token_now:
            return index
    return 0 if len(recorded) == len(now) else min(len(recorded), len(now)) + 1


# --- executed again ---


async def executed_again(host: EpisodeHost, recorded: Episode, task: Task) -> Outcome:
    """Executes the recorded turns in an environment, and compares its answers with the record.

    Raises:
        ArtefactError: the record does not hold turns of a model.
    """
    hosted = host.episode(task)
    try:
        opening = await hosted.reset()
        if recorded.opening is None:
            if recorded.verdict.failure_reason in OF_THE_MACHINE:
                return Outcome(None, is_complete=False)
            now: Json = _judged(opening.verdict) if opening.verdict else observation_value(opening.observation)
            _compare("reset", _judged(recorded.verdict), now)
            return Outcome(None)
        if opening.verdict is not None:
            _differ("reset", recorded.opening, _judged(opening.verdict))
        _compare("reset", recorded.opening, observation_value(opening.observation))

        last: Verdict | None = None
        for number, turn in enumerate(recorded.turns, 1):
            step = await hosted.step(_read(action_of, turn.action, recorded))
            recorded_step = _read(step_of, turn.step, recorded)
            if recorded_step.verdict and recorded_step.verdict.failure_reason in OF_THE_MACHINE:
                return Outcome(None, is_complete=False)
            _compare_steps(recorded_step, step, number)
            last = step.verdict
        if recorded.verdict.valid:
            _compare("verdict", _judged(recorded.verdict), _judged(last) if last else None, len(recorded.turns))
    except _DifferenceError as error:
        return Outcome(error.difference)
    finally:
        await hosted.close()
    return Outcome(None)


def _compare_steps(recorded: Step, now: Step, turn: int) -> None:
    """Compares two steps, the text that explains a failure excepted."""
    recorded_verdict, verdict = (_judged(step.verdict) if step.verdict else None for step in (recorded, now))
    recorded_turns, turns = (observation_value(step.observation) for step in (recorded, now))

    # A verdict in place of the turns says more than that they lack.
    if recorded_verdict is None and verdict is not None:
        _differ("step", recorded_turns, verdict, turn)
    if recorded_verdict is not None and verdict is None:
        _differ("step", recorded_verdict, turns, turn)

    _compare("observation", recorded_turns, turns, turn)
    _compare("verdict", recorded_verdict, verdict, turn)
    _compare("reward", recorded.turn_reward, now.turn_reward, turn)


# --- values ---


def _compare(what: str, recorded: Json, now: Json, turn: int | None = None) -> None:
    # What was written to a file has lists in place of tuples.
    now = json.loads(json.dumps(now))
    if recorded != now:
        _differ(what, recorded, now, turn)


def _judged(verdict: Verdict) -> list[Json]:
    return [verdict.reward, verdict.valid, verdict.failure_reason]


def _read(read: Callable[[Any], Value], value: Json, recorded: Episode) -> Value:
    """Returns the value of the protocol that a record holds.

    Raises:
        ArtefactError: it holds none.
    """
    try:
        return read(value)
    except (EnvironmentFailedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(recorded, str(error)) from error


def _unreadable(recorded: Episode, why: str) -> ArtefactError:
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
