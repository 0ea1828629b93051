"""Errands in a house: tiny conversations with tools, which a small model can learn on a laptop.

    python -m dist_lm.demo.errands FOLDER

writes FOLDER/{train,held_out}.jsonl, tasks of the environment `dist_lm.demo.errands:Errands` (`rlhf.prompts_from`,
`rlhf.held_out_from`), and FOLDER/examples.jsonl: conversations about other tasks (reader `messages`), from which a
model learns the form of calls and answers before it is rewarded. Tasks depend on the seed alone. A triple of kind,
thing and goal is in one part only, for every seed.

The user asks where a thing is, or wants it in a room, or beside another thing. The tool `find` knows the room of a
thing, `put` brings a thing into a room and fails if the room is locked, `open` opens a room. An answer names the room
in which the thing is then. The assistant of the examples is hasty on purpose: often it answers before it has made a
call that the request needs, and the answer is a guess or a false promise. The reward is the share of requests that are
served, so it teaches patience: to look, to act, and to go on after an error.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.environments.protocol import LAST_TURN, Action, Limits, Observation, Step, Task, Verdict
from dist_lm.environments.results import executed
from dist_lm.storage import durable

Part = Literal["examples", "train", "held_out"]
Kind = Literal["where", "put", "beside"]
KINDS: tuple[Kind, ...] = ("where", "put", "beside")
SHARES: Mapping[Part, int] = {"examples": 8, "train": 6, "held_out": 2}  # shares of all triples, out of 16
SIZES: Mapping[Part, int] = {"examples": 4000, "train": 1000, "held_out": 128}  # numbers of tasks
THINGS = ("lamp", "rope", "vase", "drum", "coat", "bell", "map", "kite", "jar", "fan", "mug", "key")
ROOMS = ("attic", "cellar", "garage", "kitchen", "study", "hall", "porch", "shed")
NUM_THINGS = 3  # in a task
LOCKED = 0.5  # share of rooms that are locked
HASTE = 0.45  # share of due calls in whose place the assistant of the examples answers


def _tool(name: str, description: str, *texts: str) -> Tool:
    """Returns a tool whose arguments are these texts, all of them required."""
    fields: dict[str, Json] = {text: {"type": "string"} for text in texts}
    return Tool(name, description, {"type": "object", "properties": fields, "required": [*texts]})


TOOLS = (
    _tool("find", "Room of a thing.", "thing"),
    _tool("put", "Puts a thing into a room.", "thing", "room"),
    _tool("open", "Opens a room.", "room"),
)
LIMITS = Limits()


@dataclass(frozen=True)
class Request:
    """What the user wants to know or to be done."""

    kind: Kind
    thing: str
    goal: str | None  # a room, or a thing whose room it is; None: the user asks

    @property
    def text(self) -> str:
        """The request in the user's words."""
        if self.kind == "where":
            return f"Where is the {self.thing}?"
        return f"Put the {self.thing} {'into' if self.kind == 'put' else 'beside'} the {self.goal}."

    def target(self, rooms: Mapping[str, str]) -> str:
        """Returns the room in which the thing is once the request is served."""
        if self.kind == "put":
            return str(self.goal)
        return rooms[self.thing if self.kind == "where" else str(self.goal)]


class House:
    """Things in rooms, some of them locked, and the tools that look things up and move them."""

    def __init__(self, rooms: Mapping[str, str], locked: Sequence[str]) -> None:
        self.rooms, self.locked = dict(rooms), set(locked)

    def execute(self, call: Call) -> Json:
        """Returns the result of a call that fits its tool."""
        arguments = call.arguments
        if call.name != "open" and arguments["thing"] not in self.rooms:
            return {"error": "no such thing"}
        if call.name == "find":
            return {"room": self.rooms[arguments["thing"]]}

        room = arguments["room"]
        if room not in ROOMS:
            return {"error": "no such room"}
        if call.name == "open":
            self.locked.discard(room)
            return {"open": room}
        if room in self.locked:
            return {"error": "locked"}
        self.rooms[arguments["thing"]] = room
        return {"room": room}


class Errands:
    """An `Environment`: requests one after another, each judged by its answer and by where things are afterwards."""

    async def reset(self, task: Task) -> Observation:
        data = task.data
        self._house = House(data["rooms"], data["locked"])
        self._requests = [Request(*fields) for fields in data["requests"]]
        self._number = self._num_right = 0
        return Observation(self._begin(), TOOLS)

    async def step(self, action: Action) -> Step:
        """Executes the calls of an action, or judges its answer and gives the next request.

        The last request, or a cut, ends the episode; its reward is the share of all requests that were served right,
        from 0 to 1.
        """
        if action.calls:
            observation = await executed(action.calls, TOOLS, self._result, LIMITS)
            return self._ended(observation) if action.cut else Step(observation, done=False)

        # An answer ends a request; one that a limit cut off is none.
        if action.cut in (None, LAST_TURN):
            self._num_right += self._is_served(action.text)
            self._number += 1
        if action.cut or self._number == len(self._requests):
            return self._ended(Observation())
        return Step(Observation(self._begin()), done=False)

    async def close(self) -> None:
        pass

    def _begin(self) -> tuple[Message, ...]:
        """Returns the turn of the next request."""
        request = self._requests[self._number]
        self._target = request.target(self._house.rooms)
        self._expected_rooms = {**self._house.rooms, request.thing: self._target}
        return (Message("user", request.text),)

    async def _result(self, call: Call, most_bytes: int) -> Json:
        return self._house.execute(call)

    def _is_served(self, answer: str) -> bool:
        # A thing that was put elsewhere by mistake, on the way to a right answer, counts against it.
        expected = answer_text(self._requests[self._number].thing, self._target)
        return self._house.rooms == self._expected_rooms and answer.strip() == expected

    def _ended(self, observation: Observation) -> Step:
        return Step(observation, done=True, verdict=Verdict.of(self._num_right / len(self._requests)))


