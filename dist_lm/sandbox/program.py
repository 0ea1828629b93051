"""Values of the sandbox: programs with tests, limits, verdicts; and how a verdict follows from what a program did."""

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

    __test__ = False  # no test of pytest

    before: str = ""  # code of the same language that runs before the program: helpers, tables
    code: str = (
        ""  # runs after it: Python that raises nothing, Bash that returns 0, an SQL query whose first value is true
    )
    stdin: str = ""
    stdout: str | None = (
        None  # expected, blanks at the ends of lines and of the text ignored; stays outside the sandbox
    )


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
    """What all tests of a program may use together; sizes hold for each test."""

    cpu_s: float = 0.5
    wall_s: float = 4.0  # a test that mostly waited for a core is no timeout but an infrastructure error
    memory_bytes: int = 512 * MIB  # address space of each process; with a cgroup also the memory of all
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
    """What became of a program.

    `infrastructure` says nothing about the program: the sandbox failed, or the machine had no core for it.
    """

    outcome: Outcome
    results: tuple[bool, ...]  # of each test
    stdout: tuple[str, ...]  # of each test
    output: str  # the end of stdout and stderr of the first test that failed, else of the last
    seconds: float
    cpu_seconds: float

    @property
    def passed(self) -> int:
        return sum(self.results)

    @property
    def total(self) -> int:
        return len(self.results)

    @property
    def judged(self) -> bool:
        return self.outcome != "infrastructure"


@dataclass(frozen=True)
class Attempt:
    """What a program did in one test; sent by `dist_lm.sandbox.inside`."""

    ended: int  # DONE, TIMEOUT, OUTPUT, TROUBLE, STARVED
    exit_code: int  # negative: the signal that ended it
    token_seen: bool  # the test's code passed
    cpu_s: float
    wall_s: float
    stdout: str
    stderr_tail: str


_ATTEMPT = struct.Struct("!Bi?ddII")
_SIGKILL = 9
_TAIL = 2_000  # characters


def request_of(program: Program, limits: Limits, folder: str) -> bytes:
    """The request to the server in the sandbox. Expected output is not in it."""
    tests = [{"before": test.before, "code": test.code, "stdin": test.stdin} for test in program.tests]
    request = {"language": program.language, "source": program.source, "tests": tests}
    return marshal.dumps({**request, "limits": vars(limits), "folder": folder})


def attempts_of(answer: bytes) -> list[Attempt]:
    """The attempts of an answer.

    Raises:
        ValueError: it is none.
    """
    attempts, place = [], 0
    while place < len(answer):
        try:
            *values, stdout, tail = _ATTEMPT.unpack_from(answer, place)
        except struct.error as error:
            raise ValueError(f"no answer of a sandbox: {error}") from None
        place += _ATTEMPT.size
        texts = answer[place : place + stdout], answer[place + stdout : place + stdout + tail]
        place += stdout + tail
        attempts.append(Attempt(*values, *(text.decode(errors="replace") for text in texts)))
    return attempts


def verdict_of(program: Program, attempts: Sequence[Attempt]) -> Verdict:
    """The verdict on a program, given an attempt for each test."""
    if len(attempts) != len(program.tests):
        return infrastructure_error(program, f"{len(attempts)} answers for {len(program.tests)} tests")
    results = tuple(_passes(test, one) for test, one in zip(program.tests, attempts, strict=True))
    shown = attempts[results.index(False)] if False in results else attempts[-1]
    outcome: Outcome = "passed"
    if False in results:
        outcome = _cause(shown)
        if any(one.ended in (TROUBLE, STARVED) for one in attempts):
            outcome = "infrastructure"
    return Verdict(
        outcome=outcome,
        results=results,
        stdout=tuple(one.stdout for one in attempts),
        output=(shown.stdout[-_TAIL:] + shown.stderr_tail)[-_TAIL:],
        seconds=sum(one.wall_s for one in attempts),
        cpu_seconds=sum(one.cpu_s for one in attempts),
    )


def infrastructure_error(program: Program, reason: str) -> Verdict:
    """A verdict that says nothing about the program."""
    empty = ("",) * len(program.tests)
    return Verdict("infrastructure", (False,) * len(program.tests), empty, reason, 0.0, 0.0)


def _passes(test: Test, attempt: Attempt) -> bool:
    if attempt.ended != DONE or attempt.exit_code != 0 or (test.code and not attempt.token_seen):
        return False
    return test.stdout is None or _lines(test.stdout) == _lines(attempt.stdout)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _cause(attempt: Attempt) -> Outcome:
    """Why an attempt failed."""
    if attempt.ended in (TIMEOUT, OUTPUT):
        return "timeout" if attempt.ended == TIMEOUT else "output"
    out_of_memory = attempt.exit_code == -_SIGKILL or "MemoryError" in attempt.stderr_tail.rpartition("\n  ")[2]
    return "memory" if out_of_memory else "failed"
