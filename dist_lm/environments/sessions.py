"""A Python or a Bash session in the sandbox: the model works in several turns, then answers in words.

A task has the columns

    prompt   a text, or turns
    answer   a text, or a list of accepted ones
    files    optional: name -> text, which lie in the session's folder

The reward is 1 if the last line of the model's answer is one of `answer` (blanks around it and a full stop at its end
are ignored), else 0. It is compared outside the sandbox: no code of the model sees an answer or a verdict.
"""

import json
import shlex
import time
from collections.abc import Mapping

from dist_lm.chat.messages import Call, Json, Tool
from dist_lm.environments.columns import opening_of
from dist_lm.environments.protocol import (
    LAST_TURN,
    Action,
    Limits,
    Observation,
    RefusedTaskError,
    Step,
    Task,
    Verdict,
)
from dist_lm.environments.results import clipped, executed
from dist_lm.environments.sandboxes import OWN_SLACK_S, SharedSandboxes, seconds_of_turn
from dist_lm.sandbox.session import PooledSession, SessionLanguage, Turn

NO_TIME = "not run: no time is left"


class SandboxSession:
    """Base of both languages."""

    language: SessionLanguage
    tool: Tool

    def __init__(self, sandboxes: SharedSandboxes, limits: Limits) -> None:
        self._sandboxes, self._limits = sandboxes, limits
        self._session: PooledSession | None = None
        self._answers: tuple[str, ...] = ()
        self._spent_s = self._spent_in_step_s = 0.0  # time of calls, without what was run again

    @property
    def seconds_again(self) -> float:
        """How long the session has run its code again, because its sandbox had ended."""
        return self._session.seconds_again if self._session else 0.0

    async def reset(self, task: Task) -> Observation:
        data = task.data
        # A bad task is refused before a session is begun for it.
        self._answers = answers_of(data)
        opening = opening_of(data)

        await self.close()
        self._spent_s = 0.0
        self._session = self._sandboxes.session(self.language, self._limits)
        if files := data.get("files"):
            await self._write(files)
        return Observation(opening, (self.tool,))

    async def step(self, action: Action) -> Step:
        observation = Observation()
        self._spent_in_step_s = 0.0
        if action.calls:
            observation = await executed(action.calls, (self.tool,), self._result, self._limits)
            if not action.cut:
                return Step(observation, done=False)

        # A turn with calls answers nothing, and one that was cut off has no last line.
        is_whole = not action.calls and action.cut in (None, LAST_TURN)
        is_right = is_whole and last_line(action.text) in self._answers
        return Step(observation, done=True, verdict=Verdict.of(float(is_right)))

    async def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    async def _result(self, call: Call, most_bytes: int) -> Json:
        assert self._session is not None, "reset comes first"
        # Code that sleeps, call after call, would end the conversation without a verdict.
        limits, turn_s = self._limits, seconds_of_turn(self._limits)
        is_late = self._spent_in_step_s + turn_s > limits.seconds_a_step + OWN_SLACK_S
        if is_late or self._spent_s + turn_s > limits.seconds:
            return {"error": NO_TIME}

        begin, again_s = time.monotonic(), self.seconds_again
        turn = await self._sandboxes.turn(self._session, call.arguments["code"])
        spent_s = time.monotonic() - begin - (self.seconds_again - again_s)
        self._spent_s, self._spent_in_step_s = self._spent_s + spent_s, self._spent_in_step_s + spent_s
        return result_of(turn, most_bytes, self.language == "python")

    async def _write(self, files: Json) -> None:
        """Writes the files of the task into the session's folder.

        Raises:
            RefusedTaskError: `files` has another form, or a file cannot be written.
        """
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise RefusedTaskError("`files`: expected an object of texts")
        assert self._session is not None
        for name, text in files.items():
            turn = await self._sandboxes.turn(self._session, self.writing(name, text))
            if not turn.is_right:
                raise RefusedTaskError(f"`files`: {name!r:.100} cannot be written: {turn.output[-200:]}")

    def writing(self, name: str, text: str) -> str:
        """Returns code that writes a file."""
        raise NotImplementedError


class PythonSession(SandboxSession):
    """A session of Python: variables and files stay from turn to turn."""

    language = "python"
    tool = Tool(
        "python",
        "Run Python code and return what it prints, and the value of its last expression. Variables and files stay "
        "for the next call. It has the standard library, and no network.",
        {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    )

    def writing(self, name: str, text: str) -> str:
        # The names are deleted again: the model finds no variables of ours.
        return f"with open({name!r}, 'w', newline='') as _file:\n    _ = _file.write({text!r})\ndel _file, _"


class BashSession(SandboxSession):
    """A session of Bash: files stay from turn to turn, each turn is a shell of its own."""

    language = "bash"
    tool = Tool(
        "bash",
        "Run a Bash script in the folder /tmp and return what it prints. Files stay for the next call, variables do "
        "not. There is no network.",
        {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    )

    def writing(self, name: str, text: str) -> str:
        return f"printf %s {shlex.quote(text)} > {shlex.quote('./' + name)}"


def result_of(turn: Turn, most_bytes: int, has_variables: bool) -> dict[str, Json]:
    """Returns what the model is told of a turn: its output, and how it ended unless it came to its end with 0."""
    result: dict[str, Json] = {}
    if turn.outcome == "lost":
        result["error"] = "the session ended; files and variables are lost"
    elif turn.outcome != "ended":
        limit = {"timeout": "time", "output": "output"}[turn.outcome]
        result["error"] = f"stopped at the limit of {limit}"
    elif turn.exit_code:
        result["exit_code"] = turn.exit_code
    if turn.is_fresh and has_variables and turn.outcome != "lost":
        result["note"] = "variables are lost"
    size = len(json.dumps(result))
    return {"output": clipped(turn.output, most_bytes - size - 20), **result}


def answers_of(data: Mapping[str, Json]) -> tuple[str, ...]:
    """Returns the accepted answers of a task, as `last_line` gives them.

    Raises:
        RefusedTaskError: there is none.
    """
    answer = data.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(text, str) for text in answers):
        raise RefusedTaskError("`answer`: expected a text, or a list of accepted ones")
    lines = tuple(last_line(text) for text in answers)
    if "" in lines:
        raise RefusedTaskError("`answer` is empty: every empty answer would be right")
    return lines


def last_line(text: str) -> str:
    """Returns the last line that is not blank, without blanks around it and a full stop at its end."""
    lines = text.strip().splitlines()
    return lines[-1].strip().removesuffix(".").rstrip() if lines else ""
