"""Generated conversations with tools: example i is a pure function of (seed, i).

    shelf -> tools -> request -> calls, executed -> answer

The group of an example is the shelf of its tools, and decides between train and val. No tool is on two shelves, so the
tools of val examples, and their names, occur in no train example.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dist_lm.chat.messages import Conversation, Message
from dist_lm.tools.data.catalogue import SHELVES, Specification, group_of, invented_topics, shelf_topics
from dist_lm.tools.data.episodes import KINDS, ROUND
from dist_lm.tools.data.scene import Scene, World

REVISION = 9  # increases with every change of the generated text: a corpus of another revision is refused
LONGEST = (650, 800, 900, 900)  # most characters of all JSON and text; one of these limits is drawn for each example
INVENTED = {"invented": 1.0, "session": 0.3}  # share of the conversations of a kind that are about invented domains
LONGEST_SESSION = 1800  # most characters of a session
OTHER_TOOLS = (0, 1, 1, 1, 2, 2, 3)  # tools that the request does not need, one of these numbers
MOST_TOOLS = 4  # most tools of a conversation with tools that it does not need
SYSTEM = (
    "You are a helpful assistant.",
    "Use the tools where they help.",
    "You work for a small company.",
    "Answer briefly.",
)


@dataclass(frozen=True)
class Example:
    """A conversation with its kind, group and tools."""

    conversation: Conversation
    kind: str  # a key of episodes.KINDS
    group: str  # hexadecimal hash: decides the split
    tools: tuple[Specification, ...]  # in the order of the conversation
    worlds: tuple[World, ...] = ()  # the world before each call of the conversation, if they were asked for


def examples(seed: int, count: int) -> Iterator[Example]:
    """Yields examples 0 to `count` - 1."""
    return (example(seed, number) for number in range(count))


def example(seed: int, number: int, with_worlds: bool = False) -> Example:
    """Returns example `number`, which depends on the two arguments alone; writes drafts until one is short enough.

    Args:
        with_worlds: whether the example has its `worlds`, to execute other calls there.
    """
    # One generator for each example, so that examples can be written in any order.
    rng = random.Random(f"tools {seed} {number}")  # noqa: S311  (text, not secrets)
    shelf = rng.randrange(SHELVES)
    kind = rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]

    # A draft may be too long; the next one continues with the same random numbers.
    while True:
        if new_example := _draft(kind, shelf, rng, with_worlds):
            return new_example


def _draft(kind: str, shelf: int, rng: random.Random, with_worlds: bool = False) -> Example | None:
    """Returns an example, or None if it would be too long or two tools have the same name.

    The length counts characters of tools and turns. Its limit is drawn from LONGEST; that of a session is
    LONGEST_SESSION. Rounds and tools that the example does not need are dropped before it counts as too long. Draws
    from `rng`, so a second call returns another draft.

    Args:
        kind: a key of KINDS.
        shelf: number of the tools to choose from, below SHELVES; it is the group of the example.
    """
    topics = shelf_topics(shelf)
    if kind in INVENTED and rng.random() < INVENTED[kind]:
        topics = invented_topics(shelf, rng)

    world = World(rng, before_calls=[] if with_worlds else None)
    scene = Scene(rng, world, topics)
    turns = KINDS[kind][1](scene)

    # A call identifies its tool by name alone.
    if len({tool.tool.name for tool in scene.tools}) < len(scene.tools):
        return None

    num_needed = len(scene.tools)
    # A session uses all of its tools.
    if kind != "session":
        scene.add_others(max(0, min(rng.choice(OTHER_TOOLS), MOST_TOOLS - num_needed)))

    if turns[0].role != "system" and rng.random() < 0.12:
        turns = [Message("system", rng.choice(SYSTEM)), *turns]

    # Drop the last rounds of a conversation with several, or tools that it does not need, until it is short enough.
    longest = LONGEST_SESSION if kind == "session" else rng.choice(LONGEST)
    while _characters(scene.tools, turns) > longest:
        # Only conversations of these kinds make sense without their last rounds.
        num_rounds = 1
        if kind in ("single", "invented", "session"):
            num_rounds = [turn.role for turn in turns].count("user")

        if num_rounds > 1 and (len(scene.tools) == num_needed or rng.random() < 0.8):
            turns = turns[:-ROUND]
        elif len(scene.tools) > num_needed:
            scene.tools.pop()
        else:
            return None

    # The position of a tool must not tell whether it is needed.
    rng.shuffle(scene.tools)
    conversation = Conversation(tuple(turns), tuple(tool.tool for tool in scene.tools))
    # Rounds that were dropped had calls, too.
    num_calls = sum(len(turn.calls) for turn in turns)
    worlds = tuple((world.before_calls or [])[:num_calls])
    return Example(conversation, kind, group_of(shelf), tuple(scene.tools), worlds)


def _characters(tools: list[Specification], turns: list[Message]) -> int:
    tool_texts = [[tool.tool.name, tool.tool.description, tool.tool.parameters] for tool in tools]
    turn_texts = [
        [turn.content, [[call.name, call.arguments] for call in turn.calls], list(turn.results)] for turn in turns
    ]
    return len(json.dumps([tool_texts, turn_texts]))
