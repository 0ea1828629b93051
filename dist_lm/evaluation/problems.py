"""Reads programming problems with tests: our own 150, and published files of HumanEval, MBPP and MultiPL-E.

A problem has a prompt, the beginning of a program. A base model continues it up to a stop text; a chat model is asked
for it and answers with a block of code. The program runs in the sandbox only.

Our own problems have hidden tests beside the fixed ones (`problem_inputs`). Published problems keep their tests.
"""

import builtins
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from dist_lm.errors import ConfigError, UserError
from dist_lm.evaluation.problem_inputs import HIDDEN_TESTS, case_of
from dist_lm.sandbox.hidden import Hidden
from dist_lm.sandbox.program import NAMES, Language, Program, Test
from dist_lm.sandbox.syntax import parses
from dist_lm.sandbox.task import code_of, refuse_broken
from dist_lm.sandbox.weak_tests import note_of_weak

log = logging.getLogger(__name__)

PYTHON_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\nassert ", "\n```")
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. 2021
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n```")  # bigcode's harness has the same
OWN_STOPS: dict[Language, tuple[str, ...]] = {"python": PYTHON_STOPS, "bash": ("\n}",), "sql": (";",)}
MULTIPL_E: dict[str, Language] = {"py": "python", "sh": "bash"}  # languages of the sandbox


@dataclass(frozen=True)
class Problem:
    """A program to write."""

    id: str
    language: Language
    prompt: str  # beginning of the program
    tests: tuple[Test, ...]
    solution: str  # code that completes the prompt; empty: unknown
    stop: tuple[str, ...]  # texts that end a completion; not part of it
    closing: str = ""  # code put behind a completion that a stop text ended
    suffix: str | None = None  # code behind the completion, for filling in the middle
    # An answer of a chat model that holds one of these texts repeats the prompt from the first one on.
    entries: tuple[str, ...] = ()
    level: int = 0  # for our own problems: 1 is the easiest
    task: str = ""  # request to a chat model; empty: to complete the prompt
    hidden: Hidden | None = None  # tests beside `tests`, drawn for each run; None: there are none

    @property
    def question(self) -> str:
        """Text of the request to a chat model: the task, or to complete the prompt; it asks for one block of code."""
        name = NAMES[self.language]
        if self.task:
            return f"{self.task}\n\nAnswer with one block of {name} code."
        return (
            f"Complete this {name} program. Answer with the whole program in one block of code.\n\n"
            f"```{self.language}\n{self.prompt.rstrip()}\n```"
        )

    def completed(self, completion: str, stopped: bool = True) -> Program:
        """Returns the program of a base model. `stopped` says whether a stop text ended the completion."""
        closing = self.closing if stopped else ""
        return Program(self.language, f"{self.prompt}{completion}{closing}{self.suffix or ''}", self.tests)

    def answered(self, answer: str) -> Program:
        """Returns the program of a chat model: its first block of code, or else all of its answer.

        Code that does not repeat the prompt completes it, with `closing` unless it ends with that.
        """
        code = code_of(answer)
        if not self.entries:
            return Program(self.language, code, self.tests)

        # The answer repeats the function, but perhaps not the imports before it.
        if any(entry in code for entry in self.entries):
            head = self.prompt[: max(self.prompt.find(self.entries[0]), 0)]
            return Program(self.language, head + code, self.tests)

        closing = "" if code.rstrip().endswith(self.closing.strip()) else self.closing
        prompt = self.prompt if self.prompt.endswith("\n") else f"{self.prompt}\n"
        return Program(self.language, f"{prompt}{code}{closing}", self.tests)


def own_problems(language: Language) -> list[Problem]:
    """Returns our own 50 problems of a language, the easiest first."""
    text = files("dist_lm.evaluation").joinpath("problems", f"{language}.jsonl").read_text(encoding="utf-8")
    return [_own(language, json.loads(line)) for line in text.splitlines()]