def answer_text(thing: str, room: str) -> str:
    """Returns the one answer that counts, for each kind of request."""
    return f"The {thing} is in the {room}."


def part_of(kind: Kind, thing: str, goal: str) -> Part:
    """Returns the part of requests of a kind for a thing, with the room or thing that they lead to: a hash decides."""
    position = hashlib.sha256(f"{kind} {thing} {goal}".encode()).digest()[0] % 16

    for part, share in SHARES.items():
        position -= share
        if position < 0:
            return part
    raise AssertionError("shares of 16")


def triples_of(part: Part) -> list[tuple[Kind, str, str]]:
    """Returns the kinds, things and goals of a part; the goal of a question is the room that answers it."""
    return [
        (kind, thing, goal)
        for kind in KINDS
        for thing in THINGS
        for goal in (THINGS if kind == "beside" else ROOMS)
        if goal != thing and part_of(kind, thing, goal) == part
    ]


def tasks(seed: int, part: Part, count: int) -> Iterator[dict[str, Json]]:
    """Yields `count` tasks of one request of a part, the kinds in turn. The first n do not depend on `count`."""
    rng = random.Random(f"errands {seed} {part}")  # noqa: S311 no secret
    triples = triples_of(part)

    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        kind, thing, goal = rng.choice([triple for triple in triples if triple[0] == kind])
        named = [thing, goal] if kind == "beside" else [thing]
        others = [other for other in THINGS if other not in named]
        things = [*named, *rng.sample(others, NUM_THINGS - len(named))]
        rng.shuffle(things)

        rooms = {name: rng.choice(ROOMS) for name in things}
        if kind == "where":
            rooms[thing] = goal
        locked = [room for room in ROOMS if rng.random() < LOCKED]
        request = Request(kind, thing, None if kind == "where" else goal)
        yield {
            "prompt": request.text,
            "rooms": rooms,
            "locked": locked,
            "requests": [[request.kind, request.thing, request.goal]],
        }


def conversation(task: Mapping[str, Any], haste: float = 0.0, seed: str = "") -> Conversation:
    """Returns a conversation about a task, which it serves without detours unless the assistant is hasty.

    Args:
        haste: probability that the assistant answers in place of a call; then it guesses a room that it does not know.
        seed: of these decisions.
    """
    rng = random.Random(f"haste {seed}")  # noqa: S311 no secret
    house, messages = House(task["rooms"], task["locked"]), []

    for request in (Request(*fields) for fields in task["requests"]):
        messages.append(Message("user", request.text))
        room = request.goal if request.kind == "put" else None
        for call in calls_of(request, house):
            if rng.random() < haste:
                break
            result = house.execute(call)
            messages += [Message("assistant", calls=(call,)), Message("tool", results=(result,))]
            if call.name == "find":
                room = request.target(house.rooms)
        messages.append(Message("assistant", answer_text(request.thing, room or rng.choice(ROOMS))))
    return Conversation(tuple(messages), TOOLS)


def calls_of(request: Request, house: House) -> list[Call]:
    """Returns the calls that serve a request, in order.

    If the room is locked there are `put`, which fails, `open`, and `put` again. A thing whose place must be known is
    looked for by `find` first. The house is not changed.
    """
    target = request.target(house.rooms)
    calls = []
    if request.kind != "put":
        calls.append(Call("find", {"thing": request.thing if request.kind == "where" else str(request.goal)}))
    if request.kind != "where":
        put = Call("put", {"thing": request.thing, "room": target})
        calls += [put, Call("open", {"room": target}), put] if target in house.locked else [put]
    return calls


def examples(seed: int, count: int) -> list[Conversation]:
    """Returns the conversations of a hasty assistant about `count` tasks of the part `examples`."""
    return [conversation(task, HASTE, f"{seed} {number}") for number, task in enumerate(tasks(seed, "examples", count))]


def write(folder: Path, seed: int = 0, sizes: Mapping[Part, int] = SIZES) -> None:
    """Writes a file PART.jsonl for each part, replacing earlier ones; makes the folder.

    Raises:
        OSError: a file cannot be written.
    """
    from dist_lm.chat.jinja_text import messages_of, tools_of  # the environment's processes need no jinja2

    folder.mkdir(parents=True, exist_ok=True)
    for part, count in sizes.items():
        if part == "examples":
            conversations = examples(seed, count)
            rows = [{"messages": messages_of(c.messages), "tools": tools_of(c.tools)} for c in conversations]
        else:
            rows = list(tasks(seed, part, count))
        durable.write_text(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write errands in a house.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed)


if __name__ == "__main__":
    main()
