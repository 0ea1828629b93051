"""A ladder of tiny tasks with tests, from one operation to three, for rewards of kind `tests` on a small model.

    python -m dist_lm.demo.ladder FOLDER

writes FOLDER/{train,held_out}.jsonl, prompts with tests (`rlhf.prompts_from`, `rlhf.held_out_from`), and
FOLDER/solved.jsonl: other tasks with their solutions, as conversations (reader `messages`). From these a model learns
the form of an answer before it is rewarded. Tasks depend on the seed alone, and no task is in two files.

All tasks of a rung differ in their numbers and words. Expected values are computed here, beside the solution, so a test
can compare the two. The fixed tests of a task are its edge cases; `hidden` describes further inputs, which are drawn
each time that the task is asked.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lm.storage import durable

Part = Literal["solved", "train", "held_out"]
SHARES: Mapping[Part, int] = {"solved": 8, "train": 6, "held_out": 2}  # shares of all tasks, out of 16
SIZES: Mapping[Part, int] = {"solved": 1620, "train": 1080, "held_out": 216}  # numbers of tasks
MOST, SMALL = 99, 24  # largest number in a task, and largest length
WORDS = ("river", "Stone", "a b", "pear", "LAMP", "night sky", "Oslo", "ink", "maple", "Quartz", "x", "sand dune")
NAMES = tuple(word.replace(" ", "_") for word in WORDS)
OPENINGS = {"python": "Python f(x)", "bash": "Bash f x", "sql": "SQL"}
ANSWERS = {"python": "def f(x): return {}", "bash": "f() {{ echo {}; }}", "sql": "SELECT {}"}
MOST_DRAWS = 200  # draws for one task: all numbers of a rung may be in use


@dataclass(frozen=True)
class TinyTask:
    """A request, its tests in the form of `kind=tests`, and an answer that passes them."""

    level: int
    language: str
    prompt: str
    tests: tuple[str | dict[str, str], ...]
    solution: str
    inputs: Mapping[str, Any]  # inputs of the hidden tests, as `dist_lm.sandbox.inputs` reads them

    @property
    def fields(self) -> dict[str, Any]:
        """Returns the task as a line of a file of prompts."""
        hidden = {"solution": self.solution, **self.inputs}
        names = {"prompt": self.prompt, "language": self.language, "level": self.level}
        return names | {"tests": list(self.tests), "hidden": hidden}

    @property
    def conversation(self) -> dict[str, Any]:
        """Returns the task as a line of a file of conversations."""
        turns = (("user", self.prompt), ("assistant", self.solution))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


@dataclass(frozen=True)
class Rung:
    """Tasks of one kind: {a} and {b} in request and solution stand for numbers from 2 to `most`."""

    level: int
    takes: str  # type of the argument of f: int, text, list; `rows` for SQL
    asks: str  # the requested value, in words
    solution: str  # an expression of x; for SQL the text after SELECT
    value: Callable[[Any, int, int], Any]  # (argument, a, b) -> expected value; for SQL the expected rows
    most: int = MOST


def _small(level: int, takes: str, asks: str, solution: str, value: Callable[[Any, int, int], Any]) -> Rung:
    return Rung(level, takes, asks, solution, value, most=SMALL)


PYTHON = (
    Rung(1, "int", "x plus {a}", "x + {a}", lambda x, a, b: x + a),
    Rung(1, "int", "x minus {a}", "x - {a}", lambda x, a, b: x - a),
    Rung(1, "int", "x times {a}", "x * {a}", lambda x, a, b: x * a),
    Rung(1, "int", "{a} minus x", "{a} - x", lambda x, a, b: a - x),
    _small(2, "text", "the first {a} characters of x", "x[:{a}]", lambda x, a, b: x[:a]),
    _small(2, "text", "x without its first {a} characters", "x[{a}:]", lambda x, a, b: x[a:]),
    _small(2, "list", "the last {a} elements of x", "x[-{a}:]", lambda x, a, b: x[-a:]),
    Rung(2, "list", "x and then {a}", "x + [{a}]", lambda x, a, b: [*x, a]),
    Rung(2, "list", "whether {a} is in x", "{a} in x", lambda x, a, b: a in x),
    Rung(2, "int", "the rest of x divided by {a}", "x % {a}", lambda x, a, b: x % a),
    Rung(3, "int", "x times {a}, plus {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
    Rung(3, "int", "x plus {a}, times {b}", "(x + {a}) * {b}", lambda x, a, b: (x + a) * b),
    Rung(3, "list", "the sum of x plus {a}", "sum(x) + {a}", lambda x, a, b: sum(x) + a),
    Rung(3, "list", "the length of x times {a}", "len(x) * {a}", lambda x, a, b: len(x) * a),
    _small(3, "text", "the first {a} characters of x in upper case", "x[:{a}].upper()", lambda x, a, b: x[:a].upper()),
    Rung(4, "int", "the larger of x and {a}", "max(x, {a})", lambda x, a, b: max(x, a)),
    Rung(4, "int", "{a} if x is above {b}, else x", "{a} if x > {b} else x", lambda x, a, b: a if x > b else x),
    Rung(
        5, "list", "the elements of x above {a}", "[y for y in x if y > {a}]", lambda x, a, b: [y for y in x if y > a]
    ),
    Rung(5, "list", "each element of x plus {a}", "[y + {a} for y in x]", lambda x, a, b: [y + a for y in x]),
)
BASH = (
    Rung(1, "int", "x plus {a}", "$(($1 + {a}))", lambda x, a, b: x + a),
    Rung(1, "int", "x times {a}", "$(($1 * {a}))", lambda x, a, b: x * a),
    Rung(3, "int", "x times {a}, minus {b}", "$(($1 * {a} - {b}))", lambda x, a, b: x * a - b),
    _small(4, "text", "the first {a} characters of x", '"${{1:0:{a}}}"', lambda x, a, b: x[:a]),
)
SQL = (
    Rung(2, "rows", "the names with price {a}", "name FROM items WHERE price = {a}",
         lambda rows, a, b: [name for name, price in rows if price == a]),
    Rung(2, "rows", "the names with a price above {a}", "name FROM items WHERE price > {a}",
         lambda rows, a, b: [name for name, price in rows if price > a]),
    Rung(3, "rows", "how many prices are below {a}", "count(*) FROM items WHERE price < {a}",
         lambda rows, a, b: [sum(price < a for _, price in rows)]),
    Rung(4, "rows", "the sum of prices above {a}, plus {b}", "sum(price) + {b} FROM items WHERE price > {a}",
         lambda rows, a, b: [sum(price for _, price in rows if price > a) + b]),
)  # fmt: skip
RUNGS = (*(("python", rung) for rung in PYTHON), *(("bash", rung) for rung in BASH), *(("sql", rung) for rung in SQL))


def tasks(seed: int, part: Part, count: int) -> Iterator[TinyTask]:
    """Yields `count` different tasks of a part, each rung in turn; fewer if MOST_DRAWS draws of a rung give no new
    task.

    The first n tasks of a part do not depend on `count`.
    """
    # Each part has a generator of its own, so that the size of one part does not change another.
    rng = random.Random(f"ladder {seed} {part}")  # noqa: S311 no secret
    prompts: set[str] = set()

    for index in range(count):
        language, rung = RUNGS[index % len(RUNGS)]
        # Other parts own some of the prompts, so a draw may be refused.
        for _ in range(MOST_DRAWS):
            a, b = rng.sample(range(2, rung.most + 1), 2)
            prompt = f"{OPENINGS[language]}: {rung.asks.format(a=a, b=b)}"
            if prompt not in prompts and part_of(prompt) == part:
                prompts.add(prompt)
                yield _task(language, rung, prompt, rng, a, b)
                break


def part_of(prompt: str) -> Part:
    """Returns the part that the task with this prompt belongs to, for every seed: a hash decides, by SHARES."""
    # The hash decides, so a task is in the same part for every seed.
    position = hashlib.sha256(prompt.encode()).digest()[0] % 16

    for part, share in SHARES.items():
        position -= share
        if position < 0:
            return part
    raise AssertionError("shares of 16")


def _task(language: str, rung: Rung, prompt: str, rng: random.Random, a: int, b: int) -> TinyTask:
    """Returns the task of a rung with the numbers a and b: two tests, whose arguments `rng` draws, and its solution.

    Args:
        language: python, bash or sql, whichever the rung is written in.
        prompt: the request, with its numbers.
    """
    solution = rung.solution.format(a=a, b=b)
    tests_arguments = _arguments(rung, rng, a, b)
    cases = [[(argument, rung.value(argument, a, b)) for argument in arguments] for arguments in tests_arguments]

    # Values are written as the language prints them: Python compares them itself, the others by their output.
    tests: list[str | dict[str, str]] = []
    for pairs in cases:
        if language == "python":
            tests.append("\n".join(f"assert f({x!r}) == {y!r}" for x, y in pairs))
        elif language == "bash":
            tests.append(" && ".join(f"[ \"$(f '{x}')\" = '{y}' ]" for x, y in pairs))
        else:
            [(table, rows)] = pairs
            tests.append({"before": _table(table), "stdout": "\n".join(map(str, rows))})

    return TinyTask(rung.level, language, prompt, tuple(tests), ANSWERS[language].format(solution), _inputs(rung, a))


def _arguments(rung: Rung, rng: random.Random, a: int, b: int) -> list[list[Any]]:
    """Returns the arguments of each test, of which there are two: random ones, and ones for which wrong numbers give
    wrong values."""

    def numbers(*extra: int) -> list[int]:
        candidates = [number for number in range(1, MOST + 2) if number not in (a, a + 1)]
        drawn = [*rng.sample(candidates, rng.randint(3, 5)), *extra]
        rng.shuffle(drawn)
        return drawn

    # Numbers around a and b tell `above` from `at least`, and `{a}` from a neighbour.
    if rung.takes == "int":
        return [rng.sample(range(1, MOST + 2), 2), [a - 1, a + 1, b, b + 1]]

    if rung.takes == "text":
        texts = (" ".join(rng.sample(WORDS, len(WORDS))) for _ in range(2))
        return [[text[: a + 4 + rng.randint(0, 5)].strip()] for text in texts]

    # A rung that asks for the last `a` elements needs longer lists.
    if rung.takes == "list":
        repeats = a // 3 if rung.most == SMALL else 0
        return [[numbers(a, a + 1) + numbers() * repeats], [numbers(a + 1), numbers()]]

    prices = (numbers(a, a + 1), numbers(a, a - 1, a + 1))
    return [[[*zip(rng.sample(NAMES, len(table_prices)), table_prices, strict=True)]] for table_prices in prices]


def _inputs(rung: Rung, a: int) -> dict[str, Any]:
    """Returns the inputs of hidden tests. Numbers in lists and tables are near `a`, so comparisons with it differ."""
    near: dict[str, Any] = {"int": [max(1, a - 4), a + 4]}
    if rung.takes == "rows":
        # A sum over no rows would be NULL.
        columns = {"name": {"one_of": list(NAMES)}, "price": near | {"with": [a + 1]}}
        return {"tables": {"items": {"rows": [3, 6], "columns": columns}}}

    # Texts and lists are longer than `a` where a rung asks for a part of them.
    shortest = a + 1 if rung.most == SMALL else 3
    value_of = {
        "int": {"int": [1, MOST + 1]},
        "text": {"words": list(WORDS), "length": [14, 16]},
        "list": {"list": near, "length": [shortest, shortest + 3]},
    }
    return {"call": "f", "arguments": [value_of[rung.takes]]}


def _table(rows: Sequence[tuple[str, int]]) -> str:
    rows_text = ", ".join(f"('{name}', {price})" for name, price in rows)
    return f"CREATE TABLE items (name TEXT, price INTEGER); INSERT INTO items VALUES {rows_text}"  # noqa: S608 our own


def write(folder: Path, seed: int = 0, sizes: Mapping[Part, int] = SIZES) -> None:
    """Writes a file PART.jsonl for each part, replacing earlier ones; makes the folder.

    Args:
        sizes: tasks of each part.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in sizes.items():
        part_tasks = list(tasks(seed, part, count))
        lines = [task.conversation if part == "solved" else task.fields for task in part_tasks]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        durable.write_text(folder / f"{part}.jsonl", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write tiny tasks with tests.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed)


if __name__ == "__main__":
    main()
