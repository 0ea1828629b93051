"""Which weights draw which rollouts: generation may run ahead of training by `staleness` iterations.

Version v of the weights is the policy after v iterations. The rollouts of iteration i are drawn by version
max(0, i - staleness), however long anything takes, so they stay a pure function of the seed.

    staleness 0:   draw 0 | train 0 | draw 1 | train 1 | ...
    staleness 1:   draw 0 | train 0             | train 1             | ...
                          | draw 1 by version 0 | draw 2 by version 1 | ...

With staleness, rules judge the rollouts of an iteration while those of the next one are drawn.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

from dist_lm.generation.decoder import WeightStream
from dist_lm.rlhf.rollouts import JudgedRollouts, Rollouts, RolloutSource, read_to_end

Done = TypeVar("Done")
Draw = Callable[[int], Rollouts]
"""position of the first prompt -> the rollouts of an iteration, by the weights that the source has."""
Judging = Callable[[Rollouts], JudgedRollouts]
"""The rollouts of an iteration with their scores under the rules."""
DrawJudged = Callable[[int], JudgedRollouts]
"""Draws and judges in one, where the scores decide which prompts are drawn (`sampling_again`)."""


@dataclass(frozen=True)
class Drawn:
    """Judged rollouts, and how long they took."""

    judged: JudgedRollouts
    drawing_s: float
    judging_s: float


def is_drawn_by(version: int, staleness: int, iterations: int) -> bool:
    """Whether this version of the weights draws rollouts in a run of so many iterations."""
    return version == 0 or version + staleness < iterations


class RolloutSchedule:
    """Draws rollouts from a source, on the rank that has it. A context manager; leaving it ends its threads.

    With staleness 0 there are no threads: rollouts are drawn and judged when they are taken.
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
        draw_judged: DrawJudged | None = None,
    ) -> None:
        """
        Args:
            iterations: of the whole run; nothing is drawn for later ones.
            prompts: that `draw` takes.
            draw_judged: instead of `draw` and `judge`.
        """
        self._source, self._draw, self._judge = source, draw, judge
        self._prompts, self._draw_judged = prompts, draw_judged
        self._position = 0  # of the next prompt; used where rollouts are drawn, one iteration after the other
        self._staleness, self._iterations = staleness, iterations
        self._drawn: dict[int, Callable[[], Drawn]] = {}
        self._thread = ThreadPoolExecutor(1, "rollouts") if staleness else None
        self._rules = ThreadPoolExecutor(1, "rules") if staleness else None

    def begin(
        self, version: int, weights: WeightStream, pending: Mapping[int, JudgedRollouts], position: int = 0
    ) -> None:
        """Start, or resume, with the weights of `version`; `pending` rollouts are taken over and not drawn again.

        Args:
            position: of the first prompt that is not of an iteration before `version`.
        """
        self._position = position + sum(judged.prompts for judged in pending.values())
        for iteration, judged in pending.items():
            # rollouts of a checkpoint written before scores were kept are judged now
            scored = judged if judged.scores else self._judge(judged.rollouts)
            self._drawn[iteration] = partial(Drawn, scored, 0.0, 0.0)
        ahead = range(version, min(version + self._staleness + 1, self._iterations))
        self._submit(version, weights, [iteration for iteration in ahead if iteration not in pending])

    def push(self, version: int, weights: WeightStream) -> None:
        """Read new weights to the end; they draw the rollouts of iteration `version + staleness`."""
        self._submit(version, weights, [version + self._staleness])

    def beside(self, work: Callable[[], Done], version: int, weights: WeightStream | None) -> Callable[[], Done]:
        """Other work for the source, with the weights of `version`: after the rollouts that are asked for, or at once
        with staleness 0. Returns a function that waits for its result.

        Args:
            weights: None: they were pushed last. Otherwise no rollouts are asked for after them.
        """
        if self._thread is None:
            if weights is not None:
                self._source.load_weights(weights, version)
            found = work()
            return lambda: found
        held = None if weights is None else self._source.hold(weights)

        def loaded() -> Done:
            if held is not None:
                self._source.load_weights(held, version)
            return work()

        return self._thread.submit(loaded).result

    def take(self, iteration: int) -> Drawn:
        """Wait for the rollouts of an iteration. Each can be taken once."""
        return self._drawn.pop(iteration)()

    def ahead(self, version: int) -> dict[int, JudgedRollouts]:
        """Wait for the rollouts that older weights than `version` draw and that are not taken yet.

        A checkpoint at `version` keeps them, because its own weights would draw others.
        """
        own = range(version, version + self._staleness)
        return {iteration: drawn().judged for iteration, drawn in sorted(self._drawn.items()) if iteration in own}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for threads in (self._thread, self._rules):
            if threads:
                threads.shutdown(cancel_futures=True)

    def _submit(self, version: int, weights: WeightStream, iterations: list[int]) -> None:
        load = None
        if not iterations:
            read_to_end(weights)
        elif self._thread:  # older weights may still draw rollouts
            load = partial(self._source.load_weights, self._source.hold(weights), version)
        else:
            self._source.load_weights(weights, version)
        for iteration in iterations:
            draw = partial(self._timed, load)
            if self._draw_judged:
                work = partial(self._timed_in_one, self._draw_judged, load)
                self._drawn[iteration] = self._thread.submit(work).result if self._thread else work
            elif self._thread and self._rules:
                draw = self._thread.submit(draw).result
                self._drawn[iteration] = self._rules.submit(self._judged, draw).result
            else:
                self._drawn[iteration] = partial(self._judged, draw)
            load = None

    def _timed(self, load: Callable[[], None] | None) -> tuple[Rollouts, float]:
        """The rollouts, and the seconds that loading weights and drawing took."""
        started = time.perf_counter()
        if load:
            load()
        rollouts = self._draw(self._position)
        self._position += self._prompts
        return rollouts, time.perf_counter() - started

    def _judged(self, draw: Callable[[], tuple[Rollouts, float]]) -> Drawn:
        rollouts, drawing_s = draw()
        started = time.perf_counter()
        judged = self._judge(rollouts)
        return Drawn(judged, drawing_s, time.perf_counter() - started)

    def _timed_in_one(self, draw: DrawJudged, load: Callable[[], None] | None) -> Drawn:
        started = time.perf_counter()
        if load:
            load()
        judged = draw(self._position)
        self._position += judged.prompts
        return Drawn(judged, time.perf_counter() - started, 0.0)
