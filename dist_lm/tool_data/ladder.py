"""What lies between copying and choosing a tool, in steps that a small model takes one at a time.

Which tool is meant is looked up: words of the request are found again in a description, and what stands behind that is
said. None of these steps is learned without the one before it, and in a mixture of all of them hardly any is
(docs/log.md), so each is a corpus that leads the stage for a while (`stage.lead`):

    lists      `cancel order: red`         asked by `cancel order`
    wishes     `Cancel an order: red`      asked by `please cancel the order for Ada Novak, at 12:30`
    choosing   tools without arguments, asked by requests of all kinds (`episodes.choosing`)
"""

import random

from dist_lm.chat.messages import Message
from dist_lm.tool_data.actions import ACTIONS
from dist_lm.tool_data.drills import BEFORE, any_word
from dist_lm.tool_data.naming import article
from dist_lm.tool_data.values import draw
from dist_lm.tool_data.words import words

ENTRIES = (2, 5)  # of a list: least, most
ASKED = (3, 6)
TOLD = ("person", "city", "code", "date", "clock", "word", "amount", "email")  # kinds of what a wish holds beside
BETWEEN = (" with ", ", ", " and the ", " for ", " ")


def lists(rng: random.Random) -> list[Message]:
    """What is said to belong to a verb and a thing, asked for in the same words."""
    said = {f"{verb} {thing}": any_word(rng) for verb, thing in _deeds(rng)}
    asked = rng.choices(list(said), k=rng.randint(*ASKED))
    return _told_and_asked(said, [(key, said[key]) for key in asked])


def wishes(rng: random.Random) -> list[Message]:
    """The same in a sentence, asked for in another one that holds more than that."""
    deeds = _deeds(rng)
    said = {f"{verb.capitalize()} {article(thing)}": any_word(rng) for verb, thing in deeds}
    values = list(said.values())
    asked = rng.choices(range(len(deeds)), k=rng.randint(*ASKED))
    return _told_and_asked(said, [(_wish(*deeds[number], rng), values[number]) for number in asked])


def _deeds(rng: random.Random) -> list[tuple[str, str]]:
    """Verbs with things: some share a verb, or all the thing, so that both count."""
    count = rng.randint(*ENTRIES)
    same = count <= 3 and rng.random() < 0.5
    things = [any_word(rng)] if same else [any_word(rng) for _ in range(count)]
    actions = rng.sample(ACTIONS, count)
    found: dict[tuple[str, str], str] = {}  # by action and thing
    while len(found) < count:
        action, thing = rng.choice(actions), rng.choice(things)
        found.setdefault((action.key, thing), rng.choice(action.said))
    return [(verb, thing) for (_, thing), verb in found.items()]


def _wish(verb: str, thing: str, rng: random.Random) -> str:
    """`please cancel the order for Ada Novak, at 12:30`."""
    told = "".join(
        rng.choice(BETWEEN) + rng.choice(["", f"{rng.choice(words('common'))} "]) + draw(rng.choice(TOLD), rng).said
        for _ in range(rng.randint(1, 3))
    )
    return f"{rng.choice(BEFORE)}{verb} the {thing}{told}"


def _told_and_asked(said: dict[str, str], asked: list[tuple[str, str]]) -> list[Message]:
    turns = [Message("system", "\n".join(f"{key}: {value}" for key, value in said.items()))]
    for question, value in asked:
        turns += [Message("user", f" {question}"), Message("assistant", f" {value}")]
    return turns
