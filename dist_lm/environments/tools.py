"""The generated tools of stage `tools`, executed for real: the model calls them until it answers, request by request.

A task has `seed` and `number`, which determine a generated conversation (`dist_lm.tools.data`): its tools, its requests
and the records that the tools work on. The reward is the share of requests whose calls are the expected ones, compared
as stage `tools` compares them (`chat.compare`); a request that needs no call is right if none is made.

    python -m dist_lm.environments.tools FOLDER

writes FOLDER/{train,held_out}.jsonl with such tasks for `rlhf.prompts_from` and `rlhf.held_out_from`. No tool is in
both files: held out are the tools that stage `tools` holds out.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_lm.chat.compare import same_calls
from dist_lm.chat.messages import Call, Json, Message
from dist_lm.data.ingest import split_of_group
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
from dist_lm.environments.results import executed
from dist_lm.environments.sandboxes import SharedSandboxes
from dist_lm.storage import durable
from dist_lm.tools.data.examples import Example, example
from dist_lm.tools.data.scene import ToolError, World

VAL_FRACTION = 0.05  # share of the groups, as `corpus.val_fraction` of stage tools


@dataclass(frozen=True)
class Request:
    """One request of the user, and the calls that serve it."""

    messages: tuple[Message, ...]  # a turn of the system, in front of the first request; the turn of the user
    expected: tuple[Call, ...]
    world: World  # before the first call


class GeneratedTools:
    """An `Environment` of generated conversations. It needs no sandbox: the tools are the project's own."""

    def __init__(self, sandboxes: SharedSandboxes, limits: Limits) -> None:
        self._limits = limits
        self._example: Example | None = None
        self._requests: list[Request] = []
        self._number = 0  # the request that is being served
        self._world = World(random.Random(0))  # noqa: S311  (text, not secrets)
        self._calls: list[Call] = []  # for this request so far
        self._right = 0

    async def reset(self, task: Task) -> Observation:
        data = task.data
        for name in ("seed", "number"):
            if type(data.get(name)) is not int:
                raise RefusedTaskError(f"`{name}`: expected an integer")
        self._example = example(data["seed"], data["number"], with_worlds=True)
        self._requests = requests_of(self._example)
        self._right = 0
        return Observation(self._begin(0), self._example.conversation.tools)

    async def step(self, action: Action) -> Step:
        assert self._example is not None, "reset comes first"
        observation = Observation()
        if action.calls:
            observation = await executed(action.calls, self._example.conversation.tools, self._result, self._limits)
            self._calls += action.calls
            if not action.cut:
                return Step(observation, done=False)

        # The answer ends a request. One that was cut off is none.
        elif action.cut in (None, LAST_TURN):
            expected = self._requests[self._number].expected
            self._right += same_calls(self._calls, expected, self._example.conversation.tools)

        if action.cut or self._number + 1 == len(self._requests):
            verdict = Verdict.of(self._right / len(self._requests))
            return Step(observation, done=True, verdict=verdict)
        return Step(Observation(self._begin(self._number + 1)), done=False)

    async def close(self) -> None:
        self._example = None

    def _begin(self, number: int) -> tuple[Message, ...]:
        """Begins a request and returns its turns. The records are those that it was written for, whatever the model has
        done to them before."""
        self._number, self._calls = number, []
        self._world = self._requests[number].world.copy()
        return self._requests[number].messages

    async def _result(self, call: Call, most_bytes: int) -> Json:
        assert self._example is not None
        specification = next(tool for tool in self._example.tools if tool.tool.name == call.name)
        try:
            return self._world.execute(specification, call)
        except ToolError as error:
            return {"error": str(error)}
        except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The schema allows values that a formula cannot use, such as a day that does not exist.
            return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def requests_of(generated: Example) -> list[Request]:
    """Returns the requests of a conversation that was generated with its worlds."""
    requests: list[Request] = []
    opening: list[Message] = []
    num_calls = 0
    for message in generated.conversation.messages:
        if message.role in ("system", "user"):
            opening.append(message)

        if message.role == "user":
            # A request without calls may be asked in any world.
            worlds = generated.worlds[num_calls:] or generated.worlds[-1:]
            world = worlds[0] if worlds else World(random.Random(0))  # noqa: S311  (text, not secrets)
            requests.append(Request(tuple(opening), (), world))
            opening = []

        elif message.calls:
            # Calls of several turns can belong to one request; `worlds` has one for each call.
            last = requests[-1]
            requests[-1] = Request(last.messages, (*last.expected, *message.calls), last.world)
            num_calls += len(message.calls)
    return requests


def tasks(seed: int, count: int, is_held_out: bool) -> Iterator[dict[str, Json]]:
    """Yields `count` tasks whose tools are held out, or are not."""
    number = 0
    while count:
        generated = example(seed, number)
        # One group in twenty is held out, so most numbers are passed over for held-out tasks.
        if (split_of_group(generated.group, VAL_FRACTION) == "val") == is_held_out:
            count -= 1
            prompt = next(message.content for message in generated.conversation.messages if message.role == "user")
            yield {"prompt": prompt, "kind": generated.kind, "seed": seed, "number": number}
        number += 1


def main() -> None:
    """Writes generated tasks to FOLDER/train.jsonl and FOLDER/held_out.jsonl, as the arguments of the command say.

    The folder is made, and existing files are replaced. A line is one task as JSON, with `prompt`, `kind`, `seed` and
    `number`. Equal arguments give equal files.

    Raises:
        SystemExit: the arguments are wrong.
        OSError: a file cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=4000, help="tasks to train on")
    parser.add_argument("--held-out", type=int, default=256, help="held-out tasks")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", arguments.train), ("held_out", arguments.held_out)):
        lines = [json.dumps(task) + "\n" for task in tasks(arguments.seed, count, name == "held_out")]
        durable.write_text(arguments.folder / f"{name}.jsonl", "".join(lines))


if __name__ == "__main__":
    main()
