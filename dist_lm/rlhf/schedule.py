"""Which weights draw which rollouts, and which prompts replace those whose rollouts have no signal.

Generation may run ahead of training by `staleness` iterations. Version v of the weights is the policy after v
iterations. The rollouts of iteration i are drawn by version max(0, i - staleness), however long anything takes, so they
stay a pure function of the seed.

    staleness 0:   draw 0 | train 0 | draw 1 | train 1 | ...
    staleness 1:   draw 0 | train 0             | train 1             | ...
                          | draw 1 by version 0 | draw 2 by version 1 | ...

With staleness, rules judge the rollouts of an iteration while those of the next one are drawn.

Dimensions: B rollouts.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, Self, TypeVar

import numpy as np

from dist_lm.environments.protocol import LARGEST_REWARD
from dist_lm.generation.decoder import WeightStream
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rollouts import Rollouts, RolloutSource, ScoredRollouts, concatenated, read_to_end

Work = TypeVar("Work")
Draw = Callable[[int], Rollouts]
"""position of the first prompt -> the rollouts of an iteration, by the weights that the source has."""
Judging = Callable[[Rollouts], ScoredRollouts]
"""The rollouts of an iteration with their scores under the rules."""
DrawScored = Callable[[int], ScoredRollouts]
"""(position of the first prompt) -> the rollouts of an iteration with their scores, by the weights that the source has.
`SamplingAgain` draws and scores in one call, because scores decide which prompts it draws next."""
DrawPrompts = Callable[[int, int], Rollouts]
"""(position of the first prompt, number of prompts) -> their rollouts, by the weights that the source has."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts with their scores, and the seconds that drawing and judging took."""

    scored: ScoredRollouts
    drawing_s: float
    judging_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the schedule


class Schedule(Protocol):
    """Gives the learner the rollouts of each iteration: a `RolloutSchedule`, or `asynchronous.AsynchronousSchedule`.
    Leaving it ends its threads."""

    def begin(
        self,
        version: int,
        weights: WeightStream,
        pending: Mapping[int, ScoredRollouts],
        position: int = 0,
        taken: int = 0,
    ) -> None: ...

    def push(self, version: int, weights: WeightStream) -> None: ...

    def take(self, iteration: int) -> Drawn: ...

    def ahead(self, version: int) -> dict[int, ScoredRollouts]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def draws_rollouts(version: int, staleness: int, iterations: int) -> bool:
    """Returns whether this version of the weights draws rollouts in a run of so many iterations."""
    return version == 0 or version + staleness < iterations


