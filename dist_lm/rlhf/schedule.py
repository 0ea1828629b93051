"""Which weights draw which rollouts: generation may run ahead of training by `staleness` iterations.

Version v of the weights is the policy after v iterations. The rollouts of iteration i are drawn by version
max(0, i - staleness), however long anything takes, so they stay a pure function of the seed.

    staleness 0:   draw 0 | train 0 | draw 1 | train 1 | ...
    staleness 1:   draw 0 | train 0             | train 1             | ...
                          | draw 1 by version 0 | draw 2 by version 1 | ...
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

from dist_lm.generation.decoder import WeightStream
from dist_lm.rlhf.rollouts import Rollouts, RolloutSource, read_to_end

Draw = Callable[[int], Rollouts]
"""iteration -> its rollouts, by the weights that the source has."""


@dataclass(frozen=True)
class Drawn:
    """Rollouts, and the seconds that drawing them took."""

    rollouts: Rollouts
    seconds: float


def is_drawn_by(version: int, staleness: int, iterations: int) -> bool:
    """Whether this version of the weights draws rollouts in a run of so many iterations."""
    return version == 0 or version + staleness < iterations


class RolloutSchedule:
    """Draws rollouts from a source, on the rank that has it. A context manager; leaving it ends its thread.

    With staleness 0 there is no thread: rollouts are drawn when they are taken.
    """

    def __init__(self, source: RolloutSource, draw: Draw, *, staleness: int, iterations: int) -> None:
        """
        Args:
            iterations: of the whole run; nothing is drawn for later ones.
        """
        self._source, self._draw = source, draw
        self._staleness, self._iterations = staleness, iterations
        self._drawn: dict[int, Callable[[], Drawn]] = {}
        self._thread = ThreadPoolExecutor(1, "rollouts") if staleness else None

    def begin(self, version: int, weights: WeightStream, pending: Mapping[int, Rollouts]) -> None:
        """Start, or resume, with the weights of `version`; `pending` rollouts are taken over and not drawn again."""
        for iteration, rollouts in pending.items():
            self._drawn[iteration] = partial(Drawn, rollouts, 0.0)
        ahead = range(version, min(version + self._staleness + 1, self._iterations))
        self._submit(version, weights, [iteration for iteration in ahead if iteration not in pending])

    def push(self, version: int, weights: WeightStream) -> None:
        """Read new weights to the end; they draw the rollouts of iteration `version + staleness`."""
        self._submit(version, weights, [version + self._staleness])

    def take(self, iteration: int) -> Drawn:
        """Wait for the rollouts of an iteration. Each can be taken once."""
        return self._drawn.pop(iteration)()

    def ahead(self, version: int) -> dict[int, Rollouts]:
        """Wait for the rollouts that older weights than `version` draw and that are not taken yet.

        A checkpoint at `version` keeps them, because its own weights would draw others.
        """
        own = range(version, version + self._staleness)
        return {iteration: drawn().rollouts for iteration, drawn in sorted(self._drawn.items()) if iteration in own}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def _submit(self, version: int, weights: WeightStream, iterations: list[int]) -> None:
        load = None
        if not iterations:
            read_to_end(weights)
        elif self._thread:  # older weights may still draw rollouts
            load = partial(self._source.load_weights, self._source.hold(weights), version)
        else:
            self._source.load_weights(weights, version)
        for iteration in iterations:
            work = partial(self._timed, iteration, load)
            self._drawn[iteration] = self._thread.submit(work).result if self._thread else work
            load = None

    def _timed(self, iteration: int, load: Callable[[], None] | None) -> Drawn:
        started = time.perf_counter()
        if load:
            load()
        rollouts = self._draw(iteration)
        return Drawn(rollouts, time.perf_counter() - started)
