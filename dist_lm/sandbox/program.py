"""Defines programs with tests, limits and verdicts, and derives a verdict from what a program did."""

import marshal
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from dist_lm.errors import require
from dist_lm.sandbox.watched import DONE, OUTPUT, STARVED, TIMEOUT, TROUBLE

Language = Literal["python", "bash", "sql"]
LANGUAGES: tuple[Language, ...] = ("python", "bash", "sql")
NAMES: dict[str, str] = {"python": "Python", "bash": "Bash", "sql": "SQL (SQLite)"}
Outcome = Literal["passed", "failed", "timeout", "memory", "output", "infrastructure"]
MIB = 1 << 20


@dataclass(frozen=True)
class Test:
    """One run of a program. It passes if the program ends with 0, and `code` and `stdout` agree.

    Nothing of one test is left for the next: each is a process of its own with an empty /tmp.
    """

    __test__ = False  # tells pytest that this class is no test

    before: str = ""  # code of the same language that runs before the program: helpers, tables
    # Code that runs after the program: Python that raises nothing, Bash that returns 0, SQL whose first value is true.
    code: str = ""
    given: str = ""  # Python that the code of the test relies on, from the task: an answer cannot redefine it
    # Name of Python's own, or of a standard command, that the program is to define; a test has others from the system.
    entry: str = ""
    writes: str = ""  # names of SQL tables, in front of the program, that it may change; others stay as they are
    stdin: str = ""
    # Expected output; blanks at the ends of lines and of the text are ignored. It stays outside the sandbox.
    stdout: str | None = None


@dataclass(frozen=True)
class Program:
    """Untrusted source text with its tests."""

    language: str  # one of LANGUAGES
    source: str
    tests: tuple[Test, ...] = (Test(),)

    def __post_init__(self) -> None:
        require(self.language in LANGUAGES, "language", self.language, " | ".join(LANGUAGES))
        require(bool(self.tests), "tests", self.tests, "at least one test")