class RolloutSchedule:
    """Draws rollouts from a source, on the rank that has it. A context manager; leaving it ends its threads.

    With staleness 0 there are no threads: rollouts are drawn and scored when they are taken.
    """

    def __init__(
        self,
        source: RolloutSource,
        draw: Draw,
        judge: Judging,
        *,
        staleness: int,
        iterations: int,
        prompts: int,
        draw_scored: DrawScored | None = None,
    ) -> None:
        """
        Args:
            iterations: length of the whole run; nothing is drawn for later ones.
            prompts: number of prompts of a `draw`.
            draw_scored: replaces `draw` and `judge`.
        """
        self._source, self._draw, self._judge = source, draw, judge
        self._prompts, self._draw_scored = prompts, draw_scored
        # position of the next prompt; only the code that draws reads and moves it
        self._position = 0
        self._staleness, self._iterations = staleness, iterations
        self._drawn: dict[int, Callable[[], Drawn]] = {}
        self._thread = self._judging_thread = None
        if staleness:
            self._thread, self._judging_thread = ThreadPoolExecutor(1, "rollouts"), ThreadPoolExecutor(1, "rules")

    def begin(
        self,
        version: int,
        weights: WeightStream,
        pending: Mapping[int, ScoredRollouts],
        position: int = 0,
        taken: int = 0,
    ) -> None:
        """Starts, or resumes, with the weights of `version`; `pending` rollouts are taken over and not drawn again.

        With staleness, drawing begins in a thread; otherwise the source loads the weights, and rollouts are drawn by
        `take`.

        Args:
            weights: read to the end.
            pending: rollouts with their scores, by iteration.
            position: position of the first prompt of iteration `version + taken`.
            taken: number of iterations, from number `version` on, that an earlier schedule has already handed out.

        Raises:
            RewardError: rules failed on too many of the `pending` rollouts of an old checkpoint. Those are judged here
                if they have no scores, or scores out of the range of fp32.
            UserError, PoolFailure: the source cannot load the weights; with staleness, `take` raises it.
        """
        self._position = position + sum(scored.prompts for scored in pending.values())
        for iteration, scored in pending.items():
            # A checkpoint of an old release has rollouts without scores, or with scores out of fp32's range. NaN, the
            # score of a rule that failed, is not too large.
            is_too_large = any((np.abs(score_B) > LARGEST_REWARD).any() for score_B in scored.scores.values())
            if not scored.scores or is_too_large:
                scored = self._judge(scored.rollouts)
            self._drawn[iteration] = partial(Drawn, scored, 0.0, 0.0)

        ahead = range(version + taken, min(version + self._staleness + 1, self._iterations))
        self._submit(version, weights, [iteration for iteration in ahead if iteration not in pending])

    def push(self, version: int, weights: WeightStream) -> None:
        """Reads new weights to the end. They draw the rollouts of iteration `version + staleness`. With staleness the
        thread draws these as soon as it is free; without, `take` draws them.

        Raises:
            UserError, PoolFailure: as `begin`.
        """
        self._submit(version, weights, [version + self._staleness])

    def queue(self, work: Callable[[], Work], version: int, weights: WeightStream | None) -> Callable[[], Work]:
        """Queues `work`, which uses the source, behind the rollouts that are queued already; returns a function that
        waits for its result.

        With staleness 0 there is no queue: the work is done before this returns. Errors of `work` and of loading the
        weights are raised by the returned function, or here without a queue.

        Args:
            weights: weights of `version`, which the source loads first; None keeps those that were pushed last.
                Rollouts that are still to be drawn would come from them, so give weights only after the last `push`
                and, with staleness 0, after the last `take` too.
        """
        if self._thread is None:
            if weights is not None:
                self._source.load_weights(weights, version)
            outcome = work()
            return lambda: outcome

        # The thread may still draw with older weights, so the new ones wait their turn there.
        load = None
        if weights is not None:
            load = partial(self._source.load_weights, self._source.hold(weights), version)

        def load_and_work() -> Work:
            if load:
                load()
            return work()

        return self._thread.submit(load_and_work).result

    def take(self, iteration: int) -> Drawn:
        """Waits for the rollouts of an iteration, or draws and judges them with staleness 0. Each can be taken once.

        Raises:
            RequestError: a prompt cannot be answered.
            RewardError: rules failed on too many rollouts.
            UserError, PoolFailure: of the source, see `RolloutSource`.
        """
        return self._drawn.pop(iteration)()

    def ahead(self, version: int) -> dict[int, ScoredRollouts]:
        """Waits for the rollouts that are drawn but not yet taken and that come from weights older than `version`.

        Returns them by iteration; they can still be taken. There are none with staleness 0. A checkpoint at `version`
        keeps them, because its own weights would draw others.

        Raises:
            RequestError, RewardError, UserError, PoolFailure: as `take`.
        """
        drawn_by_older = range(version, version + self._staleness)
        return {i: drawn().scored for i, drawn in sorted(self._drawn.items()) if i in drawn_by_older}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for threads in (self._thread, self._judging_thread):
            if threads:
                threads.shutdown(cancel_futures=True)

    def _submit(self, version: int, weights: WeightStream, iterations: list[int]) -> None:
        """Makes these weights draw the rollouts of the iterations: in the thread, or when they are taken.

        The weights are read to the end in any case; without iterations they are dropped.

        Raises:
            UserError, PoolFailure: without a thread, the source cannot load the weights; else `take` raises it.
        """
        load = None
        if not iterations:
            read_to_end(weights)
        elif self._thread:
            # Older weights may still draw rollouts in the thread, so the new ones wait their turn there.
            load = partial(self._source.load_weights, self._source.hold(weights), version)
        else:
            self._source.load_weights(weights, version)

        for iteration in iterations:
            if self._draw_scored:
                self._drawn[iteration] = _started(self._thread, partial(self._draw_and_score, self._draw_scored, load))
            else:
                # Scoring waits for drawing in a thread of its own, so the next rollouts are drawn meanwhile.
                wait_for_rollouts = _started(self._thread, partial(self._draw_timed, load))
                self._drawn[iteration] = _started(self._judging_thread, partial(self._judge_timed, wait_for_rollouts))
            load = None

    def _draw_timed(self, load: Callable[[], None] | None) -> tuple[Rollouts, float]:
        """Loads weights, if there are new ones, draws and moves the position. Returns the rollouts and the seconds that
        it took, loading included.

        Raises:
            RequestError, RewardError, UserError, PoolFailure: of the source and of `draw`.
        """
        started = time.perf_counter()
        if load:
            load()
        rollouts = self._draw(self._position)
        self._position += self._prompts
        return rollouts, time.perf_counter() - started

    def _judge_timed(self, wait_for_rollouts: Callable[[], tuple[Rollouts, float]]) -> Drawn:
        """Waits for rollouts and judges them. Returns them with their scores and the seconds of drawing and judging."""
        rollouts, drawing_s = wait_for_rollouts()
        started = time.perf_counter()
        scored = self._judge(rollouts)
        return Drawn(scored, drawing_s, time.perf_counter() - started)

    def _draw_and_score(self, draw: DrawScored, load: Callable[[], None] | None) -> Drawn:
        started = time.perf_counter()
        if load:
            load()
        scored = draw(self._position)
        self._position += scored.prompts
        return Drawn(scored, time.perf_counter() - started, 0.0)


