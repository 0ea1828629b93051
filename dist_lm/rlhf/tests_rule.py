"""Executed code as a reward: the answer to a task runs with the task's tests, in the sandbox.

Programs run beside generation, with actors on cores of all nodes: each starts as soon as its completion is there
(`begin`), and its verdict is read when the iteration's rollouts are judged. A program that fails, hangs or takes too
much has a score; an error of the sandbox gives none, so that completion leaves the iteration.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from functools import partial

from dist_lm.config.rlhf import RewardPartConfig
from dist_lm.rlhf.reward_function import RewardError
from dist_lm.rlhf.rules import Alive, Failure, Judged, Score
from dist_lm.sandbox.pool import Sandboxes, SandboxPool
from dist_lm.sandbox.program import Limits, Verdict
from dist_lm.sandbox.sandbox import fences
from dist_lm.sandbox.task import Task

log = logging.getLogger(__name__)

ALL = "all"
ALIVE_S = 1.0  # a sign of life at least so often


class TestsRule:
    """A `Rule`."""

    __test__ = False  # no test of pytest

    def __init__(
        self,
        key: str,
        part: RewardPartConfig,
        tasks: Mapping[str, Task],
        trust_me: bool,
        sandboxes: Callable[[int, bool], Sandboxes] = SandboxPool,
    ) -> None:
        """
        Args:
            key: the config key, for messages.
            tasks: by the text of the prompt.
            trust_me: run programs without isolation where this machine has none.
            sandboxes: (programs at once on a node, trust_me) -> what runs them; called at the first program.

        Raises:
            SandboxError: no sandbox here.
        """
        self._key, self._tasks, self._all = key, tasks, part.score == ALL
        self._limits = Limits(cpu_s=part.cpu_s, wall_s=part.wall_s)
        self._make = partial(sandboxes, part.workers, trust_me)
        self._pool: Sandboxes | None = None
        self._begun: dict[Judged, Future[Verdict]] = {}
        log.info("%s: %s", key, fences(trust_me).describe())

    def begin(self, judged: Judged) -> None:
        """Start the program of a completion that will be judged later."""
        self._begun[judged] = self._submit(judged)

    def __call__(self, judged: Sequence[Judged], alive: Alive) -> Iterator[Score]:
        """The share of tests passed, or 1 only if all are.

        Raises:
            RewardError: a prompt has no tests.
        """
        verdicts = [self._begun.pop(one, None) or self._submit(one) for one in judged]
        for verdict in verdicts:
            yield self._score(_waited(verdict, alive))

    def close(self) -> None:
        """End the sandboxes."""
        self._begun.clear()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__()

    def _submit(self, judged: Judged) -> Future[Verdict]:
        task = self._tasks.get(judged.prompt)
        if task is None:
            raise RewardError(f"{self._key}: no tests for the prompt {judged.prompt!r:.200}")
        if self._pool is None:
            self._pool = self._make().__enter__()
        return self._pool.submit(task.program(judged.completion), self._limits)

    def _score(self, verdict: Verdict) -> Score:
        if not verdict.judged:
            return Failure(f"the sandbox failed: {verdict.output}")
        share = verdict.passed / verdict.total
        return float(share == 1) if self._all else share


def _waited(verdict: Future[Verdict], alive: Alive) -> Verdict:
    while True:
        alive()
        try:
            return verdict.result(ALIVE_S)
        except NotYetError:  # also an error that the verdict itself may end with
            if verdict.done():
                return verdict.result()
