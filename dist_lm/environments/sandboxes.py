"""The sandboxes of the project's own environments: sessions of code, and programs with tests."""

import asyncio
from contextlib import ExitStack

from dist_lm.environments.protocol import EnvironmentFailedError, Limits
from dist_lm.sandbox.hidden import Hidden, References
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits as ProgramLimits
from dist_lm.sandbox.program import Program, Verdict
from dist_lm.sandbox.session import PooledSession, SessionFailedError, SessionLanguage, SessionPool, Turn

TESTS = ProgramLimits(cpu_s=1.0, wall_s=8.0)
OWN_SLACK_S = 300.0  # the project's own environments limit the code that they run; this only ends what hangs
MOST_AGAIN_S = 120.0  # most seconds in which the code of a session whose sandbox has ended is run again
_OVERHEAD_S = 0.9  # share of the seconds of a step that the code of the model may use


def again_seconds(limits: Limits) -> float:
    """Returns for how many seconds a conversation with these limits may run the code of its session again."""
    return min(MOST_AGAIN_S, limits.seconds)


def seconds_of_turn(limits: Limits) -> float:
    """Returns the most seconds that the code of a turn may take in a conversation with these limits."""
    return _OVERHEAD_S * min(limits.seconds_a_step, limits.seconds)


class SharedSandboxes:
    """Runs code of the model for many conversations at once.

    Args:
        workers: sessions and programs that run at once.
        trust_me: run code without isolation where the machine allows none.
    """

    def __init__(self, workers: int, trust_me: bool) -> None:
        self._workers, self._trust_me = workers, trust_me
        self._stack = ExitStack()
        self._sessions: SessionPool | None = None
        self._programs: SandboxPool | None = None
        self._references = References()

    @property
    def sessions_again(self) -> int:
        """Sessions so far whose code was run again, because their sandbox or program had been killed."""
        return self._sessions.num_run_again if self._sessions else 0

    def open(self) -> None:
        """Raises SandboxError if no sandbox can be made here. Sandboxes start at their first use."""
        self._sessions = self._stack.enter_context(SessionPool(self._workers, self._trust_me))
        self._programs = self._stack.enter_context(SandboxPool(self._workers, self._trust_me))

    def close(self) -> None:
        """Ends all sandboxes."""
        self._stack.close()
        self._sessions = self._programs = None

    def session(self, language: SessionLanguage, limits: Limits) -> PooledSession:
        """Returns a session whose turns fit into a step of a conversation with these limits."""
        assert self._sessions is not None, "open comes first"
        wall_s = seconds_of_turn(limits)
        turn_limits = ProgramLimits(cpu_s=min(5.0, wall_s), wall_s=wall_s)
        cpu_s = turn_limits.cpu_s * limits.turns
        return self._sessions.begin(language, turn_limits, cpu_s, most_again_s=again_seconds(limits))

    async def turn(self, session: PooledSession, code: str) -> Turn:
        """Runs the code of a turn in a session.

        Raises:
            EnvironmentFailedError: the machine has no core for it, or the sandbox failed.
        """
        try:
            return await asyncio.wrap_future(session.run(code))
        except SessionFailedError as error:
            raise EnvironmentFailedError("infrastructure", str(error)) from None

    async def verdict(self, program: Program, limits: ProgramLimits = TESTS) -> Verdict:
        """Runs a program with its tests.

        Raises:
            EnvironmentFailedError: the sandbox failed, or the machine had no core.
        """
        assert self._programs is not None, "open comes first"
        return _judged(await asyncio.wrap_future(self._programs.submit(program, limits)))

    async def hidden_verdict(
        self, program: Program, hidden: Hidden, key: int, limits: ProgramLimits = TESTS
    ) -> Verdict:
        """Runs a program with its tests and the hidden ones of a key.

        Raises:
            EnvironmentFailedError: the sandbox failed, or the machine had no core.
            ReferenceSolutionError: the task's own solution fails.
        """
        assert self._programs is not None, "open comes first"
        return _judged(await asyncio.wrap_future(self._references.submit(program, hidden, key, self._programs, limits)))


def _judged(verdict: Verdict) -> Verdict:
    if not verdict.judged:
        raise EnvironmentFailedError("infrastructure", verdict.output)
    return verdict