def _started(threads: ThreadPoolExecutor | None, work: Callable[[], Work]) -> Callable[[], Work]:
    """Starts `work` in a thread and returns a function that waits for it; without threads, `work` itself."""
    return threads.submit(work).result if threads else work


# --- prompts that replace others ---


@dataclass(frozen=True)
class SamplingAgain:
    """Replaces prompts whose rollouts all score alike by the next ones in the order of prompts (dynamic sampling: Yu et
    al. 2025, section 3.2). No prompt is drawn twice for one iteration.

    An advantage relative to the group is 0 in such a group, so it gives no gradient. Which prompts are drawn depends
    only on the weights and on the position in the order of prompts, and their number is saved with the rollouts, so a
    run that was interrupted draws the same ones.

        round 1: draw `prompts` prompts        | keep the groups with a signal
        round 2: draw as many as are missing   | keep ...
        after the last round: fill up with groups without a signal, the earliest first

    Only the scores of rules decide. With a reward model among the parts, every group has a signal, because its scores
    are hardly ever equal.
    """

    draw: DrawPrompts
    judge: Callable[[Rollouts], ScoredRollouts]
    parts: Mapping[str, RewardPartConfig]
    prompts: int  # prompts of an iteration
    rounds: int  # largest number of draws, rlhf.sampling_rounds

    def __call__(self, position: int) -> ScoredRollouts:
        """Returns the rollouts of `prompts` prompts, in the order of prompts from `position` on.

        Raises:
            RequestError, RewardError, UserError, PoolFailure: from `draw` and `judge`.
        """
        rounds: list[ScoredRollouts] = []
        informative: list[int] = []  # positions of prompts whose group has a signal
        n_drawn = 0
        for _ in range(self.rounds):
            missing = self.prompts - len(informative)
            if not missing:
                break
            rounds.append(self.judge(self.draw(position + n_drawn, missing)))
            n_drawn += missing
            informative += positions_with_signal(rounds[-1], self.parts)

        # An iteration has its full number of prompts even if too few groups have a signal.
        drawn = [int(prompt) for scored in rounds for prompt in np.unique(scored.rollouts.position_B)]
        without_signal = [prompt for prompt in drawn if prompt not in set(informative)]
        chosen = [*informative, *without_signal[: self.prompts - len(informative)]]
        return concatenated(rounds).of_prompts(np.array(chosen), replaced=n_drawn - len(chosen))


def positions_with_signal(scored: ScoredRollouts, parts: Mapping[str, RewardPartConfig]) -> list[int]:
    """Returns the positions of the prompts whose rollouts do not all have the same weighted sum of rule scores,
    ascending.

    Rollouts on which a rule failed, or to which none applies, do not count. With a reward model among the parts, it
    returns all prompts.
    """
    position_B = scored.rollouts.position_B
    has_reward_model = bool(set(parts) - set(scored.scores))
    if has_reward_model:
        return [int(prompt) for prompt in np.unique(position_B)]

    score_B = sum((part.weight * scored.scores[name] for name, part in parts.items()), np.zeros(len(position_B)))
    positions = []
    for prompt in np.unique(position_B):
        group_scores = score_B[(position_B == prompt) & np.isfinite(score_B) & scored.applicable]
        if len(group_scores) and group_scores.min() < group_scores.max():
            positions.append(int(prompt))
    return positions
