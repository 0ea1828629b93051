"""Rollouts that are conversations with an environment: many at once, each a turn of the model, a step, a turn, ...

    event loop, in a thread    conversation: reset -> ask -> step -> ask -> step -> verdict     (one of many)
                                                       |  ^
                                               Request v  | Answer
    calling thread             engines: whatever is ready, together

A conversation that waits for its environment holds up no other: engines generate for those that are ready. Answers
depend only on the weights and on (seed, position of the task, sample, turn), so the order of events changes no number.

Dimensions: B conversations.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from dist_lm.chat.messages import ChatError, Conversation, Json, Tool
from dist_lm.chat.template import stop_tokens
from dist_lm.environments.protocol import (
    FAILURES,
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
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import (
    Answer,
    Finished,
    Refusal,
    Request,
    RequestError,
    SamplingParams,
    ignore_answer,
)
from dist_lm.model.keyed_random import hash_words, signed
from dist_lm.rlhf.config import LARGEST_REWARD, RlhfConfig
from dist_lm.rlhf.episodes import Episode, EpisodeFile, Turn, rollouts_of_episodes
from dist_lm.rlhf.rewards import RewardError
from dist_lm.rlhf.rollouts import Rollouts, RolloutSource, ScoredRollouts
from dist_lm.rlhf.transcript import ReadTurn, Sample, Transcript
from dist_lm.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_SEED = 0x656E7669  # salt of sampling seeds: keeps them apart from other hashes of seed and position
ALIVE_EVERY_S = 1.0
Ask = Callable[[Request], Coroutine[Any, Any, Answer]]
"""Returns the answer to a request for one answer."""
ConstraintOf = Callable[[Sequence[Tool]], Constraint]
"""The tools of a task -> what every turn of its conversations must be."""


# --- between conversations and engines ---


class AbortedError(Exception):
    """Raised in conversations when the engines have failed: their answers never come."""


class RequestFeed:
    """Requests of conversations, as an iterator for `RolloutSource.results`, and their answers.

    `ask` belongs to the thread of the event loop, everything else to the thread that generates.
    """

    def __init__(self, alive: Callable[[], None]) -> None:
        """`alive` is called regularly while the iterator is read."""
        self._alive = alive
        self._beaten = time.monotonic()
        self._changed = threading.Condition()
        self._ready: deque[Request] = deque()
        self._asking: dict[str, asyncio.Future[Answer]] = {}
        self._n_generating = 0
        self._is_over = False

    async def ask(self, request: Request) -> Answer:
        """Returns the answer to a request for one answer.

        Raises:
            AbortedError: the engines have failed.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._is_over:
                raise AbortedError
            self._asking[request.id] = future
            self._ready.append(request)
            self._changed.notify()
        return await future

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Request | None:
        """Returns the next request; None: there is none now. It waits for one if nothing is being generated."""
        with self._changed:
            if not self._ready and not self._n_generating and not self._is_over:
                self._changed.wait(ALIVE_EVERY_S)
            request = self._ready.popleft() if self._ready else None
            self._n_generating += request is not None
            is_over = self._is_over
        if time.monotonic() - self._beaten > ALIVE_EVERY_S:
            self._alive()
            self._beaten = time.monotonic()
        if request is None and is_over:
            raise StopIteration
        return request

    def deliver(self, answer: Answer) -> None:
        """Gives an answer to the conversation that asked."""
        with self._changed:
            future = self._asking.pop(answer.request, None)
            self._n_generating -= 1
        if future is not None:  # after `abort` nobody waits
            future.get_loop().call_soon_threadsafe(_resolve, future, answer)

    def end(self) -> None:
        """Ends the iterator once all requests are read; for any thread."""
        with self._changed:
            self._is_over = True
            self._changed.notify()

    def abort(self) -> None:
        """Raises AbortedError in all conversations that wait for an answer or ask for one later; for any thread."""
        self.end()
        with self._changed:
            asking, self._asking = self._asking, {}
        for future in asking.values():
            with suppress(RuntimeError):  # its loop is closed: nobody waits
                future.get_loop().call_soon_threadsafe(_refuse, future)


