"""Errands in a store room: tiny conversations with tools, which a small model can learn on a laptop.

    python -m dist_lm.demo.errands FOLDER

writes FOLDER/{train,held_out}.jsonl, tasks of the environment `dist_lm.demo.errands:Errands` (`rlhf.prompts_from`,
`rlhf.held_out_from`), and FOLDER/solved.jsonl: other tasks as conversations (reader `messages`). From these a model
learns the form of calls and answers before it is rewarded. Tasks depend on the seed alone. A pair of a thing and a
request is in one part only, for every seed.

Each thing lies in a numbered box. The user asks where a thing is, or wants it in another box; the model learns the
number from the tool `find`, so no number is worth remembering. The reward is the share of requests that are served.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dist_lm.chat.messages import Call, Conversation, Json, Message, Tool
from dist_lm.environments.protocol import LAST_TURN, Action, Limits, Observation, Step, Task, Verdict
from dist_lm.environments.results import executed
from dist_lm.storage import durable

Part = Literal["solved", "train", "held_out"]
SHARES: Mapping[Part, int] = {"solved": 8, "train": 6, "held_out": 2}  # shares of all pairs, out of 16
SIZES: Mapping[Part, int] = {"solved": 4000, "train": 1000, "held_out": 128}  # numbers of tasks
BOXES = range(10, 100)
ADJECTIVES = ("red", "old", "big", "tin", "wet", "new", "odd", "dry")
NOUNS = ("lamp", "rope", "vase", "drum", "coat", "bell", "map", "kite", "jar", "fan", "desk", "mug")
THINGS = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
NUM_THINGS, NUM_REQUESTS = 3, 1  # in a task
BOX: Json = {"type": "integer"}
TOOLS = (
    Tool("find", "Box of a thing.", {"type": "object", "properties": {"thing": {"type": "string"}}}),
    Tool("move", "Moves a thing.", {"type": "object", "properties": {"from": BOX, "to": BOX}}),
)
for tool in TOOLS:
    tool.parameters["required"] = [*tool.parameters["properties"]]
LIMITS = Limits()


class StoreRoom:
    """Things in boxes, each box with one thing at most, and the tools that look them up and move them."""

    def __init__(self, boxes: Mapping[str, int]) -> None:
        self.boxes = dict(boxes)

    def execute(self, call: Call) -> Json:
        """Returns the result of a call that fits its tool."""
        if call.name == "find":
            box = self.boxes.get(call.arguments["thing"])
            return {"error": "no such thing"} if box is None else {"box": box}

        begin, end = call.arguments["from"], call.arguments["to"]
        thing = next((thing for thing, box in self.boxes.items() if box == begin), None)
        if thing is None or end in self.boxes.values():
            return {"error": "empty" if thing is None else "full"}
        self.boxes[thing] = end
        return {"moved": thing}


class Errands:
    """An `Environment`: requests one after another, each judged by its answer and by where things are afterwards."""

    async def reset(self, task: Task) -> Observation:
        data = task.data
        self._room, self._requests = StoreRoom(data["boxes"]), data["requests"]
        self._number = self._num_right = 0
        return Observation(self._begin(), TOOLS)

    async def step(self, action: Action) -> Step:
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
        self._expected = expected_boxes(self._room.boxes, request)
        return (Message("user", request_text(request)),)

    async def _result(self, call: Call, most_bytes: int) -> Json:
        return self._room.execute(call)

    def _is_served(self, answer: str) -> bool:
        thing, box = self._requests[self._number]
        # What was moved by mistake, on the way to a right answer, counts against it.
        return self._room.boxes == self._expected and (box is not None or answer.strip() == str(self._expected[thing]))

    def _ended(self, observation: Observation) -> Step:
        return Step(observation, done=True, verdict=Verdict.of(self._num_right / len(self._requests)))


def request_text(request: Sequence[Any]) -> str:
    """Returns a request (thing, new box or None) in words."""
    thing, box = request
    return f"Where is the {thing}?" if box is None else f"Put the {thing} into {box}."


def expected_boxes(boxes: Mapping[str, int], request: Sequence[Any]) -> dict[str, int]:
    """Returns where things are after a request was served; `find` moves none."""
    thing, box = request
    return dict(boxes) if box is None else {**boxes, thing: box}


def part_of(thing: str, is_move: bool) -> Part:
    """Returns the part that requests of this kind for a thing belong to: a hash decides, by SHARES."""
    position = hashlib.sha256(f"{thing} {is_move}".encode()).digest()[0] % 16

    for part, share in SHARES.items():
        position -= share
        if position < 0:
            return part
    raise AssertionError("shares of 16")


def tasks(seed: int, part: Part, count: int) -> Iterator[dict[str, Json]]:
    """Yields `count` tasks of a part. The first n do not depend on `count`."""
    rng = random.Random(f"errands {seed} {part}")  # noqa: S311 no secret
    pairs = [(thing, is_move) for thing in THINGS for is_move in (False, True) if part_of(thing, is_move) == part]

    for _ in range(count):
        chosen = rng.sample(pairs, NUM_REQUESTS)
        other_things = rng.sample([thing for thing in THINGS if thing not in dict(chosen)], NUM_THINGS - NUM_REQUESTS)
        stored_things = [*dict(chosen), *other_things]
        rng.shuffle(stored_things)

        # New boxes are empty ones, and differ from each other.
        numbers = iter(rng.sample(BOXES, len(stored_things) + NUM_REQUESTS))
        boxes = dict(zip(stored_things, numbers, strict=False))
        requests = [[thing, next(numbers) if is_move else None] for thing, is_move in chosen]
        yield {"prompt": request_text(requests[0]), "boxes": boxes, "requests": requests}


def solved(task: Mapping[str, Any]) -> Conversation:
    """Returns the conversation in which a task is served without detours."""
    room, messages = StoreRoom(task["boxes"]), []

    for thing, new_box in task["requests"]:
        calls = [Call("find", {"thing": thing})]
        if new_box is not None:
            calls.append(Call("move", {"from": room.boxes[thing], "to": new_box}))
        messages.append(Message("user", request_text((thing, new_box))))
        for call in calls:
            messages += [Message("assistant", calls=(call,)), Message("tool", results=(room.execute(call),))]
        messages.append(Message("assistant", str(room.boxes[thing]) if new_box is None else "Done."))
    return Conversation(tuple(messages), TOOLS)


def write(folder: Path, seed: int = 0, sizes: Mapping[Part, int] = SIZES) -> None:
    """Writes a file PART.jsonl for each part, replacing earlier ones; makes the folder.

    Raises:
        OSError: a file cannot be written.
    """
    from dist_lm.chat.jinja_text import messages_of, tools_of  # the environment's processes need no jinja2

    folder.mkdir(parents=True, exist_ok=True)
    for part, count in sizes.items():
        rows: list[Mapping[str, Any]] = list(tasks(seed, part, count))
        if part == "solved":
            conversations = [solved(task) for task in rows]
            rows = [{"messages": messages_of(c.messages), "tools": tools_of(c.tools)} for c in conversations]
        durable.write_text(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write errands in a store room.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.seed)


if __name__ == "__main__":
    main()
