"""Tasks of one turn: two tools, a request that needs one call of one of them, and an environment that judges the call.

    python -m tests.rlhf.one_turn_calls FOLDER

writes FOLDER/{train,held_out}.jsonl. Words and numbers of the held-out requests occur in no task to train on. Tools
have no descriptions, so that prompts stay short: names say what they do.
"""

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_lm.chat.messages import Call, Json, Tool
from dist_lm.environments.protocol import LAST_TURN, Action, Observation, Step, Task, Verdict

Part = Literal["train", "held_out"]
SIZES: Mapping[Part, int] = {"train": 2000, "held_out": 100}
RIGHT_TOOL = 0.2  # reward of one call of the right tool
RIGHT_ARGUMENT = 0.3  # of all its arguments together, by the share that are right; the rest is for a call without fault

WORDS: Mapping[str, Mapping[Part, Sequence[str]]] = {
    "city": {
        "train": ("Oslo", "Paris", "Rome", "Berlin", "Madrid", "Tokyo", "Cairo", "Lima", "Boston", "Delhi", "Athens"),
        "held_out": ("Vienna", "London", "Dublin", "Sydney", "Chicago", "Moscow"),
    },
    "name": {
        "train": ("Anna", "Tom", "Maria", "Peter", "Lucy", "David", "Emma", "Jack", "Sara", "Paul", "Nina"),
        "held_out": ("Kate", "Mark", "Julia", "Simon", "Laura", "Henry"),
    },
    "thing": {
        "train": ("milk", "bread", "rice", "soap", "tea", "salt", "honey", "paper", "flour", "sugar", "pasta"),
        "held_out": ("coffee", "butter", "cheese", "juice", "pepper", "glue"),
    },
    "song": {
        "train": ("Yesterday", "Imagine", "Hallelujah", "Thriller", "Waterloo", "Wonderwall", "Creep", "Africa"),
        "held_out": ("Faithfully", "Bohemia", "Angels", "Sunshine", "Valerie"),
    },
}


@dataclass(frozen=True)
class Kind:
    """A tool, and how people ask for it."""

    name: str
    arguments: Mapping[str, str]  # argument -> number, or a key of `WORDS`
    requests: Sequence[str]

    @property
    def tool(self) -> Tool:
        types = {name: {"type": "integer" if of == "number" else "string"} for name, of in self.arguments.items()}
        parameters: dict[str, Json] = {"type": "object", "properties": types, "required": [*types]}
        return Tool(self.name, "", parameters)


KINDS = (
    Kind("weather", {"city": "city"}, ("Is it raining in {city}?", "How warm is it in {city} today?")),
    Kind(
        "set_timer",
        {"minutes": "number"},
        ("Wake me up in {minutes} minutes.", "Tell me when {minutes} minutes have passed."),
    ),
    Kind("call_person", {"name": "name"}, ("I want to talk to {name} on the phone.", "Please ring {name}.")),
    Kind(
        "book_flight",
        {"origin": "city", "destination": "city"},
        ("I want to fly from {origin} to {destination}.", "Get me to {destination}, I am in {origin}."),
    ),
    Kind(
        "buy",
        {"item": "thing", "count": "number"},
        ("We need {count} packs of {item}.", "Order {item} for me, {count} of them."),
    ),
    Kind("play_song", {"title": "song"}, ("I would like to hear {title}.", "Put on {title}, please.")),
    Kind(
        "pay",
        {"to": "name", "euros": "number"},
        ("I owe {to} {euros} euros, send it.", "Transfer {euros} euros to {to}."),
    ),
    Kind("add", {"a": "number", "b": "number"}, ("What is the sum of {a} and {b}?", "How much is {a} plus {b}?")),
)


def tasks(seed: int, part: Part, count: int) -> Iterator[dict[str, Json]]:
    """Yields tasks, drawn by seed and part: `request`, `tools` (names) and `call`. Held-out ones have `exact`."""
    draw = random.Random(f"{seed} {part}")
    for _ in range(count):
        kind, other = draw.sample(KINDS, 2)
        arguments = {name: _value(of, part, draw) for name, of in kind.arguments.items()}
        request = draw.choice(kind.requests).format(**arguments)
        tools = [kind.name, other.name]
        draw.shuffle(tools)
        call: Json = {"name": kind.name, "arguments": arguments}
        yield {"request": request, "tools": tools, "call": call, "exact": part == "held_out"}


def _value(of: str, part: Part, draw: random.Random) -> Json:
    if of != "number":
        return draw.choice(WORDS[of][part])
    # One number in four is held out.
    return draw.choice([number for number in range(2, 100) if (number % 4 == 0) == (part == "held_out")])


class OneTurnCalls:
    """An `Environment`: the reward is 1 for exactly the right call, alone; less for one of the right tool with other
    arguments, and nothing for that in tasks with `exact`."""

    async def reset(self, task: Task) -> Observation:
        self._task = task.data
        tools = {kind.name: kind.tool for kind in KINDS}
        return Observation(
            Observation.user(self._task["request"]).messages, tuple(tools[n] for n in self._task["tools"])
        )

    async def step(self, action: Action) -> Step:
        # A turn that a limit cut off has not been ended by the model.
        was_ended = action.cut in (None, LAST_TURN)
        right = Call(self._task["call"]["name"], self._task["call"]["arguments"])
        reward = reward_of(action.calls, right, self._task["exact"]) if was_ended else 0.0
        return Step(Observation(), done=True, verdict=Verdict.of(reward))

    async def close(self) -> None:
        pass


def reward_of(calls: Sequence[Call], right: Call, exact: bool) -> float:
    """Returns the reward of the calls of a turn, from 0 to 1.

    Args:
        exact: only the right call earns anything.
    """
    # Who calls everything that there is has not chosen.
    if len(calls) != 1 or calls[0].name != right.name:
        return 0.0

    (call,) = calls
    if call == right:
        return 1.0
    num_right = sum(call.arguments.get(name) == value for name, value in right.arguments.items())
    return 0.0 if exact else RIGHT_TOOL + RIGHT_ARGUMENT * num_right / len(right.arguments)


def write(folder: Path, seed: int = 0) -> None:
    """Writes the files of tasks into `folder`; returns nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in SIZES.items():
        lines = [json.dumps(task) + "\n" for task in tasks(seed, part, size)]
        (folder / f"{part}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
