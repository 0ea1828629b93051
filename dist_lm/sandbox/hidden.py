"""Hidden tests: inputs drawn from a key, and the values that a reference solution gives for them.

An answer that knows the fixed tests of a task by heart fails these. Equal keys give equal tests, whatever was drawn
before and wherever it runs. The reference runs in a sandbox, once for each key: all answers share what it printed.
"""

import ast
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from dist_lm.errors import UserError
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.sandbox.program import Limits, Program, Test, Verdict, infrastructure_error

REFERENCE_LIMITS = Limits(cpu_s=5.0, wall_s=60.0)
TRIES = 20  # draws for one test that differs from the others
MOST_REFERENCES = 10_000  # outputs that are kept, the newest ones

# The inputs of a case come by standard input, so that one program serves all cases.
_PYTHON_CASE = "\nimport sys as _sys\nprint('\\n' + ascii(eval(_sys.stdin.read())))\n"
_BASH_CASE = '\neval "$(cat)"\n'

First = TypeVar("First")
Second = TypeVar("Second")


class ReferenceSolutionError(UserError):
    """A reference solution gives no value for inputs that were drawn for it."""


@dataclass(frozen=True)
class Case:
    """The inputs of a hidden test, without the expected value."""

    shown: str = ""  # Python: an expression; Bash: commands whose output is compared; SQL: empty, its rows are compared
    before: str = ""  # Bash: commands before these; SQL: tables and rows


@dataclass(frozen=True)
class Hidden:
    """Draws the hidden tests of a task."""

    language: str
    solution: str  # a whole program that solves the task
    draw: Callable[[random.Random], Case]
    entry: str = ""  # see `Test`
    count: int = 3  # number of tests; fewer if the inputs of a task do not differ as often

    def cases(self, key: int) -> list[Case]:
        """Returns the inputs of a key, all different."""
        rng = random.Random(key)  # noqa: S311 no secret
        cases: dict[Case, None] = {}
        for _ in range(TRIES * self.count):
            cases[self.draw(rng)] = None
            if len(cases) == self.count:
                break
        return [*cases]

    def reference(self, cases: Sequence[Case]) -> Program:
        """Returns a program whose output in the n-th test is what the solution gives for the n-th case."""
        if self.language == "sql":
            return Program("sql", self.solution, tuple(Test(before=case.before) for case in cases))
        if self.language == "python":
            return Program("python", self.solution + _PYTHON_CASE, tuple(Test(stdin=case.shown) for case in cases))

        # The status of the last command says nothing: `grep` fails if it finds no line.
        scripts = (f"{case.before or ':'} && {{ {case.shown}\n}}\nexit 0" for case in cases)
        return Program("bash", self.solution + _BASH_CASE, tuple(Test(stdin=script) for script in scripts))

    def tests(self, cases: Sequence[Case], outputs: Sequence[str]) -> tuple[Test, ...]:
        """Returns the tests of cases.

        Args:
            outputs: of the reference.

        Raises:
            ReferenceSolutionError: a solution in Python returned a value that has no literal.
        """
        return tuple(self._test(case, output) for case, output in zip(cases, outputs, strict=True))

    def _test(self, case: Case, output: str) -> Test:
        """Returns the test that expects of an answer what the solution has printed for a case. Nothing is drawn.

        The test of SQL expects `output` as its `stdout`. Those of Bash and Python compare in their `code`: in Bash the
        output of the case with `output`, newlines at the end left out, and in Python the value of the case with the
        literal in the last line of `output`.

        Raises:
            ReferenceSolutionError: the last line of Python's output is no literal, or is empty.
        """
        if self.language == "sql":
            return Test(before=case.before, stdout=output)
        if self.language == "bash":
            before = f"{case.before} && " if case.before else ""
            # A command substitution drops the newlines at its end.
            expected = quoted(output.rstrip("\n"))
            return Test(code=f'{before}[ "$({case.shown})" = {expected} ]', entry=self.entry)

        # The solution may print something, too.
        value = output.rstrip("\n").rpartition("\n")[2]
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ReferenceSolutionError(
                f"{case.shown} is {value:.200}: expected numbers, texts, None and containers of them"
            ) from None
        comparison = "is" if value in ("True", "False", "None") else "=="
        return Test(code=f"assert {case.shown} {comparison} {value}", entry=self.entry)


def quoted(text: str) -> str:
    """Returns a text as a word of Bash in the form $'...', on one line."""
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "$'" + "".join(escapes.get(character, character) for character in text) + "'"


class References:
    """Runs answers with hidden tests. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (solution, key) -> cases and the run of the reference for them
        self._runs: dict[tuple[str, int], tuple[list[Case], Future[Verdict]]] = {}

    def submit(
        self, program: Program, hidden: Hidden, key: int, sandboxes: Sandboxes, limits: Limits
    ) -> Future[Verdict]:
        """Runs a program with its own tests and then the hidden ones of a key. It waits for nothing: the program starts
        when the reference of the key has ended.

        The verdict is `infrastructure` if the sandbox failed on the reference. Getting it raises whatever the sandboxes
        raise, and ReferenceSolutionError if the solution fails on inputs that were drawn.
        """
        cases, reference = self._run(hidden, key, sandboxes)

        def run(verdict: Verdict) -> Future[Verdict]:
            if not verdict.judged:
                failed: Future[Verdict] = Future()
                failed.set_result(infrastructure_error(program, f"of the reference: {verdict.output}"))
                return failed
            if verdict.outcome != "passed":
                case = cases[verdict.results.index(False)]
                raise ReferenceSolutionError(f"the solution fails ({verdict.outcome}) on {case}: {verdict.output:.500}")
            tests = hidden.tests(cases, verdict.stdout)
            return sandboxes.submit(replace(program, tests=(*program.tests, *tests)), limits)

        return _after(reference, run)

    def _run(self, hidden: Hidden, key: int, sandboxes: Sandboxes) -> tuple[list[Case], Future[Verdict]]:
        """Returns the cases of a key and the run of their reference, which it begins unless there is one."""
        name = hidden.solution, key
        with self._lock:
            run = self._runs.get(name)
            if run is None or _is_void(run[1]):
                cases = hidden.cases(key)
                run = cases, sandboxes.submit(hidden.reference(cases), REFERENCE_LIMITS)
                self._runs[name] = run
            if len(self._runs) > MOST_REFERENCES:
                del self._runs[next(iter(self._runs))]
            return run


def _is_void(run: Future[Verdict]) -> bool:
    """Returns whether a run has ended without saying anything about its program, so that another one may."""
    return run.done() and (run.cancelled() or run.exception() is not None or not run.result().judged)


def _after(first: Future[First], then: Callable[[First], Future[Second]]) -> Future[Second]:
    """Returns the outcome of the future that `then` makes of the result of `first`; errors of each go there, too."""
    outcome: Future[Second] = Future()

    def finish(second: Future[Second]) -> None:
        try:
            outcome.set_result(second.result())
        except Exception as error:
            outcome.set_exception(error)

    def go_on(first: Future[First]) -> None:
        # Also an error of sandboxes that have been closed meanwhile.
        try:
            second = then(first.result())
        except Exception as error:
            outcome.set_exception(error)
        else:
            second.add_done_callback(finish)

    first.add_done_callback(go_on)
    return outcome
