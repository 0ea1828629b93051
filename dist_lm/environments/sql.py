"""SQL (SQLite) over a database that the model can only query: it explores by calls, then answers with a query.

A task has the columns

    prompt     a text, or turns
    database   statements that make the tables; the model never sees them
    query      the reference
    tables     optional: tables with drawn rows (as `hidden` of `dist_lm.sandbox.inputs` has them), further databases
               on which the rows must agree; without them the rows of `database` as a constant are an answer, which
               a model can find by its calls

Every call and the answer run on a new copy of the database. The answer is the first fenced block of the model's last
turn, else all of it. The reward is 1 if its rows equal those of the reference, in any order unless the reference sorts
them; they are compared outside the sandbox.
"""

import re
from collections import Counter

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
from dist_lm.environments.sandboxes import SharedSandboxes
from dist_lm.errors import UserError
from dist_lm.sandbox.hidden import Hidden
from dist_lm.sandbox.inputs import hidden_of
from dist_lm.sandbox.program import Program, Test
from dist_lm.sandbox.program import Verdict as TestVerdict
from dist_lm.sandbox.task import code_of

_ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)
TOOL = Tool(
    "sql",
    "Run SQL (SQLite) in a copy of the database and return the rows of the last query. Changes are not kept. The "
    "tables are in sqlite_master.",
    {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)


class HiddenDatabase:
    """An `Environment` of questions to a database."""

    def __init__(self, sandboxes: SharedSandboxes, limits: Limits) -> None:
        self._sandboxes, self._limits = sandboxes, limits
        self._databases: tuple[Test, ...] = ()  # the task's first; further ones are drawn
        self._expected: tuple[str, ...] = ()  # rows of the reference in each
        self._is_sorted = False

    async def reset(self, task: Task) -> Observation:
        data = task.data
        database, query = (_text(data, name) for name in ("database", "query"))
        opening = opening_of(data)

        # Fifteen hexadecimal digits of the digest fit into 64 bits; equal tasks get equal databases.
        self._databases = (Test(before=database), *_drawn(data, query, int(task.digest[:15], 16)))
        reference = await self._sandboxes.verdict(Program("sql", query, self._databases))
        if reference.outcome != "passed":
            raise RefusedTaskError(f"`query` fails on its database: {reference.output[-200:]}")
        if not any(reference.stdout):
            raise RefusedTaskError("`query` gives no rows on its databases: every empty answer would be right")
        self._expected = reference.stdout
        self._is_sorted = _ORDER.search(query) is not None
        return Observation(opening, (TOOL,))

    async def step(self, action: Action) -> Step:
        observation = Observation()
        if action.calls:
            observation = await executed(action.calls, (TOOL,), self._result, self._limits)
            if not action.cut:
                return Step(observation, done=False)

        is_right = False
        if not action.calls and action.cut in (None, LAST_TURN):
            is_right = self._is_right(
                await self._sandboxes.verdict(Program("sql", code_of(action.text), self._databases))
            )
        return Step(observation, done=True, verdict=Verdict.of(float(is_right)))

    async def close(self) -> None:
        self._databases = self._expected = ()

    async def _result(self, call: Call, most_bytes: int) -> Json:
        # A call sees the first database alone, so an answer by heart fails on the others.
        verdict = await self._sandboxes.verdict(Program("sql", call.arguments["query"], self._databases[:1]))
        if verdict.outcome == "passed":
            return {"rows": clipped(verdict.stdout[0], most_bytes - 20)}
        return {"error": clipped(verdict.output if verdict.outcome == "failed" else verdict.outcome, most_bytes - 20)}

    def _is_right(self, verdict: TestVerdict) -> bool:
        if verdict.outcome != "passed":
            return False
        pairs = zip(verdict.stdout, self._expected, strict=True)
        if self._is_sorted:
            return all(rows == expected for rows, expected in pairs)
        # Unordered rows are a multiset: a row that occurs twice must occur twice.
        return all(Counter(rows.splitlines()) == Counter(expected.splitlines()) for rows, expected in pairs)


def _drawn(data: dict[str, Json], query: str, key: int) -> tuple[Test, ...]:
    """Returns further databases, drawn as `tables` of the task says.

    Raises:
        RefusedTaskError: `tables` has another form.
    """
    if "tables" not in data:
        return ()
    try:
        hidden: Hidden = hidden_of("sql", {"solution": query, "tables": data["tables"]})
    except UserError as error:
        raise RefusedTaskError(f"`tables`: {error}") from None
    return tuple(Test(before=case.before) for case in hidden.cases(key))


def _text(data: dict[str, Json], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RefusedTaskError(f"`{name}`: expected statements of SQL")
    return value
