"""Programs that only the output of a failed test can put right: tasks of the environment `code_repair`.

    python -m dist_lm.demo.repairs FOLDER

writes FOLDER/{train,held_out}.jsonl (`rlhf.prompts_from`, `rlhf.held_out_from`), and FOLDER/solved.jsonl: other tasks
as conversations (reader `messages`) of a program that fails, the test that it fails, and one that passes. Tasks depend
on the seed alone, and no pair of kind and number is in two files.

A request leaves out a number that the tests know: "Python f(x): x plus a number". The output of the first test shows
it, and the model writes the program again. A program that returns what this test expects fails the two others.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lm.chat.messages import Conversation, Json, Message
from dist_lm.environments.code_repair import feedback
from dist_lm.sandbox.program import Verdict
from dist_lm.sandbox.task import task_of
from dist_lm.storage import durable

Part = Literal["solved", "train", "held_out"]
SHARES: Mapping[Part, int] = {"solved": 8, "train": 6, "held_out": 2}  # shares of all tasks, out of 16
SIZES: Mapping[Part, int] = {"solved": 2000, "train": 1000, "held_out": 128}  # numbers of tasks
NUMBERS = range(10, 100)
NAMES = ("f", "g", "h", "mix", "step", "rate", "gain", "fit")
ATTEMPTS = 2
FAILED_OUTPUT = 'Traceback (most recent call last):\n  File "test", line 1, in <module>\nAssertionError'
"""What a failed test prints."""


@dataclass(frozen=True)
class Kind:
    """Tasks of one kind; {a} stands for the number."""

    asks: str
    solution: str  # an expression of x
    value: Callable[[Any, int], Any]  # (argument, a) -> expected value
    arguments: tuple[Any, Any, Any]  # of the tests; the value of the first one shows the number


KINDS = (
    Kind("x plus a number", "x + {a}", lambda x, a: x + a, (0, 3, 71)),
    Kind("x times a number", "x * {a}", lambda x, a: x * a, (1, 2, 30)),
    Kind("a number minus x", "{a} - x", lambda x, a: a - x, (0, 1, 50)),
    Kind("the text x and a number", 'x + "{a}"', lambda x, a: f"{x}{a}", ("", "b", "c d")),
    Kind("x and then a number", "x + [{a}]", lambda x, a: [*x, a], ([], [1], [5, 6])),
    Kind("the sum of x plus a number", "sum(x) + {a}", lambda x, a: sum(x) + a, ([], [4], [5, 6])),
    Kind("the length of x times a number", "len(x) * {a}", lambda x, a: len(x) * a, ([0], [7, 8, 9], [5, 6])),
)


@dataclass(frozen=True)
class Repair:
    """A task: a function `name` of this kind with this number."""

    kind: Kind
    name: str
    number: int

    @property
    def fields(self) -> dict[str, Json]:
        """Returns the task as a line of a file of tasks. Of three tests the environment shows the first one."""
        values = [(x, self.kind.value(x, self.number)) for x in self.kind.arguments]
        tests: list[Json] = [f"assert {self.name}({x!r}) == {value!r}" for x, value in values]
        prompt = f"Python {self.name}(x): {self.kind.asks}"
        return {"prompt": prompt, "language": "python", "tests": tests, "attempts": ATTEMPTS}

    def program(self, number: int) -> str:
        """Returns the program for a number."""
        return f"def {self.name}(x): return {self.kind.solution.format(a=number)}"

    def conversation(self, wrong_number: int) -> Conversation:
        """Returns the conversation in which a program with another number fails, and the next one passes: four turns.
        Nothing is executed; all tests of the first program count as failed.
        """
        wrong = self.program(wrong_number)
        program = task_of(self.fields).program(wrong)
        results = tuple(False for _ in program.tests)
        feedback_text = feedback(
            program, Verdict("failed", results, ("",) * len(results), FAILED_OUTPUT, 0.0, 0.0), num_shown=1
        )

        messages = (
            Message("user", str(self.fields["prompt"])),
            Message("assistant", wrong),
            Message("user", feedback_text),
            Message("assistant", self.program(self.number)),
        )
        return Conversation(messages)


def part_of(kind: Kind, number: int) -> Part:
    """Returns the part that a kind with a number belongs to, for every seed: a hash decides, by SHARES."""
    position = hashlib.sha256(f"{kind.asks} {number}".encode()).digest()[0] % 16

    for part, share in SHARES.items():
        position -= share
        if position < 0:
            return part
    raise AssertionError("shares of 16")


def tasks(seed: int, part: Part, count: int) -> list[Repair]:
    """Returns `count` different tasks of a part in random order, or all that there are. The first n do not depend on
    `count`."""
    pairs = [(kind, number) for kind in KINDS for number in NUMBERS if part_of(kind, number) == part]
    repairs = [Repair(kind, name, number) for kind, number in pairs for name in NAMES]
    random.Random(f"repairs {seed} {part}").shuffle(repairs)  # noqa: S311 no secret
    return repairs[:count]


def conversations(seed: int, count: int) -> list[Conversation]:
    """Returns the conversations of `count` tasks of the part `solved`."""
    rng = random.Random(f"repairs {seed} wrong")  # noqa: S311 no secret
    return [
        repair.conversation(rng.choice([number for number in NUMBERS if number != repair.number]))
        for repair in tasks(seed, "solved", count)
    ]


def write(folder: Path, seed: int = 0, sizes: Mapping[Part, int] = SIZES) -> None:
    """Writes a file PART.jsonl for each part, replacing earlier ones; makes the folder.

    Raises:
        OSError: a file cannot be written.
    """
    from dist_lm.chat.jinja_text import messages_of  # jinja2 is for files only

    folder.mkdir(parents=True, exist_ok=True)
    for part, count in sizes.items():
        if part == "solved":
            rows = [{"messages": messages_of(conversation.messages)} for conversation in conversations(seed, count)]
        else:
            rows = [repair.fields for repair in tasks(seed, part, count)]
        durable.write_text(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write programs to be put right.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed)


if __name__ == "__main__":
    main()
