"""Code that the model writes and mends: each turn is a program, and the output of the tests that fail comes back.

A task is a line with tests as `rlhf.prompts_from` takes it (`dist_lm.sandbox.task`), with `prompt`, `language`, `tests`
and optionally `hidden`; and `attempts`, the turns of the model (4). The reward is the share of all tests that the last
program passes, hidden ones included. The verdict never enters a program.

A model is shown fixed tests that fail, never hidden ones. Without hidden tests it is shown those of the first half
alone: a program that knows by heart what it was shown must not win.
"""

from dist_lm.chat.messages import Call, Json
from dist_lm.environments.columns import opening_of
from dist_lm.environments.protocol import (
    LAST_TURN,
    Action,
    Limits,
    Observation,
    RefusedTaskError,
    Step,
    Verdict,
)
from dist_lm.environments.protocol import Task as EnvironmentTask
from dist_lm.environments.results import clipped, executed
from dist_lm.environments.sandboxes import SharedSandboxes
from dist_lm.errors import UserError
from dist_lm.sandbox.hidden import ReferenceSolutionError
from dist_lm.sandbox.program import Program, Test
from dist_lm.sandbox.program import Verdict as TestVerdict
from dist_lm.sandbox.task import Task, task_of

ATTEMPTS = 4


class CodeRepair:
    """An `Environment` of programs with tests."""

    def __init__(self, sandboxes: SharedSandboxes, limits: Limits) -> None:
        self._sandboxes, self._limits = sandboxes, limits
        self._task: Task | None = None
        self._key = 0  # chooses the hidden tests: equal tasks have equal ones
        self._remaining = 0  # turns of the model
        self._last_text = ""  # the model's last turn with a program
        self._num_shown = 0  # fixed tests, from the first, that the model may be shown

    async def reset(self, task: EnvironmentTask) -> Observation:
        data = task.data
        try:
            self._task = task_of(data)
        except UserError as error:
            raise RefusedTaskError(str(error)) from None
        opening = opening_of(data)
        num_tests = len(self._task.tests)
        self._num_shown = num_tests if self._task.hidden is not None else num_tests // 2
        self._remaining = attempts_of(data.get("attempts", ATTEMPTS))
        self._last_text = ""
        self._key = int(task.digest[:15], 16)
        return Observation(opening)

    async def step(self, action: Action) -> Step:
        assert self._task is not None, "reset comes first"
        # There are no tools: a call costs an attempt and is told so.
        if action.calls and self._remaining > 1 and not action.cut:
            self._remaining -= 1
            return Step(await executed(action.calls, (), _no_result, self._limits), done=False)

        # A conversation that is full ends with an empty turn: the program before is the last one.
        if action.text or action.cut in (None, LAST_TURN):
            self._last_text = action.text
        program = self._task.program(self._last_text)
        self._remaining -= 1
        is_last = self._remaining == 0 or action.cut is not None
        # A program that was cut off is judged, too: it may be whole.
        verdict = await self._sandboxes.verdict(program)
        if not is_last and verdict.outcome != "passed":
            feedback_text = clipped(feedback(program, verdict, self._num_shown), self._limits.observation_bytes // 2)
            return Step(Observation.user(feedback_text), done=False)

        if self._task.hidden is not None:
            try:
                verdict = await self._sandboxes.hidden_verdict(program, self._task.hidden, self._key)
            except ReferenceSolutionError as error:
                raise RefusedTaskError(f"`hidden`: {error}") from None
        return Step(Observation(), done=True, verdict=Verdict.of(verdict.passed / verdict.total))

    async def close(self) -> None:
        self._task = None


async def _no_result(call: Call, most_bytes: int) -> Json:
    return None


def feedback(program: Program, verdict: TestVerdict, num_shown: int) -> str:
    """Returns what the model is told of the fixed tests: how many pass, the first one that fails, and its output.

    Args:
        verdict: at least one test fails.
        num_shown: tests, from the first, that may be shown; of another one the model hears only that it fails.
    """
    passed = f"{verdict.passed} of {verdict.total} tests pass."
    failed = verdict.results.index(False)
    if failed < num_shown:
        lines = [f"{passed} This one does not ({verdict.outcome}):", shown(program.tests[failed])]
        if output := verdict.output.strip():
            lines += ["Its output:", output]
    else:
        lines = [f"{passed} One that is not shown does not ({verdict.outcome})."]
    return "\n".join([*lines, "Write the whole program again."])


def shown(test: Test) -> str:
    """Returns a test as the model sees it."""
    lines = [part for part in (test.before, test.code) if part]
    if test.stdin:
        lines.append(f"input: {test.stdin}")
    if test.stdout is not None:
        lines.append(f"expected output: {test.stdout}")
    return "\n".join(lines)


def attempts_of(value: Json) -> int:
    """Returns the value of `attempts`, turns of the model with a program.

    Raises:
        RefusedTaskError: it is no positive integer.
    """
    if type(value) is not int or value < 1:
        raise RefusedTaskError(f"`attempts` is {value!r:.50}: expected a positive integer")
    return value