def _resolve(future: asyncio.Future[Answer], answer: Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _refuse(future: asyncio.Future[Answer]) -> None:
    if not future.done():
        future.set_exception(AbortedError())


# --- one conversation ---


class HostedEpisode(Protocol):
    """A conversation on the side of the environment, as of `environments.host.Episode`."""

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

    async def hold(self, host: EpisodeHost, task: Task, position: int, sample: int, ask: Ask) -> Episode:
        """Returns a finished conversation: one with a verdict, or the reason why there is none.

        Raises:
            AbortedError: of `ask`.
        """
        held = _Held(self, host.episode(task), position, sample, ask)
        try:
            verdict = await held.converse()
        except _UnfitTurnsError as error:
            # The host logs failures of the environment itself.
            log.warning("task %s has no reward: %s: %s", task.key, error.reason, error)
            verdict = Verdict.failed(error.reason, str(error))
        finally:
            await held.hosted.close()
        return held.finished(task, verdict)


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
    cut: str = ""
    opening: Json = None
    turns: list[Turn] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sets: list[bytes] = field(default_factory=list)
    constraint: Constraint | None = None

    async def converse(self) -> Verdict:
        """Returns the verdict of the environment after turns of both sides.

        Raises:
            _UnfitTurnsError: turns of the environment fit no conversation.
            AbortedError: the engines have failed.
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

            with _fits():
                transcript.add_observation(step.observation.messages)
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
        if self.how.constraint_of:
            self.constraint = self.how.constraint_of(observation.tools)
        with _fits():
            return Transcript(Conversation(observation.messages, observation.tools), self.how.tokenizer)

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
        answer = await self.ask(request)
        assert not self.turns or answer.version == self.version, "weights change between iterations alone"
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
        self.turns.append(
            Turn(new_tokens, is_readable, action_value(action), step_value(step), step.turn_reward, tool_errors)
        )
        return step

    def _room(self, transcript: Transcript) -> int:
        """Returns how many tokens the next turn may have; below 1: none."""
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


# --- all conversations of an iteration ---


class ConversationLoop:
    """An event loop in a thread of its own, with the host of environments. A context manager."""

    def __init__(self, open_host: Callable[[], AbstractAsyncContextManager[EpisodeHost]]) -> None:
        self._open_host = open_host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="conversations")

    def __enter__(self) -> Self:
        """Raises UserError if the environment cannot be opened, such as a class that cannot be imported."""
        self._thread.start()
        try:
            self._context = self._open_host()
            self.host = self._run(self._context.__aenter__()).result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        try:
            self._run(self._context.__aexit__(None, None, None)).result()
        finally:
            self._end()

    def hold_all(self, holding: Sequence[Callable[[], Awaitable[None]]], at_once: int, feed: RequestFeed) -> Future:
        """Begins to call the coroutine functions in their order, some at a time, and ends `feed` when all are done.

        The first error cancels the others, and is the result's.
        """
        return self._run(_hold_all(deque(holding), at_once, feed))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _hold_all(waiting: deque[Callable[[], Awaitable[None]]], at_once: int, feed: RequestFeed) -> None:
    async def work() -> None:
        while waiting:
            await waiting.popleft()()

    workers = [asyncio.ensure_future(work()) for _ in range(min(at_once, len(waiting)))]
    try:
        await asyncio.gather(*workers)
    except BaseException:
        feed.abort()
        raise
    finally:
        # Conversations under way close their environments.
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        feed.end()


@dataclass(frozen=True)
class EnvironmentJudge:
    """Scores conversations by the verdicts of their environment, which they carry. Takes the place of a `Judge`."""

    name: str  # rlhf.environment, for messages
    part: str  # name of the part of rlhf.rewards
    max_failed_fraction: float

    def __call__(self, rollouts: Rollouts, expected: int = 0) -> ScoredRollouts:
        """Returns the conversations with their rewards; NaN where there is no verdict.

        Args:
            expected: conversations of the iteration, if these are only some of them.

        Raises:
            RewardError: more of them have no verdict than `max_failed_fraction` allows.
        """
        failure_B = rollouts.failure_B[rollouts.failure_B >= 0]
        expected = max(expected, len(rollouts))
        if len(failure_B) > self.max_failed_fraction * expected:
            counts = Counter(FAILURES[index] for index in failure_B.tolist())
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            raise RewardError(
                f"rlhf.environment={self.name}: {len(failure_B)} of {expected} conversations of an iteration have no "
                f"verdict ({reasons}), above rlhf.max_failed_fraction={self.max_failed_fraction:g}: mend it (the log "
                "has details), or raise that"
            )
        return ScoredRollouts(rollouts, {self.part: rollouts.reward_B})


class VersionedSource:
    """A `RolloutSource` that says which version of the weights it has."""

    def __init__(self, source: RolloutSource) -> None:
        self._source = source
        self.version: int | None = None  # the weights that were loaded last

    def load_weights(self, weights: Any, version: int) -> None:
        self._source.load_weights(weights, version)
        self.version = version

    def hold(self, weights: WeightStream) -> Any:
        return self._source.hold(weights)

    def generate(self, requests: Sequence[Request], finished: Finished = ignore_answer) -> list[Answer]:
        return self._source.generate(requests, finished)

    def results(self, requests: Iterable[Request | None]) -> Iterator[Answer | Refusal]:
        return self._source.results(requests)


@dataclass(frozen=True)
class EnvironmentSupply:
    """Tasks, engines and environments of a run, on the first rank. Takes the place of a `RolloutSupply`."""

    source: "VersionedSource"
    prompts: Callable[[int, int], Sequence[Task]]  # (first position, count) -> the tasks there
    judge: EnvironmentJudge
    tokenizer: Tokenizer
    conversations: ConversationLoop
    limits: Limits
    context: int  # model.max_seq_len
    at_once: int  # most conversations at a time
    weight: float = 1.0  # factor of the reward
    constraint_of: ConstraintOf | None = None
    folder: Path | None = None  # for the files of finished conversations; None: they are not kept
    alive: Callable[[], None] = lambda: None

    def draw(self, tasks: Sequence[Task], position: int, samples: int, config: RlhfConfig, seed: int) -> Rollouts:
        """Returns `samples` conversations of each task, held by the weights that the source has.

        Conversations that an earlier attempt of the run has finished are read from its file.

        Args:
            position: position of the first task in the order of tasks.
            samples: conversations of each task.
            seed: of the run; with position, sample and turn it determines each answer.

        Raises:
            RequestError: the engines refuse a request.
            UserError, PoolFailure: of the source, see `RolloutSource`.
            OSError: the file of conversations cannot be written.
        """
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=stop_tokens(self.tokenizer),
        )
        how = Conversing(
            self.tokenizer,
            self.limits,
            params,
            self.context,
            seed,
            LARGEST_REWARD / 2 / max(1.0, abs(self.weight)),
            self.constraint_of,
        )
        if self.folder is None:
            return rollouts_of_episodes(self._held(how, tasks, position, samples, None))
        path = self.folder / f"tasks_{position:08d}.jsonl"
        with EpisodeFile(path, self._digest(config, seed), self.source.version) as file:
            return rollouts_of_episodes(self._held(how, tasks, position, samples, file))

    def _held(
        self, how: Conversing, tasks: Sequence[Task], position: int, samples: int, file: EpisodeFile | None
    ) -> list[Episode]:
        """Returns all conversations, by task, then by sample: those that the file has, and others that are held now.

        Raises:
            RequestError, UserError, PoolFailure, OSError: as `draw`.
        """
        episodes: dict[tuple[int, int], Episode] = {}
        todo: list[tuple[int, int]] = []
        for number, task in enumerate(tasks):
            for sample in range(samples):
                episode = file.finished.get((position + number, sample)) if file else None
                if episode is not None and episode.task == task.digest:
                    episodes[number, sample] = episode
                else:
                    todo.append((number, sample))

        feed = RequestFeed(self.alive)

        async def hold(number: int, sample: int) -> None:
            host = self.conversations.host
            episode = await how.hold(host, tasks[number], position + number, sample, feed.ask)
            episodes[number, sample] = episode
            if file:
                file.add(episode)

        holding = self.conversations.hold_all([partial(hold, *pair) for pair in todo], self.at_once, feed)
        try:
            for result in self.source.results(feed):
                if isinstance(result, Refusal):
                    raise RequestError(result.request, result.error)
                feed.deliver(result)
        except BaseException:
            # Nobody answers any more, so the conversations end before the error goes on.
            feed.abort()
            wait([holding])
            raise
        holding.result()
        return [episodes[key] for key in sorted(episodes)]

    def _digest(self, config: RlhfConfig, seed: int) -> str:
        """Returns a hash of the settings that conversations depend on."""
        names = ("prompts", "max_new_tokens", "temperature", "top_k", "top_p", "constraint", "max_staleness")
        values = {name: getattr(config, name) for name in names}
        values |= {"seed": seed, "limits": asdict(self.limits), "environment": self.judge.name}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