def _own(language: Language, line: Mapping[str, Any]) -> Problem:
    """Returns the problem of a line of our own benchmark, a mapping with id (`LANGUAGE/NAME`), prompt, solution, tests
    and level.

    Its `hidden` is None if no test cases can be drawn for the problem.
    """
    name = line["id"].partition("/")[2]
    entries = {"python": (f"def {name}(",), "bash": _functions(name), "sql": ("SELECT", "select", "Select")}[language]
    closing = {"python": "", "bash": "\n}\n", "sql": ";\n"}[language]
    entry = name if language == "bash" else ""
    hidden = None
    if draw := case_of(language, name, line["prompt"]):
        hidden = Hidden(language, line["prompt"] + line["solution"], draw, entry, HIDDEN_TESTS[language])

    return Problem(
        id=line["id"],
        language=language,
        prompt=line["prompt"],
        tests=tuple(Test(**test, entry=entry) for test in line["tests"]),
        solution=line["solution"],
        stop=OWN_STOPS[language],
        closing=closing,
        entries=entries,
        level=line["level"],
        hidden=hidden,
    )


def _functions(name: str) -> tuple[str, ...]:
    """Returns the ways in which the function `name` may begin in Bash."""
    return f"{name}()", f"{name} ()", f"function {name}"


def own_infills() -> list[Problem]:
    """Returns our Python problems whose solution has several lines, each with the middle line of it left out: the
    answer is the rest of that line behind its indentation, and the lines after it are the suffix."""
    infills = []
    for problem in own_problems("python"):
        lines = problem.solution.splitlines(keepends=True)
        if len(lines) < 2:
            continue

        # The indentation of the missing line belongs to the prompt.
        index = len(lines) // 2
        line = lines[index]
        indent = len(line) - len(line.lstrip())
        infills.append(
            replace(
                problem,
                id=problem.id.replace("python/", "infill/"),
                prompt=problem.prompt + "".join(lines[:index]) + line[:indent],
                solution=line[indent:].rstrip("\n"),
                suffix="\n" + "".join(lines[index + 1 :]),
                stop=("\n",),
            )
        )
    return infills


# --- published files ---


def humaneval(path: Path) -> list[Problem]:
    """Reads HumanEval.jsonl or HumanEval.jsonl.gz (Chen et al. 2021) and returns its problems.

    Raises:
        ConfigError: `path` is not such a file, or a test cannot be read.
    """

    def read(line: Mapping[str, Any]) -> Problem:
        """Returns a problem of a line of the file.

        Raises:
            UserError: the test checks nothing, or the prompt lacks the function.
        """
        name = line["entry_point"]
        if not re.search(r"\bcheck\b", line["test"]):
            raise UserError("`test` defines no function `check`, which is called with the entry point")
        if name not in line["prompt"]:
            raise UserError(f"entry_point is {name}, which `prompt` does not begin")
        # The test may rely on names that the prompt defines before the function: an answer must not replace them.
        test = Test(
            code=f"{line['test']}\ncheck({name})\n", given=_given(line["prompt"], name), entry=_built_in(f"def {name}(")
        )
        solution = line["canonical_solution"]
        return Problem(
            line["task_id"], "python", line["prompt"], (test,), solution, HUMANEVAL_STOPS, entries=(f"def {name}(",)
        )

    return _read("eval.humaneval", path, read)


def mbpp(path: Path) -> list[Problem]:
    """Reads mbpp.jsonl or sanitized-mbpp.json (Austin et al. 2021) and returns its problems.

    The prompt is a comment with text and tests.

    Raises:
        ConfigError: `path` is not such a file, or a test cannot be read.
    """

    def read(line: Mapping[str, Any]) -> Problem:
        """Returns a problem of a line of the file.

        Raises:
            UserError: it has no tests.
        """
        text = line.get("text") or line["prompt"]
        setup = "\n".join(line.get("test_imports", ())) or line.get("test_setup_code", "")
        asserts = "\n".join(line["test_list"])
        if not asserts.strip():
            raise UserError("test_list is empty, so every program would pass")

        # The setup comes after the program, because some setups use its classes.
        test = Test(code=f"{setup}\n{asserts}\n", entry=_built_in(line["code"]))
        return Problem(
            f"MBPP/{line['task_id']}",
            "python",
            f'"""\n{text}\n{asserts}\n"""\n',
            (test,),
            line["code"],
            MBPP_STOPS,
            task=f"{text}\nYour code should pass these tests:\n\n{asserts}",
        )

    return _read("eval.mbpp", path, read)


