"""Rollouts that are conversations with an environment: many at once, each a turn of the model, a step, a turn, ...

    event loop, in a thread    conversation: reset -> ask -> step -> ask -> step -> verdict     (one of many)
                                                       |  ^
                                               Request v  | Answer
    calling thread             engines: whatever is ready, together

A conversation that waits for its environment holds up no other: engines generate for those that are ready. One
conversation is in `conversing.py`, the event loop in `conversation_loop.py`, the way between the two threads in
`request_feed.py`.

Dimensions: B conversations.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dist_lm.chat.template import stop_tokens
from dist_lm.environments.protocol import (
    FAILURES,
    LARGEST_REWARD,
    Limits,
    Task,
)
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
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.conversing import ConstraintOf, Conversing, EpisodeHost
from dist_lm.rlhf.episodes import Episode, EpisodeFile, rollouts_of_episodes
from dist_lm.rlhf.request_feed import Ask, RequestFeed
from dist_lm.rlhf.rewards import RewardError
from dist_lm.rlhf.rollouts import Rollouts, RolloutSource, ScoredRollouts, SignsOfLife
from dist_lm.rlhf.waiting_times import WaitingTimes
from dist_lm.tokenizer.tokenizer import Tokenizer


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

    def swap_weights(self, weights: Any, version: int) -> None:
        self._source.swap_weights(weights, version)
        self.version = version

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
    conversations: ConversationLoop[EpisodeHost]
    limits: Limits
    context: int  # model.max_seq_len
    at_once: int  # most conversations at a time
    weight: float = 1.0  # factor of the reward
    constraint_of: ConstraintOf | None = None
    folder: Path | None = None  # for the files of finished conversations; None: they are not kept
    alive: SignsOfLife = field(default_factory=SignsOfLife)
    waiting: WaitingTimes = field(default_factory=WaitingTimes)
    take_held_again: Callable[[], int] = lambda: 0  # conversations executed again since the last call

    def times(self) -> dict[str, float]:
        """Returns how long conversations have waited since the last call, and how many were executed again, as
        metrics."""
        return self.waiting.take() | {"perf/held_again": float(self.take_held_again())}

    def conversing(self, config: RlhfConfig, seed: int) -> Conversing:
        """Returns how conversations are held; `seed`: of the run."""
        return conversing(config, seed, self.tokenizer, self.limits, self.context, self.weight, self.constraint_of)

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
        how = self.conversing(config, seed)
        if self.folder is None:
            return rollouts_of_episodes(self._held(how, tasks, position, samples, None))

        settings = settings_digest(config, seed, self.limits, self.judge.name)
        with EpisodeFile(self.folder / file_name(position), settings, self.source.version) as file:
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
                # A file of tasks may have changed since, so another task may be at this position.
                if episode is not None and episode.task == task.digest:
                    episodes[number, sample] = episode
                else:
                    todo.append((number, sample))

        async def hold(number: int, sample: int, ask: Ask) -> None:
            host = self.waiting.host(self.conversations.host)
            episode = await how.hold(host, tasks[number], position + number, sample, self.waiting.ask(ask))
            episodes[number, sample] = episode
            if file:
                file.add(episode)

        hold_together(
            self.source, self.conversations, [partial(hold, *pair) for pair in todo], self.at_once, self.alive
        )
        how.failures.summarise(len(todo))
        return [episodes[key] for key in sorted(episodes)]


def hold_together(
    source: RolloutSource,
    conversations: ConversationLoop[Any],
    holding: Sequence[Callable[[Ask], Awaitable[None]]],
    at_once: int,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Holds conversations in their order, some at a time, with the answers of a source, until all have ended.

    Args:
        holding: coroutine functions that hold one conversation each; their argument returns answers.
        at_once: most conversations at a time.
        alive: called regularly.

    Raises:
        RequestError: the engines refuse a request.
        UserError, PoolFailure: of the source, see `RolloutSource`.
        Exception: what a conversation raises first; the others are cancelled.
    """
    feed = RequestFeed(alive)
    ended = conversations.hold_all([partial(hold, feed.ask) for hold in holding], at_once, feed)
    try:
        for result in source.results(feed):
            if isinstance(result, Refusal):
                raise RequestError(result.request, result.error)
            feed.deliver(result)
    except BaseException:
        # Nobody answers any more, so the conversations end before the error goes on.
        feed.abort()
        wait([ended])
        raise
    ended.result()


def conversing(
    config: RlhfConfig,
    seed: int,
    tokenizer: Tokenizer,
    limits: Limits,
    context: int,
    weight: float = 1.0,
    constraint_of: ConstraintOf | None = None,
) -> Conversing:
    """Returns how the conversations of a run are held.

    Args:
        seed: of the run.
        context: model.max_seq_len.
        weight: factor of the reward.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_tokens=stop_tokens(tokenizer),
    )
    largest_reward = LARGEST_REWARD / 2 / max(1.0, abs(weight))  # so that the weighted sum is a number in fp32
    return Conversing(tokenizer, limits, params, context, seed, largest_reward, constraint_of, config.asynchronous)


def file_name(position: int) -> str:
    """Returns the name of the file of the conversations that are drawn together.

    Args:
        position: position of their first task in the order of tasks.
    """
    return f"tasks_{position:08d}.jsonl"


def recorded_positions(folder: Path) -> list[int]:
    """Returns the positions of which a folder has files of conversations, ascending."""
    names = [path.stem.removeprefix("tasks_") for path in folder.glob("tasks_*.jsonl")]
    return sorted(int(name) for name in names if name.isdecimal())


def settings_digest(config: RlhfConfig, seed: int, limits: Limits, environment: str) -> str:
    """Returns a hash of the settings that conversations depend on."""
    names = ("prompts", "max_new_tokens", "temperature", "top_k", "top_p", "constraint", "max_staleness")
    values = {name: getattr(config, name) for name in names}
    values |= {"seed": seed, "limits": asdict(limits), "environment": environment}
    # Runs of older releases have no such key.
    if config.asynchronous:
        values["asynchronous"] = True
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
