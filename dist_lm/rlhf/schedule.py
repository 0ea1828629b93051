"""Who draws rollouts when: each iteration's by weights as old as staleness allows, while older ones are trained on.

The rollouts of iteration i are drawn by version max(0, i - staleness), whatever takes how long: they stay a pure
function of the seed. Version v is the policy after v iterations.

    staleness 0:   draw 0 | train 0 | draw 1 | train 1 | ...
    staleness 1:   draw 0 | train 0             | train 1             | ...
                          | draw 1 by version 0 | draw 2 by version 1 | ...
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from dist_lm.rlhf.rollouts import Rollouts, RolloutSource

Weights = Mapping[str, np.ndarray]
Draw = Callable[[RolloutSource, int], Rollouts]
"""(source, iteration) -> its rollouts."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts, and how long it took to draw them."""

    rollouts: Rollouts
    seconds: float


def is_drawn_by(version: int, staleness: int, iterations: int) -> bool:
    """Whether a run of so many iterations has rollouts by this version of the weights."""
    return version == 0 or version + staleness < iterations


class RolloutSchedule:
    """On the rank that has the source. A context manager; `close` ends the thread, and the source with it.

    Without staleness rollouts are drawn when they are taken: nothing would run beside a thread.
    """

    def __init__(self, source: RolloutSource, draw: Draw, *, staleness: int, iterations: int) -> None:
        """
        Args:
            iterations: of the whole run: nothing is drawn beyond them.
        """
        self._source, self._draw = source, draw
        self._staleness, self._iterations = staleness, iterations
        self._drawn: dict[int, Callable[[], Drawn]] = {}
        self._thread = ThreadPoolExecutor(1, "rollouts") if staleness else None

    def begin(self, version: int, weights: Weights, pending: Mapping[int, Rollouts]) -> None:
        """Start, or go on, with the weights of `version`; of the next iterations those are drawn that are not
        `pending`."""
        for iteration, rollouts in pending.items():
            self._drawn[iteration] = partial(Drawn, rollouts, 0.0)
        ahead = range(version, min(version + self._staleness + 1, self._iterations))
        self._go_on(version, weights, [iteration for iteration in ahead if iteration not in pending])

    def push(self, version: int, weights: Weights) -> None:
        """New weights: they draw the rollouts that are `staleness` iterations away."""
        self._go_on(version, weights, [version + self._staleness])

    def take(self, iteration: int) -> Drawn:
        """The rollouts of an iteration, once they are there; each can be taken once."""
        return self._drawn.pop(iteration)()

    def ahead(self, version: int) -> dict[int, Rollouts]:
        """What was drawn by weights older than `version` and is not taken yet, once it is there: what a checkpoint of
        these weights has to keep, as they would draw something else."""
        own = range(version, version + self._staleness)
        return {iteration: drawn().rollouts for iteration, drawn in sorted(self._drawn.items()) if iteration in own}

    def close(self) -> None:
        """End the thread and the source. What was drawn and not taken is dropped."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_on(self, version: int, weights: Weights, iterations: list[int]) -> None:
        for iteration in iterations:
            new = weights if iteration == iterations[0] else None
            work = partial(self._timed, iteration, version, new)
            self._drawn[iteration] = self._thread.submit(work).result if self._thread else work

    def _timed(self, iteration: int, version: int, weights: Weights | None) -> Drawn:
        started = time.perf_counter()
        if weights is not None:
            self._source.load_weights(weights, version)
        rollouts = self._draw(self._source, iteration)
        return Drawn(rollouts, time.perf_counter() - started)