def _given(prompt: str, name: str) -> str:
    """Returns the code of a prompt before its function `name`; empty where that is no module, as inside a class."""
    preamble, _, _ = f"\n{prompt}".rpartition(f"\ndef {name}(")
    return preamble if parses("python", preamble) else ""


def _built_in(code: str) -> str:
    """Returns the first built-in name that `code` defines as a function, as MBPP/126 does `sum`; empty: none."""
    names = re.findall(r"^def (\w+)\(", code, re.MULTILINE)
    return next((name for name in names if hasattr(builtins, name)), "")


def multipl_e(path: Path) -> list[Problem]:
    """Reads a file of MultiPL-E (Cassano et al. 2022) with programs in Python or Bash and returns its problems.

    Raises:
        ConfigError: `path` is not such a file, its programs are in another language, or a test cannot be read.
    """

    def read(line: Mapping[str, Any]) -> Problem:
        """Returns a problem of a line of the file.

        Raises:
            UserError: another language.
        """
        if line["language"] not in MULTIPL_E:
            raise UserError(f"language {line['language']}: the sandbox runs {' and '.join(MULTIPL_E)}")
        language = MULTIPL_E[line["language"]]

        # The function to complete is the last one of the prompt.
        entries: tuple[str, ...] = ()
        preamble = name = ""
        if names := re.findall(r"^(?:def (\w+)\(|(\w+)\(\))", line["prompt"], re.MULTILINE):
            name = names[-1][0] or names[-1][1]
            entries = (f"def {name}(",) if language == "python" else _functions(name)
            preamble = _given(line["prompt"], name) if language == "python" else ""

        # Tests in Bash close the function that a stop text left open.
        tests = line["tests"].lstrip()
        closing = "\n}\n" if tests.startswith("}") else ""
        entry = name if language == "bash" else ""
        test = Test(code=tests.removeprefix("}") + "\n", given=preamble, entry=entry)
        stops = tuple(line["stop_tokens"])
        return Problem(line["name"], language, line["prompt"], (test,), "", stops, closing, entries=entries)

    return _read("eval.multipl_e", path, read)


def _read(key: str, path: Path, read: Callable[[Mapping[str, Any]], Problem]) -> list[Problem]:
    """Returns the problems of a file, in its order, and warns in the log of tests that a constant answer passes.

    Args:
        key: config key of the file, for messages.
        read: makes a problem of a JSON object; its UserErrors and KeyErrors name the fault.

    Raises:
        ConfigError: names the key, the file, the line, and the fault.
    """
    problems: dict[str, Problem] = {}
    current_line = ""
    try:
        for line_name, line in _lines(path):
            current_line = line_name
            problem = read(json.loads(line) if isinstance(line, str) else line)
            if not any((test.code if test.stdout is None else test.stdout).strip() for test in problem.tests):
                raise UserError("it has no tests, so every program would pass")
            refuse_broken(problem.language, problem.tests)
            if problem.id in problems:
                raise UserError(f"{problem.id} occurs twice; expected problems with different ids")
            problems[problem.id] = problem
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror or error})") from error
    except UserError as error:
        raise ConfigError(f"{key}={path}{current_line}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{key}={path}{current_line}: not the published format: no field {error}") from error
    except (ValueError, TypeError, AttributeError, EOFError, zlib.error) as error:  # gzip raises the last two
        raise ConfigError(
            f"{key}={path}{current_line}: not the published format ({type(error).__name__}: {error})"
        ) from error

    if not problems:
        raise ConfigError(f"{key}={path}: expected problems; the file has none")
    if note := note_of_weak({problem.id: (problem.language, problem.tests) for problem in problems.values()}):
        log.warning("%s=%s: %s", key, path, note)
    return [*problems.values()]


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (place in the file for messages, problem) for each problem.

    A problem is a line of JSON as text, or a parsed value of the list that the file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8 or no JSON; EOFError or zlib.error: no gzip.
    """
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    if text.lstrip().startswith("["):
        yield from ((f" entry {number}", problem) for number, problem in enumerate(json.loads(text), 1))
        return

    # No splitlines: JSON may hold U+2028 as it is.
    yield from ((f" line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