@dataclass(frozen=True)
class Limits:
    """Seconds that all tests of a program may use in sum; sizes and counts hold for each test."""

    cpu_s: float = 0.5
    wall_s: float = 4.0  # a test that mostly waited for a core is no timeout but an infrastructure error
    memory_bytes: int = 512 * MIB  # address space of each process; with a cgroup also the memory of all processes
    processes: int = 16
    file_bytes: int = 16 * MIB
    tmp_bytes: int = 32 * MIB
    output_bytes: int = 256 * 1024
    files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(value > 0, f"limits.{name}", value, "more than 0")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program's tests.

    `infrastructure` says nothing about the program: the sandbox failed, or the machine had no core for it.
    """

    outcome: Outcome
    results: tuple[bool, ...]  # whether each test passed
    stdout: tuple[str, ...]  # output of each test
    output: str  # the end of stdout and stderr of the first test that failed, or of the last test
    seconds: float  # wall time of all tests
    cpu_seconds: float  # all tests

    @property
    def passed(self) -> int:
        """Number of tests that passed."""
        return sum(self.results)

    @property
    def total(self) -> int:
        """Number of tests."""
        return len(self.results)

    @property
    def judged(self) -> bool:
        """Whether the verdict says anything about the program."""
        return self.outcome != "infrastructure"


@dataclass(frozen=True)
class Attempt:
    """Facts about a program in one test; sent by `dist_lm.sandbox.inside`."""

    ended: int  # DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED
    exit_code: int  # negative: minus the signal that ended it
    code_passed: bool
    cpu_s: float
    wall_s: float
    stdout: str
    stderr_tail: str


HIDDEN = ("code", "given", "entry")  # parts of a test that its program never sees

_ATTEMPT = struct.Struct("!Bi?ddII")
_SIGKILL = 9
_TAIL = 2_000  # characters


def request_of(program: Program, limits: Limits, folder: str) -> tuple[bytes, bytes]:
    """Returns the request to the server in the sandbox, and what only the judge may read (empty: nothing).

    Expected output is in neither. Both are in the format of `marshal`.

    Args:
        folder: working directory of the program in the sandbox.

    The process that runs the program is forked from one that read the request, and may search its memory.
    """
    tests = [_parts(test, HIDDEN) for test in program.tests]
    request = {"language": program.language, "source": program.source, "tests": tests}
    request |= {"judged": [bool(test.code) for test in program.tests]}
    for_judge = marshal.dumps([_parts(test, ()) for test in program.tests]) if any(request["judged"]) else b""
    return marshal.dumps({**request, "limits": vars(limits), "folder": folder}), for_judge


def _parts(test: Test, hidden: Sequence[str]) -> dict[str, str]:
    """Returns the parts of a test; those that are hidden are empty, and the expected output is left out."""
    return {name: "" if name in hidden else text for name, text in vars(test).items() if name != "stdout"}


def attempts_of(answer: bytes) -> list[Attempt]:
    """Returns the attempts in an answer of the server, one per test; bytes that are no UTF-8 become U+FFFD.

    Raises:
        ValueError: `answer` is not what a server sends.
    """
    attempts = []
    offset = 0
    while offset < len(answer):
        try:
            *facts, stdout_bytes, tail_bytes = _ATTEMPT.unpack_from(answer, offset)
        except struct.error as error:
            raise ValueError(f"no answer of a sandbox: {error}") from None
        offset += _ATTEMPT.size

        stdout = answer[offset : offset + stdout_bytes]
        offset += stdout_bytes
        stderr_tail = answer[offset : offset + tail_bytes]
        offset += tail_bytes
        texts = (output.decode(errors="replace") for output in (stdout, stderr_tail))
        attempts.append(Attempt(*facts, *texts))
    return attempts


def verdict_of(program: Program, attempts: Sequence[Attempt]) -> Verdict:
    """Returns the verdict on a program, given an attempt for each test; its outcome is that of the first test that
    failed.

    Another number of attempts, or a test that had no core or never began, gives the outcome `infrastructure`. Seconds
    are sums over the tests.
    """
    if len(attempts) != len(program.tests):
        return infrastructure_error(program, f"{len(attempts)} answers for {len(program.tests)} tests")

    results = tuple(_passes(test, attempt) for test, attempt in zip(program.tests, attempts, strict=True))
    quoted = attempts[-1]
    outcome: Outcome = "passed"
    if False in results:
        quoted = attempts[results.index(False)]
        # A test without a core, or one that never began, leaves open whether the program is right.
        is_judged = all(attempt.ended not in (TROUBLE, STARVED) for attempt in attempts)
        outcome = _cause(quoted) if is_judged else "infrastructure"

    return Verdict(
        outcome=outcome,
        results=results,
        stdout=tuple(attempt.stdout for attempt in attempts),
        output=(quoted.stdout[-_TAIL:] + quoted.stderr_tail)[-_TAIL:],
        seconds=sum(attempt.wall_s for attempt in attempts),
        cpu_seconds=sum(attempt.cpu_s for attempt in attempts),
    )


def infrastructure_error(program: Program, reason: str) -> Verdict:
    """Returns a verdict that says nothing about the program."""
    num_tests = len(program.tests)
    return Verdict("infrastructure", (False,) * num_tests, ("",) * num_tests, reason, 0.0, 0.0)


def _passes(test: Test, attempt: Attempt) -> bool:
    if attempt.ended != DONE or attempt.exit_code != 0 or (test.code and not attempt.code_passed):
        return False
    return test.stdout is None or _lines(test.stdout) == _lines(attempt.stdout)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _cause(attempt: Attempt) -> Outcome:
    """Returns why an attempt failed: timeout, output, memory or failed."""
    if attempt.ended == TIMEOUT:
        return "timeout"
    if attempt.ended == OUTPUT:
        return "output"

    # The kernel kills a program that exceeds its cgroup; Python raises where the address space ends. The last line of
    # a traceback is not indented, and a program may print the word before it.
    if attempt.exit_code == -_SIGKILL or "MemoryError" in attempt.stderr_tail.rpartition("\n  ")[2]:
        return "memory"
    return "failed"
