"""One conversation of a model with an environment: turns and steps until a verdict.

Answers depend only on the weights and on (seed, position of the task, sample, turn), so the order of events changes no
number.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from dist_lm.chat.messages import ChatError, Conversation, Json, Tool
from dist_lm.environments.protocol import (
    LARGEST_REWARD,
    LAST_TURN,
    Action,
    Failure,
    Limits,
    Observation,
    Step,
    Task,
    Verdict,
)
from dist_lm.environments.values import action_value, observation_value, step_value
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.request import (
    Request,
    SamplingParams,
    Versions,
)
from dist_lm.model.keyed_random import hash_words, signed
from dist_lm.rlhf.episodes import Episode, Turn
from dist_lm.rlhf.failure_notes import FailureNotes
from dist_lm.rlhf.request_feed import Ask
from dist_lm.rlhf.transcript import ReadTurn, Sample, Transcript
from dist_lm.tokenizer.tokenizer import Tokenizer

_SEED = 0x656E7669  # salt of sampling seeds: keeps them apart from other hashes of seed and position
ConstraintOf = Callable[[Sequence[Tool]], Constraint]
"""The tools of a task -> what every turn of its conversations must be."""


class HostedEpisode(Protocol):
    """A conversation on the side of the environment, as in `environments.host.Episode`."""

    async def reset(self) -> Step: ...

    async def step(self, action: Action) -> Step: ...

    async def close(self) -> None: ...


class EpisodeHost(Protocol):
    """Opens conversations with an environment; whatever that does, they end with a verdict, valid or failed."""

    def episode(self, task: Task) -> HostedEpisode: ...


@dataclass(frozen=True)
class Conversing:
    """How conversations are held: the same for all of an iteration."""

    tokenizer: Tokenizer
    limits: Limits
    params: SamplingParams
    context: int  # tokens that the model can read, model.max_seq_len
    seed: int
    largest_reward: float = LARGEST_REWARD
    constraint_of: ConstraintOf | None = None  # None: turns may be anything
    swaps_weights: bool = False  # whether weights may change in a conversation; turns then note their versions
    failures: FailureNotes = field(default_factory=FailureNotes)

    async def hold(self, host: EpisodeHost, task: Task, position: int, sample: int, ask: Ask) -> Episode:
        """Returns a finished conversation: one with a verdict, or the reason why there is none.

        Raises:
            AbortedError: from `ask`.
        """
        held = _Held(self, host.episode(task), position, sample, ask)
        try:
            verdict = await held.converse()
        except _UnfitTurnsError as error:
            verdict = Verdict.failed(error.reason, str(error))
        finally:
            await held.hosted.close()
        episode = held.finished(task, verdict)
        self.failures.note(task, sample, episode.verdict)
        return episode


class _UnfitTurnsError(Exception):
    """Ends a conversation whose turns the chat template, or the model's context, does not take."""

    def __init__(self, reason: Failure, detail: str) -> None:
        super().__init__(detail)
        self.reason: Failure = reason


