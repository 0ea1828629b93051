"""Checks whether a text parses, without running it, in a process with limits of time and memory (`parsers`).

The process is started at the first text and kept for the next ones, so that one costs a tenth of a millisecond.
"""

import atexit
import logging
import os
import signal
import threading
from functools import lru_cache, partial
from pathlib import Path

from dist_lm.sandbox.environment import ENVIRONMENT
from dist_lm.sandbox.parsers import cpu_limit_s
from dist_lm.storage.json_process import JsonProcess

log = logging.getLogger(__name__)

ANSWER_S = 60.0  # wall time; a parser ends after its limit of CPU time
START_S = 60.0
TRIES = 2  # for a text that ends its process: other causes do not end it twice


class _Parser:
    """The process that parses, started when it is needed. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: JsonProcess | None = None

    def error(self, check: str, text: str) -> str | None:
        """Returns what a check of `parsers` says of a text; None: this machine gave no verdict, and a warning says why.

        A text that takes too much time or memory, or ends its process TRIES times, has an error. Empty: the check
        accepts the text. Waits for other threads, and up to ANSWER_S seconds.
        """
        with self._lock:
            for _ in range(TRIES):
                if self._process is None and not self._start():
                    return None
                assert self._process is not None

                try:
                    self._process.send({"check": check, "text": text}, ANSWER_S)
                    answer = self._process.receive(ANSWER_S)
                except TimeoutError as error:
                    log.warning("a parser %s", error)
                    self._end()
                    return None
                except (EOFError, OSError):
                    code = self._process.code()
                    self._end()
                    # The timer of CPU time ends the process by this signal.
                    if code == -signal.SIGPROF:
                        return f"parsing it needs more than {cpu_limit_s(text):.2g} s of CPU time"
                    continue

                if answer["ends"]:
                    self._end()
                return answer["error"]

        return f"parsing it ends the parser (exit code {code})"

    def _start(self) -> bool:
        """Starts the process and returns whether it is ready, within START_S seconds; else a warning says why."""
        environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONSAFEPATH": "1"}
        try:
            self._process = JsonProcess("dist_lm.sandbox.parsers", environment=environment)
            self._process.receive(START_S)
        except (EOFError, OSError, TimeoutError) as error:
            log.warning("no parser starts: %s", error or "it ended")
            self._end()
            return False
        return True

    def _end(self) -> None:
        if self._process:
            self._process.end()
        self._process = None


@lru_cache
def _parser_of(process: int) -> _Parser:
    """Returns the parser of this process: a forked one must not read the answers of its parent's."""
    parser = _Parser()
    atexit.register(parser._end)
    return parser


def _error(check: str, text: str) -> str | None:
    return _parser_of(os.getpid()).error(check, text)


python_error = partial(_error, "python_error")
bash_error = partial(_error, "bash_error")
BEFORE_ERRORS = {"python": python_error, "bash": bash_error, "sql": partial(_error, "sql_grammar_error")}
"""Language -> function of code that returns why it cannot be read, empty if it can; None: no verdict."""
TEST_ERRORS = BEFORE_ERRORS | {"sql": partial(_error, "sql_test_error")}
PARSERS = {"python": "python_error", "bash": "bash_error", "sql": "sql_error"}


def parses(language: str, text: str) -> bool | None:
    """Returns whether `text` parses as `language`, within limits of time and memory; beyond them it does not.

    Python must be a module; `bash -n` must accept Bash; SQLite must compile every statement, given the tables that
    earlier ones create. None for a language without a parser here, or if this machine gave no verdict.
    """
    if language not in PARSERS:
        return None
    error = _error(PARSERS[language], text)
    if error is None:
        return None
    return not error


def parses_continued(language: str, prompt: str, completion: str, finished: bool) -> bool | None:
    """Returns whether prompt and completion parse as one text; None as in `parses`. A last line that was cut off is
    removed first.

    False for a completion that was cut off in its first line: only the prompt would be left.

    Args:
        finished: whether the completion was not cut off.
    """
    if language in PARSERS and not finished and "\n" not in completion:
        return False
    return parses(language, whole_lines(prompt + completion, finished))


def whole_lines(text: str, finished: bool) -> str:
    """Returns `text` without its last line, if generation was cut off in that line (`finished` is False)."""
    if finished or "\n" not in text:
        return text
    return text[: text.rindex("\n") + 1]
