"""Conversations without tools that teach to take values out of a request, and nothing else.

A schema costs a hundred tokens of which none is learned; here half the tokens are, and each can be had from the request
only: said again, looked up among others, as a list in JSON, or as an object with the keys and in the order that are
asked for. What has to be said again word by word is without sense, so that nothing but looking helps: a small model
learns to copy from that first. A piece of a word that it has never said it cannot copy, so words come in every spelling
that names have.
"""

import random
from collections.abc import Callable

from dist_lm.chat.json_text import write
from dist_lm.chat.messages import Message
from dist_lm.tools.data.invented import invented_word
from dist_lm.tools.data.naming import STYLE_WEIGHTS, STYLES, argument_name, camel
from dist_lm.tools.data.phrasing import piece
from dist_lm.tools.data.specification import Parameter
from dist_lm.tools.data.values import Value, draw, sentence
from dist_lm.tools.data.words import domains, words

BEFORE = ("", "", "please ", "what is ", "tell me ", "I would like you to ", "now the ", "can you ", "I need ")
BEHIND = ("", "", " now", " for me", ", thanks", " in the room at 5", " with the number 12")
KNOWN = 0.8  # of the words in drills; the others are made up
SPELLED = (0, 0, 0, 0.5, 1)  # shares of names as programs spell them, one of these for a drill
LISTED = ("code", "person", "city", "word", "email", "amount", "date", "handle", "title", "product", "given", "path")


def drill(rng: random.Random) -> list[Message]:
    """A request and what is asked for."""
    return one_turn(*rng.choice(DRILLS)(rng))


def one_turn(asked: str, answered: str) -> list[Message]:
    """A conversation of one question."""
    return [Message("user", asked), Message("assistant", answered)]


def echo(rng: random.Random) -> tuple[str, str]:
    """Words without sense, again: hardly one twice, so that what came before says what comes next."""
    spelled = rng.choice(SPELLED)
    picked = rng.sample(words("common"), rng.randint(3, 15 if spelled else 30))
    text = " ".join(
        identifier(rng) if rng.random() < spelled else word if rng.random() < KNOWN else _noise(rng) for word in picked
    )
    return f"{rng.choice(['Repeat', 'Read back', 'Say', 'Copy'])}: {text}", text


def look_up(rng: random.Random) -> tuple[str, str]:
    """What was said to belong to some of the words, in the order in which they are asked for."""
    meaning = {
        any_word(rng): " ".join(any_word(rng) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 8))
    }
    asked = rng.sample(list(meaning), rng.randint(1, len(meaning)))
    told = ", ".join(f"{word} = {value}" for word, value in meaning.items())
    return f"{told}. {rng.choice(['Give me', 'What is', 'Tell me'])} {', '.join(asked)}?", ", ".join(
        f"{word} = {meaning[word]}" for word in asked
    )


def read_back(rng: random.Random) -> tuple[str, str]:
    """The same words again."""
    if rng.random() < 0.5:
        text = " ".join(sentence(rng) for _ in range(rng.randint(1, 3)))
    else:
        text = ", ".join(value.said for value in _items(rng))
    return f"{rng.choice(['Repeat', 'Read back', 'Say', 'Copy'])}: {text}", text


def as_list(rng: random.Random) -> tuple[str, str]:
    """Values as a list in JSON."""
    items = _items(rng)
    asked = rng.choice(["As a JSON list: {}", "Make a JSON list of {}", "JSON list, please: {}"])
    between = rng.choice([", ", ", ", "; ", "\n"])
    return asked.format(between.join(item.said for item in items)), write([item.json for item in items], "a list")


def as_object(rng: random.Random) -> tuple[str, str]:
    """Named values as an object in JSON; the keys are said first, then the values in the same order."""
    _, fields = domains()[rng.choice(list(domains()))]
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    picked = rng.sample(fields, rng.randint(2, 5))
    parameters = [Parameter(name, argument_name(name, style), kind) for name, kind in picked]
    given = {parameter: draw(parameter.kind, rng) for parameter in parameters}
    kinds = [parameter.kind for parameter in parameters]
    pieces = [piece(parameter, value, kinds.count(parameter.kind) == 1, rng) for parameter, value in given.items()]
    keys = ", ".join(parameter.key for parameter in parameters)
    between = rng.choice([", ", "; ", " and "])
    asked = rng.choice(["JSON with {}: {}.", "An object with {}: {}", "Fill in {}: {}."])
    text = between.join(part.removeprefix(": ") for part in pieces)
    return asked.format(keys, text), write(
        {parameter.key: value.json for parameter, value in given.items()}, "an object"
    )


def recall(rng: random.Random) -> list[Message]:
    """A list of words and what belongs to each, then one asked for after the other, somewhere in a request.

    A word is one or two; those of two share one, so that both count.
    """
    count, spelled = rng.randint(2, 8), rng.choice(SPELLED)

    def value() -> str:
        return identifier(rng) if rng.random() < spelled else " ".join(any_word(rng) for _ in range(rng.randint(1, 2)))

    if rng.random() < 0.5:
        first, second = ([any_word(rng) for _ in range(number)] for number in (4, 3))
        pairs = sorted({f"{one} {other}" for one in first for other in second})
        keys = rng.sample(pairs, min(count, len(pairs)))
    else:
        keys = list(dict.fromkeys(any_word(rng) for _ in range(count)))
    said = {key: value() for key in keys}
    form, between = rng.choice([("{}: {}", ", "), ("{} = {}", "\n"), ("{} {}", "; ")])
    told = between.join(form.format(key, value) for key, value in said.items())
    plain = rng.random() < 0.4
    turns: list[Message] = []
    for key in rng.sample(keys, len(keys)):
        asked = f" {key}" if plain else f" {rng.choice(BEFORE)}{key}{rng.choice(BEHIND)}"
        turns.append(Message("user", asked if turns else f"{told}.{asked}"))
        turns.append(Message("assistant", f" {said[key]}"))
    return turns


DRILLS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    *(echo, echo, echo, look_up),
    *(read_back, as_list, as_object, as_object),
)


def identifier(rng: random.Random) -> str:
    """One to three words as programs spell them: `copied_top`, `copiedTop`, `Top`."""
    picked = [any_word(rng) for _ in range(rng.randint(1, 3))]
    capitals = "".join(word.capitalize() for word in picked)
    spellings = (*(between.join(picked) for between in "_.-"), capitals, camel(picked), " ".join(picked).title())
    return rng.choice((*spellings, "_".join(picked).upper()))


def any_word(rng: random.Random) -> str:
    """One of thousands, or one that nobody has said."""
    return rng.choice(words("common")) if rng.random() < KNOWN else _noise(rng)


def _noise(rng: random.Random) -> str:
    """A word that nobody has said, or a number."""
    if rng.random() < 0.25:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    return invented_word(rng)


def _items(rng: random.Random) -> list[Value]:
    kind = rng.choice(LISTED)
    return [draw(kind, rng) for _ in range(rng.randint(2, 8))]
