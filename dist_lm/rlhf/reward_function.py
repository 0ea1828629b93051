"""A user's reward function in its own process: `python -m dist_lm.rlhf.reward_function SOCKET PACKAGE.MODULE:NAME`.

The process imports the function, then judges batches: it gets all texts of a batch at once, and answers one by one. A
completion on which the function raises, hangs, ends its process or returns no finite number is a `Failure`. After a
hang or an exit the process is started again, for the completions that are left.
"""

import importlib
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_lm.errors import UserError
from dist_lm.rlhf.rules import Alive, Failure, Judged, Score
from dist_lm.storage.json_process import JsonProcess, asked

LOADING_S = 300.0  # limit for importing the function and what it needs
LONGEST_REASON = 300  # characters


class RewardError(UserError):
    """The reward of an iteration cannot be computed."""


class FunctionRule:
    """A `Rule`."""

    def __init__(self, path: str, key: str, timeout_s: float) -> None:
        """Start the process.

        Args:
            path: 'package.module:name' of a function of the text of the user's last turn and the completion's.
            key: the config key, for messages.
            timeout_s: limit of a call in seconds.
        """
        self._path, self._key, self._timeout_s = path, key, timeout_s
        self._process: JsonProcess | None = None
        self._loaded = False
        self._start()

    def __call__(self, judged: Sequence[Judged], alive: Alive) -> Iterator[Score]:
        """The scores.

        Raises:
            RewardError: the function cannot be imported in its process.
        """
        done = 0
        while done < len(judged):
            for score in self._answers(self._ready(alive), judged[done:], alive):
                done += 1
                yield score

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.end()
        self._process, self._loaded = None, False

    @property
    def pid(self) -> int | None:
        """Id of the process; None: the next call starts one."""
        return self._process.pid if self._process else None

    def _start(self) -> JsonProcess:
        path = os.pathsep.join(folder for folder in sys.path if folder)  # the function is found where this process does
        environment = dict(os.environ) | {"PYTHONPATH": path}
        self._process = JsonProcess("dist_lm.rlhf.reward_function", self._path, environment=environment)
        return self._process

    def _ready(self, alive: Alive) -> JsonProcess:
        process = self._process or self._start()
        if not self._loaded:
            try:
                reason = process.receive(LOADING_S, _calling(alive)).get("refused")
            except TimeoutError:
                reason = f"importing it takes longer than {LOADING_S:.0f} s"
            except (EOFError, OSError, ValueError):
                reason = f"importing it ended the process (exit code {process.code()})"
            if reason:
                self.close()
                raise RewardError(f"{self._key}={self._path}: {reason}")
            self._loaded = True
        return process

    def _answers(self, process: JsonProcess, judged: Sequence[Judged], alive: Alive) -> Iterator[Score]:
        """The scores up to the first completion that costs the process."""
        answered = 0
        try:
            process.send({"judged": [[one.request, one.completion] for one in judged]}, self._timeout_s)
            while answered < len(judged):
                score = _score(process.receive(self._timeout_s, _calling(alive)))
                answered += 1
                yield score
            return
        except TimeoutError as error:
            reason = str(error)
        except (EOFError, OSError, ValueError):
            reason = f"ended its process (exit code {process.code()})"
        finally:
            if answered < len(judged):  # the process works on texts whose scores nobody would read
                self.close()
        yield Failure(reason)


def _calling(alive: Alive) -> Callable[[], bool]:
    def interrupted() -> bool:
        alive()
        return False

    return interrupted


def _score(answer: dict[str, Any]) -> Score:
    value = answer.get("value")
    if isinstance(value, float) and math.isfinite(value):
        return value
    return Failure(str(answer.get("failure", f"answered {answer!s:.{LONGEST_REASON}}")))


# --- in the process ---


def main() -> None:
    """Import the function and judge batches until the parent ends."""
    with asked() as (requests, send):
        module, _, name = sys.argv[2].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except BaseException as error:  # importing may raise anything, SystemExit included
            send({"refused": f"{type(error).__name__}: {error}"})
            return
        send({"loaded": name})
        while True:
            for prompt, completion in requests.get()["judged"]:
                send(answer(function, prompt, completion))


def answer(function: Callable[[str, str], Any], prompt: str, completion: str) -> dict[str, Any]:
    """`{"value": number}`, or `{"failure": why}` if the function raises or returns no finite number."""
    try:
        value = function(prompt, completion)
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return {"value": float(value)}
        return {"failure": f"returned {value!r:.{LONGEST_REASON}}; expected a finite number"}
    except (Exception, SystemExit) as error:
        return {"failure": f"{type(error).__name__}: {error}"[:LONGEST_REASON] + _place(error)}


def _place(error: BaseException) -> str:
    """The deepest line of the function's own file that the error went through; empty: it did not reach the function."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without `answer`
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name} line {own[-1].lineno})" if own else ""


if __name__ == "__main__":
    main()
