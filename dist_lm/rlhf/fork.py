"""Forks a recorded conversation at a turn: what was said before happens again, then it goes on from there.

    turn before the fork    its recorded tokens, executed again; the environment must answer as recorded
    the turn itself         edited, or drawn again
    turns behind it         drawn by the weights of the record, answered by the environment

Requests are keyed by (seed, task, sample, turn), so a fork without an edit is the recorded conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from dist_lm.environments.protocol import Action, Step, Task
from dist_lm.environments.values import action_value, observation_value, step_of
from dist_lm.errors import require
from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.conversing import Conversing, EpisodeHost, HostedEpisode
from dist_lm.rlhf.episodes import Episode
from dist_lm.rlhf.replay import (
    Difference,
    DifferenceError,
    RecordedTurns,
    compare,
    compare_ends,
    compare_ids,
    compare_steps,
    differ,
    judged,
    named,
    read_recorded,
)
from dist_lm.rlhf.request_feed import Ask
from dist_lm.tokenizer.tokenizer import Tokenizer

Origin = Literal["recorded", "edited", "drawn"]


@dataclass(frozen=True)
class SpokenTurn:
    """A turn of the model in a fork."""

    origin: Origin
    tokens: tuple[int, ...]  # with the one that ended the turn


@dataclass(frozen=True)
class Forked:
    """A conversation that was forked."""

    episode: Episode | None  # as it ended; None: the environment answered otherwise before the fork (`refused`)
    spoken: tuple[SpokenTurn, ...] = ()  # the model's turns
    refused: Difference | None = None
    difference: Difference | None = None  # the first one from the record, without an edit


def check_fork(recorded: Episode, turn: int) -> None:
    """Refuses a turn that the model did not draw.

    Raises:
        ConfigError: there is no such turn.
    """
    # A last turn without tokens only tells the environment that no room is left.
    n_drawn = sum(turn.new_tokens > 0 for turn in recorded.turns)
    accepted = f"1 to {n_drawn}, the turns of that conversation" if n_drawn else "no fork: the model drew no turn there"
    require(1 <= turn <= n_drawn, "--fork", turn, accepted)


async def forked(
    how: Conversing,
    host: EpisodeHost,
    recorded: Episode,
    task: Task,
    ask: Ask,
    turn: int,
    edit: Sequence[int] | None,
    is_exact: bool,
    edit_option: str = "--edit",
) -> Forked:
    """Holds a recorded conversation again up to a turn, and goes on from there.

    Args:
        how: the conversations of the run.
        host: of a fresh environment.
        ask: returns the answers of a model with the weights that drew the record.
        turn: of the model, from 1; see `check_fork`.
        edit: token ids of that turn, with the one that ends it; None: the model draws it again.
        is_exact: whether log-probabilities of a fork without an edit must have the same bits.
        edit_option: option that gave the edit, for messages.

    Raises:
        ConfigError: the edit has more tokens than a turn may have there.
        ArtefactError: the record does not hold turns of a model.
        AbortedError: from `ask`.
    """
    fork = _Fork(host, recorded, ask, turn, edit, edit_option, how.tokenizer)
    try:
        episode = await how.hold(fork, task, recorded.position, recorded.sample, fork.ask)
    except DifferenceError as error:
        return Forked(None, tuple(fork.spoken), refused=error.difference)

    difference = None
    if edit is None:
        try:
            _compare_drawn(recorded, episode, how.tokenizer, is_exact)
            compare_ends(recorded, episode)
        except DifferenceError as error:
            difference = error.difference
    return Forked(episode, tuple(fork.spoken), difference=difference)


def _compare_drawn(recorded: Episode, now: Episode, tokenizer: Tokenizer, is_exact: bool) -> None:
    """Raises DifferenceError: the tokens of a turn differ, or what they were drawn with."""
    # The ids of a conversation without a verdict are not recorded.
    if not recorded.samples or not now.samples:
        return

    recorded_turns, turns = RecordedTurns(recorded), RecordedTurns(now)
    # Turns that only one side has are found by `compare_ends`.
    for number, pair in enumerate(zip(recorded.turns, now.turns, strict=False), 1):
        if not all(turn.new_tokens for turn in pair):
            return

        before, after = recorded_turns.next(pair[0], number), turns.next(pair[1], number)
        compare_ids("prompt", before.prompt, after.prompt, number, tokenizer)
        compare_ids("token", before.tokens, after.tokens, number, tokenizer)
        if not is_exact:
            continue

        # A record keeps fp32, so these are compared in fp32.
        for index, logprobs in enumerate(zip(before.logprobs, after.logprobs, strict=True)):
            logprob, logprob_now = map(np.float32, logprobs)
            if logprob != logprob_now:
                token = before.tokens[index]
                text, text_now = (named(token, tokenizer, float(value)) for value in (logprob, logprob_now))
                differ("log-probability", text, text_now, number, index + 1)


@dataclass
class _Fork:
    """Stands between a conversation and both its sides: model and environment."""

    host: EpisodeHost
    recorded: Episode
    ask_model: Ask
    turn: int
    edit: Sequence[int] | None
    edit_option: str
    tokenizer: Tokenizer
    spoken: list[SpokenTurn] = field(default_factory=list)
    n_steps: int = 0
    hosted: HostedEpisode = field(init=False)
    recorded_turns: RecordedTurns = field(init=False)

    def episode(self, task: Task) -> "_Fork":
        self.hosted, self.recorded_turns = self.host.episode(task), RecordedTurns(self.recorded)
        return self

    async def reset(self) -> Step:
        opening = await self.hosted.reset()
        now = judged(opening.verdict) if opening.verdict else observation_value(opening.observation)
        compare("reset", self.recorded.opening, now)
        return opening

    async def step(self, action: Action) -> Step:
        self.n_steps += 1
        if self.n_steps >= self.turn:
            return await self.hosted.step(action)

        turn = self.recorded.turns[self.n_steps - 1]
        # Where no ids are recorded, the model has drawn the turn again.
        compare("action", turn.action, action_value(action), self.n_steps)
        step = await self.hosted.step(action)
        compare_steps(read_recorded(step_of, turn.step, self.recorded), step, self.n_steps)
        return step

    async def close(self) -> None:
        await self.hosted.close()

    async def ask(self, request: Request) -> Answer:
        """Returns a turn: the recorded one before the fork, the edited one at it, else the model's.

        Raises:
            DifferenceError: a recorded turn does not fit its request.
        """
        number = len(self.spoken) + 1
        if number < self.turn and self.recorded.samples:
            drawn = self.recorded_turns.next(self.recorded.turns[number - 1], number)
            compare_ids("prompt", drawn.prompt, request.prompt, number, self.tokenizer)
            answer = self._answer(request, drawn.tokens, drawn.logprobs, drawn.sets)
            origin: Origin = "recorded"

        elif number == self.turn and self.edit is not None:
            most = request.params.max_new_tokens
            accepted = f"at most {most} in this turn"
            require(len(self.edit) <= most, self.edit_option, f"{len(self.edit)} tokens", accepted)
            # No model has drawn these tokens, so they have no log-probabilities.
            answer = self._answer(request, self.edit, [float("nan")] * len(self.edit), ())
            origin = "edited"

        else:
            # All turns of a conversation have one version, and this engine counts its own.
            answer = replace(await self.ask_model(request), version=self.recorded.version)
            origin = "recorded" if number < self.turn else "drawn"

        self.spoken.append(SpokenTurn(origin, answer.tokens))
        return answer

    def _answer(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[float], sets: Sequence[bytes]
    ) -> Answer:
        """Returns an answer that no engine has given; only what conversations read of it is there."""
        return Answer(
            request=request.id,
            index=0,
            prompt_tokens=len(request.prompt),
            tokens=tuple(tokens),
            text="",
            logprobs=tuple(logprobs),
            raw_logprobs=tuple(logprobs),
            finish="stop",
            seed=request.seed,
            version=self.recorded.version,
            sets=tuple(sets),
        )