@dataclass
class _Held:
    """A conversation while it is held."""

    how: Conversing
    hosted: HostedEpisode
    position: int
    sample: int
    ask: Ask
    version: int = 0
    versions: Versions = ()  # of the last turn; with `swaps_weights` alone
    cut: str = ""
    opening: Json = None
    turns: list[Turn] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sets: list[bytes] = field(default_factory=list)
    constraint: Constraint | None = None

    async def converse(self) -> Verdict:
        """Returns the verdict of the environment after turns of both sides; a conversation without one has failed with
        `no_verdict`.

        If no room is left for another turn, the environment gets an empty one with the reason of the cut (`context` or
        `tokens`). Finished samples are in `samples` after each turn.

        Raises:
            _UnfitTurnsError: turns of the environment fit no conversation, or the task leaves no room for an answer.
            AbortedError: the engines have failed.
            UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
        """
        step = await self.hosted.reset()
        if step.verdict is not None:
            return step.verdict
        transcript = self._begun(step.observation)
        if self._room(transcript) < 1:
            raise _UnfitTurnsError("too_long", f"the task takes {len(transcript.prompt)} tokens and leaves no room")

        while True:
            turn, new_tokens = await self._turn(transcript)
            step = await self._step(Action(turn.text, turn.calls, self.cut or None), turn.is_readable, new_tokens)
            self.samples = transcript.finished_samples
            if step.verdict is not None:
                return step.verdict

            self._go_on(transcript, step.observation)
            # No turn is left to draw, so the environment judges what is there.
            if self._room(transcript) < 1:
                self.cut = "context" if len(transcript.prompt) >= self.how.context else "tokens"
                step = await self._step(Action("", (), self.cut), True, 0)
                return step.verdict or Verdict.failed("no_verdict", f"the conversation was cut ({self.cut})")

    def finished(self, task: Task, verdict: Verdict) -> Episode:
        """Returns the conversation with its verdict. One without a verdict has no samples: nothing is learned of it."""
        turns = tuple(self.turns)
        episode = Episode(self.position, self.sample, task.digest, self.version, verdict, self.cut, self.opening, turns)
        reward = episode.reward
        if reward is not None and abs(reward) > self.how.largest_reward:
            detail = f"rewards add up to {reward:g}, which leaves the range of fp32"
            return replace(episode, verdict=Verdict.failed("bad_reward", detail))
        if reward is None:
            return episode
        return replace(episode, samples=tuple(self.samples), logprobs=tuple(self.logprobs), sets=tuple(self.sets))

    def _begun(self, observation: Observation) -> Transcript:
        """Returns the transcript that the first observation begins.

        Raises:
            _UnfitTurnsError: the template cannot write it.
        """
        self.opening = observation_value(observation)
        self._constrain(observation.tools)
        with _fits():
            return Transcript(Conversation(observation.messages, observation.tools), self.how.tokenizer)

    def _go_on(self, transcript: Transcript, observation: Observation) -> None:
        """Appends the turns that follow the model's one; where they begin anew, they open a sample of their own.

        Raises:
            _UnfitTurnsError: the template cannot write them.
        """
        if not observation.begins_anew:
            with _fits():
                transcript.add_observation(observation.messages)
            return

        self._constrain(observation.tools)
        with _fits():
            transcript.begin_sample(Conversation(observation.messages, observation.tools))

    def _constrain(self, tools: Sequence[Tool]) -> None:
        """Holds all further turns to calls of these tools, if the run constrains them."""
        if self.how.constraint_of:
            self.constraint = self.how.constraint_of(tools)

    async def _turn(self, transcript: Transcript) -> tuple[ReadTurn, int]:
        """Draws a turn, appends it and returns it with its number of tokens; sets `cut` if none may follow."""
        params = replace(self.how.params, max_new_tokens=min(self.how.params.max_new_tokens, self._room(transcript)))
        number = len(self.turns)
        request = Request(
            id=f"{self.position}.{self.sample}.{number}",
            prompt=list(transcript.prompt),
            params=params,
            seed=signed(hash_words(self.how.seed, _SEED, self.position, self.sample, number)),
            # Learners follow no grammar over several turns: the sets say what it allowed.
            keep_sets=self.constraint is not None or (params.top_k, params.top_p, params.min_p) != (0, 1, 0),
            constraint=self.constraint,
        )
        # Other conversations go on meanwhile, so their requests are generated together with this one.
        answer = await self.ask(request)
        if self.how.swaps_weights:
            self.versions = answer.versions or ((0, answer.version),)
        else:
            assert not self.turns or answer.version == self.version, "weights change between iterations alone"
        if not self.turns:
            self.version = answer.version
        self.logprobs += answer.logprobs
        self.sets += answer.sets

        if answer.finish in ("length", "context"):
            self.cut = "tokens"
        elif number + 1 >= self.how.limits.turns:
            self.cut = LAST_TURN
        return transcript.add_turn(answer.tokens), len(answer.tokens)

    async def _step(self, action: Action, is_readable: bool, new_tokens: int) -> Step:
        """Returns the environment's step, which is noted with the turn."""
        step = await self.hosted.step(action)
        tool_errors = sum(_is_error(result) for message in step.observation.messages for result in message.results)
        turn = Turn(new_tokens, is_readable, action_value(action), step_value(step), step.turn_reward, tool_errors)
        self.turns.append(replace(turn, versions=self.versions if new_tokens else ()))
        return step

    def _room(self, transcript: Transcript) -> int:
        """Returns how many tokens the next turn may have; below 1: none.

        The limit of tokens holds for each sample; the number of turns bounds that of the samples.
        """
        return min(self.how.context, self.how.limits.tokens) - len(transcript.prompt)


@contextmanager
def _fits() -> Iterator[None]:
    """Turns the refusal of a chat template into the failure of a conversation."""
    try:
        yield
    except ChatError as error:
        raise _UnfitTurnsError("bad_observation", str(error)) from None


def _is_error(result: Json) -> bool:
    return isinstance(result, dict) and bool(result.get("error"))
