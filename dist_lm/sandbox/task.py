"""Reads tasks: a request for code in words, and the tests that its answer must pass. As fields of a JSON line:

{"prompt": "Write add(a, b).", "language": "python", "tests": ["assert add(1, 2) == 3", {"stdin": "4", "stdout": "8"}]}

The field `hidden` adds tests with drawn inputs (`dist_lm.sandbox.inputs`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dist_lm.errors import UserError
from dist_lm.sandbox.hidden import Hidden
from dist_lm.sandbox.inputs import hidden_of
from dist_lm.sandbox.program import LANGUAGES, NAMES, Program, Test
from dist_lm.sandbox.syntax import BEFORE_ERRORS, TEST_ERRORS
from dist_lm.sandbox.weak_tests import only_defines

# CommonMark 0.31, section 4.5: the closing fence is indented like the opening one, or by at most three spaces
_FENCED = re.compile(r"^([ \t]*)(`{3,})[^\n`]*\n(.*?)(?:^(?:\1| {0,3})\2|\Z)", re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", re.MULTILINE)
_PARTS = tuple(Test.__dataclass_fields__)


@dataclass(frozen=True)
class Task:
    """Language and tests of an answer."""

    language: str
    tests: tuple[Test, ...]
    hidden: Hidden | None = None  # tests beside `tests`, drawn for each sampling of the prompt; None: there are none

    def program(self, answer: str) -> Program:
        """Returns the code of an answer with the fixed tests."""
        return Program(self.language, code_of(answer), self.tests)


def code_of(answer: str) -> str:
    """Returns the first fenced block of an answer, without the indentation of its fence, else all of the answer.

    A block that is not closed reaches to the end. A fence that is indented by more than three spaces counts only in
    a list; elsewhere it is text, as in a docstring.
    """
    first_item = _ITEM.search(answer)
    for block in _FENCED.finditer(answer):
        is_in_list = first_item is not None and first_item.end() <= block.start()
        if len(block[1].expandtabs(4)) <= 3 or is_in_list:
            return re.sub(rf"^[ \t]{{0,{len(block[1])}}}", "", block[3], flags=re.MULTILINE)
    return answer


def task_of(values: Mapping[str, Any], readable: bool = False) -> Task:
    """Returns the task in the fields `language`, `tests` and optionally `before` (code before every test's own) and
    `hidden`.

    Args:
        readable: whether the tests were checked in their language earlier; this saves a process for each test of Bash.

    Raises:
        UserError: says which field is missing or wrong, or which test cannot be read or has an unknown part.
    """
    language, test_values, before = values.get("language"), values.get("tests"), values.get("before", "")
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; expected {', '.join(LANGUAGES)}")
    if not isinstance(test_values, list) or not test_values:
        raise UserError("expected `tests`, a list of code or of objects with " + ", ".join(_PARTS))
    if not isinstance(before, str):
        raise UserError("`before` is no text")

    tests = tuple(_test(value, before) for value in test_values)
    if not readable:
        refuse_broken(language, tests)
    hidden = hidden_of(language, values["hidden"]) if "hidden" in values else None
    return Task(language, tests, hidden)


def refuse_broken(language: str, tests: Sequence[Test]) -> None:
    """Refuses tests whose code does not parse, because no program passes them. In Python it also refuses a test without
    `stdout` whose code only defines functions or classes, because every program passes it.

    The code is parsed, never executed. Other tests that check nothing are accepted, such as an empty one. If the parser
    gives no verdict on this machine, no code is refused as unreadable.

    Args:
        language: one of `LANGUAGES`.

    Raises:
        UserError: for the first bad test; it quotes the code and says why.
        SyntaxError: Python code does not parse, and the parser gave no verdict.
    """
    for test in tests:
        for part, error_of in ((test.before, BEFORE_ERRORS[language]), (test.code, TEST_ERRORS[language])):
            if part and (reason := _error(error_of, part)):
                raise UserError(f"test {part!r:.100} is no {NAMES[language]}, so no program passes it: {reason}")
        if language == "python" and test.code and test.stdout is None and only_defines(test.code):
            raise UserError(
                f"test {test.code!r:.100} defines functions and calls none, so every program passes it: call them"
            )


@lru_cache(10_000)
def _error(error_of: Callable[[str], str | None], part: str) -> str | None:
    """Caches the errors: many tests share the code before them."""
    return error_of(part)


def _test(value: Any, before: str) -> Test:
    """Returns a test of a text (its code) or an object; `before` is put in front of the test's own.

    Raises:
        UserError: the value has another form, or expects nothing.
    """
    parts = {"code": value} if isinstance(value, str) else value
    if not isinstance(parts, dict) or not parts or not all(isinstance(text, str) for text in parts.values()):
        raise UserError(f"test {value!r:.100}: expected code, or an object of texts")
    if unknown := [name for name in parts if name not in _PARTS]:
        raise UserError(f"test {value!r:.100}: unknown {', '.join(unknown)}; expected {', '.join(_PARTS)}")
    if not parts.get("code") and "stdout" not in parts:
        raise UserError(f"test {value!r:.100}: expected `code` or `stdout`")

    test = Test(**parts)
    if before:
        return replace(test, before=f"{before}\n{test.before}")
    return test
